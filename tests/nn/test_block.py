"""The joint block: what it keeps, what it computes again, and how it gives way to what is hooked.

Its numbers against the textbook are in test_nn_modules.py.
"""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import EXACT_RTOL, random_positions, randomise, relative_error
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from vmae_fast import ops
from vmae_fast.nn import (
    MLP,
    DividedSpaceTimeBlock,
    JointSpaceTimeBlock,
    LayerNorm,
    Residual,
    SharedTokens,
)

LOW = torch.bfloat16
WIDTH, HEADS, HIDDEN = 64, 2, 256


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def block_of(dtype=torch.float64, hidden=HIDDEN, **settings):
    block = JointSpaceTimeBlock(WIDTH, HEADS, hidden, **settings).to(dtype)
    randomise(block)
    return block


def gradients(block, x, *rest, streams=True):
    """Result and gradients of x and all parameters, by name."""
    x = x.detach().requires_grad_()
    out = block(Residual(x), *rest).sum() if streams else block(x, *rest)
    upstream = normal(*out.shape, seed=7, dtype=out.dtype)
    named = {"x": x, **dict(block.named_parameters())}
    found = torch.autograd.grad(out, list(named.values()), upstream, allow_unused=True)
    return {"out": out.detach(), **dict(zip(named, found, strict=True))}


def assert_same(got, expected, rtol=EXACT_RTOL):
    assert got.keys() == expected.keys()
    for name, truth in expected.items():
        assert (got[name] is None) == (truth is None), name
        if truth is not None:
            assert got[name].dtype == truth.dtype
            assert relative_error(got[name], truth) <= rtol, name


@pytest.fixture(params=[True, False], ids=["bias_with_gelu", "bias_in_product"])
def bias_with_gelu(request, monkeypatch):
    """As on a GPU, and as on a CPU."""
    monkeypatch.setattr(MLP, "_bias_with_gelu", request.param)
    return request.param


# ---- what is kept ---------------------------------------------------------------------------


class PlainBlock(nn.Module):
    """A pre-norm block of torch's own modules."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def kept_bytes(block, num_tokens, stream_dtype):
    """Of the memory that is kept for the backward pass of one clip, each piece once."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in block.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(1, num_tokens, WIDTH, dtype=stream_dtype, requires_grad=True)
    # In the middle of a model, where the addition of the block before is still to be made.
    given = Residual(
        x, torch.randn(x.shape, dtype=LOW if torch.is_autocast_enabled("cpu") else x.dtype)
    )
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(given) if isinstance(block, JointSpaceTimeBlock) else block(x)
    size = sum(storage.nbytes() for storage in kept.values())
    del out
    return size


def kept_a_token(block, stream_dtype):
    """Bytes a token: what does not grow with their number, copies of weights say, falls out."""
    return (kept_bytes(block, 192, stream_dtype) - kept_bytes(block, 64, stream_dtype)) / 128


# Widths of the residual stream (what came in, and after attention), and in the dtype of products
# qkv, attention's output and what goes into GELU; 4 bytes a head for the log-sum-exp.
@pytest.mark.parametrize("settings", [{}, {"init_values": 0.1, "drop_path": 0.5}], ids=str)
@pytest.mark.usefixtures("bias_with_gelu")
def test_ten_widths_are_kept(settings):
    block = block_of(torch.float32, **settings)
    lse = 4 * HEADS
    assert kept_a_token(block, torch.float32) == 10 * WIDTH * 4 + lse
    with torch.autocast("cpu", LOW):
        assert kept_a_token(block, torch.float32) == 2 * WIDTH * 4 + 8 * WIDTH * 2 + lse
        assert kept_a_token(block, LOW) == 10 * WIDTH * 2 + lse


def test_a_plain_block_keeps_more():
    plain, ours = PlainBlock(), block_of(torch.float32)
    with torch.autocast("cpu", LOW):
        ratio = kept_a_token(ours, torch.float32) / kept_a_token(plain, torch.float32)
    assert kept_a_token(plain, torch.float32) >= 16 * WIDTH * 4
    assert ratio < 2 / 3
    assert kept_a_token(ours, torch.float32) < 2 / 3 * kept_a_token(plain, torch.float32)


def allocated_a_token(block):
    """Bytes a token that a forward pass takes and does not give back, its results among them."""

    def allocated(num_tokens):
        given = Residual(torch.randn(1, num_tokens, WIDTH), torch.randn(1, num_tokens, WIDTH))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            out = block(given)
        assert out.branch.requires_grad
        events = seen.profiler.kineto_results.events()
        return sum(event.nbytes() for event in events if event.name() == "[memory]")

    allocated(64)
    return (allocated(192) - allocated(64)) / 128


# The result's branch is one width more, and where it was computed without keeping it, its x.
@pytest.mark.parametrize(
    ("what", "widths", "lse"), [("none", 11, 1), ("mlp", 8, 1), ("block", 2, 0)]
)
def test_checkpointing_keeps_less(what, widths, lse):
    block = block_of(torch.float32)
    block.checkpointing = what
    assert allocated_a_token(block) == widths * WIDTH * 4 + lse * 4 * HEADS


# ---- computing again ------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["mlp", "block"])
@pytest.mark.parametrize("settings", [{}, {"init_values": 0.1, "drop_path": 0.5}], ids=str)
def test_checkpointing_changes_nothing(what, settings):
    block, x = block_of(**settings), normal(5, 9, WIDTH)
    found = []
    for block.checkpointing in ("none", what):
        torch.manual_seed(3)
        found.append(gradients(block, x))
    assert_same(found[1], found[0], rtol=0)


@pytest.mark.parametrize(("what", "calls"), [("none", 1), ("mlp", 2), ("block", 2)])
def test_what_checkpointing_computes_again(what, calls, monkeypatch):
    counted = []
    outer = MLP.outer

    def counting(self, *given):
        counted.append(1)
        return outer(self, *given)

    monkeypatch.setattr(MLP, "outer", counting)
    block = block_of()
    block.checkpointing = what
    gradients(block, normal(2, 9, WIDTH))
    assert len(counted) == calls


# ---- modules in the place of ours, and hooks -------------------------------------------------


class Doubling(nn.Module):
    """What an adapter is like: another module around a linear layer, with its weight."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"])
def test_a_module_put_in_the_place_of_ours_is_called(name):
    x, block = normal(2, 9, WIDTH), block_of(init_values=0.3)
    plain = gradients(block, x)["out"]
    outer, _, last = name.rpartition(".")
    holder = block.get_submodule(outer)
    original = getattr(holder, last)
    setattr(holder, last, Doubling(original))
    got = gradients(block, x)["out"]
    # The same by doubling what the module computes.
    setattr(holder, last, original)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(2)
    assert relative_error(got, gradients(block, x)["out"]) < EXACT_RTOL
    assert relative_error(got, plain) > 1e-3


@pytest.mark.parametrize("name", ["attn", "norm1", "mlp", "mlp.fc2", "attn.qkv"])
def test_hooks_are_called_and_change_nothing_else(name):
    x, block = normal(2, 9, WIDTH), block_of(init_values=0.3)
    expected = gradients(block, x)
    seen = []
    block.get_submodule(name).register_forward_hook(lambda *given: seen.append(1))
    found = gradients(block, x)
    assert_same(found, expected)
    assert seen


def test_queries_of_the_last_tokens_by_modules():
    x, block = normal(2, 9, WIDTH), block_of(init_values=0.3)
    expected = gradients(block, x, 4)
    block.norm1.register_forward_hook(lambda *given: None)
    assert_same(gradients(block, x, 4), expected)
    block.attn.qkv.register_forward_hook(lambda *given: None)
    assert_same(gradients(block, x, 4), expected)


@pytest.mark.parametrize("name", ["norm2", "temporal_attn", "attn", "mlp.fc1"])
def test_hooks_in_a_divided_block(name):
    x, block = normal(2, 6, WIDTH), DividedSpaceTimeBlock(WIDTH, HEADS, HIDDEN).double()
    randomise(block)
    expected = gradients(block, x, (2, 3), streams=False)
    seen = []
    block.get_submodule(name).register_forward_hook(lambda *given: seen.append(1))
    assert_same(gradients(block, x, (2, 3), streams=False), expected)
    assert seen


# ---- streams, norms, shared tokens, padding --------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"init_values": 0.1}], ids=str)
def test_a_stream_through_blocks_is_tokens_through_blocks(settings):
    first, second = block_of(**settings), block_of(**settings)
    x = normal(2, 9, WIDTH)
    stream = second(first(Residual(x)))
    assert stream.branch is not None
    assert relative_error(stream.sum(), second(first(x))) < EXACT_RTOL
    assert relative_error(second(first(Residual(x)), 3).sum(), second(first(x), 3)) < EXACT_RTOL


def test_drop_path_of_a_block_before_is_not_lost():
    block, x = block_of(drop_path=0.5), normal(16, 5, WIDTH)
    torch.manual_seed(1)
    stream = block(Residual(x))
    assert set(stream.scale.tolist()) == {0.0, 2.0}
    expected = stream.x + stream.branch * stream.scale.view(-1, 1, 1)
    assert relative_error(stream.sum(), expected) < EXACT_RTOL
    norm = LayerNorm(WIDTH).double()
    assert relative_error(norm(stream), norm(expected)) < EXACT_RTOL
    block.eval()
    assert relative_error(block(stream).sum(), block(expected)) < EXACT_RTOL


def test_layer_norm_is_torchs():
    torch.manual_seed(0)
    ours, theirs = LayerNorm(12, eps=1e-3).double(), nn.LayerNorm(12, eps=1e-3).double()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.LayerNorm)
    x = normal(2, 5, 12).requires_grad_()
    upstream = normal(2, 5, 12, seed=1)
    found = [
        (norm(x), *torch.autograd.grad(norm(x), [x, norm.weight, norm.bias], upstream))
        for norm in (ours, theirs)
    ]
    for got, truth in zip(*found, strict=True):
        assert relative_error(got, truth) < EXACT_RTOL
    for settings in ({"elementwise_affine": False}, {"bias": False}):
        a, b = LayerNorm(12, **settings).double(), nn.LayerNorm(12, **settings).double()
        assert relative_error(a(x), b(x)) < EXACT_RTOL
        assert relative_error(a(Residual(x, x)), b(2 * x)) < EXACT_RTOL
    assert relative_error(LayerNorm((5, 12)).double()(x), F.layer_norm(x, (5, 12))) < EXACT_RTOL


def test_dtypes_of_layer_norm_under_autocast():
    norm, x = LayerNorm(12), torch.randn(2, 5, 12)
    with torch.autocast("cpu", LOW):
        assert norm(x).dtype == torch.float32
        assert norm(Residual(x, x.to(LOW)), for_product=True).dtype == LOW
    assert norm(x, for_product=True).dtype == torch.float32


@pytest.mark.parametrize("num_queries", [None, 4])
def test_shared_tokens_are_the_tokens_written_out(num_queries):
    block = block_of(init_values=0.3)
    batch, num_positions, num_visible = 4, 10, 3
    order = random_positions(batch, num_positions, num_positions)
    decode_idx = order[:, num_visible:]
    visible = normal(batch, num_visible, WIDTH, seed=1).requires_grad_()
    shared = normal(num_positions, WIDTH, seed=2).requires_grad_()
    x = torch.cat([visible, torch.stack([shared[idx] for idx in decode_idx])], dim=1)
    leaves = [visible, shared, *block.parameters()]
    plain = block(x, num_queries)
    got = block(x, num_queries, SharedTokens(visible, shared, decode_idx))
    upstream = normal(*plain.shape, seed=3)
    assert relative_error(got, plain) < EXACT_RTOL
    truths = torch.autograd.grad(plain, leaves, upstream, retain_graph=True)
    for one, truth in zip(torch.autograd.grad(got, leaves, upstream), truths, strict=True):
        assert relative_error(one, truth) < EXACT_RTOL


@pytest.mark.parametrize("hidden", [17, 22, 24])
def test_an_inner_width_is_padded_inside_only(hidden, bias_with_gelu, monkeypatch):
    mlp = MLP(12, hidden).double()
    randomise(mlp)
    assert mlp.fc1.weight.shape == (hidden, 12)
    assert mlp.fc2.weight.shape == (12, hidden)
    widths = []
    real = ops.bias_gelu_linear

    def noting(x, gelu_bias, *rest):
        assert (gelu_bias is not None) == bias_with_gelu
        widths.append(x.shape[-1])
        return real(x, gelu_bias, *rest)

    monkeypatch.setattr(ops, "bias_gelu_linear", noting)
    x = normal(2, 5, 12).requires_grad_()
    got = mlp(x)
    assert widths == [24]
    expected = F.gelu(x @ mlp.fc1.weight.t() + mlp.fc1.bias) @ mlp.fc2.weight.t() + mlp.fc2.bias
    leaves, upstream = [x, *mlp.parameters()], normal(2, 5, 12, seed=1)
    grads = torch.autograd.grad(got, leaves, upstream)
    truths = torch.autograd.grad(expected, leaves, upstream)
    for one, truth in zip([got, *grads], [expected, *truths], strict=True):
        assert one.shape == truth.shape
        assert relative_error(one, truth) < EXACT_RTOL


@pytest.mark.parametrize("settings", [{}, {"init_values": 0.1, "hidden": 17}], ids=str)
def test_the_bias_may_be_added_with_gelu(settings, monkeypatch):
    block, x = block_of(**settings), normal(2, 9, WIDTH)
    expected = gradients(block, x)
    monkeypatch.setattr(MLP, "_bias_with_gelu", True)
    assert_same(gradients(block, x), expected)


def test_a_padded_block():
    even, odd = block_of(hidden=24), block_of(hidden=22)
    with torch.no_grad():
        for one in (even, odd):
            randomise(one)
        even.load_state_dict(
            {
                name: F.pad(
                    value,
                    (0, 2) if name.endswith("fc2.weight") else [0, 0] * (value.dim() - 1) + [0, 2],
                )
                if "fc1" in name or name.endswith("fc2.weight")
                else value
                for name, value in odd.state_dict().items()
            }
        )
    x = normal(2, 5, WIDTH)
    assert relative_error(odd(x), even(x)) < EXACT_RTOL


@pytest.mark.parametrize("settings", [{}, {"init_values": 0.1}], ids=str)
def test_it_compiles_whole(settings):
    torch.compiler.reset()
    block, x = block_of(**settings), normal(2, 9, WIDTH)
    expected = gradients(block, x)
    compiled = copy.copy(block)
    compiled.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, x), expected, rtol=1e-14)
