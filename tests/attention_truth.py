"""Attention written out, in fp64 and as PyTorch does it eagerly, and how far from it one may be.

Shapes: B clips, N tokens (M queries), H heads, K head width, G sequences a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from helpers import EAGER_FACTOR
from torch import Tensor

HEAD_WIDTHS = (32, 64, 80, 88, 128)

# Gradients go through more roundings than the output.
GRADIENT_FACTOR = 3.0
# Sums of at most some hundred products in fp32, and exponentials of logits around 4.
FP32_RTOL = 5e-6
# What cancels to less than this part of all gradients is measured by all of them.
LEAST_PART = 0.1


def definition(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``(B, M, H, K)``: softmax by exponentials and their sum."""
    logits = torch.einsum("bmhk,bnhk->bhmn", q, k) * scale
    weights = (logits - logits.amax(dim=3, keepdim=True)).exp()
    return torch.einsum("bhmn,bnhk->bmhk", weights / weights.sum(dim=3, keepdim=True), v)


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As PyTorch does it in a low precision: only the softmax is in fp32."""
    q_BHMK, k_BHNK, v_BHNK = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q_BHMK @ k_BHNK.transpose(2, 3) * scale).float().softmax(dim=3).to(q.dtype)
    return (weights @ v_BHNK).transpose(1, 2)


def log_sum_exp(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``(B, H, M)``, fp64."""
    logits = torch.einsum("bmhk,bnhk->bhmn", q.double(), k.double()) * scale
    top = logits.amax(dim=3)
    return top + (logits - top.unsqueeze(3)).exp().sum(dim=3).log()


def sequences_of(t: int, s: int, axis: str, class_token: bool) -> Tensor:
    """``(G, N)``, each sequence's tokens, for a t-major grid of t rows of s positions."""
    grid = [[class_token + row * s + position for position in range(s)] for row in range(t)]
    if axis == "time":
        grid = [[row[position] for row in grid] for position in range(s)]
    return torch.tensor([[0] * class_token + tokens for tokens in grid])


def in_sequences(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, index: Tensor
) -> Tensor:
    """``(B, T, H, K)``: attention within each sequence; a token of all has the mean over them."""
    split = [x[:, index.to(x.device)].flatten(0, 1) for x in (q, k, v)]
    out = attend(*split, scale).unflatten(0, (len(q), -1)).flatten(1, 2)
    order = index.flatten().tolist()
    first = out[:, [place for place, token in enumerate(order) if token == 0]]
    rest = out[:, [order.index(token) for token in range(1, q.shape[1])]]
    return torch.cat([first.mean(dim=1, keepdim=True), rest], dim=1)


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """The same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def run(function: Callable[..., Tensor], leaves: Sequence[Tensor], upstream: Tensor, dtype=None):
    """The output, and the gradients of copies of the leaves, in a dtype or their own."""
    own = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    out = function(*own)
    return out.detach(), *torch.autograd.grad(out, own, upstream.to(out.dtype))


def heads(packed: Tensor, num_heads: int, count: int) -> tuple[Tensor, ...]:
    """``(B, N, H, K)`` each, of columns (count, H, K)."""
    return packed.unflatten(2, (count, num_heads, -1)).unbind(2)


def of_heads(gradients: Sequence[Tensor], num_heads: int, counts: Sequence[int]) -> list[Tensor]:
    """Gradients of packed projections as those of q, k and v: each is to be right alone."""
    parts = [heads(x, num_heads, n) for x, n in zip(gradients, counts, strict=True)]
    return [part for of_one in parts for part in of_one]


def assert_accurate(
    got: Sequence[Tensor],
    by_eager: Sequence[Tensor],
    truth: Sequence[Tensor],
    factor: float,
    rtol: float = FP32_RTOL,
) -> None:
    """As close to the fp64 truth as fp32 allows, in less as eager PyTorch comes, factor times."""
    everything = torch.stack([true.norm() for true in truth]).norm()
    for place, (mine, theirs, true) in enumerate(zip(got, by_eager, truth, strict=True)):
        assert mine.shape == true.shape
        assert mine.dtype == theirs.dtype
        size = true.norm().clamp_min(LEAST_PART * everything).clamp_min(1e-300)
        error, bound = (mine.double() - true).norm() / size, rtol
        if mine.dtype != torch.float32:
            bound += factor * (theirs.double() - true).norm() / size
        assert error <= bound, f"number {place} of {len(truth)}: {error:.2e} above {bound:.2e}"


def compare(
    function: Callable[..., Tensor],
    written: Callable[..., Callable[..., Tensor]],
    leaves: Sequence[Tensor],
    upstream: Tensor,
    num_heads: int,
    largest_logit: float = 0.0,
) -> None:
    """An op with what is written out for it.

    Args:
        function: of the leaves, to ``(B, M, H * K)``.
        written: of :func:`definition` or :func:`eager`, the same function.
        leaves: packed projections, q of one, k and v of two or all three.
        upstream: the gradient of what the function returns.
        num_heads: H.
        largest_logit: what fp32 rounds of it goes into the exponent of the weights.
    """
    rtol = FP32_RTOL + 4 * torch.finfo(torch.float32).eps * largest_logit
    got = run(function, leaves, upstream)
    theirs = run(written(eager), leaves, upstream)
    truth = run(written(definition), leaves, upstream, torch.float64)
    assert_accurate(got[:1], theirs[:1], truth[:1], EAGER_FACTOR, rtol)
    counts = (3,) if len(leaves) == 1 else (1, 2)
    grads = [of_heads(one[1:], num_heads, counts) for one in (got, theirs, truth)]
    assert_accurate(*grads, GRADIENT_FACTOR, rtol)
