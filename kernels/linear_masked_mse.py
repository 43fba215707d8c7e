"""Pixel head and masked MSE together, in chunks of rows: predictions never exist in full.

The difference of a chunk's predictions and targets takes their place, and goes into the three
gradients at once, of order 1; the backward pass multiplies them by grad * 2 / (P * scored tokens).
The head's rows are put in the video's own order (c pt ph pw) first, so that predictions and pixels
lie alike in memory.

Shapes: n = B * S tokens of width E, weight (P, E), P = C * q values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .linear import linear_reference, weight_gradient
from .masked_mse import (
    Differences,
    Targets,
    differences_reference,
    differences_triton,
    scale_rows_reference,
    scale_rows_triton,
)
from .token_gather import column_sum_reference, column_sum_triton

# Bytes of predictions at a time. On a GPU enough to fill it, and half of what a large L2 holds; not
# yet measured there. On a CPU small, but enough rows for the quicker of its products.
_CHUNK_BYTES = {"cuda": 24 << 20, "cpu": 8 << 20}

Result = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def linear_masked_mse_reference(
    x_BSE: Tensor,
    weight_PE: Tensor,
    bias_P: Tensor | None,
    targets: Targets,
    scored_BS: Tensor | None,
    keep: bool,
) -> Result:
    """Loss, and if ``keep`` its gradients but for the factor ``2 / (P * scored tokens)``.

    Computed in the dtype of x. Returns the scalar loss in fp32 (fp64 for fp64), the gradient of x
    ``(n, E)`` in x's dtype, those of weight and bias in fp32 (fp64).
    """
    turn = differences_reference(targets)
    return in_chunks(x_BSE, weight_PE, bias_P, targets, scored_BS, keep, turn, column_sum_reference)


def linear_masked_mse_triton(
    x_BSE: Tensor,
    weight_PE: Tensor,
    bias_P: Tensor | None,
    targets: Targets,
    scored_BS: Tensor | None,
    keep: bool,
) -> Result:
    """As :func:`linear_masked_mse_reference`."""
    turn = differences_triton(targets)
    return in_chunks(x_BSE, weight_PE, bias_P, targets, scored_BS, keep, turn, column_sum_triton)


def linear_masked_mse_backward(
    scale: Tensor, grad_x_nE: Tensor, grad_weight: Tensor, grad_bias: Tensor, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept gradients times ``scale``, a scalar on the device, multiplied in fp32 at least."""
    scale_rows = scale_rows_triton if triton else scale_rows_reference
    rows = scale.expand(grad_x_nE.shape[0])
    return (
        scale_rows(grad_x_nE, rows, 1.0, 1, grad_x_nE.dtype),
        grad_weight * scale,
        grad_bias * scale,
    )


def in_chunks(
    x_BSE: Tensor,
    weight_PE: Tensor,
    bias_P: Tensor | None,
    targets: Targets,
    scored_BS: Tensor | None,
    keep: bool,
    turn: Differences,
    column_sum: Callable[[Tensor], Tensor],
) -> Result:
    dtype, wide = x_BSE.dtype, torch.promote_types(x_BSE.dtype, torch.float32)
    x_nE = x_BSE.flatten(0, 1)
    count, width = x_nE.shape
    weight_PE = _channel_major(weight_PE, targets).to(dtype)
    bias_P = None if bias_P is None else _channel_major(bias_P, targets).to(dtype)
    weight_n = None if scored_BS is None else scored_BS.reshape(-1).to(wide)
    loss_n = x_nE.new_empty(count, dtype=wide)
    grad_x = grad_weight = grad_bias = None
    if keep:
        grad_x = x_nE.new_empty(count, width)
        grad_weight = x_nE.new_zeros(weight_PE.shape, dtype=wide)
        grad_bias = x_nE.new_zeros(weight_PE.shape[0], dtype=wide)
    step = _chunk_rows(x_nE, targets)
    for first in range(0, count, step):
        part = slice(first, first + step)
        values_nP = linear_reference(x_nE[part], weight_PE, bias_P)
        loss_n[part] = turn(values_nP, first, None if weight_n is None else weight_n[part])
        if grad_x is not None and grad_weight is not None and grad_bias is not None:
            grad_x[part] = linear_reference(values_nP, weight_PE.t(), None)
            grad_weight += weight_gradient(values_nP, x_nE[part])
            grad_bias += column_sum(values_nP.unsqueeze(0))
        # Before the next chunk's are made, which would stand beside them.
        del values_nP
    if grad_weight is not None and grad_bias is not None:
        grad_weight = _pixel_major(grad_weight, targets)
        grad_bias = _pixel_major(grad_bias, targets)
    loss = loss_n.mean() if weight_n is None else (loss_n * weight_n).sum() / weight_n.sum()
    return loss, grad_x, grad_weight, grad_bias


def _channel_major(head: Tensor, targets: Targets) -> Tensor:
    """Rows of the head from (pt ph pw c) to (c pt ph pw)."""
    return head.unflatten(0, (targets.pixels, -1)).transpose(0, 1).flatten(0, 1).contiguous()


def _pixel_major(head: Tensor, targets: Targets) -> Tensor:
    """Rows of the head from (c pt ph pw) to (pt ph pw c)."""
    return head.unflatten(0, (-1, targets.pixels)).transpose(0, 1).flatten(0, 1).contiguous()


def _chunk_rows(x_nE: Tensor, targets: Targets) -> int:
    """Tokens at a time: a multiple of 128, and on a CPU at least 1024."""
    budget = _CHUNK_BYTES.get(x_nE.device.type, _CHUNK_BYTES["cuda"])
    rows = budget // max(targets.values * x_nE.element_size(), 1) // 128 * 128
    return max(rows, 1024 if x_nE.device.type == "cpu" else 128)
