"""Exact (erf) GELU of a linear layer's output and its bias, in one pass.

Nothing but the input is needed for the backward pass, which can hand out the GELU once more for
the gradient of the next layer.

Shapes: x (R, I) rows and columns; bias (I,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _launch
from ._launch import Row, cdiv, jit, tl
from .token_gather import dense_rows

# 8 values a thread, one load of 16 bytes for 16-bit dtypes. Not yet measured.
_ROWS = Row({"BLOCK_R": 8, "BLOCK_I": 128}, num_warps=4, num_stages=1)
# Rows that one program of the backward pass takes: few enough programs that their sums of the
# bias's gradient are a hundredth of what is moved. Not yet measured.
_SPAN = 64

# Values worked on at a time on a CPU: bounds what is in fp32 beside 16-bit tensors. Smaller chunks,
# which a cache would hold, took 1.1 to 2.5 times as long: threads start anew for each.
_CHUNK_VALUES = 1 << 23


def bias_gelu_reference(x_RI: Tensor, bias_I: Tensor | None) -> Tensor:
    """``z * (1 + erf(z / sqrt 2)) / 2`` with ``z = x + bias``, in x's dtype.

    Computed in fp32 at least, with one rounding at the end.
    """
    if bias_I is None:
        # PyTorch's own takes 16-bit values to fp32 and rounds once.
        return torch.nn.functional.gelu(x_RI.contiguous())
    y_RI = torch.empty_like(x_RI, memory_format=torch.contiguous_format)
    for part in _chunks(x_RI):
        _gelu_into(y_RI[part], _with_bias(x_RI[part], bias_I))
    return y_RI


def bias_gelu_backward_reference(
    grad_RI: Tensor, x_RI: Tensor, bias_I: Tensor | None, keep: bool, overwrite: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients from the input alone.

    Args:
        grad_RI: of the result, any floating dtype.
        x_RI: as in the forward pass.
        bias_I: as in the forward pass.
        keep: also compute the forward result again.
        overwrite: the gradient of x may take the place of grad, which nobody else reads.

    Returns:
        Gradient of x in x's dtype; of the bias, fp32 (fp64 for fp64), None without one; the
        forward result, None if not asked for.
    """
    if bias_I is None:
        x_RI, grad_RI = x_RI.contiguous(), grad_RI.to(x_RI.dtype).contiguous()
        if overwrite:
            grad_x_RI = torch.ops.aten.gelu_backward.grad_input(grad_RI, x_RI, grad_input=grad_RI)
        else:
            grad_x_RI = torch.ops.aten.gelu_backward(grad_RI, x_RI)
        return grad_x_RI, None, torch.nn.functional.gelu(x_RI) if keep else None
    wide = torch.promote_types(x_RI.dtype, torch.float32)
    grad_x_RI = torch.empty_like(x_RI, memory_format=torch.contiguous_format)
    grad_bias_I = x_RI.new_zeros(x_RI.shape[1], dtype=wide)
    y_RI = torch.empty_like(grad_x_RI) if keep else None
    for part in _chunks(x_RI):
        z_RI = _with_bias(x_RI[part], bias_I)
        through_RI = torch.ops.aten.gelu_backward(grad_RI[part].to(wide), z_RI)
        grad_x_RI[part] = through_RI
        grad_bias_I += through_RI.sum(0)
        if y_RI is not None:
            _gelu_into(y_RI[part], z_RI)
    return grad_x_RI, grad_bias_I, y_RI


def _gelu_into(y_RI: Tensor, z_RI: Tensor) -> None:
    if y_RI.dtype == z_RI.dtype:
        torch.ops.aten.gelu.out(z_RI, out=y_RI)
    else:
        y_RI.copy_(torch.nn.functional.gelu(z_RI))


def _with_bias(x_RI: Tensor, bias_I: Tensor) -> Tensor:
    """``x + bias`` in fp32 at least."""
    x_RI = x_RI.to(torch.promote_types(x_RI.dtype, torch.float32))
    return x_RI + bias_I.to(x_RI.dtype)


def _chunks(x_RI: Tensor) -> list[slice]:
    """Rows to work on at a time; all of them where that is no gain."""
    rows, width = x_RI.shape
    step = max(_CHUNK_VALUES // max(width, 1), 1) if x_RI.device.type == "cpu" else max(rows, 1)
    return [slice(first, first + step) for first in range(0, rows, step)]


@jit
def _normal_below(z):
    """Probability that a standard normal number is below z."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)  # 1 / sqrt 2


@jit
def _bias_gelu_kernel(
    x_ptr, bias_ptr, y_ptr, num_rows, width, stride_x,
    HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """GELU of BLOCK_R rows of BLOCK_I columns.

    Grid: row blocks x column blocks, columns fastest. Writes all of y.
    """
    column_blocks = tl.cdiv(width, BLOCK_I)
    program = tl.program_id(0)
    rows = (program // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_i = (program % column_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i = offs_i < width
    mask = (rows < num_rows)[:, None] & mask_i[None, :]
    z = tl.load(x_ptr + rows[:, None] * stride_x + offs_i[None, :], mask=mask, other=0.0)
    z = z.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)[None, :]
    y = z * _normal_below(z)
    out = y_ptr + rows[:, None] * width + offs_i[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _bias_gelu_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, grad_x_ptr, grad_bias_ptr, y_ptr,
    num_rows, width, stride_grad, stride_x,
    HAS_BIAS: tl.constexpr, KEEP: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Gradients of SPAN rows of BLOCK_I columns, BLOCK_R rows at a time.

    Grid: spans x column blocks, columns fastest. Writes all of grad_x, with KEEP of y, with
    HAS_BIAS one row of grad_bias a span.
    """
    column_blocks = tl.cdiv(width, BLOCK_I)
    program = tl.program_id(0)
    span = (program // column_blocks).to(tl.int64)
    offs_i = (program % column_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i = offs_i < width
    bias = tl.zeros([BLOCK_I], dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_I], dtype=tl.float32)
    for first in range(0, SPAN, BLOCK_R):
        rows = span * SPAN + first + tl.arange(0, BLOCK_R)
        mask = (rows < num_rows)[:, None] & mask_i[None, :]
        z = tl.load(x_ptr + rows[:, None] * stride_x + offs_i[None, :], mask=mask, other=0.0)
        grad_at = grad_ptr + rows[:, None] * stride_grad + offs_i[None, :]
        grad = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
        z = z.to(tl.float32) + bias[None, :]
        below = _normal_below(z)
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)  # 1 / sqrt(2 pi)
        grad_x = grad * (below + z * density)
        out = rows[:, None] * width + offs_i[None, :]
        tl.store(grad_x_ptr + out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if KEEP:
            tl.store(y_ptr + out, (z * below).to(y_ptr.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            total += tl.where(mask, grad_x, 0.0)
    if HAS_BIAS:
        tl.store(grad_bias_ptr + span * width + offs_i, tl.sum(total, axis=0), mask=mask_i)


def bias_gelu_triton(x_RI: Tensor, bias_I: Tensor | None) -> Tensor:
    """As :func:`bias_gelu_reference`, in one pass."""
    x_RI = dense_rows(x_RI)
    rows, width = x_RI.shape
    y_RI = x_RI.new_empty(rows, width)
    _launch.launch(
        _bias_gelu_kernel,
        cdiv(rows, _ROWS.blocks["BLOCK_R"]) * cdiv(width, _ROWS.blocks["BLOCK_I"]),
        x_RI, None if bias_I is None else bias_I.contiguous(), y_RI, rows, width, x_RI.stride(0),
        HAS_BIAS=bias_I is not None,
        row=_ROWS,
    )  # fmt: skip
    return y_RI


def bias_gelu_backward_triton(
    grad_RI: Tensor, x_RI: Tensor, bias_I: Tensor | None, keep: bool, overwrite: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As :func:`bias_gelu_backward_reference`, in one pass.

    The bias's gradient is a sum over fixed spans of rows, added in a fixed order.
    """
    grad_RI, x_RI = dense_rows(grad_RI), dense_rows(x_RI)
    rows, width = x_RI.shape
    spans = cdiv(rows, _SPAN)
    in_place = overwrite and grad_RI.dtype == x_RI.dtype and grad_RI.is_contiguous()
    grad_x_RI = grad_RI if in_place else x_RI.new_empty(rows, width)
    partial = None if bias_I is None else x_RI.new_empty(spans, width, dtype=torch.float32)
    y_RI = torch.empty_like(grad_x_RI) if keep else None
    _launch.launch(
        _bias_gelu_backward_kernel,
        spans * cdiv(width, _ROWS.blocks["BLOCK_I"]),
        grad_RI, x_RI, None if bias_I is None else bias_I.contiguous(), grad_x_RI, partial, y_RI,
        rows, width, grad_RI.stride(0), x_RI.stride(0),
        HAS_BIAS=partial is not None,
        KEEP=keep,
        SPAN=_SPAN,
        row=_ROWS,
    )  # fmt: skip
    return grad_x_RI, None if partial is None else partial.sum(0), y_RI
