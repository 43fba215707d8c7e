"""GELU of a linear layer's output and its bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmae_fast.kernels import bias_gelu as kernels

from ._backend import use_triton
from ._checks import check, check_same_device
from ._library import once_differentiable, refuse_double_backward, register


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``z * (1 + erf(z / sqrt 2)) / 2`` with ``z = x + bias``: the exact GELU, in one pass.

    Kept for the backward pass are x and the bias.

    Args:
        x: ``(..., I)``, any floating dtype and strides.
        bias: ``(I,)``, any floating dtype, or None.

    Returns:
        As x in shape and dtype, computed in fp32 (fp64 for fp64) and rounded once. Gradients flow
        to x and bias, once, the latter added up in fp32 and in a fixed order.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: Gaussian Error Linear Units (arXiv 1606.08415).
    """
    check(x.dim() >= 1, lambda: "x must be (..., I), got a single number")
    check(x.is_floating_point(), lambda: f"x must be floating point, got {x.dtype}")
    if bias is not None:
        check(
            bias.dim() == 1 and bias.shape[0] == x.shape[-1],
            lambda: f"bias must be (I,) = ({x.shape[-1]},), got shape {tuple(bias.shape)}",
        )
        check(bias.is_floating_point(), lambda: f"bias must be floating point, got {bias.dtype}")
        check_same_device("x", x, bias=bias)
    flat = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    y: Tensor = _bias_gelu(flat, bias)
    return y.view(x.shape)


def _forward(x: Tensor, bias: Tensor | None) -> Tensor:
    if use_triton(x, bias):
        return kernels.bias_gelu_triton(x, bias)
    return kernels.bias_gelu_reference(x, bias)


def _backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    triton = use_triton(grad, x, bias)
    run = kernels.bias_gelu_backward_triton if triton else kernels.bias_gelu_backward_reference
    grad_x, grad_bias, _ = run(grad, x, bias, False)
    return grad_x, _no_gradient(x) if grad_bias is None else grad_bias


def _no_gradient(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


def _backward_fake(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_bias = _no_gradient(x)
    return x.new_empty(x.shape), grad_bias if bias is None else grad_bias.new_empty(bias.shape)


_bias_gelu = register(
    "bias_gelu(Tensor x, Tensor? bias) -> Tensor",
    _forward,
    fake=lambda x, bias: x.new_empty(x.shape),
)
_bias_gelu_backward = register(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
once_differentiable(_bias_gelu_backward, "bias_gelu")


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    refuse_double_backward("bias_gelu")
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _bias_gelu_backward(grad, x, bias)
    return grad_x, None if bias is None else grad_bias.to(bias.dtype)


torch.library.register_autograd(_bias_gelu, _grad, setup_context=_setup)
