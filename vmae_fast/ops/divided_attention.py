"""Divided space-time attention: along time or across space, by strides on the packed tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmae_fast.kernels.attention import merge, split
from vmae_fast.kernels.attention_tiles import divided

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
from ._checks import check
from ._library import once_differentiable, refuse_double_backward, register

ATTENTION_AXES = ("time", "space")


def divided_attention(
    qkv: Tensor,
    num_heads: int,
    grid: tuple[int, ...],
    axis: str,
    *,
    class_token: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Self-attention within each position over time, or within each row over space.

    Nothing is moved or copied to form the sequences. A tube mask leaves such a grid too: the
    visible tokens in the order of their indices are a rectangle of t rows and s positions.

    Args:
        qkv: ``(B, t * s, 3 * H * K)``, tokens in t-major order, or ``(B, t * s, 3, H, K)``; as in
            :func:`vmae_fast.ops.attention`.
        num_heads: H.
        grid: ``(t, h, w)``, or ``(t, s)`` with s positions.
        axis: "time" (each position's t tokens attend to each other) or "space" (each row's s).
        class_token: token 0 of ``1 + t * s`` belongs to none of them: it stands first in every
            sequence, as query and as key, and its output is the mean of those it has in each.
        scale: factor on the logits, positive; None is ``K ** -0.5``.

    Returns:
        ``(B, t * s, H * K)``, or with the class token's first, in the dtype computed in. The
        gradient flows to qkv, once.

    Raises:
        ValueError: the grid does not hold qkv's tokens, the axis is unknown, or as in
            :func:`vmae_fast.ops.attention`.
        BackendError: a demanded kernel cannot run (see :func:`vmae_fast.ops.attention_kernel`).

    Source: TimeSformer (arXiv 2102.05095), also for the class token.
    """
    qkv = packed(qkv, num_heads)
    t, s = checked_grid(grid, qkv.shape[1] - class_token)
    check(
        axis in ATTENTION_AXES,
        lambda: f"axis must be one of {', '.join(ATTENTION_AXES)}, got {axis!r}",
    )
    given = heads_of(qkv, num_heads, 3)
    scale = checked_scale(scale, given[0].shape[3])
    sequences = divided(t, s, axis, class_token)
    kernel = choose(given[0], sequences.total, dense=sequences.stride == 1 and not class_token)
    if kernel == "op":
        out: Tensor = _divided_attention(qkv, num_heads, t, s, axis, class_token, scale)[0]
        return out
    q, k, v = (split(x, sequences) for x in given)
    tokens, own = merge(library_attention((q, k, v), scale, kernel), sequences)
    if own is not None:
        tokens = torch.cat([own.mean(1, keepdim=True), tokens], dim=1)
    return tokens.flatten(2)


def checked_grid(grid: tuple[int, ...], num_tokens: int) -> tuple[int, int]:
    """Rows and positions of a grid that must hold so many tokens."""
    check(
        len(grid) in (2, 3) and min(grid) > 0,
        lambda: f"grid must be (t, h, w) or (t, s), all positive, got {tuple(grid)}",
    )
    t, s = grid[0], grid[1] * (grid[2] if len(grid) == 3 else 1)
    check(
        t * s == num_tokens,
        lambda: (
            f"grid {tuple(grid)} holds {t * s} tokens, but there are {num_tokens} (the class token "
            "not counted)"
        ),
    )
    return t, s


def _forward(
    qkv: Tensor, num_heads: int, t: int, s: int, axis: str, class_token: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    given = heads_of(dense(qkv), num_heads, 3)
    return run_forward(given, divided(t, s, axis, class_token), scale)


def _fake(
    qkv: Tensor, num_heads: int, t: int, s: int, axis: str, class_token: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(heads_of(qkv, num_heads, 3)[0], divided(t, s, axis, class_token))


def _backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    class_out: Tensor,
    lse: Tensor,
    num_heads: int,
    t: int,
    s: int,
    axis: str,
    class_token: bool,
    scale: float,
) -> Tensor:
    grad_qkv = empty_gradient(qkv)
    given, into = heads_of(dense(qkv), num_heads, 3), heads_of(grad_qkv, num_heads, 3)
    sequences = divided(t, s, axis, class_token)
    run_backward(grad, given, (out, class_out, lse), into, sequences, scale)
    return grad_qkv


def _flops(products: int) -> Any:
    def count(*arguments: Any, **more: Any) -> int:
        qkv, grid = arguments[0], arguments[2:6]
        if products == BACKWARD_PRODUCTS:
            qkv, grid = arguments[1], arguments[6:10]
        batch, _, columns = qkv
        sequences = divided(*grid)
        pairs = sequences.count * sequences.total**2
        return products * 2 * int(batch * pairs * columns) // 3

    return count


_divided_attention = register(
    "divided_attention(Tensor qkv, int num_heads, SymInt t, SymInt s, str axis, bool class_token,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _flops(FORWARD_PRODUCTS),
)
_divided_attention_backward = register(
    "divided_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor class_out, Tensor lse,"
    " int num_heads, SymInt t, SymInt s, str axis, bool class_token, float scale) -> Tensor",
    _backward,
    fake=lambda grad, qkv, *rest: empty_gradient(qkv),
    flops=_flops(BACKWARD_PRODUCTS),
)
once_differentiable(_divided_attention_backward, "divided_attention")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, *ctx.rest = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("divided_attention")
    if grad is None:
        return (None,) * 7
    return _divided_attention_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 6


torch.library.register_autograd(_divided_attention, _grad, setup_context=_setup)
