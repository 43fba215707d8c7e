"""Joint attention, read from the packed projections, and attention of some queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmae_fast.kernels.attention_tiles import joint

from ._attention_choice import choose, library_attention
from ._attention_run import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    checked_scale,
    dense,
    empty_gradient,
    empty_results,
    heads_of,
    packed,
    run_backward,
    run_forward,
)
from ._checks import check, check_same_device
from ._library import compute_dtype, once_differentiable, refuse_double_backward, register


def attention(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Self-attention over all tokens of a clip, ``softmax(q k^T * scale) v`` in every head.

    The matrix of logits is never in memory. Softmax and sums are in fp32; what is kept for the
    backward pass, beside argument and result, is the log-sum-exp, 4 bytes a token and head.

    Args:
        qkv: ``(B, N, 3 * H * K)``, straight from the linear layer, columns (3, H, K), or
            ``(B, N, 3, H, K)``. fp16, bf16, fp32 or fp64; autocast's dtype where that is on.
        num_heads: H.
        scale: factor on the logits, positive; None is ``K ** -0.5``.

    Returns:
        ``(B, N, H * K)`` in the dtype computed in, ready for the output projection. The gradient
        flows to qkv, once.

    Raises:
        ValueError: qkv's shape does not fit num_heads, or scale is not positive.
        BackendError: a demanded kernel cannot run (see :func:`vmae_fast.ops.attention_kernel`).

    Source: Attention Is All You Need (arXiv 1706.03762); without the matrix of logits,
    FlashAttention (arXiv 2205.14135, 2307.08691).
    """
    qkv = packed(qkv, num_heads)
    q, k, v = heads_of(qkv, num_heads, 3)
    scale = checked_scale(scale, q.shape[3])
    kernel = choose(q, qkv.shape[1])
    if kernel == "op":
        out: Tensor = _attention(qkv, num_heads, scale)[0]
        return out
    return library_attention((q, k, v), scale, kernel).flatten(2)


def cross_attention(q: Tensor, kv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Attention of M queries over N keys, otherwise as :func:`attention`.

    Args:
        q: ``(B, M, H * K)``.
        kv: ``(B, N, 2 * H * K)``, columns (2, H, K): k, v. N is at least 1.
        num_heads: H.
        scale: factor on the logits, positive; None is ``K ** -0.5``.

    Returns:
        ``(B, M, H * K)`` in the dtype computed in. Gradients flow to q and kv, once.

    Raises:
        ValueError: the widths do not divide into heads or do not fit each other, dtypes or devices
            differ, there is no key, or scale is not positive.
        BackendError: a demanded kernel cannot run (see :func:`vmae_fast.ops.attention_kernel`).
    """
    check(num_heads > 0, lambda: f"num_heads must be positive, got {num_heads}")
    check(
        q.dim() == 3 and q.shape[2] > 0 and q.shape[2] % num_heads == 0,
        lambda: f"q must be (B, M, {num_heads} heads * K), got shape {tuple(q.shape)}",
    )
    check(
        kv.dim() == 3 and kv.shape[0] == q.shape[0] and kv.shape[2] == 2 * q.shape[2],
        lambda: f"kv must be ({q.shape[0]}, N, {2 * q.shape[2]}), got shape {tuple(kv.shape)}",
    )
    check(kv.shape[1] > 0, lambda: "kv must hold at least one token")
    check(q.is_floating_point(), lambda: f"q must be floating point, got {q.dtype}")
    check_same_device("q", q, kv=kv)
    q, kv = q.to(compute_dtype(q)), kv.to(compute_dtype(kv))
    check(q.dtype == kv.dtype, lambda: f"q is {q.dtype} but kv is {kv.dtype}; cast one of them")
    given = (*heads_of(q, num_heads, 1), *heads_of(kv, num_heads, 2))
    scale = checked_scale(scale, given[0].shape[3])
    kernel = choose(given[0], kv.shape[1])
    if kernel == "op":
        out: Tensor = _cross_attention(q, kv, num_heads, scale)[0]
        return out
    return library_attention(given, scale, kernel).flatten(2)


def _forward(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    given = heads_of(dense(qkv), num_heads, 3)
    out, _, lse = run_forward(given, joint(qkv.shape[1]), scale)
    return out, lse


def _fake(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    out, _, lse = empty_results(heads_of(qkv, num_heads, 3)[0], joint(qkv.shape[1]))
    return out, lse


def _backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> Tensor:
    grad_qkv = empty_gradient(qkv)
    given, into = heads_of(dense(qkv), num_heads, 3), heads_of(grad_qkv, num_heads, 3)
    results = (out, out[:, :0], lse)
    run_backward(grad, given, results, into, joint(qkv.shape[1]), scale)
    return grad_qkv


def _flops(products: int) -> Any:
    def count(*shapes: Any, **more: Any) -> int:
        batch, num_tokens, columns = shapes[0] if products == FORWARD_PRODUCTS else shapes[1]
        return products * 2 * int(batch * num_tokens**2 * columns) // 3

    return count


_attention = register(
    "attention(Tensor qkv, int num_heads, float scale) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _flops(FORWARD_PRODUCTS),
)
_attention_backward = register(
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int num_heads,"
    " float scale) -> Tensor",
    _backward,
    fake=lambda grad, qkv, *rest: empty_gradient(qkv),
    flops=_flops(BACKWARD_PRODUCTS),
)
once_differentiable(_attention_backward, "attention")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, *ctx.rest = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    refuse_double_backward("attention")
    if grad is None:
        return None, None, None
    return _attention_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None


torch.library.register_autograd(_attention, _grad, setup_context=_setup)


def _cross_forward(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    given = (*heads_of(dense(q), num_heads, 1), *heads_of(dense(kv), num_heads, 2))
    out, _, lse = run_forward(given, joint(kv.shape[1]), scale)
    return out, lse


def _cross_fake(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    out, _, lse = empty_results(heads_of(q, num_heads, 1)[0], joint(kv.shape[1]))
    return out, lse


def _cross_backward(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    grad_q, grad_kv = empty_gradient(q), empty_gradient(kv)
    given = (*heads_of(dense(q), num_heads, 1), *heads_of(dense(kv), num_heads, 2))
    into = (*heads_of(grad_q, num_heads, 1), *heads_of(grad_kv, num_heads, 2))
    run_backward(grad, given, (out, out[:, :0], lse), into, joint(kv.shape[1]), scale)
    return grad_q, grad_kv


def _cross_flops(products: int) -> Any:
    def count(*shapes: Any, **more: Any) -> int:
        q, kv = shapes[:2] if products == FORWARD_PRODUCTS else shapes[1:3]
        return products * 2 * int(q[0] * q[1] * q[2] * kv[1])

    return count


_cross_attention = register(
    "cross_attention(Tensor q, Tensor kv, int num_heads, float scale) -> (Tensor, Tensor)",
    _cross_forward,
    _cross_fake,
    _cross_flops(FORWARD_PRODUCTS),
)
_cross_attention_backward = register(
    "cross_attention_backward(Tensor grad, Tensor q, Tensor kv, Tensor out, Tensor lse,"
    " int num_heads, float scale) -> (Tensor, Tensor)",
    _cross_backward,
    fake=lambda grad, q, kv, *rest: (empty_gradient(q), empty_gradient(kv)),
    flops=_cross_flops(BACKWARD_PRODUCTS),
)
once_differentiable(_cross_attention_backward, "cross_attention")


def _cross_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, *ctx.rest = inputs
    ctx.save_for_backward(q, kv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _cross_grad(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("cross_attention")
    if grad is None:
        return None, None, None, None
    return *_cross_attention_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None


torch.library.register_autograd(_cross_attention, _cross_grad, setup_context=_cross_setup)
