"""Layer norm, alone and after the residual's addition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmae_fast.kernels import layer_norm as kernels

from ._backend import use_triton
from ._checks import check, check_same_device
from ._library import compute_dtype, once_differentiable, refuse_double_backward, register


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, for_product: bool = False
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension.

    Kept for the backward pass are x and the vectors; mean and variance are computed again.

    Args:
        x: ``(..., D)``, any floating dtype and strides.
        weight: ``(D,)``, any floating dtype.
        bias: ``(D,)``, any floating dtype.
        eps: added to the variance, positive.
        for_product: give the result in the dtype that matrix products are computed in,
            autocast's where that is on, without another pass.

    Returns:
        As x in shape, in x's dtype or as ``for_product`` says; statistics in fp32 (fp64 for
        fp64). Gradients flow to x, weight and bias, once, the latter two added up in fp32 and in
        a fixed order.

    Raises:
        ValueError: a shape, dtype or device does not fit, or eps is not positive.

    Source: Layer Normalization (arXiv 1607.06450).
    """
    check(
        x.dim() >= 1 and x.shape[-1] > 0,
        lambda: f"x must be (..., D) with D of at least 1, got shape {tuple(x.shape)}",
    )
    check_norm(x, weight, bias, eps)
    # One clip: without a scale nothing hangs on which.
    x_BND = x if x.dim() == 3 else x.reshape(-1, x.shape[-1]).unsqueeze(0)
    dtype = compute_dtype(x) if for_product else x.dtype
    y_BND: Tensor = _add_layer_norm(x_BND, None, None, weight, bias, eps, dtype)[1]
    return y_BND if x.dim() == 3 else y_BND.view(x.shape)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    branch_scale: Tensor | None = None,
    for_product: bool = False,
) -> tuple[Tensor, Tensor]:
    """``residual = x + branch_scale * branch`` and its layer norm, in one pass.

    Kept for the backward pass are the residual, which is a result, and the vectors.

    Args:
        x: ``(B, ..., D)`` residual stream, any floating dtype and strides.
        branch: of x's shape, any floating dtype and strides.
        weight: ``(D,)``, any floating dtype.
        bias: ``(D,)``, any floating dtype.
        eps: added to the variance, positive.
        branch_scale: ``(B,)`` factor of each clip's branch, as drop path has; None is 1. It gets
            no gradient.
        for_product: give the norm in the dtype that matrix products are computed in, autocast's
            where that is on, without another pass.

    Returns:
        The residual, added in fp32 (fp64 for fp64) and rounded to x's dtype; and its norm, as
        :func:`layer_norm` gives it. Gradients flow to x, branch, weight and bias, once, the
        latter two added up in fp32 and in a fixed order.

    Raises:
        ValueError: a shape, dtype or device does not fit, or eps is not positive.

    Source: Layer Normalization (arXiv 1607.06450); stochastic depth (arXiv 1603.09382).
    """
    check(
        x.dim() >= 2 and x.shape[-1] > 0,
        lambda: f"x must be (B, ..., D) with D of at least 1, got shape {tuple(x.shape)}",
    )
    check_norm(x, weight, bias, eps)
    check(
        branch.shape == x.shape,
        lambda: f"branch must be of x's shape {tuple(x.shape)}, got {tuple(branch.shape)}",
    )
    check(branch.is_floating_point(), lambda: f"branch must be floating point, got {branch.dtype}")
    check_same_device("x", x, branch=branch, branch_scale=branch_scale)
    if branch_scale is not None:
        check_scale(branch_scale, x.shape[0])
        branch_scale = branch_scale.detach()
    x_BND, branch_BND = _by_clips(x), _by_clips(branch)
    dtype = compute_dtype(x) if for_product else x.dtype
    residual, y = _add_layer_norm(x_BND, branch_BND, branch_scale, weight, bias, eps, dtype)
    return (residual, y) if x.dim() == 3 else (residual.view(x.shape), y.view(x.shape))


def check_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check(x.is_floating_point(), lambda: f"x must be floating point, got {x.dtype}")
    _check_vector("weight", weight, x.shape[-1])
    _check_vector("bias", bias, x.shape[-1])
    check(eps > 0, lambda: f"eps must be positive, got {eps}")
    check_same_device("x", x, weight=weight, bias=bias)


def _check_vector(name: str, vector: Tensor, width: int) -> None:
    check(
        vector.dim() == 1 and vector.shape[0] == width,
        lambda: f"{name} must be (D,) = ({width},), got shape {tuple(vector.shape)}",
    )
    check(vector.is_floating_point(), lambda: f"{name} must be floating point, got {vector.dtype}")


def check_scale(scale: Tensor, batch: int) -> None:
    check(
        scale.dim() == 1 and scale.shape[0] == batch,
        lambda: f"branch_scale must be (B,) = ({batch},), got shape {tuple(scale.shape)}",
    )
    check(
        scale.is_floating_point(),
        lambda: f"branch_scale must be floating point, got {scale.dtype}",
    )


def _by_clips(x: Tensor) -> Tensor:
    """``(B, ..., D)`` as ``(B, N, D)``."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _forward(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    vectors = (scale, weight, bias)
    triton = use_triton(x, branch, *vectors, dtype=dtype, too_large=kernels.too_large(x))
    run = kernels.layer_norm_triton if triton else kernels.layer_norm_reference
    residual, y = run(x, branch, scale, weight, bias, eps, dtype)
    # An op may not hand back what it was given.
    return (x.new_empty(0) if branch is None else residual), y


def _fake(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    residual = x.new_empty(0 if branch is None else x.shape)
    return residual, x.new_empty(x.shape, dtype=dtype)


def _backward(
    grad_y: Tensor,
    grad_residual: Tensor | None,
    residual: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (residual, grad_y, grad_residual, scale, weight, bias)
    triton = use_triton(*given, dtype=branch_dtype, too_large=kernels.too_large(residual))
    run = kernels.layer_norm_backward_triton if triton else kernels.layer_norm_backward_reference
    found = run(grad_y, grad_residual, residual, scale, weight, bias, eps, branch_dtype, None)
    branch = found.branch
    if branch is None or branch is found.x:
        branch = residual.new_empty(0, dtype=branch_dtype)
    return found.x, branch, found.weight, found.bias


def _backward_fake(
    grad_y: Tensor,
    grad_residual: Tensor | None,
    residual: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(residual.dtype, torch.float32)
    own = branch_dtype is not None and (scale is not None or branch_dtype != residual.dtype)
    return (
        residual.new_empty(residual.shape),
        residual.new_empty(residual.shape if own else 0, dtype=branch_dtype),
        weight.new_empty(weight.shape, dtype=wide),
        weight.new_empty(weight.shape, dtype=wide),
    )


_add_layer_norm = register(
    "add_layer_norm(Tensor x, Tensor? branch, Tensor? scale, Tensor weight, Tensor bias, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
_add_layer_norm_backward = register(
    "add_layer_norm_backward(Tensor grad_y, Tensor? grad_residual, Tensor residual, Tensor? scale,"
    " Tensor weight, Tensor bias, float eps, ScalarType? branch_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
once_differentiable(_add_layer_norm_backward, "add_layer_norm")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, scale, weight, bias, ctx.eps, _ = inputs
    ctx.name = "layer_norm" if branch is None else "add_layer_norm"
    ctx.save_for_backward(x if branch is None else output[0], scale, weight, bias)
    ctx.branch_dtype = None if branch is None else branch.dtype
    if branch is None:
        ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, grad_residual: Tensor | None, grad_y: Tensor | None) -> tuple[Any, ...]:
    refuse_double_backward(ctx.name)
    residual, scale, weight, bias = ctx.saved_tensors
    if grad_y is None:
        if grad_residual is None:
            return (None,) * 7
        # The norm was not used: only the addition is left.
        return *_grad_of_addition(ctx, grad_residual, scale), *(None,) * 5
    x, branch, grad_weight, grad_bias = _add_layer_norm_backward(
        grad_y, grad_residual, residual, scale, weight, bias, ctx.eps, ctx.branch_dtype
    )
    if ctx.branch_dtype is None:
        branch = None
    elif scale is None and ctx.branch_dtype == x.dtype:
        branch = x
    return x, branch, None, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None


def _grad_of_addition(ctx: Any, grad: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    branch = grad if scale is None else grad * scale[:, None, None]
    return grad, branch.to(ctx.branch_dtype)


torch.library.register_autograd(_add_layer_norm, _grad, setup_context=_setup)
