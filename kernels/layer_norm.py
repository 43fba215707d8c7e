"""Layer norm, with the residual's addition before it in the same pass.

Nothing but the residual is needed for the backward pass: mean and variance are computed again
from it, and so is the norm itself where a caller needs it for the gradient of the next layer.

Shapes: x, branch and residual (B, N, D) clips, tokens, width; scale (B,) factors of the branch;
weight and bias (D,).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _launch
from ._launch import Row, cdiv, jit, power_of_2, tl
from .token_gather import dense_rows

# By how many columns a row has, rounded up to a power of two, at most. Up to 2048 columns 8 values
# a thread, one load of 16 bytes for 16-bit dtypes: with twice as many the backward pass takes 128
# registers and more, and spills some. Not yet measured.
_ROWS = {
    1024: Row(num_warps=4, num_stages=1),
    2048: Row(num_warps=8, num_stages=1),
    4096: Row(num_warps=8, num_stages=1),
}
# Programs at most: as many as registers let an H200 run at a time for the usual widths, 8 and 6 on
# each of 132 multiprocessors. The same on every GPU, because the backward pass adds up parameter
# gradients program by program. Not yet measured.
_FORWARD_PROGRAMS = 1056
_BACKWARD_PROGRAMS = 792
# Row numbers are 32-bit integers, for the sake of division; offsets are not.
_MOST_ROWS = 1 << 30


class NormGradients(NamedTuple):
    """What the backward pass gives.

    Attributes:
        x: ``(B, N, D)`` in the residual's dtype.
        branch: ``(B, N, D)`` in the branch's dtype, ``x`` itself where the two are the same; None
            without a branch.
        y: the norm computed again, ``(B, N, D)``; None if not asked for.
        weight: ``(D,)`` fp32 (fp64 for fp64).
        bias: as weight.
    """

    x: Tensor
    branch: Tensor | None
    y: Tensor | None
    weight: Tensor
    bias: Tensor


def layer_norm_reference(
    x_BND: Tensor,
    branch_BND: Tensor | None,
    scale_B: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``residual = x + scale * branch`` and ``y = (residual - mean) * rstd * weight + bias``.

    The residual is added in fp32 at least and rounded to x's dtype; it is x itself without a
    branch. The norm is that of the rounded residual, in ``dtype``; statistics in fp32 at least.
    """
    residual_BND = _add_reference(x_BND, branch_BND, scale_B)
    y_BND, _, _ = _norm_reference(residual_BND, weight_D, bias_D, eps, dtype)
    return residual_BND, y_BND


def layer_norm_backward_reference(
    grad_y_BND: Tensor,
    grad_residual_BSD: Tensor | None,
    residual_BND: Tensor,
    scale_B: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    branch_dtype: torch.dtype | None,
    y_dtype: torch.dtype | None,
) -> NormGradients:
    """Gradients from the residual alone; see :class:`NormGradients`.

    Args:
        grad_y_BND: of the norm, any floating dtype.
        grad_residual_BSD: of the residual's last S tokens, the others having none; or None.
        residual_BND: what the norm was taken of.
        scale_B: as in the forward pass.
        weight_D: as in the forward pass.
        bias_D: as in the forward pass; read for y only.
        eps: as in the forward pass.
        branch_dtype: of the branch, None without one.
        y_dtype: that y is computed again in, None to leave that out.
    """
    dtype = residual_BND.dtype
    wide = torch.promote_types(dtype, torch.float32)
    given_BND = residual_BND.to(wide)
    y_BND, mean_BN1, rstd_BN1 = _norm_reference(
        given_BND, weight_D, bias_D, eps, wide if y_dtype is None else y_dtype
    )
    grad_BND, grad_weight_D, grad_bias_D = torch.ops.aten.native_layer_norm_backward(
        grad_y_BND.to(wide).contiguous(), given_BND.contiguous(), [residual_BND.shape[2]],
        mean_BN1, rstd_BN1, weight_D.to(wide), bias_D.to(wide), [True, True, True],
    )  # fmt: skip
    if grad_residual_BSD is not None:
        grad_BND[:, grad_BND.shape[1] - grad_residual_BSD.shape[1] :] += grad_residual_BSD
    x_BND = grad_BND.to(dtype)
    grad_branch_BND = None
    if branch_dtype is not None:
        scaled = grad_BND if scale_B is None else grad_BND * scale_B.to(wide)[:, None, None]
        same = scale_B is None and branch_dtype == dtype
        grad_branch_BND = x_BND if same else scaled.to(branch_dtype)
    y = None if y_dtype is None else y_BND
    return NormGradients(x_BND, grad_branch_BND, y, grad_weight_D, grad_bias_D)


def _add_reference(x_BND: Tensor, branch_BND: Tensor | None, scale_B: Tensor | None) -> Tensor:
    if branch_BND is None:
        return x_BND
    if scale_B is None:
        return torch.add(x_BND, branch_BND).to(x_BND.dtype).contiguous()
    wide = torch.promote_types(torch.promote_types(x_BND.dtype, branch_BND.dtype), torch.float32)
    scale_B11 = scale_B.to(wide)[:, None, None]
    residual_BND = torch.addcmul(x_BND.to(wide), branch_BND.to(wide), scale_B11)
    return residual_BND.to(x_BND.dtype).contiguous()


def _norm_reference(
    x_BND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm in ``dtype``, mean and reciprocal deviation in fp32 at least."""
    wide = torch.promote_types(x_BND.dtype, torch.float32)
    if x_BND.device.type != "cpu" or x_BND.dtype != dtype:
        # A CPU's kernel takes values of 16 bits with vectors of 32, and rounds once.
        x_BND = x_BND.to(wide)
    y_BND, mean_BN1, rstd_BN1 = torch.native_layer_norm(
        x_BND, [x_BND.shape[2]], weight_D.to(wide), bias_D.to(wide), eps
    )
    return y_BND.to(dtype), mean_BN1, rstd_BN1


@jit
def _statistics(x, mask_d, width, eps):
    """Difference from the mean, and reciprocal standard deviation, of rows that are zero beyond
    their width: in two passes, because the mean may be large.
    """
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(mask_d[None, :], x - mean[:, None], 0.0)
    return centred, tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)


@jit
def _layer_norm_kernel(
    x_ptr, branch_ptr, scale_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    num_rows, rows_per_clip, width, span,
    stride_x_clip, stride_x_token, stride_branch_clip, stride_branch_token, eps,
    HAS_BRANCH: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add and norm span rows, BLOCK_R at a time.

    Grid: spans. Writes all of y, and with HAS_BRANCH of residual.
    """
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for first in range(0, span, BLOCK_R):
        rows = tl.program_id(0) * span + first + tl.arange(0, BLOCK_R)
        mask_r = rows < num_rows
        mask = mask_r[:, None] & mask_d[None, :]
        clip, token = (rows // rows_per_clip).to(tl.int64), (rows % rows_per_clip).to(tl.int64)
        out = rows.to(tl.int64)[:, None] * width + offs_d[None, :]
        start = clip * stride_x_clip + token * stride_x_token
        x = tl.load(x_ptr + start[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            start = clip * stride_branch_clip + token * stride_branch_token
            branch_at = branch_ptr + start[:, None] + offs_d[None, :]
            branch = tl.load(branch_at, mask=mask, other=0.0).to(tl.float32)
            if HAS_SCALE:
                scale = tl.load(scale_ptr + clip, mask=mask_r, other=0.0).to(tl.float32)
                branch = branch * scale[:, None]
            residual = (x + branch).to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + out, residual, mask=mask)
            x = residual.to(tl.float32)
        centred, rstd = _statistics(x, mask_d, width, eps)
        y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _layer_norm_backward_kernel(
    grad_y_ptr, grad_residual_ptr, residual_ptr, scale_ptr, weight_ptr, bias_ptr,
    grad_x_ptr, grad_branch_ptr, y_ptr, grad_weight_ptr, grad_bias_ptr,
    num_rows, rows_per_clip, lacking, width, span,
    stride_gy_clip, stride_gy_token, stride_gr_clip, stride_gr_token,
    stride_residual_clip, stride_residual_token, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BRANCH: tl.constexpr,
    HAS_Y: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of span rows, BLOCK_R at a time; grad_residual lacks the first tokens of a clip.

    Grid: spans. Writes all of grad_x, with HAS_BRANCH of grad_branch, with HAS_Y of y, and one row
    a span of grad_weight and grad_bias.
    """
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    grad_bias = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for first in range(0, span, BLOCK_R):
        rows = tl.program_id(0) * span + first + tl.arange(0, BLOCK_R)
        mask_r = rows < num_rows
        mask = mask_r[:, None] & mask_d[None, :]
        clip, token = (rows // rows_per_clip).to(tl.int64), (rows % rows_per_clip).to(tl.int64)
        start = clip * stride_residual_clip + token * stride_residual_token
        x = tl.load(residual_ptr + start[:, None] + offs_d[None, :], mask=mask, other=0.0)
        start = clip * stride_gy_clip + token * stride_gy_token
        grad_y = tl.load(grad_y_ptr + start[:, None] + offs_d[None, :], mask=mask, other=0.0)
        # Read before the statistics, which have to wait for the rest.
        grad_x = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
        if HAS_RESIDUAL:
            start = clip * stride_gr_clip + (token - lacking) * stride_gr_token
            grad_at = grad_residual_ptr + start[:, None] + offs_d[None, :]
            has = mask & (token >= lacking)[:, None]
            grad_x = tl.load(grad_at, mask=has, other=0.0).to(tl.float32)
        grad_y = grad_y.to(tl.float32)
        centred, rstd = _statistics(x.to(tl.float32), mask_d, width, eps)
        normed = centred * rstd[:, None]
        grad_normed = grad_y * weight[None, :]
        level = tl.sum(grad_normed, axis=1) / width
        # Not of normed: so this sum need not wait for the deviation.
        along = tl.sum(grad_normed * centred, axis=1) * rstd / width
        grad_x += (grad_normed - level[:, None] - normed * along[:, None]) * rstd[:, None]
        grad_weight += grad_y * normed
        grad_bias += grad_y
        out = rows.to(tl.int64)[:, None] * width + offs_d[None, :]
        tl.store(grad_x_ptr + out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if HAS_BRANCH:
            grad_branch = grad_x
            if HAS_SCALE:
                scale = tl.load(scale_ptr + clip, mask=mask_r, other=0.0).to(tl.float32)
                grad_branch = grad_x * scale[:, None]
            grad_branch = grad_branch.to(grad_branch_ptr.dtype.element_ty)
            tl.store(grad_branch_ptr + out, grad_branch, mask=mask)
        if HAS_Y:
            bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            y = normed * weight[None, :] + bias[None, :]
            tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)
    at = tl.program_id(0).to(tl.int64) * width + offs_d
    tl.store(grad_weight_ptr + at, tl.sum(grad_weight, axis=0), mask=mask_d)
    tl.store(grad_bias_ptr + at, tl.sum(grad_bias, axis=0), mask=mask_d)


def layer_norm_triton(
    x_BND: Tensor,
    branch_BND: Tensor | None,
    scale_B: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As :func:`layer_norm_reference`, in one pass."""
    x_BND = dense_rows(x_BND)
    batch, count, width = x_BND.shape
    y_BND = x_BND.new_empty(batch, count, width, dtype=dtype)
    residual_BND = x_BND
    if branch_BND is not None:
        branch_BND = dense_rows(branch_BND)
        residual_BND = x_BND.new_empty(batch, count, width)
    blocks, spans, span = _spans(batch * count, width, _FORWARD_PROGRAMS)
    _launch.launch(
        _layer_norm_kernel,
        spans,
        x_BND, branch_BND, _dense(scale_B), _dense(weight_D), _dense(bias_D),
        residual_BND, y_BND, batch * count, count, width, span,
        *x_BND.stride()[:2], *_row_strides(branch_BND), eps,
        HAS_BRANCH=branch_BND is not None,
        HAS_SCALE=scale_B is not None,
        **blocks,
        row=_row(width),
    )  # fmt: skip
    return residual_BND, y_BND


def layer_norm_backward_triton(
    grad_y_BND: Tensor,
    grad_residual_BSD: Tensor | None,
    residual_BND: Tensor,
    scale_B: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    branch_dtype: torch.dtype | None,
    y_dtype: torch.dtype | None,
) -> NormGradients:
    """As :func:`layer_norm_backward_reference`, in one pass.

    Parameter gradients are sums over fixed spans of rows, added in a fixed order.
    """
    grad_y_BND, residual_BND = dense_rows(grad_y_BND), dense_rows(residual_BND)
    batch, count, width = residual_BND.shape
    lacking = 0
    if grad_residual_BSD is not None:
        grad_residual_BSD = dense_rows(grad_residual_BSD)
        lacking = count - grad_residual_BSD.shape[1]

    def empty(dtype: torch.dtype) -> Tensor:
        return residual_BND.new_empty(batch, count, width, dtype=dtype)

    x_BND = empty(residual_BND.dtype)
    same = branch_dtype == residual_BND.dtype and scale_B is None
    branch_BND = None if branch_dtype is None or same else empty(branch_dtype)
    y_BND = None if y_dtype is None else empty(y_dtype)
    blocks, spans, span = _spans(batch * count, width, _BACKWARD_PROGRAMS)
    grad_weight = residual_BND.new_empty(spans, width, dtype=torch.float32)
    grad_bias = torch.empty_like(grad_weight)
    _launch.launch(
        _layer_norm_backward_kernel,
        spans,
        grad_y_BND, grad_residual_BSD, residual_BND, _dense(scale_B), _dense(weight_D),
        _dense(bias_D), x_BND, branch_BND, y_BND, grad_weight, grad_bias,
        batch * count, count, lacking, width, span,
        *grad_y_BND.stride()[:2], *_row_strides(grad_residual_BSD), *residual_BND.stride()[:2], eps,
        HAS_RESIDUAL=grad_residual_BSD is not None,
        HAS_SCALE=scale_B is not None,
        HAS_BRANCH=branch_BND is not None,
        HAS_Y=y_BND is not None,
        **blocks,
        row=_row(width),
    )  # fmt: skip
    branch_BND = x_BND if same else branch_BND
    return NormGradients(x_BND, branch_BND, y_BND, grad_weight.sum(0), grad_bias.sum(0))


def too_large(x_BND: Tensor) -> str:
    """What the kernels cannot hold of these rows, in words; "" if they can hold them."""
    rows, width = x_BND.shape[0] * x_BND.shape[1], x_BND.shape[2]
    if power_of_2(width) > max(_ROWS):
        return f"rows of more than {max(_ROWS)} values, got {width}"
    return "" if rows <= _MOST_ROWS else f"more than {_MOST_ROWS} rows, got {rows}"


def _row(width: int) -> Row:
    return _ROWS[min(limit for limit in _ROWS if limit >= width)]


def _spans(rows: int, width: int, most: int) -> tuple[dict[str, int], int, int]:
    """Block sizes, how many spans there are, and how many rows in each."""
    block_d = max(power_of_2(width), 64)
    block_r = max(min(_ROWS) // block_d, 1)
    span = max(cdiv(rows, block_r * most), 1) * block_r
    return {"BLOCK_R": block_r, "BLOCK_D": block_d}, cdiv(rows, span), span


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _row_strides(x: Tensor | None) -> tuple[int, int]:
    """Of clips and tokens; 0 where there is no tensor to read."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))
