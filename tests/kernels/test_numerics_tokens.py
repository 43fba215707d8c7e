"""Kernels that move tokens, against indexing clip by clip in fp64."""

import os

import pytest
import torch
from helpers import EAGER_FACTOR, random_positions, relative_error

from vmae_fast.ops import decoder_tokens, gather_tokens, shared_tokens

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a GPU, or Triton's interpreter, in which test_interpreter.py runs this file",
        allow_module_level=True,
    )
pytestmark = [pytest.mark.usefixtures("kernels")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)

# Sums of at most some hundred fp32 values: a few units in the last place.
FP32_RTOL = 1e-6

# Blocks are 16 rows of 128 columns: one token, primes, a block, one more than a block, nothing.
GATHERS = {  # batch, tokens, taken, width
    "one": (1, 1, 1, 1),
    "primes": (3, 37, 11, 13),
    "all": (2, 16, 16, 24),
    "one_block": (2, 40, 8, 128),
    "above_a_block": (1, 19, 17, 129),
    "several_blocks": (3, 50, 33, 296),
    "none_taken": (2, 9, 0, 8),
    "no_clips": (0, 9, 4, 8),
}
DECODERS = {  # batch, tokens, visible, decoded, width
    "one": (1, 2, 1, 1, 1),
    "primes": (3, 37, 11, 13, 7),
    "one_block": (1, 40, 8, 8, 128),
    "above_a_block": (1, 19, 8, 9, 129),
    "overlapping": (2, 20, 15, 12, 40),
    "none_visible": (2, 9, 0, 5, 8),
    "none_decoded": (2, 9, 5, 0, 8),
    "no_clips": (0, 9, 5, 4, 8),
    # Rows that are added up at a time are 256.
    "below_a_span": (5, 60, 3, 51, 5),
    "one_span": (4, 70, 2, 64, 5),
    "above_a_span": (1, 300, 2, 257, 5),
    "two_spans": (9, 60, 1, 57, 3),
}


def normal(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def positions(batch, num_tokens, count, device, form, seed=0):
    """Distinct positions as int64, or as what a mask may hand over: int32, a slice."""
    idx = random_positions(batch, num_tokens, count, seed).to(device)
    if form == "int64":
        return idx
    wide = torch.full((batch, 3 + 2 * count), 7 * num_tokens, dtype=torch.int32, device=device)
    wide[:, 3::2] = idx
    return wide[:, 3::2]


def taken(x, idx):
    return torch.stack([x[b, idx[b].long()] for b in range(len(x))]) if len(x) else x[:, :0]


@pytest.mark.parametrize("form", ["int64", "int32_slice"])
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        *((case, "contiguous") for case in GATHERS),
        *(("primes", layout) for layout in ("transposed", "every_second", "cut")),
        *(("above_a_block", layout) for layout in ("transposed", "every_second", "cut")),
    ],
)
def test_gather_tokens(case, layout, form, dtype, device):
    batch, num_tokens, count, width = GATHERS[case]
    kind = {"dtype": dtype, "device": device}
    stored = {
        "contiguous": normal(batch, num_tokens, width, **kind),
        "transposed": normal(batch, width, num_tokens, **kind),
        "every_second": normal(batch, num_tokens, 2 * width, **kind),
        "cut": normal(batch, num_tokens + 2, width + 3, **kind),
    }[layout].requires_grad_()
    x = {
        "contiguous": stored,
        "transposed": stored.transpose(1, 2),
        "every_second": stored[..., ::2],
        "cut": stored[:, 1:-1, :width],
    }[layout]
    idx = positions(batch, num_tokens, count, device, form)
    got = gather_tokens(x, idx)
    assert got.shape == (batch, count, width)
    assert got.dtype == dtype
    upstream = normal(count, batch, width, **kind, seed=1).transpose(0, 1)
    (mine,) = torch.autograd.grad(got, stored, upstream)
    if batch == 0:
        assert mine.shape == stored.shape
        return
    expected = taken(x, idx)
    assert torch.equal(got, expected)
    # Positions are distinct, so nothing is added up: exact.
    assert torch.equal(mine, torch.autograd.grad(expected, stored, upstream)[0])


def test_gradient_of_a_sum(dtype, device):
    """Its upstream gradient is one number, expanded."""
    x = normal(2, 9, 5, dtype=dtype, device=device).requires_grad_()
    idx = positions(2, 9, 4, device, "int64")
    gather_tokens(x, idx).sum().backward()
    assert torch.equal(x.grad.sum(1), torch.full_like(x[:, 0], 4))


def loop(visible, mask_token, pos, visible_idx, decode_idx):
    clips = [
        torch.cat([seen + pos[v.long()], mask_token + pos[d.long()]])
        for seen, v, d in zip(visible, visible_idx, decode_idx, strict=True)
    ]
    return torch.stack(clips)


def assert_accurate(got, eager, truth):
    """As close to the fp64 truth as fp32 allows, or in less as eager PyTorch comes, twice."""
    for mine, theirs, true in zip(got, eager, truth, strict=True):
        assert mine.shape == true.shape
        assert mine.dtype == theirs.dtype
        bound = FP32_RTOL
        if mine.dtype != torch.float32:
            bound = EAGER_FACTOR * relative_error(theirs, true) + 1e-15
        assert relative_error(mine, true) <= bound


def decoder_inputs(case, device, form, dtypes):
    batch, num_tokens, num_visible, num_decoded, width = case
    visible = normal(batch, num_visible + 1, width, dtype=dtypes[0], device=device)
    mask_token = normal(width, dtype=dtypes[1], device=device, seed=1)
    pos = normal(num_tokens, 2 * width, dtype=dtypes[2], device=device, seed=2)
    visible_idx = positions(batch, num_tokens, num_visible, device, form, seed=3)
    decode_idx = positions(batch, num_tokens, num_decoded, device, form, seed=4)
    return [visible, mask_token, pos], [visible_idx, decode_idx]


@pytest.mark.parametrize("case", DECODERS.values(), ids=DECODERS)
def test_decoder_tokens(case, dtype, device):
    compare_decoder_tokens(decoder_inputs(case, device, "int32_slice", [dtype] * 3))


@pytest.mark.parametrize("wide", [0, 1, 2], ids=["visible", "mask_token", "pos_embed"])
def test_decoder_tokens_of_several_dtypes(wide, dtype, device):
    dtypes = [torch.float32 if place == wide else dtype for place in range(3)]
    compare_decoder_tokens(decoder_inputs(DECODERS["primes"], device, "int64", dtypes))


def compare_decoder_tokens(inputs):
    leaves, index = inputs
    batch, width = len(index[0]), len(leaves[1])
    count = index[0].shape[1] + index[1].shape[1]
    dtype = max((leaf.dtype for leaf in leaves), key=lambda kind: kind.itemsize)
    # Not contiguous: a permuted gradient is what attention hands back.
    upstream = normal(count, batch, width, dtype=dtype, device=leaves[0].device, seed=5)
    upstream = upstream.transpose(0, 1)

    def run(function, kind=None):
        own = [leaf.to(kind or leaf.dtype, copy=True).requires_grad_() for leaf in leaves]
        out = function(*views(own), *index)
        return out, *torch.autograd.grad(out, own, upstream.to(out.dtype))

    got = run(decoder_tokens)
    assert got[0].shape == (batch, count, width)
    if batch == 0:
        assert not any(gradient.any() for gradient in got[1:])
    else:
        assert_accurate(got, run(loop), run(loop, torch.float64))


def views(leaves):
    """Rows further apart than they are wide, and a table whose columns are not dense."""
    visible, mask_token, pos = leaves
    return visible[:, 1:], mask_token, pos[:, ::2]


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["visible", "mask_token", "pos_embed"])
def test_one_gradient_alone(wanted, device):
    leaves, index = decoder_inputs(DECODERS["primes"], device, "int64", [torch.float32] * 3)
    leaves[wanted].requires_grad_()
    upstream = normal(3, 24, 7, dtype=torch.float32, device=device, seed=5)
    both = [function(*views(leaves), *index) for function in (decoder_tokens, loop)]
    mine, theirs = (torch.autograd.grad(out, leaves[wanted], upstream)[0] for out in both)
    assert relative_error(mine, theirs) < FP32_RTOL


@pytest.mark.parametrize("case", [case for case in DECODERS if "span" not in case])
def test_shared_tokens(case, dtype, device):
    batch, _, num_visible, num_decoded, width = DECODERS[case]
    leaves, (_, decode_idx) = decoder_inputs(DECODERS[case], device, "int32_slice", [dtype] * 3)
    del leaves[1]
    count = num_visible + num_decoded
    upstream = normal(count, batch, width, dtype=dtype, device=device, seed=5).transpose(0, 1)

    def run(function, kind=dtype):
        own = [leaf.to(kind, copy=True).requires_grad_() for leaf in leaves]
        # Rows further apart than they are wide, and a table whose columns are not dense.
        out = function(own[0][:, 1:], own[1][:, ::2], decode_idx)
        return out, *torch.autograd.grad(out, own, upstream.to(kind))

    got = run(shared_tokens)
    assert got[0].shape == (batch, count, width)
    assert [one.dtype for one in got] == [dtype] * 3
    assert all(torch.equal(*both) for both in zip(got, run(shared_tokens), strict=True))
    if batch == 0:
        assert not any(gradient.any() for gradient in got[1:])
        return
    truth = run(placed, torch.float64)
    # What is only moved is exact; sums over clips are of fp32, then rounded once.
    assert torch.equal(got[0].double(), truth[0])
    assert torch.equal(got[1].double(), truth[1])
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert relative_error(got[2], truth[2]) <= FP32_RTOL + rounding


def placed(visible, shared, decode_idx):
    clips = [torch.cat([a, shared[i.long()]]) for a, i in zip(visible, decode_idx, strict=True)]
    return torch.stack(clips)


def test_the_same_from_run_to_run(dtype, device):
    def run():
        leaves, index = decoder_inputs(DECODERS["two_spans"], device, "int64", [dtype] * 3)
        for leaf in leaves:
            leaf.requires_grad_()
        out = decoder_tokens(*views(leaves), *index)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out) / 3)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
