"""Attention divided into time and space against a softmax written out for every sequence."""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from helpers import EXACT_RTOL, assert_as_accurate_as_eager, relative_error
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from vmae_fast import Masking, clip_keys, ops
from vmae_fast.ops import divided_attention

AXES = ("time", "space")
# A gradient's error in a low precision, in those of the same computation done eagerly in it.
GRADIENT_FACTOR = 3.0


def normal(*shape, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def softmax_of(qkv, heads, scale):
    """``(B, N, 3HK)`` to ``(B, N, HK)``: all tokens attend to each other, head by head."""
    outs = []
    for q, k, v in zip(*(x.chunk(heads, dim=2) for x in qkv.chunk(3, dim=2)), strict=True):
        logits = q @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
        weights = (logits - logits.amax(dim=2, keepdim=True)).exp()
        outs.append(weights / weights.sum(dim=2, keepdim=True) @ v)
    return torch.cat(outs, dim=2)


def sequence_by_sequence(qkv, heads, t, s, axis, class_token=False, scale=None):
    """Tokens picked by lists of their numbers, and put back one by one."""
    if axis == "time":
        sequences = [[row * s + place for row in range(t)] for place in range(s)]
    else:
        sequences = [[row * s + place for place in range(s)] for row in range(t)]
    found, of_class = {}, []
    for tokens in sequences:
        tokens = [0, *(1 + n for n in tokens)] if class_token else tokens
        out = softmax_of(qkv[:, tokens], heads, scale)
        found.update(zip(tokens, out.unbind(1), strict=True))
        of_class.append(out[:, 0])
    if class_token:
        found[0] = sum(of_class) / len(of_class)
    return torch.stack([found[n] for n in range(qkv.shape[1])], dim=1)


@pytest.mark.parametrize("scale", [None, 0.3], ids=str)
@pytest.mark.parametrize("class_token", [False, True], ids=["grid", "class_token"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    ("grid", "heads", "head_width"),
    [((1, 1), 1, 1), ((1, 7), 2, 5), ((5, 1), 2, 5), ((3, 2, 5), 3, 7), ((7, 5), 1, 32)],
    ids=str,
)
def test_values_and_gradients(grid, heads, head_width, axis, class_token, scale, device):
    t, s = grid[0], math.prod(grid[1:])
    width = heads * head_width
    # Columns far apart in memory.
    stored = normal(3 * width, t * s + class_token, 2, device=device).requires_grad_()
    before = stored.detach().clone()
    qkv = stored.permute(2, 1, 0)
    got = divided_attention(qkv, heads, grid, axis, class_token=class_token, scale=scale)
    expected = sequence_by_sequence(qkv, heads, t, s, axis, class_token, scale)
    assert got.shape == (2, t * s + class_token, width)
    assert relative_error(got, expected) < EXACT_RTOL
    upstream = normal(*got.shape, seed=1, device=device)
    mine, truth = (torch.autograd.grad(out, stored, upstream)[0] for out in (got, expected))
    assert relative_error(mine, truth) < EXACT_RTOL
    assert torch.equal(stored, before)


@pytest.mark.parametrize("class_token", [False, True], ids=["grid", "class_token"])
@pytest.mark.parametrize("axis", AXES)
def test_it_is_multi_head_attention_of_rearranged_tokens(axis, class_token):
    """As TimeSformer has it, with projections: the class token repeated, then averaged."""
    t, h, w, heads, width = 3, 2, 5, 3, 15
    attention = nn.MultiheadAttention(width, heads, batch_first=True, bias=False).double()
    x = normal(2, t * h * w + class_token, width).requires_grad_()
    qkv = F.linear(x, attention.in_proj_weight)
    got = divided_attention(qkv, heads, (t, h, w), axis, class_token=class_token)
    got = F.linear(got, attention.out_proj.weight)
    pattern = "(b p) t d" if axis == "time" else "(b t) p d"
    sizes = {"t": t, "p": h * w}
    count = h * w if axis == "time" else t
    sequences = rearrange(x[:, int(class_token) :], f"b (t p) d -> {pattern}", **sizes)
    if class_token:
        copies = repeat(x[:, :1], "b n d -> (b g) n d", g=count)
        sequences = torch.cat([copies, sequences], dim=1)
    out, _ = attention(sequences, sequences, sequences, need_weights=False)
    expected = rearrange(out[:, int(class_token) :], f"{pattern} -> b (t p) d", b=2, **sizes)
    if class_token:
        mean = rearrange(out[:, :1], "(b g) n d -> b g n d", g=count).mean(1)
        expected = torch.cat([mean, expected], dim=1)
    assert relative_error(got, expected) < EXACT_RTOL
    upstream = normal(*got.shape, seed=1)
    leaves = (x, attention.in_proj_weight, attention.out_proj.weight)
    grads = [torch.autograd.grad(out, leaves, upstream) for out in (got, expected)]
    for mine, truth in zip(*grads, strict=True):
        assert relative_error(mine, truth) < EXACT_RTOL


def test_the_class_token_by_hand():
    """Weights 1 (class token), 1, 2 (first row), 3, 4 (second); values 6, 0, 3, 9, 12."""
    key = torch.tensor([1.0, 1, 2, 3, 4], dtype=torch.float64).log()
    value = torch.tensor([6.0, 0, 3, 9, 12], dtype=torch.float64)
    qkv = torch.stack([torch.ones_like(key), key, value], dim=1).unsqueeze(0)
    rows = [(6 * 1 + 0 * 1 + 3 * 2) / 4, (6 * 1 + 9 * 3 + 12 * 4) / 8]
    out = divided_attention(qkv, 1, (2, 2), "space", class_token=True, scale=1.0).flatten()
    first, second = rows
    expected = torch.tensor([(first + second) / 2, first, first, second, second]).double()
    assert relative_error(out, expected) < EXACT_RTOL
    columns = [(6 * 1 + 0 * 1 + 9 * 3) / 5, (6 * 1 + 3 * 2 + 12 * 4) / 7]
    out = divided_attention(qkv, 1, (2, 2), "time", class_token=True, scale=1.0).flatten()
    mean = (columns[0] + columns[1]) / 2
    expected = torch.tensor([mean, *columns, *columns], dtype=torch.float64)
    assert relative_error(out, expected) < EXACT_RTOL


@pytest.mark.parametrize("axis", AXES)
def test_what_a_tube_mask_leaves_is_a_grid(axis):
    """As attention over the whole grid, with the keys that are masked left out."""
    t, h, w = grid = (4, 4, 6)
    heads, batch = 3, 5
    masking = Masking(grid, "tube", 0.7)
    mask = masking(clip_keys(3, 0, torch.arange(batch)))
    s = masking.num_visible // t
    qkv = normal(batch, t * h * w, 3 * 15).requires_grad_()
    visible = ops.gather_tokens(qkv, mask.visible_idx)
    got = divided_attention(visible, heads, (t, s), axis)

    token = torch.arange(t * h * w)
    group = token % (h * w) if axis == "time" else token // (h * w)
    seen = (group[:, None] == group) & ~mask.to_bool()[:, None]
    q, k, v = rearrange(qkv, "b n (c h k) -> c b h n k", c=3, h=heads)
    logits = (q @ k.mT / 5**0.5).masked_fill(~seen[:, None], -1e9)
    out = rearrange(logits.softmax(3) @ v, "b h n k -> b n (h k)")
    expected = torch.stack([out[b, mask.visible_idx[b]] for b in range(batch)])
    # Clips differ in what they see.
    assert not torch.equal(mask.visible_idx[0], mask.visible_idx[1])
    assert relative_error(got, expected) < EXACT_RTOL
    upstream = normal(*got.shape, seed=1)
    mine, truth = (torch.autograd.grad(one, qkv, upstream)[0] for one in (got, expected))
    assert relative_error(mine, truth) < EXACT_RTOL


@pytest.mark.parametrize("class_token", [False, True], ids=["grid", "class_token"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_as_accurate_as_eager(dtype, axis, class_token):
    given = normal(3, 35 + class_token, 3 * 4 * 13).to(dtype)
    upstream = normal(3, 35 + class_token, 4 * 13, seed=1).to(dtype)
    results = []
    for kind, eager in ((dtype, False), (dtype, True), (torch.float64, True)):
        qkv = given.to(kind).requires_grad_()
        if eager:
            out = sequence_by_sequence(qkv, 4, 5, 7, axis, class_token)
        else:
            out = divided_attention(qkv, 4, (5, 7), axis, class_token=class_token)
        results.append((out, *torch.autograd.grad(out, qkv, upstream.to(kind))))
    got, eager, truth = results
    assert_as_accurate_as_eager(got[0], eager[0], truth[0])
    assert got[1].dtype == dtype
    bound = GRADIENT_FACTOR * relative_error(eager[1], truth[1])
    assert relative_error(got[1], truth[1]) < bound


def test_five_dimensions():
    five = normal(2, 6, 3, 3, 5)
    expected = divided_attention(five.flatten(2), 3, (2, 3), "time")
    assert torch.equal(divided_attention(five, 3, (2, 3), "time"), expected)


@pytest.mark.parametrize("class_token", [False, True], ids=["grid", "class_token"])
@pytest.mark.parametrize("axis", AXES)
def test_no_clips(axis, class_token):
    qkv = normal(0, 6 + class_token, 24).requires_grad_()
    out = divided_attention(qkv, 2, (2, 3), axis, class_token=class_token)
    assert out.shape == (0, 6 + class_token, 8)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("class_token", [False, True], ids=["grid", "class_token"])
@pytest.mark.parametrize(("axis", "count"), [("time", 7), ("space", 5)])
def test_what_is_kept_is_argument_result_and_log_sum_exp(axis, count, class_token):
    """And with a class token what it has of each sequence, fp32."""
    heads, width, batch = 4, 32, 3
    num_tokens = 35 + class_token
    qkv = normal(batch, num_tokens, 3 * width).bfloat16().requires_grad_()
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        divided_attention(qkv, heads, (5, 7), axis, class_token=class_token)
    log_sum_exps = batch * heads * (35 + class_token * count)
    of_class = batch * count * width if class_token else 0
    values = batch * num_tokens * 4 * width
    assert sum(storages.values()) == 2 * values + 4 * (log_sum_exps + of_class)


def test_the_backward_op_cannot_be_differentiated():
    given = (2, 1, 3, "space", True, 0.5)
    qkv = normal(1, 4, 12)
    results = torch.ops.vmae_fast.divided_attention(qkv, *given)
    upstream = torch.ones_like(results[0]).requires_grad_()
    found = torch.ops.vmae_fast.divided_attention_backward(upstream, qkv, *results, *given)
    with pytest.raises(RuntimeError, match=r"^divided_attention cannot be differentiated twice"):
        found.sum().backward()


QKV = torch.zeros(2, 12, 3 * 8)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((QKV, 2, (2, 5), "time"), {}, r"grid \(2, 5\) holds 10 tokens, but there are 12"),
        ((QKV, 2, (3, 2, 3), "time"), {}, r"grid \(3, 2, 3\) holds 18 tokens, .* are 12"),
        ((QKV, 2, (3, 4), "time"), {"class_token": True}, r"\(3, 4\) holds 12 .* there are 11"),
        ((QKV, 2, (0, 12), "time"), {}, r"grid must be .* all positive, got \(0, 12\)"),
        ((QKV[:, :0], 2, (3, 0, 4), "time"), {}, r"all positive, got \(3, 0, 4\)"),
        ((QKV, 2, (-3, -4), "time"), {}, r"all positive, got \(-3, -4\)"),
        ((QKV, 2, (12,), "time"), {}, r"grid must be \(t, h, w\) or \(t, s\), .* got \(12,\)"),
        ((QKV, 2, (1, 3, 2, 2), "time"), {}, r"grid must be .* got \(1, 3, 2, 2\)"),
        ((QKV, 2, (3, 4), "width"), {}, "axis must be one of time, space, got 'width'"),
        ((QKV[0], 2, (3, 4), "time"), {}, r"qkv must be .* got shape \(12, 24\)"),
        ((QKV[..., :20], 2, (3, 4), "time"), {}, r"qkv must be .* got shape \(2, 12, 20\)"),
        ((QKV, 0, (3, 4), "time"), {}, "num_heads must be positive, got 0"),
        ((QKV.int(), 2, (3, 4), "time"), {}, r"must be floating point, got torch\.int32"),
        ((QKV, 2, (3, 4), "time"), {"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ((QKV, 2, (3, 4), "time"), {"scale": math.nan}, "scale must be .* got nan"),
    ],
)
def test_errors(given, options, message):
    with pytest.raises(ValueError, match=message):
        divided_attention(*given, **options)
