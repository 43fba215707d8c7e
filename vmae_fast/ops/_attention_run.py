"""What the attention ops share: packed arguments, shapes of results, calls of the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vmae_fast.kernels import attention as kernels
from vmae_fast.kernels.attention_tiles import Results, Sequences, Three

from . import _short_attention as cuda
from ._attention_choice import prefers_cuda
from ._backend import use_cuda, use_triton
from ._checks import check
from ._library import compute_dtype

# Products of matrices: logits and output; logits again, and the gradients of weights, q, k and v.
FORWARD_PRODUCTS = 2
BACKWARD_PRODUCTS = 5


def packed(qkv: Tensor, num_heads: int) -> Tensor:
    """Checked, ``(B, N, 3 * H * K)``, in the dtype that is computed in."""
    check(num_heads > 0, lambda: f"num_heads must be positive, got {num_heads}")
    fits = qkv.dim() == 3 and qkv.shape[2] > 0 and qkv.shape[2] % (3 * num_heads) == 0
    fits = fits or (qkv.dim() == 5 and qkv.shape[2:4] == (3, num_heads) and qkv.shape[4] > 0)
    check(
        fits,
        lambda: (
            f"qkv must be (B, N, 3 * {num_heads} heads * K) or (B, N, 3, {num_heads}, K), "
            f"got shape {tuple(qkv.shape)}"
        ),
    )
    check(qkv.is_floating_point(), lambda: f"qkv must be floating point, got {qkv.dtype}")
    return qkv.flatten(2).to(compute_dtype(qkv))


def checked_scale(scale: float | None, head_width: int) -> float:
    """The factor on the logits, ``K ** -0.5`` for None."""
    if scale is None:
        return float(head_width**-0.5)
    check(0 < scale < math.inf, lambda: f"scale must be positive and finite, got {scale}")
    return float(scale)


def heads_of(x: Tensor, num_heads: int, count: int) -> Any:
    """Views ``(B, N, H, K)``, so many of ``(B, N, count * H * K)``."""
    return x.unflatten(2, (count, num_heads, -1)).unbind(2)


def dense(x: Tensor) -> Tensor:
    """Columns dense in memory, as the kernels take them; rows at any distance."""
    return x if x.stride(2) == 1 else x.contiguous()


def empty_results(q: Tensor, sequences: Sequences) -> Three:
    """Unset, of the shapes and dtypes of what :func:`run_forward` returns."""
    batch, num_tokens, heads, head_width = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    own = sequences.count if sequences.class_token else 0
    num_queries = num_tokens if sequences.is_joint else sequences.total
    return (
        q.new_empty(batch, num_tokens, heads * head_width),
        q.new_empty(batch, own, heads * head_width, dtype=wide),
        q.new_empty(batch * sequences.count, heads, num_queries, dtype=wide),
    )


def run_forward(given: Three, sequences: Sequences, scale: float) -> Three:
    """Attention of q, k and v, ``(B, T, H, K)`` each.

    Returns:
        ``(B, T, H * K)``; the class token's output in each sequence, ``(B, G, H * K)``, or
        ``(B, 0, H * K)`` without one; the log-sum-exp ``(B * G, H, M)``.
    """
    q = given[0]
    if q.numel() == 0:
        return empty_results(q, sequences)
    if _runs_cuda(q, sequences, partial(cuda.unsuited, given, sequences), backward=False):
        run = cuda.short_attention
    elif _runs_triton(q):
        run = kernels.attention_triton
    else:
        run = kernels.attention_in_sequences_reference
    out, class_out, lse = run(given, sequences, scale)
    if class_out is None:
        class_out = lse.new_empty(q.shape[0], 0, *q.shape[2:])
    return out.flatten(2), class_out.flatten(2), lse


def run_backward(
    grad: Tensor, given: Three, kept: Three, grads: Three, sequences: Sequences, scale: float
) -> None:
    """Write the gradients of q, k and v to ``grads``, shaped as they are.

    Args:
        grad: ``(B, T, H * K)``, the upstream gradient.
        given: q, k and v as :func:`run_forward` had them.
        kept: what it returned.
    """
    q = given[0]
    if q.numel() == 0:
        for x in grads:
            x.zero_()
        return
    grad, out, own = (x.contiguous().unflatten(2, q.shape[2:]) for x in (grad, kept[0], kept[1]))
    results = Results(out, own if sequences.class_token else None, kept[2])
    unsuited = partial(cuda.unsuited_backward, grad, given, grads, sequences)
    if _runs_cuda(q, sequences, unsuited, backward=True):
        run = cuda.short_attention_backward
    elif _runs_triton(q):
        run = kernels.attention_backward_triton
    else:
        run = kernels.attention_in_sequences_backward_reference
    run(grad, given, results, grads, sequences, scale)


def _runs_cuda(
    q: Tensor, sequences: Sequences, unsuited: Callable[[], str], *, backward: bool
) -> bool:
    """Looks at the tensors only where the CUDA C++ kernels are wanted: that takes its time."""
    if not use_cuda(q, preferred=prefers_cuda(q, sequences.total)):
        return False
    return not unsuited() and cuda.fits(q, sequences, backward=backward)


def _runs_triton(q: Tensor) -> bool:
    return use_triton(q, too_large=kernels.why_not(q.shape[3]))


def empty_gradient(x: Tensor) -> Tensor:
    """Unset, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
