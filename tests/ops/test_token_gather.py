"""gather_tokens and decoder_tokens against loops over clips and tokens."""

import pytest
import torch
from helpers import EXACT_RTOL, random_positions, relative_error

from vmae_fast.ops import decoder_tokens, gather_tokens


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 5), (2, 13, 33)], ids=str)
def test_gather_tokens(shape, idx_dtype):
    batch, num_tokens, width = shape
    idx = random_positions(batch, num_tokens, max(1, num_tokens // 2)).to(idx_dtype)
    stored = normal(num_tokens, width, batch).requires_grad_()
    x = stored.permute(2, 0, 1)
    before = x.detach().clone()
    got = gather_tokens(x, idx)
    expected = torch.stack([torch.stack([x[b, int(n)] for n in row]) for b, row in enumerate(idx)])
    assert torch.equal(got, expected)
    upstream = normal(*got.shape, seed=1)
    mine = torch.autograd.grad(got, stored, upstream, retain_graph=True)[0]
    truth = torch.autograd.grad(expected, stored, upstream)[0]
    assert relative_error(mine, truth) < EXACT_RTOL
    assert torch.equal(x, before)


def test_gather_keeps_the_dtype():
    x = torch.randn(2, 5, 3, dtype=torch.bfloat16)
    idx = torch.tensor([[4], [0]])
    got = gather_tokens(x, idx)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[:, 0], torch.stack([x[0, 4], x[1, 0]]))


def loop_decoder_tokens(visible, mask_token, pos, visible_idx, decode_idx):
    """Token by token: what the encoder saw, then the mask token, each plus its position."""
    clips = []
    for b in range(len(visible)):
        seen = [visible[b, i] + pos[int(n)] for i, n in enumerate(visible_idx[b])]
        unseen = [mask_token + pos[int(n)] for n in decode_idx[b]]
        clips.append(torch.stack(seen + unseen))
    return torch.stack(clips)


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("counts", [(1, 1), (3, 8), (5, 2)], ids=str)
def test_decoder_tokens(counts, idx_dtype):
    num_visible, num_decoded = counts
    batch, num_tokens, width = 3, 11, 7
    order = random_positions(batch, num_tokens, num_tokens).to(idx_dtype)
    visible_idx, decode_idx = order[:, :num_visible], order[:, -num_decoded:]
    leaves = [
        normal(width, num_visible, batch, seed=1),
        normal(width, seed=2),
        normal(num_tokens, width, seed=3),
    ]
    copies = [leaf.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    visible = leaves[0].permute(2, 1, 0)
    got = decoder_tokens(visible, *leaves[1:], visible_idx, decode_idx)
    expected = loop_decoder_tokens(visible, *leaves[1:], visible_idx, decode_idx)
    assert got.shape == (batch, num_visible + num_decoded, width)
    assert relative_error(got, expected) < EXACT_RTOL
    upstream = normal(*got.shape, seed=4)
    mine = torch.autograd.grad(got, leaves, upstream)
    truth = torch.autograd.grad(expected, leaves, upstream)
    for gradient, true_gradient in zip(mine, truth, strict=True):
        assert relative_error(gradient, true_gradient) < EXACT_RTOL
    for leaf, copy in zip(leaves, copies, strict=True):
        assert torch.equal(leaf, copy)


IDX = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "idx", "message"),
    [
        (torch.zeros(2, 3), IDX, r"x must be \(B, N, D\), got shape \(2, 3\)"),
        (torch.zeros(2, 5, 3), IDX.float(), "idx must be int32 or int64, got torch.float32"),
        (torch.zeros(2, 5, 3), IDX.bool(), "idx must be int32 or int64, got torch.bool"),
        (torch.zeros(4, 5, 3), IDX, r"idx must be \(B, n\) with B=4, got shape \(2, 3\)"),
        (torch.zeros(2, 5, 3), IDX[0], r"idx must be \(B, n\) with B=2, got shape \(3,\)"),
    ],
)
def test_gather_errors(x, idx, message):
    with pytest.raises(ValueError, match=message):
        gather_tokens(x, idx)


GOOD = {
    "visible": torch.zeros(2, 3, 4),
    "mask_token": torch.zeros(4),
    "pos_embed": torch.zeros(9, 4),
    "visible_idx": IDX,
    "decode_idx": torch.zeros(2, 5, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("visible", torch.zeros(3, 4), r"visible must be \(B, V, E\), got shape \(3, 4\)"),
        ("mask_token", torch.zeros(1, 1, 4), r"mask_token must be .* \(4,\), got .*\(1, 1, 4\)"),
        ("mask_token", torch.zeros(5), r"mask_token must be .* \(4,\), got shape \(5,\)"),
        ("pos_embed", torch.zeros(9, 5), r"pos_embed must be \(N, 4\), got shape \(9, 5\)"),
        ("pos_embed", torch.zeros(1, 9, 4), r"pos_embed must be \(N, 4\), got .*\(1, 9, 4\)"),
        ("visible_idx", IDX.double(), "visible_idx must be int32 or int64, got torch.float64"),
        ("visible_idx", IDX[:1], r"visible_idx must be \(B, n\) with B=2, got shape \(1, 3\)"),
        ("visible_idx", IDX[:, :2], "visible_idx names 2 tokens but visible holds 3"),
        ("decode_idx", IDX.half(), "decode_idx must be int32 or int64, got torch.float16"),
        ("decode_idx", IDX[0], r"decode_idx must be \(B, n\) with B=2, got shape \(3,\)"),
    ],
)
def test_decoder_tokens_errors(name, value, message):
    with pytest.raises(ValueError, match=message):
        decoder_tokens(**{**GOOD, name: value})


@pytest.mark.parametrize("name", ["mask_token", "pos_embed", "visible_idx", "decode_idx"])
def test_tensors_on_two_devices(name):
    message = f"^{name} is on meta but visible is on cpu; move one of them$"
    with pytest.raises(ValueError, match=message):
        decoder_tokens(**{**GOOD, name: GOOD[name].to("meta")})
    with pytest.raises(ValueError, match=r"^idx is on meta but x is on cpu; move one of them$"):
        gather_tokens(torch.zeros(2, 5, 3), IDX.to("meta"))
