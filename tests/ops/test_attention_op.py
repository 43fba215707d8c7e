"""Attention over packed projections against a softmax written out head by head."""

import pytest
import torch
from helpers import EXACT_RTOL, assert_as_accurate_as_eager, relative_error

from vmae_fast.ops import attention, cross_attention


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def written_out(q, k, v, heads, scale):
    """``(B, M, HK)``, ``(B, N, HK)``, ``(B, N, HK)``: one softmax a head, by exp and sum."""
    outs = []
    for qh, kh, vh in zip(*(x.chunk(heads, dim=2) for x in (q, k, v)), strict=True):
        logits = qh @ kh.transpose(1, 2) * (qh.shape[2] ** -0.5 if scale is None else scale)
        weights = (logits - logits.amax(dim=2, keepdim=True)).exp()
        outs.append(weights / weights.sum(dim=2, keepdim=True) @ vh)
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("scale", [None, 0.3], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "heads", "head_width"), [(1, 1, 1), (1, 3, 5), (17, 1, 7), (29, 3, 13)]
)
def test_attention(num_tokens, heads, head_width, scale):
    width = heads * head_width
    stored = normal(3 * width, num_tokens, 2).requires_grad_()
    qkv = stored.permute(2, 1, 0)
    before = stored.detach().clone()
    got = attention(qkv, heads, scale)
    expected = written_out(*qkv.chunk(3, dim=2), heads, scale)
    assert got.shape == (2, num_tokens, width)
    assert relative_error(got, expected) < EXACT_RTOL
    upstream = normal(*got.shape, seed=1)
    mine = torch.autograd.grad(got, stored, upstream)[0]
    truth = torch.autograd.grad(expected, stored, upstream)[0]
    # One token: the gradients to q and k are zero, hence a norm over all of qkv.
    assert relative_error(mine, truth) < EXACT_RTOL
    assert torch.equal(stored, before)


@pytest.mark.parametrize("scale", [None, 0.3], ids=str)
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "heads", "head_width"),
    [(1, 1, 1, 1), (1, 19, 2, 5), (7, 1, 2, 5), (11, 23, 3, 9), (23, 11, 1, 16)],
)
def test_cross_attention(num_queries, num_keys, heads, head_width, scale):
    width = heads * head_width
    q = normal(2, num_queries, 2 * width, seed=2)[..., ::2].requires_grad_()
    kv = normal(2, num_keys, 2 * width, seed=3).requires_grad_()
    got = cross_attention(q, kv, heads, scale)
    expected = written_out(q, *kv.chunk(2, dim=2), heads, scale)
    assert got.shape == (2, num_queries, width)
    assert relative_error(got, expected) < EXACT_RTOL
    upstream = normal(*got.shape, seed=4)
    mine = torch.autograd.grad(got, (q, kv), upstream)
    truth = torch.autograd.grad(expected, (q, kv), upstream)
    together = [torch.cat([g.flatten() for g in grads]) for grads in (mine, truth)]
    assert relative_error(*together) < EXACT_RTOL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_as_accurate_as_eager(dtype):
    qkv = normal(2, 37, 3 * 4 * 13).to(dtype)
    truth = written_out(*qkv.double().chunk(3, dim=2), 4, None)
    eager = written_out(*qkv.chunk(3, dim=2), 4, None)
    assert_as_accurate_as_eager(attention(qkv, 4), eager, truth)


def test_large_logits_do_not_overflow():
    qkv = 300 * normal(1, 9, 3 * 8)
    assert attention(qkv.float(), 2).isfinite().all()


@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        (torch.zeros(2, 12), r"qkv must be \(B, N, 3 \* 2 heads \* K\) or .* got shape \(2, 12\)"),
        (torch.zeros(2, 5, 14), r"qkv must be .* 2 heads .* got shape \(2, 5, 14\)"),
    ],
)
def test_attention_errors(qkv, message):
    with pytest.raises(ValueError, match=message):
        attention(qkv, 2)


Q, KV = torch.zeros(2, 3, 8), torch.zeros(2, 5, 16)


@pytest.mark.parametrize(
    ("q", "kv", "message"),
    [
        (Q[0], KV, r"q must be \(B, M, 4 heads \* K\), got shape \(3, 8\)"),
        (Q[..., :6], KV, r"q must be \(B, M, 4 heads \* K\), got shape \(2, 3, 6\)"),
        (Q, KV[0], r"kv must be \(2, N, 16\), got shape \(5, 16\)"),
        (Q, KV[:1], r"kv must be \(2, N, 16\), got shape \(1, 5, 16\)"),
        (Q, KV[..., :8], r"kv must be \(2, N, 16\), got shape \(2, 5, 8\)"),
    ],
)
def test_cross_attention_errors(q, kv, message):
    with pytest.raises(ValueError, match=message):
        cross_attention(q, kv, 4)
