"""Debug mode reads the indices, and says which position of which clip is wrong."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import make_video, random_positions

from vmae_fast import ops

SIZE = (2, 4, 4)
NUM_TOKENS = 8
VIDEO = make_video((3, 3, 4, 8, 8), torch.uint8)
WEIGHT = torch.randn(6, 3, *SIZE)
GOOD = random_positions(3, NUM_TOKENS, 4)
X = torch.randn(3, NUM_TOKENS, 6)
DECODER = (X[:, :4], X[0, 0], X[0])

# Every index of every op, by the argument's name.
CALLS = {
    "gather_tokens idx": lambda idx: ops.gather_tokens(X, idx),
    "decoder_tokens visible_idx": lambda idx: ops.decoder_tokens(
        X[:, :4], X[0, 0], X[0], idx, GOOD
    ),
    "decoder_tokens decode_idx": lambda idx: ops.decoder_tokens(X[:, :4], X[0, 0], X[0], GOOD, idx),
    "shared_tokens decode_idx": lambda idx: ops.shared_tokens(X[:, :4], X[0], idx),
    "tubelet_embed visible_idx": lambda idx: ops.tubelet_embed(VIDEO, WEIGHT, visible_idx=idx),
    "masked_mse target_idx": lambda idx: ops.masked_mse(torch.zeros(3, 4, 96), VIDEO, idx, SIZE),
    "zero_prediction_mse target_idx": lambda idx: ops.zero_prediction_mse(VIDEO, idx, SIZE),
    "pixel_targets target_idx": lambda idx: ops.pixel_targets(VIDEO, idx, SIZE),
    "linear_masked_mse target_idx": lambda idx: ops.linear_masked_mse(
        X[:, :4], torch.zeros(96, 6), None, VIDEO, idx, SIZE
    ),
}


@pytest.fixture(params=CALLS)
def call(request):
    """A call with an index, and the argument's name."""
    return CALLS[request.param], request.param.split()[1]


def spoilt(clip, place, value):
    idx = GOOD.clone()
    idx[clip, place] = value
    return idx


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("value", [-1, NUM_TOKENS, 10**6])
def test_a_position_out_of_range(call, value, dtype):
    function, name = call
    message = rf"^{name} holds {value} in clip 2; positions must lie in 0\.\.{NUM_TOKENS - 1}$"
    with ops.debug(), pytest.raises(IndexError, match=message):
        function(spoilt(2, 1, value).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_position_given_twice(call, dtype):
    function, name = call
    value = GOOD[1, 3].item()
    message = rf"^{name} holds {value} more than once in clip 1; .* distinct within each clip$"
    with ops.debug(), pytest.raises(IndexError, match=message):
        function(spoilt(1, 0, value).to(dtype))


def test_good_positions_pass(call):
    function, _ = call
    with ops.debug():
        function(GOOD)
        # The same position in two clips is no repetition.
        function(GOOD[:1].expand(3, -1))


def test_nothing_is_read_otherwise(call, monkeypatch):
    """A duplicate passes: reading an index back would stall a GPU."""
    function, _ = call
    monkeypatch.setattr(ops._checks, "_check_positions", None)
    function(GOOD)
    with ops.debug(), ops.debug(False):
        function(GOOD)


def test_a_duplicate_passes_without_it():
    twice = spoilt(1, 0, GOOD[1, 3].item())
    ops.gather_tokens(X, twice)
    ops.tubelet_embed(VIDEO, WEIGHT, visible_idx=twice)


def test_it_ends_with_its_context(monkeypatch):
    monkeypatch.setattr(ops._checks, "_debug", False)

    def fail():
        with ops.debug():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert ops._checks._debug is False
    with ops.debug():
        with ops.debug(False):
            assert ops._checks._debug is False
        assert ops._checks._debug is True
    assert ops._checks._debug is False


def test_not_in_effect_in_compiled_code():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, idx: ops.gather_tokens(x, idx), backend="eager", fullgraph=True
    )
    with ops.debug():
        assert torch.equal(compiled(X, GOOD), ops.gather_tokens(X, GOOD))


@pytest.mark.parametrize(("value", "checked"), [("1", True), ("0", False)])
def test_environment_variable(value, checked):
    script = """
        import torch
        from vmae_fast import ops
        try:
            ops.gather_tokens(torch.zeros(1, 4, 2), torch.tensor([[1, 1]]))
        except IndexError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in script.splitlines())],
        env={**os.environ, "VMAE_FAST_DEBUG": value}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("idx holds 1 more than once in clip 0") == checked
    assert bool(done.stdout) == checked
