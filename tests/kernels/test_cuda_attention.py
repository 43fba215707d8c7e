"""Attention in CUDA C++ on the CPU: which calls it takes, and what the emulator counts.

How accurate it is stands in test_numerics_attention.py and test_numerics_divided.py, beside
Triton's kernels.
"""

import pytest
import torch
from attention_truth import normal, run
from helpers import relative_error

from vmae_fast import ops
from vmae_fast.ops import _extension, _short_attention

CPU = torch.device("cpu")
LOW = torch.bfloat16
FORWARD, BACKWARD = "short_attention", "short_attention_backward"


@pytest.fixture
def device():
    """The emulator's, whatever else there is."""
    return CPU


def gradients(function, qkv):
    width = qkv.shape[2] // 3
    upstream = normal(*qkv.shape[:2], width, dtype=qkv.dtype, device=CPU, seed=1)
    return run(function, [qkv], upstream)


OTHERS = {
    "fp32": lambda: normal(1, 9, 3 * 64, dtype=torch.float32, device=CPU),
    "width 32": lambda: normal(1, 9, 3 * 32, dtype=LOW, device=CPU),
    "width 128": lambda: normal(1, 9, 3 * 128, dtype=LOW, device=CPU),
    "257 tokens": lambda: normal(1, 257, 3 * 64, dtype=LOW, device=CPU),
    "class token": lambda: normal(1, 1 + 3 * 4, 3 * 64, dtype=LOW, device=CPU),
    # Memory from 2 bytes past a multiple of 16 on, and tokens at odd distances.
    "misaligned": lambda: normal(2, 9, 3 * 64 + 8, dtype=LOW, device=CPU)[..., 1:-7],
    "odd rows": lambda: normal(2, 9, 3 * 64 + 1, dtype=LOW, device=CPU)[..., :-1],
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_left_to_others(what, emulated):
    def function(x):
        if what == "class token":
            return ops.divided_attention(x, 1, (3, 4), "space", class_token=True)
        return ops.attention(x, 1)

    qkv = OTHERS[what]()
    with ops.backend("reference"):
        expected = gradients(function, qkv)
    emulated.emulator.reset()
    with _extension.use(emulated), ops.backend("cuda"):
        got = gradients(function, qkv)
    assert emulated.emulator.counts()["launches"] == 0
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)


def test_cross_attention_is_left_to_others(emulated):
    q = normal(1, 5, 64, dtype=LOW, device=CPU)
    kv = normal(1, 5, 128, dtype=LOW, device=CPU)
    emulated.emulator.reset()
    with _extension.use(emulated), ops.backend("cuda"):
        got = ops.cross_attention(q, kv, 1)
    assert emulated.emulator.counts()["launches"] == 0
    assert torch.equal(got, ops.cross_attention(q, kv, 1))


@pytest.mark.parametrize(
    ("head_width", "most_tokens"), [(64, 224), (80, 208), (88, 208)], ids=lambda value: str(value)
)
def test_a_backward_pass_that_does_not_fit_is_left_to_others(
    head_width, most_tokens, cuda_calls, emulated
):
    calls = cuda_calls()
    for num_tokens in (most_tokens, most_tokens + 1):
        calls.clear()
        gradients(
            lambda x: ops.attention(x, 1),
            normal(1, num_tokens, 3 * head_width, dtype=LOW, device=CPU),
        )
        assert calls == [FORWARD, BACKWARD][: 1 + (num_tokens == most_tokens)]


def test_a_smaller_chip(cuda_calls, emulated):
    """99 KiB, of compute capability 8.6, 8.9 and 12.0: nothing, the forward pass alone, or both."""
    calls = cuda_calls()
    emulated.emulator.set_most_shared_bytes(99 * 1024)
    try:
        for num_tokens, head_width, ran in ((208, 88, 0), (160, 64, 1), (112, 64, 2)):
            calls.clear()
            qkv = normal(1, num_tokens, 3 * head_width, dtype=LOW, device=CPU)
            gradients(lambda x: ops.attention(x, 1), qkv)
            assert calls == [FORWARD, BACKWARD][:ran]
    finally:
        emulated.emulator.set_most_shared_bytes(232448)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_other_backends_do_without(backend, emulated):
    emulated.emulator.reset()
    with _extension.use(emulated), ops.backend(backend):
        ops.attention(normal(1, 9, 3 * 64, dtype=LOW, device=CPU), 1)
    assert emulated.emulator.counts()["launches"] == 0


@pytest.mark.parametrize("num_tokens", [160, 45])
@pytest.mark.parametrize("head_width", _short_attention.HEAD_WIDTHS)
def test_no_bank_conflicts(head_width, num_tokens, cuda_calls, emulated):
    """In what matrices are read by; single values of a register may wait for each other."""
    cuda_calls()
    emulated.emulator.reset()
    qkv = normal(1, num_tokens, 3 * 2 * head_width, dtype=LOW, device=CPU)
    gradients(lambda x: ops.attention(x, 2), qkv)
    counts = emulated.emulator.counts()
    assert counts["ldmatrix"] > 0
    assert counts["ldmatrix_conflicts"] == 0


def test_tiles_of_16_rows(cuda_calls, emulated):
    """As many products as 160 tokens are tiles of 16, two forward and six backward, not 256."""
    calls = cuda_calls()
    tiles, per_tile = (160 // 16) ** 2, 2 * 64 // 16
    qkv = normal(1, 160, 3 * 64, dtype=LOW, device=CPU).requires_grad_()
    emulated.emulator.reset()
    out = ops.attention(qkv, 1)
    assert emulated.emulator.counts()["mma"] == 2 * tiles * per_tile
    emulated.emulator.reset()
    out.sum().backward()
    assert emulated.emulator.counts()["mma"] == 6 * tiles * per_tile
    assert calls == [FORWARD, BACKWARD]


def test_short_sequences_compute_their_own_tiles_only(cuda_calls, emulated):
    """Along time, 8 tokens: two sequences a tile, and no tile off the diagonal."""
    cuda_calls()
    qkv = normal(1, 8 * 6, 3 * 64, dtype=LOW, device=CPU)
    emulated.emulator.reset()
    ops.divided_attention(qkv, 1, (8, 6), "time")
    assert emulated.emulator.counts()["mma"] == 2 * 3 * (2 * 64 // 16)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_warps(seed, cuda_calls, emulated):
    """Races are errors; here none of them hides behind the order."""
    cuda_calls()
    qkv = normal(2, 77, 3 * 2 * 64, dtype=LOW, device=CPU)
    first = gradients(lambda x: ops.attention(x, 2), qkv)
    emulated.emulator.set_seed(100 + seed)
    for one, other in zip(first, gradients(lambda x: ops.attention(x, 2), qkv), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_tokens", [97, 160])
@pytest.mark.parametrize("resident", [1, 3, 64])
def test_blocks_that_stay_for_several_items(resident, num_tokens, cuda_calls, emulated):
    """Those that fill a multiprocessor, as many as there is room for, with two stages of memory."""
    cuda_calls()
    qkv = normal(2, num_tokens, 3 * 2 * 64, dtype=LOW, device=CPU)
    first = gradients(lambda x: ops.attention(x, 2), qkv)
    emulated.emulator.set_resident_blocks(resident)
    emulated.emulator.reset()
    try:
        second = gradients(lambda x: ops.attention(x, 2), qkv)
        # Forward a block an item, backward as many as there is room for.
        assert emulated.emulator.counts()["blocks"] == 4 + min(resident, 4)
    finally:
        emulated.emulator.set_resident_blocks(2)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_tokens", [20, 96, 161])
def test_other_blocks_have_an_item_each(num_tokens, cuda_calls, emulated):
    """Several side by side, or one whose memory cannot be doubled."""
    cuda_calls()
    emulated.emulator.reset()
    gradients(
        lambda x: ops.attention(x, 2), normal(2, num_tokens, 3 * 2 * 64, dtype=LOW, device=CPU)
    )
    assert emulated.emulator.counts()["blocks"] == 8


def test_opcheck(cuda_calls, emulated):
    cuda_calls()
    qkv = normal(2, 20, 3 * 2 * 64, dtype=torch.float16, device=CPU).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.vmae_fast.attention.default, (qkv, 2, 0.125), test_utils=checks)
    torch.library.opcheck(
        torch.ops.vmae_fast.divided_attention.default,
        (qkv, 2, 4, 5, "time", False, 0.125),
        test_utils=checks,
    )


def test_compiled_and_under_autocast(cuda_calls, emulated):
    calls = cuda_calls()
    qkv = normal(2, 20, 3 * 2 * 64, dtype=torch.float32, device=CPU)

    def function(x):
        return ops.attention(x.sin(), 2).square()

    with torch.autocast("cpu", LOW):
        expected = gradients(function, qkv)
        calls.clear()
        got = gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), qkv)
    assert calls == [FORWARD, BACKWARD]
    for mine, other in zip(got, expected, strict=True):
        assert relative_error(mine, other) < 1e-6
