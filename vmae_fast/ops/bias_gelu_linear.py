"""Bias, GELU and the linear layer after it, without keeping what lies between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmae_fast.kernels import bias_gelu_linear as kernels

from ._backend import use_triton
from ._checks import check, check_same_device
from ._library import (
    autocasting,
    compute_dtype,
    once_differentiable,
    refuse_double_backward,
    register,
)


def bias_gelu_linear(
    x: Tensor, gelu_bias: Tensor | None, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``linear(gelu(x + gelu_bias), weight, bias)``; kept for the backward pass is x alone.

    Args:
        x: ``(..., I)``.
        gelu_bias: ``(I,)``, of the linear layer before, or None.
        weight: ``(O, I)``.
        bias: ``(O,)`` or None.

    Returns:
        ``(..., O)`` in x's dtype, or autocast's; GELU is the exact one (erf), in fp32 (fp64 for
        fp64), rounded once. Gradients flow to all tensors; those of parameters are added up in
        fp32, without atomics.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: GELU (arXiv 1606.08415).
    """
    width = x.shape[-1] if x.dim() else 0
    check(
        x.dim() >= 1 and weight.dim() == 2 and weight.shape[1] == width,
        lambda: (
            f"x must be (..., I) and weight (O, I) with the same I, got shapes {tuple(x.shape)} "
            f"and {tuple(weight.shape)}"
        ),
    )
    for name, vector, size in (("gelu_bias", gelu_bias, width), ("bias", bias, weight.shape[0])):
        if vector is not None and tuple(vector.shape) != (size,):
            raise ValueError(f"{name} must be ({size},), got shape {tuple(vector.shape)}")
    check(
        x.is_floating_point() and (x.dtype == weight.dtype or autocasting(x)),
        lambda: f"x is {x.dtype} but weight is {weight.dtype}; cast one of them",
    )
    check_same_device("x", x, gelu_bias=gelu_bias, weight=weight, bias=bias)
    # As in layer_norm_linear: the gradient is of the weight itself, never rounded to the copy's.
    narrow = weight.detach().to(compute_dtype(weight))
    rows = x.to(narrow.dtype).reshape(-1, width)
    out: Tensor = _bias_gelu_linear(rows, gelu_bias, weight, narrow, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _forward(
    x: Tensor, gelu_bias: Tensor | None, weight: Tensor, narrow: Tensor, bias: Tensor | None
) -> Tensor:
    return kernels.bias_gelu_linear(x, gelu_bias, narrow, bias, use_triton(x, gelu_bias))


def _backward(
    grad: Tensor, x: Tensor, gelu_bias: Tensor | None, narrow: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    triton = use_triton(x, grad, gelu_bias)
    found = kernels.bias_gelu_linear_backward(grad, x, gelu_bias, narrow, need_weight, triton)
    return (
        found.x,
        found.bias.new_empty(0) if found.gelu_bias is None else found.gelu_bias,
        found.bias.new_empty(0) if found.weight is None else found.weight,
        found.bias,
    )


def _backward_fake(
    grad: Tensor, x: Tensor, gelu_bias: Tensor | None, narrow: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if gelu_bias is None else x.shape[1], dtype=wide),
        x.new_empty(narrow.shape if need_weight else (0,), dtype=wide),
        x.new_empty(narrow.shape[0], dtype=wide),
    )


def _flops(x: Any, gelu_bias: Any, weight: Any, *rest: Any, **more: Any) -> int:
    return int(2 * x[0] * x[1] * weight[0])


def _backward_flops(grad: Any, x: Any, *rest: Any, **more: Any) -> int:
    return int((2 if rest[-1] else 1) * 2 * grad[0] * grad[1] * x[1])


_bias_gelu_linear = register(
    "bias_gelu_linear(Tensor x, Tensor? gelu_bias, Tensor weight, Tensor narrow, Tensor? bias)"
    " -> Tensor",
    _forward,
    fake=lambda x, gelu_bias, weight, narrow, bias: x.new_empty(x.shape[0], weight.shape[0]),
    flops=_flops,
)
_bias_gelu_linear_backward = register(
    "bias_gelu_linear_backward(Tensor grad, Tensor x, Tensor? gelu_bias, Tensor narrow,"
    " bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    _backward_flops,
)
once_differentiable(_bias_gelu_linear_backward, "bias_gelu_linear")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gelu_bias, weight, narrow, bias = inputs
    ctx.save_for_backward(x, gelu_bias, narrow)
    ctx.dtypes = [None if one is None else one.dtype for one in (gelu_bias, weight, bias)]


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward("bias_gelu_linear")
    need_weight = ctx.needs_input_grad[2]
    grad_x, *found = _bias_gelu_linear_backward(grad, *ctx.saved_tensors, need_weight)
    gelu_bias, weight, bias = (
        None if dtype is None or not needed else one.to(dtype)
        for one, dtype, needed in zip(found, ctx.dtypes, (True, need_weight, True), strict=True)
    )
    return grad_x, gelu_bias, weight, None, bias


torch.library.register_autograd(_bias_gelu_linear, _grad, setup_context=_setup)
