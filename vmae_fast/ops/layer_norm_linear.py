"""Layer norm and the linear layer after it, without keeping what lies between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmae_fast.kernels import layer_norm_linear as kernels
from vmae_fast.kernels.layer_norm import too_large
from vmae_fast.kernels.layer_norm_linear import Norm, Tail

from ._backend import use_triton
from ._checks import check, check_same_device
from ._library import compute_dtype, once_differentiable, refuse_double_backward, register
from .layer_norm import check_norm, check_scale


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """``linear(layer_norm(x), weight, bias)``; kept for the backward pass is x alone.

    Args:
        x: ``(B, N, D)``, any floating dtype and strides.
        norm_weight, norm_bias: ``(D,)``.
        eps: added to the variance.
        weight: ``(O, D)``.
        bias: ``(O,)`` or None.

    Returns:
        ``(B, N, O)`` in weight's dtype, or autocast's, in which the product is computed; the norm
        in fp32 (fp64 for fp64), rounded once. Gradients flow to all tensors; those of parameters
        are added up in fp32, without atomics.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: pre-norm transformers; to compute norms again in the backward pass as in Megatron-LM's
    selective recomputation (arXiv 2205.05198).
    """
    return _run(x, None, None, norm_weight, norm_bias, eps, weight, bias, None)[1]


def add_layer_norm_linear(
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    branch_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``residual = x + branch_scale * branch``, and :func:`layer_norm_linear` of it.

    Args:
        x: ``(B, N, D)``, the residual stream.
        branch: ``(B, N, D)``, what is added to it; may have another dtype.
        norm_weight, norm_bias, eps, weight, bias: as in :func:`layer_norm_linear`.
        branch_scale: ``(B,)`` factors of drop path, without a gradient, or None.

    Returns:
        residual ``(B, N, D)`` in x's dtype, which is what is kept, and ``(B, N, O)``.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    residual, out, _ = _run(
        x, branch, branch_scale, norm_weight, norm_bias, eps, weight, bias, None
    )
    return residual, out


def add_layer_norm_query_key_value(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    num_queries: int,
    *,
    branch_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`add_layer_norm_linear` with queries of the last tokens of each clip only.

    Args:
        x: ``(B, N, D)``.
        branch: ``(B, N, D)``, or None to add nothing.
        norm_weight, norm_bias, eps: as in :func:`layer_norm_linear`.
        weight: ``(3 * D, D)``, rows of q, k and v.
        bias: ``(3 * D,)`` or None.
        num_queries: S, from 1 to N.
        branch_scale: ``(B,)`` factors of drop path, or None.

    Returns:
        The residual of the last tokens ``(B, S, D)``, q ``(B, S, D)`` and kv ``(B, N, 2 * D)``.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check(
        x.dim() == 3 and 0 < num_queries <= x.shape[1],
        lambda: (
            f"num_queries must be from 1 to N for x (B, N, D), got {num_queries} and "
            f"shape {tuple(x.shape)}"
        ),
    )
    check(
        weight.dim() == 2 and weight.shape[0] == 3 * weight.shape[1],
        lambda: f"weight must be (3 * D, D), got shape {tuple(weight.shape)}",
    )
    tail = Tail(num_queries, weight.shape[1])
    residual, kv, q = _run(x, branch, branch_scale, norm_weight, norm_bias, eps, weight, bias, tail)
    return residual, q, kv


def _run(
    x: Tensor,
    branch: Tensor | None,
    branch_scale: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tail | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check(x.dim() == 3, lambda: f"x must be (B, N, D), got shape {tuple(x.shape)}")
    check_norm(x, norm_weight, norm_bias, eps)
    if branch is not None:
        shape = branch.shape
        check(
            shape == x.shape,
            lambda: f"branch must be of x's shape {tuple(x.shape)}, got {tuple(shape)}",
        )
    if branch_scale is not None:
        check_scale(branch_scale, x.shape[0])
        branch_scale = branch_scale.detach()
    check(
        weight.dim() == 2 and weight.shape[1] == x.shape[2],
        lambda: f"weight must be (O, D) with D={x.shape[2]}, got shape {tuple(weight.shape)}",
    )
    check(
        bias is None or tuple(bias.shape) == (weight.shape[0],),
        lambda: (
            f"bias must be (O,) = ({weight.shape[0]},), got shape "
            f"{None if bias is None else (*bias.shape,)}"
        ),
    )
    check(weight.is_floating_point(), lambda: f"weight must be floating point, got {weight.dtype}")
    check_same_device("x", x, branch=branch, branch_scale=branch_scale, weight=weight, bias=bias)
    # The op computes with the narrow copy, which it keeps; the gradient is of the weight itself,
    # and never rounded to the copy's dtype.
    narrow = weight.detach().to(compute_dtype(weight))
    residual, tail_residual, out, queries = _layer_norm_linear(
        x, branch, branch_scale, norm_weight, norm_bias, eps, weight, narrow, bias,
        *((-1, 0) if tail is None else tail),
    )  # fmt: skip
    return (residual if tail is None else tail_residual), out, queries


def _tail(tokens: int, rows: int) -> Tail | None:
    return None if tokens < 0 else Tail(tokens, rows)


def _forward(
    x: Tensor, branch: Tensor | None, scale: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
    eps: float, weight: Tensor, narrow: Tensor, bias: Tensor | None, tokens: int, rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tail = _tail(tokens, rows)
    triton = use_triton(x, branch, scale, norm_weight, norm_bias, narrow, too_large=too_large(x))
    norm = Norm(norm_weight, norm_bias, eps)
    found = kernels.layer_norm_linear(x, branch, scale, norm, narrow, bias, tail, triton)
    # Where nothing is added the residual is x, which an op may not return.
    kept = x.new_empty(0) if branch is None else found.residual.contiguous()
    if tail is None or found.tail is None:
        return kept, x.new_empty(0), found.out, found.out.new_empty(0)
    last = found.residual[:, x.shape[1] - tokens :]
    return kept, last.clone(memory_format=torch.contiguous_format), found.out, found.tail


def _fake(
    x: Tensor, branch: Tensor | None, scale: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
    eps: float, weight: Tensor, narrow: Tensor, bias: Tensor | None, tokens: int, rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, num_tokens, width = x.shape
    kept = x.new_empty(0) if branch is None else x.new_empty(x.shape)
    out = narrow.new_empty(batch, num_tokens, weight.shape[0] - rows)
    if tokens < 0:
        return kept, x.new_empty(0), out, narrow.new_empty(0)
    return (
        kept,
        x.new_empty(batch, tokens, width),
        out,
        narrow.new_empty(batch, tokens, rows),
    )


def _backward(
    grad_out: Tensor, grad_tail: Tensor | None, grad_residual: Tensor | None, residual: Tensor,
    scale: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float, narrow: Tensor,
    branch_dtype: torch.dtype | None, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    triton = use_triton(
        grad_out, residual, scale, norm_weight, norm_bias, too_large=too_large(residual)
    )
    found = kernels.layer_norm_linear_backward(
        grad_out, grad_tail, grad_residual, residual, scale, Norm(norm_weight, norm_bias, eps),
        narrow, branch_dtype, need_weight, need_bias, triton,
    )  # fmt: skip
    return (
        found.x,
        grad_out.new_empty(0) if found.branch is None else found.branch,
        found.norm_weight,
        found.norm_bias,
        grad_out.new_empty(0) if found.weight is None else found.weight,
        grad_out.new_empty(0) if found.bias is None else found.bias,
    )


def _backward_fake(
    grad_out: Tensor, grad_tail: Tensor | None, grad_residual: Tensor | None, residual: Tensor,
    scale: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float, narrow: Tensor,
    branch_dtype: torch.dtype | None, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(narrow.dtype, torch.float32)
    norm_wide = torch.promote_types(residual.dtype, torch.float32)
    own = 0 if branch_dtype is None else residual.shape
    return (
        residual.new_empty(residual.shape),
        residual.new_empty(own, dtype=branch_dtype or grad_out.dtype),
        residual.new_empty(residual.shape[2], dtype=norm_wide),
        residual.new_empty(residual.shape[2], dtype=norm_wide),
        narrow.new_empty(narrow.shape, dtype=wide) if need_weight else grad_out.new_empty(0),
        narrow.new_empty(narrow.shape[0], dtype=wide) if need_bias else grad_out.new_empty(0),
    )


def _flops(x: Any, branch: Any, scale: Any, *rest: Any, **more: Any) -> int:
    weight, tokens, rows = rest[3], rest[-2], rest[-1]
    out = x[1] * weight[0] if tokens < 0 else x[1] * (weight[0] - rows) + tokens * rows
    return int(2 * x[0] * out * x[2])


def _backward_flops(grad_out: Any, grad_tail: Any, *rest: Any, **more: Any) -> int:
    out = grad_out[0] * grad_out[1] * grad_out[2]
    if grad_tail is not None:
        out += grad_tail[0] * grad_tail[1] * grad_tail[2]
    need_weight = rest[-2]
    return int((2 if need_weight else 1) * 2 * out * rest[1][2])


_layer_norm_linear = register(
    "layer_norm_linear(Tensor x, Tensor? branch, Tensor? branch_scale, Tensor norm_weight,"
    " Tensor norm_bias, float eps, Tensor weight, Tensor narrow, Tensor? bias, SymInt tail_tokens,"
    " SymInt tail_rows) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _flops,
)
_layer_norm_linear_backward = register(
    "layer_norm_linear_backward(Tensor grad_out, Tensor? grad_tail, Tensor? grad_residual,"
    " Tensor residual, Tensor? branch_scale, Tensor norm_weight, Tensor norm_bias, float eps,"
    " Tensor narrow, ScalarType? branch_dtype, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_flops,
)
once_differentiable(_layer_norm_linear_backward, "layer_norm_linear")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, scale, norm_weight, norm_bias, eps, weight, narrow, bias, tokens, _ = inputs
    kept, _, out, _ = output
    has_branch, has_tail = branch is not None, tokens >= 0
    ctx.save_for_backward(kept if has_branch else x, scale, norm_weight, norm_bias, narrow)
    ctx.set_materialize_grads(False)
    if has_tail or not has_branch:
        ctx.mark_non_differentiable(kept)
    ctx.name = "add_layer_norm_linear" if has_branch else "layer_norm_linear"
    if has_tail:
        ctx.name = "add_layer_norm_query_key_value"
    ctx.eps, ctx.has_tail, ctx.out = eps, has_tail, (out.shape, out.dtype, out.device)
    ctx.branch_dtype = branch.dtype if has_branch else None
    ctx.shared = has_branch and scale is None and branch.dtype == x.dtype
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype


def _grad(
    ctx: Any,
    grad_kept: Tensor | None,
    grad_last: Tensor | None,
    grad_out: Tensor | None,
    grad_tail: Tensor | None,
) -> tuple[Tensor | None, ...]:
    refuse_double_backward(ctx.name)
    residual, scale, norm_weight, norm_bias, narrow = ctx.saved_tensors
    grad_residual = grad_last if ctx.has_tail else grad_kept
    weight_dtype, bias_dtype = ctx.dtypes
    if grad_out is None:
        shape, dtype, device = ctx.out
        grad_out = torch.zeros(shape, dtype=dtype, device=device)
    found = _layer_norm_linear_backward(
        grad_out, grad_tail if ctx.has_tail else None, grad_residual, residual, scale,
        norm_weight, norm_bias, ctx.eps, narrow, None if ctx.shared else ctx.branch_dtype,
        ctx.needs_input_grad[6], bias_dtype is not None,
    )  # fmt: skip
    grad_x, grad_branch, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias = found
    return (
        grad_x,
        None if ctx.branch_dtype is None else grad_x if ctx.shared else grad_branch,
        None,
        grad_norm_weight.to(norm_weight.dtype),
        grad_norm_bias.to(norm_bias.dtype),
        None,
        grad_weight.to(weight_dtype) if ctx.needs_input_grad[6] else None,
        None,
        None if bias_dtype is None else grad_bias.to(bias_dtype),
        None,
        None,
    )


torch.library.register_autograd(_layer_norm_linear, _grad, setup_context=_setup)
