"""Layer norm and the linear layer after it: the normed tokens are never kept.

The backward pass norms again, in the pass over memory that it makes for the norm's gradient anyway.

Shapes: x, branch (B, N, D), S <= N tokens at the end of each clip, weight (O, D), out (B, N, O).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import layer_norm as norms
from .linear import linear_reference, rounded_weight_gradient
from .token_gather import column_sum_reference, column_sum_triton


class Norm(NamedTuple):
    """Weight and bias ``(D,)`` and epsilon of a layer norm."""

    weight: Tensor
    bias: Tensor
    eps: float


class Tail(NamedTuple):
    """Outputs that only the end of each clip has: queries of the tokens that something reads.

    Attributes:
        tokens: S, at the end of each clip.
        rows: of the linear layer, its first ones.
    """

    tokens: int
    rows: int


class NormLinear(NamedTuple):
    """What the forward pass gives.

    Attributes:
        residual: ``(B, N, D)``, x with the branch added; x itself without one.
        out: ``(B, N, O)``, without the tail's columns.
        tail: ``(B, S, rows)``, or None.
    """

    residual: Tensor
    out: Tensor
    tail: Tensor | None


class NormLinearGradients(NamedTuple):
    """Of x (that of the residual too), branch, norm, weight and bias; the last four in fp32."""

    x: Tensor
    branch: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor | None
    bias: Tensor | None


def layer_norm_linear(
    x: Tensor,
    branch: Tensor | None,
    scale_B: Tensor | None,
    norm: Norm,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    tail: Tail | None,
    triton: bool,
) -> NormLinear:
    """``linear(layer_norm(x + scale * branch))``, computed in weight's dtype."""
    run = norms.layer_norm_triton if triton else norms.layer_norm_reference
    residual, y = run(x, branch, scale_B, *norm, weight_OD.dtype)
    bias_O = None if bias_O is None else bias_O.to(weight_OD.dtype)
    if tail is None:
        return NormLinear(residual, linear_reference(y, weight_OD, bias_O), None)
    biases = (None, None) if bias_O is None else (bias_O[: tail.rows], bias_O[tail.rows :])
    last = y[:, y.shape[1] - tail.tokens :]
    return NormLinear(
        residual,
        linear_reference(y, weight_OD[tail.rows :], biases[1]),
        linear_reference(last, weight_OD[: tail.rows], biases[0]),
    )


def layer_norm_linear_backward(
    grad_out: Tensor,
    grad_tail: Tensor | None,
    grad_residual: Tensor | None,
    residual: Tensor,
    scale_B: Tensor | None,
    norm: Norm,
    weight_OD: Tensor,
    branch_dtype: torch.dtype | None,
    need_weight: bool,
    need_bias: bool,
    triton: bool,
) -> NormLinearGradients:
    """Gradients of :func:`layer_norm_linear`.

    Args:
        grad_out: of out.
        grad_tail: of tail, None without one.
        grad_residual: of the residual, or of its last tokens only.
        residual: what :func:`layer_norm_linear` gave.
        scale_B: as there, as are norm and weight.
        branch_dtype: None without a branch.
        need_weight: the weight's is wanted; need_bias: the bias's, another pass over grad_out.
        triton: which kernels run.
    """
    dtype = weight_OD.dtype
    tail_rows = 0 if grad_tail is None else grad_tail.shape[2]
    grad_y = linear_reference(grad_out, weight_OD[tail_rows:].t(), None)
    if grad_tail is not None:
        last = grad_y[:, grad_y.shape[1] - grad_tail.shape[1] :]
        last += linear_reference(grad_tail, weight_OD[:tail_rows].t(), None)
    run = norms.layer_norm_backward_triton if triton else norms.layer_norm_backward_reference
    y_dtype = dtype if need_weight else None
    found = run(grad_y, grad_residual, residual, scale_B, *norm, branch_dtype, y_dtype)
    del grad_y
    weight = bias = None
    if need_bias:
        add_up = column_sum_triton if triton else column_sum_reference
        bias = add_up(grad_out)
        if grad_tail is not None:
            bias = torch.cat([add_up(grad_tail), bias])
    if found.y is not None:
        weight = rounded_weight_gradient(grad_out.flatten(0, 1), found.y.flatten(0, 1))
        if grad_tail is not None:
            last = found.y[:, found.y.shape[1] - grad_tail.shape[1] :]
            part = rounded_weight_gradient(grad_tail.flatten(0, 1), last.flatten(0, 1))
            weight = torch.cat([part, weight])
    return NormLinearGradients(found.x, found.branch, found.weight, found.bias, weight, bias)
