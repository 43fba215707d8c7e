"""GELU and the linear layer after it: the activations are never kept.

The backward pass computes them again, in the pass over memory that GELU's gradient takes anyway.

Shapes: R rows, I inner width, x (R, I), weight (O, I), out (R, O).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import bias_gelu as gelu
from .linear import linear_reference, rounded_weight_gradient
from .token_gather import column_sum_reference, column_sum_triton


class GeluLinearGradients(NamedTuple):
    """Of x, of the bias before GELU, of weight and bias; the last three in fp32."""

    x: Tensor
    gelu_bias: Tensor | None
    weight: Tensor | None
    bias: Tensor


def bias_gelu_linear(
    x_RI: Tensor, gelu_bias_I: Tensor | None, weight_OI: Tensor, bias_O: Tensor | None, triton: bool
) -> Tensor:
    """``linear(gelu(x + gelu_bias))``, ``(R, O)`` in x's dtype, which is weight's too."""
    run = gelu.bias_gelu_triton if triton else gelu.bias_gelu_reference
    bias_O = None if bias_O is None else bias_O.to(weight_OI.dtype)
    return linear_reference(run(x_RI, gelu_bias_I), weight_OI, bias_O)


def bias_gelu_linear_backward(
    grad_RO: Tensor,
    x_RI: Tensor,
    gelu_bias_I: Tensor | None,
    weight_OI: Tensor,
    need_weight: bool,
    triton: bool,
) -> GeluLinearGradients:
    """Gradients of :func:`bias_gelu_linear`."""
    grad_y = linear_reference(grad_RO, weight_OI.t(), None)
    run = gelu.bias_gelu_backward_triton if triton else gelu.bias_gelu_backward_reference
    grad_x, grad_gelu_bias, y = run(grad_y, x_RI, gelu_bias_I, need_weight, overwrite=True)
    weight = None if y is None else rounded_weight_gradient(grad_RO, y)
    add_up = column_sum_triton if triton else column_sum_reference
    return GeluLinearGradients(grad_x, grad_gelu_bias, weight, add_up(grad_RO.unsqueeze(0)))
