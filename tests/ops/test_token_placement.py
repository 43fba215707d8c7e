"""shared_tokens against a loop over clips and tokens, and what it refuses."""

import pytest
import torch
from helpers import EXACT_RTOL, random_positions, relative_error

from vmae_fast.ops import shared_tokens


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def loop_shared_tokens(visible, shared, decode_idx):
    """Token by token: a clip's own rows as they come, then those of the positions it names."""
    pairs = zip(visible, decode_idx, strict=True)
    clips = [[*rows, *(shared[int(n)] for n in idx)] for rows, idx in pairs]
    return torch.stack([torch.stack(rows) for rows in clips])


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("counts", [(1, 1), (3, 8), (0, 5), (4, 0)], ids=str)
def test_shared_tokens(counts, idx_dtype):
    num_visible, num_decoded = counts
    batch, num_tokens, width = 3, 11, 7
    decode_idx = random_positions(batch, num_tokens, num_tokens).to(idx_dtype)[:, :num_decoded]
    stored = [normal(width, num_visible, batch, seed=1), normal(width, num_tokens, seed=2)]
    before = [one.clone() for one in stored]
    leaves = [one.requires_grad_() for one in stored]
    visible, shared = leaves[0].permute(2, 1, 0), leaves[1].T
    got = shared_tokens(visible, shared, decode_idx)
    expected = loop_shared_tokens(visible, shared, decode_idx)
    assert got.shape == (batch, num_visible + num_decoded, width)
    assert torch.equal(got, expected)
    # As attention hands gradients back: not contiguous.
    upstream = normal(*got.mT.shape, seed=3).mT
    mine = torch.autograd.grad(got, leaves, upstream)
    truth = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    for gradient, true_gradient, leaf in zip(mine, truth, leaves, strict=True):
        wanted = torch.zeros_like(leaf) if true_gradient is None else true_gradient
        assert relative_error(gradient, wanted) < EXACT_RTOL
    for one, copy in zip(stored, before, strict=True):
        assert torch.equal(one, copy)


def test_no_clips():
    visible, shared = torch.zeros(0, 3, 4, requires_grad=True), torch.ones(5, 4).requires_grad_()
    out = shared_tokens(visible, shared, torch.zeros(0, 2, dtype=torch.int64))
    out.sum().backward()
    assert (out.shape, visible.grad.shape) == ((0, 5, 4), (0, 3, 4))
    assert torch.equal(shared.grad, torch.zeros(5, 4))


@pytest.mark.parametrize(("dtype", "clips"), [(torch.bfloat16, 260), (torch.float16, 2052)])
def test_gradients_are_added_up_in_fp32(dtype, clips):
    """One a clip: added up in bf16 the sum would stay at 256, in fp16 at 2048."""
    visible, shared = torch.zeros(clips, 1, 2, dtype=dtype), torch.zeros(3, 2, dtype=dtype)
    decode_idx = torch.ones(clips, 1, dtype=torch.int64)
    out = shared_tokens(visible, shared.requires_grad_(), decode_idx)
    out.backward(torch.ones_like(out))
    assert out.dtype == shared.grad.dtype == dtype
    assert shared.grad[1].tolist() == [clips] * 2
    assert not shared.grad[::2].any()


def test_the_gradient_of_visible_is_no_copy():
    visible, shared = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(5, 4)
    out = shared_tokens(visible, shared, torch.zeros(2, 1, dtype=torch.int32))
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, visible, upstream)
    assert torch.equal(gradient, upstream[:, :3])
    assert gradient.data_ptr() == upstream.data_ptr()


GOOD = {
    "visible": torch.zeros(2, 3, 4),
    "shared": torch.zeros(9, 4),
    "decode_idx": torch.zeros(2, 5, dtype=torch.int64),
}
LOW = r"shared is torch.bfloat16 but visible is torch.float32; they must be alike"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("visible", torch.zeros(3, 4), r"visible must be \(B, V, W\), got shape \(3, 4\)"),
        ("visible", torch.zeros(2, 3, 4).int(), "visible must be floating point, got torch.int32"),
        ("shared", torch.zeros(9, 5), r"shared must be \(N, 4\), got shape \(9, 5\)"),
        ("shared", torch.zeros(1, 9, 4), r"shared must be \(N, 4\), got shape \(1, 9, 4\)"),
        ("shared", torch.zeros(9, 4).bfloat16(), LOW),
        ("decode_idx", torch.zeros(2, 5), "decode_idx must be int32 or int64, got torch.float32"),
        ("decode_idx", GOOD["decode_idx"][0], r"decode_idx must be \(B, n\) with B=2, got .*\(5,"),
        ("decode_idx", GOOD["decode_idx"][:1], r"decode_idx must be \(B, n\) with B=2, got .*\(1,"),
        ("shared", GOOD["shared"].to("meta"), "shared is on meta but visible is on cpu; move one"),
        ("decode_idx", GOOD["decode_idx"].to("meta"), "decode_idx is on meta but visible is on"),
    ],
)
def test_errors(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        shared_tokens(**{**GOOD, name: value})
