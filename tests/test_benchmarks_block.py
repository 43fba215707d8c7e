"""The benchmarks of the block and its ops: peers, bytes, what is kept, rows and targets."""

from dataclasses import replace
from functools import partial

import block_peers
import gpu_suite
import pytest
import report
import rows
import test_block
import timing
import torch
import torch._functorch.config as functorch
from block_cases import DECODER, ENCODER, NORMS, Batch, Blocks, Placement, Size
from helpers import PARITY_RTOL, randomise, relative_error
from targets import BLOCK_TARGETS

from vmae_fast.nn import JointSpaceTimeBlock

CPU = torch.device("cpu")
SMALL = Size("small", 3, 8 * 2 * 2, 24, 40, 3, low=torch.float32)


def assert_alike(ours, theirs):
    for got, expected in zip(ours, theirs, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert relative_error(got, expected) < PARITY_RTOL[torch.float32]


@pytest.mark.parametrize("op", test_block.PEERS, ids=lambda op: op.__name__)
def test_a_peer_computes_what_the_op_does(op):
    torch.compiler.reset()
    batch = (Placement if op is test_block.shared_tokens else Batch)(SMALL, CPU)
    wanted = [getattr(batch, leaf) for leaf in test_block.PEERS[op][1]]
    ours = op(batch)
    upstream = rows.upstream_of(ours)

    def results(out, **options):
        gradients = torch.autograd.grad(out, wanted, upstream, **options)
        return (*([out] if isinstance(out, torch.Tensor) else out), *gradients)

    expected = results(ours)
    assert_alike(results(test_block.peer_of(op)(batch)), expected)
    compiled = partial(block_peers.compiled, backend="aot_eager")
    out = test_block.peer_of(op, compiled)(batch)
    # Twice, as the backward pass is timed.
    assert_alike(results(out, retain_graph=True), expected)
    assert_alike(results(out), expected)


def test_what_is_compiled_may_run_its_backward_pass_again():
    torch.compiler.reset()
    seen = []

    def backend(graph, _):
        seen.append(functorch.donated_buffer)
        return graph.forward

    block_peers.compiled(torch.sin, backend)(torch.ones(2))
    assert seen == [False]


@pytest.mark.parametrize("op", [test_block.layer_norm, test_block.add_layer_norm])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_and_its_peer_give_the_products_dtype(op, stream):
    batch = Batch(replace(SMALL, stream=stream, low=torch.bfloat16), CPU)
    for function in (op, test_block.peer_of(op)):
        out = function(batch)
        *residual, y = [out] if isinstance(out, torch.Tensor) else out
        assert y.dtype == torch.bfloat16
        assert [one.dtype for one in residual] == [stream] * len(residual)


def blocks():
    ours = JointSpaceTimeBlock(SMALL.width, SMALL.heads, SMALL.hidden, eps=block_peers.EPS)
    randomise(ours)
    return Blocks(SMALL, ours, block_peers.PlainBlock(ours), CPU)


def test_the_plain_block_computes_what_ours_does():
    batch = blocks()
    upstream = torch.randn_like(batch.x)
    names = {"norm1.weight": "norm1.weight", "attn.qkv.weight": "qkv.weight",
             "attn.proj.bias": "proj.bias", "norm2.bias": "norm2.bias",
             "mlp.fc1.bias": "fc1.bias", "mlp.fc2.weight": "fc2.weight"}  # fmt: skip
    results = []
    for block, word, leaves in (
        (batch.ours, "ours", names),
        (batch.plain, "plain", names.values()),
    ):
        out = block(batch.x)
        wanted = [batch.x, *(getattr(batch, f"{word}.{leaf}") for leaf in leaves)]
        results.append((out, *torch.autograd.grad(out, wanted, upstream)))
    assert_alike(*results)
    with pytest.raises(AttributeError, match="a batch has no 'y'"):
        _ = batch.y


# ---- what is counted ----------------------------------------------------------------------


def test_bytes_of_norms_by_hand():
    values = 64 * 160 * 768
    bf16, fp32 = (replace(ENCODER, stream=dtype) for dtype in (torch.bfloat16, torch.float32))
    # Input and norm; the norm's gradient, the input and its gradient.
    assert test_block.norm_bytes(bf16, added=False) == {
        "forward": values * (2 + 2) + 2 * 768 * 2,
        "backward": values * (2 + 2 + 2) + 3 * 768 * 2,
    }
    # And the branch and the residual; the residual's gradient, in fp32 the branch's own as well.
    assert test_block.norm_bytes(bf16, added=True) == {
        "forward": values * (2 + 2 + 2 + 2) + 2 * 768 * 2,
        "backward": values * (2 + 2 + 2 + 2) + 3 * 768 * 2,
    }
    assert test_block.norm_bytes(fp32, added=True) == {
        "forward": values * (4 + 2 + 4 + 2) + 2 * 768 * 4,
        "backward": values * (2 + 4 + 4 + 4 + 2) + 3 * 768 * 4,
    }


def test_what_is_kept_is_counted_once_and_without_parameters():
    linear = torch.nn.Linear(6, 10, bias=False)
    x = torch.randn(7, 6, requires_grad=True)

    def function(x):
        y = linear(x).exp()
        # The same memory three times.
        return y.sin() + y[:3].sin().sum()

    # x and the exponential; not the weight.
    assert test_block.kept_bytes(function, x, linear) == 4 * (7 * 6 + 7 * 10)


def test_a_block_keeps_less_than_a_plain_one():
    size = replace(SMALL, clips=5, low=torch.bfloat16, hidden=4 * SMALL.width)
    ways, make = test_block.blocks_of(size)
    batch = make()
    kept = {word: test_block.kept_bytes(way, batch, batch.ours) for word, (way, _) in ways.items()}
    widths = {word: size_bytes / (2 * size.values) for word, size_bytes in kept.items()}
    # Ten with a stream in bf16; each of the two tensors of it is twice as wide in fp32.
    assert 12 <= widths["ours"] < 12.5
    assert widths["eager"] > 17


# ---- rows ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    """Rows by file, from the benchmarks themselves."""
    files = {}

    def keep(name, what, found, call):
        call()
        files[name] = {"what": what, "rows": [rows.judged(row) for row in found]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "CPU_ROUNDS", 1)
        for op in (test_block.layer_norm, test_block.add_layer_norm):
            test_block.test_norm(keep, op)
        test_block.test_bias_gelu(keep)
        test_block.test_shared_tokens(keep)
        for size in (ENCODER, DECODER):
            test_block.test_block(keep, size)
    return files


def test_every_target_has_its_row_and_its_figure(measured):
    found = {(row["op"], row["direction"]): row for one in measured.values() for row in one["rows"]}
    for key, targets in BLOCK_TARGETS.items():
        for target in targets:
            assert isinstance(target.judge(found.pop(key))["met"], bool)
    assert {op for op, _ in found} == {"block encoder", "block decoder"}
    assert len(BLOCK_TARGETS) == 2 * (2 * len(NORMS) + 3 + 1)
    for row in found.values():
        assert set(row["peers"]) == {"eager"}
        assert row["flops"] > row["bytes"]
    backward, forward = (found["block encoder", way]["flops"] for way in ("backward", "forward"))
    assert 2 < backward / forward < 2.5


def test_rows_are_rendered(measured, tmp_path):
    kept = measured["block_encoder"]["rows"][0]["kept_mib"]
    assert kept["ours"] < kept["eager"]
    line = report._token_line(measured["block_encoder"]["rows"][0])
    assert f"kept: ours {report.number(kept['ours'])}, eager" in line[-2]
    assert "without compiled" in line[-3]
    assert len(gpu_suite.told(measured["layer_norm"]["rows"])) == 2 * len(NORMS)
