"""Tubelet embedding: a Conv3d with kernel = stride, of chosen tubelets only.

out[b, i] = weight . tubelet(video[b], visible_idx[b, i]) + bias + pos_embed[visible_idx[b, i]]

uint8 video is folded into the weights. With m, s the channel's mean and standard deviation,

    weight . (u / 255 - m) / s  =  folded . (u - 128) + sum(folded * (128 - 255 m)),
    folded = weight / (255 s),

where u - 128 is exact in bf16, which holds every integer up to 256, and the sum is taken over the
folded weight as rounded, so that the weight's rounding is the only one left in the product.

Shapes: video (B, C, T, H, W), R = B * V rows of P = C*pt*ph*pw values, weight (D, P).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _launch
from ._launch import Row, cdiv, jit, tl
from .linear import linear_reference, matmul_accumulated, weight_gradient
from .token_gather import (
    column_sum_reference,
    column_sum_triton,
    dense_rows,
    position_gradient_reference,
    position_gradient_triton,
)
from .tubelets import (
    channel_constant,
    pixel_offset,
    put_tubelets,
    scale_channels_,
    take_tubelets,
    tubelet_origin,
)

# Rows of tubelets in and out of a video; see _ROWS in token_gather.py. Not yet measured.
_MOVE = Row({"BLOCK_R": 8, "BLOCK_P": 256}, num_warps=4, num_stages=1)
_FOLD = Row({"BLOCK_P": 1024}, num_warps=4, num_stages=1)
_FINISH = Row({"BLOCK_R": 16, "BLOCK_D": 128}, num_warps=4, num_stages=1)

_HALF = Row({"BLOCK_R": 128, "BLOCK_D": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3)
_HALF_99K = Row({"BLOCK_R": 128, "BLOCK_D": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3)
# Where pixels of a tubelet's line do not come in 16 bytes, addresses take more registers.
_HALF_SCATTERED = Row({"BLOCK_R": 64, "BLOCK_D": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3)
_FP32 = Row({"BLOCK_R": 32, "BLOCK_D": 32, "BLOCK_K": 32}, num_warps=4, num_stages=2)
_GEMM = {
    **{(target, torch.float32): _FP32 for target in (80, 86, 90, 100, 120)},
    **{(t, d): _HALF for t in (80, 90, 100) for d in (torch.float16, torch.bfloat16)},
    **{(t, d): _HALF_99K for t in (86, 120) for d in (torch.float16, torch.bfloat16)},
}

_GEMM_SCATTERED = {
    (80, torch.float32): _FP32,
    (80, torch.float16): _HALF_SCATTERED,
    (80, torch.bfloat16): _HALF_SCATTERED,
}

# The two ways forward: rows of tubelets, then the library's matrix product, then bias and
# position; or all of it in one kernel. The first until the second is measured to be faster.
FORWARD_WAYS = ("rows", "one_kernel")
forward_way = FORWARD_WAYS[0]


class Tubelets(NamedTuple):
    """Where the tubelets of an embedding come from, and how their values are meant.

    Attributes:
        video: ``(B, C, T, H, W)`` uint8 or floating.
        idx: ``(B, V)`` positions, or None for all N in order.
        size: ``(pt, ph, pw)``.
        mean: per-channel mean of uint8 video in units of [0, 1].
        std: per-channel standard deviation.
        dtype: what products are computed in.
    """

    video: Tensor
    idx: Tensor | None
    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype

    @property
    def grid(self) -> tuple[int, int, int]:
        """``(t, h, w)``."""
        t, h, w = (n // p for n, p in zip(self.video.shape[2:], self.size, strict=True))
        return t, h, w

    @property
    def per_clip(self) -> int:
        """V, tubelets a clip."""
        t, h, w = self.grid
        return t * h * w if self.idx is None else self.idx.shape[1]

    @property
    def positions(self) -> Tensor:
        """``(B, V)`` of the tokens, all of them when there is no index."""
        if self.idx is not None:
            return self.idx
        every = torch.arange(self.per_clip, device=self.video.device)
        return every.expand(self.video.shape[0], -1)


def tubelet_embed_reference(
    tubelets: Tubelets, weight_DCthw: Tensor, bias_D: Tensor | None, pos_embed_ND: Tensor | None
) -> Tensor:
    """Definition of the op in plain PyTorch, ``(B, V, D)``; uint8 is normalised on the way."""
    rows_BVP = _normalised_rows(tubelets)
    bias_D = None if bias_D is None else bias_D.to(tubelets.dtype)
    tokens_BVD = linear_reference(rows_BVP, weight_DCthw.flatten(1).to(tubelets.dtype), bias_D)
    if pos_embed_ND is None:
        return tokens_BVD
    return tokens_BVD + (pos_embed_ND if tubelets.idx is None else pos_embed_ND[tubelets.idx])


def tubelet_embed_backward_reference(
    tubelets: Tubelets,
    weight_DCthw: Tensor,
    grad_BVD: Tensor,
    need_weight: bool,
    need_bias: bool,
    need_pos: bool,
    need_video: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, bias and position (fp32 at least) and of a floating video."""
    grad_weight = grad_bias = grad_pos = grad_video = None
    narrow_BVD = grad_BVD.to(tubelets.dtype)
    if need_weight:
        grad_DP = weight_gradient(
            narrow_BVD.flatten(0, 1), _normalised_rows(tubelets).flatten(0, 1)
        )
        grad_weight = grad_DP.view(weight_DCthw.shape)
    if need_bias:
        grad_bias = column_sum_reference(grad_BVD)
    if need_pos:
        num_tokens = tubelets.grid[0] * tubelets.grid[1] * tubelets.grid[2]
        grad_pos = position_gradient_reference(grad_BVD, tubelets.positions, num_tokens)
    if need_video:
        rows_BVP = narrow_BVD @ weight_DCthw.flatten(1).to(tubelets.dtype)
        cells = rows_BVP.to(tubelets.video.dtype).unflatten(2, weight_DCthw.shape[1:])
        grad_video = put_tubelets(cells, tubelets.idx, tuple(tubelets.video.shape))
    return grad_weight, grad_bias, grad_pos, grad_video


def _normalised_rows(tubelets: Tubelets) -> Tensor:
    """``(B, V, P)`` in the dtype of the product, channel-major as the weight."""
    values = take_tubelets(tubelets.video, tubelets.idx, tubelets.size)
    if not values.is_floating_point():
        # In fp32 at least: bf16 cannot hold the steps of 8-bit video once the mean is off.
        values = values.to(torch.promote_types(tubelets.dtype, torch.float32))
        scale = [1 / (255 * s) for s in tubelets.std]
        shift = [-m / s for m, s in zip(tubelets.mean, tubelets.std, strict=True)]
        scale_channels_(values, scale, shift)
    return values.flatten(2).to(tubelets.dtype)


@jit
def _tubelet_value_offset(
    offs_p, stride_c, stride_t, stride_h, stride_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """Offset in a tubelet of its values ``offs_p``, counted (c pt ph pw) as the weight, int64."""
    channel = (offs_p // (PT * PH * PW)).to(tl.int64)
    inside = pixel_offset(offs_p % (PT * PH * PW), stride_t, stride_h, stride_w, PH, PW)
    return channel * stride_c + inside


@jit
def _fold_kernel(
    weight_ptr, bias_ptr, folded_ptr, shift_ptr, num_values,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Fold the normalisation into one row of the weight, and into what is added to its products.

    Grid: rows. Writes all of folded and of shift.
    """
    row = tl.program_id(0)
    start = row.to(tl.int64) * num_values
    total = tl.zeros([BLOCK_P], dtype=tl.float32)
    for first in range(0, num_values, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        mask_p = offs_p < num_values
        channel = offs_p // PIXELS
        weight = tl.load(weight_ptr + start + offs_p, mask=mask_p, other=0.0).to(tl.float32)
        scale = channel_constant(channel, SCALE, CHANNELS)
        folded = (weight * scale).to(folded_ptr.dtype.element_ty)
        tl.store(folded_ptr + start + offs_p, folded, mask=mask_p)
        total += folded.to(tl.float32) * channel_constant(channel, OFFSET, CHANNELS)
    shift = tl.sum(total, axis=0)
    if HAS_BIAS:
        shift += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(shift_ptr + row, shift)


@jit
def _unfold_kernel(
    grad_ptr, column_sum_ptr, num_values,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Turn one row of the folded weight's gradient into the weight's own, in place.

    Grid: rows.
    """
    row = tl.program_id(0)
    column_sum = tl.load(column_sum_ptr + row)
    for first in range(0, num_values, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        mask_p = offs_p < num_values
        channel = offs_p // PIXELS
        at = grad_ptr + row.to(tl.int64) * num_values + offs_p
        grad = tl.load(at, mask=mask_p, other=0.0)
        grad += column_sum * channel_constant(channel, OFFSET, CHANNELS)
        tl.store(at, grad * channel_constant(channel, SCALE, CHANNELS), mask=mask_p)


@jit
def _move_kernel(
    video_ptr, rows_ptr, idx_ptr, num_rows, rows_per_clip, num_values, grid_h, grid_w,
    stride_clip, stride_c, stride_t, stride_h, stride_w, stride_idx_clip, stride_idx_token,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    HAS_IDX: tl.constexpr, TAKE: tl.constexpr, CENTRE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Move BLOCK_P values of BLOCK_R tubelets: to rows (TAKE), less 128 (CENTRE), or from them.

    Grid: row blocks x value blocks, values fastest. Writes all of rows, or in the video the
    tubelets that idx names.
    """
    value_blocks = tl.cdiv(num_values, BLOCK_P)
    program = tl.program_id(0)
    rows = (program // value_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_p = (program % value_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_r = rows < num_rows
    clip, token = rows // rows_per_clip, rows % rows_per_clip
    if HAS_IDX:
        at = clip * stride_idx_clip + token * stride_idx_token
        token = tl.load(idx_ptr + at, mask=mask_r, other=0).to(tl.int64)
    start = clip * stride_clip + tubelet_origin(
        token, grid_h, grid_w, stride_t, stride_h, stride_w, PT, PH, PW
    )
    inside = _tubelet_value_offset(offs_p, stride_c, stride_t, stride_h, stride_w, PT, PH, PW)
    in_video = video_ptr + start[:, None] + inside[None, :]
    in_rows = rows_ptr + rows[:, None] * num_values + offs_p[None, :]
    mask = mask_r[:, None] & (offs_p < num_values)[None, :]
    if TAKE:
        values = tl.load(in_video, mask=mask, other=0)
        if CENTRE:
            values = values.to(tl.int16) - 128
        tl.store(in_rows, values.to(rows_ptr.dtype.element_ty), mask=mask)
    else:
        values = tl.load(in_rows, mask=mask)
        tl.store(in_video, values.to(video_ptr.dtype.element_ty), mask=mask)


@jit
def _finish_kernel(
    product_ptr, shift_ptr, pos_ptr, idx_ptr, out_ptr, num_rows, rows_per_clip, width,
    stride_pos, stride_idx_clip, stride_idx_token,
    HAS_IDX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add shift and position to BLOCK_R rows of BLOCK_D columns of the product.

    Grid: row blocks x column blocks, columns fastest. Writes all of out, which may be product.
    """
    column_blocks = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    rows = (program // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_r, mask_d = rows < num_rows, offs_d < width
    mask = mask_r[:, None] & mask_d[None, :]
    at = rows[:, None] * width + offs_d[None, :]
    values = tl.load(product_ptr + at, mask=mask, other=0.0).to(tl.float32)
    values += tl.load(shift_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
    clip, token = rows // rows_per_clip, rows % rows_per_clip
    if HAS_IDX:
        where = clip * stride_idx_clip + token * stride_idx_token
        token = tl.load(idx_ptr + where, mask=mask_r, other=0).to(tl.int64)
    pos = pos_ptr + token[:, None] * stride_pos + offs_d[None, :]
    values += tl.load(pos, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _embed_kernel(
    video_ptr, weight_ptr, shift_ptr, pos_ptr, idx_ptr, out_ptr,
    num_rows, rows_per_clip, num_values, width, grid_h, grid_w,
    stride_clip, stride_c, stride_t, stride_h, stride_w, stride_pos,
    stride_idx_clip, stride_idx_token,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    HAS_POS: tl.constexpr, HAS_IDX: tl.constexpr, CENTRE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Embed BLOCK_R tubelets into BLOCK_D columns, reading the video as the product's operand.

    Grid: row blocks x column blocks, columns fastest, so that programs side by side share
    tubelets in L2. Writes all of out.
    """
    column_blocks = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    rows = (program // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_r, mask_d = rows < num_rows, offs_d < width
    clip, token = rows // rows_per_clip, rows % rows_per_clip
    if HAS_IDX:
        at = clip * stride_idx_clip + token * stride_idx_token
        token = tl.load(idx_ptr + at, mask=mask_r, other=0).to(tl.int64)
    start = clip * stride_clip + tubelet_origin(
        token, grid_h, grid_w, stride_t, stride_h, stride_w, PT, PH, PW
    )
    weight_row = weight_ptr + offs_d.to(tl.int64)[None, :] * num_values
    total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for first in range(0, num_values, BLOCK_K):
        offs_p = first + tl.arange(0, BLOCK_K)
        mask_p = offs_p < num_values
        inside = _tubelet_value_offset(offs_p, stride_c, stride_t, stride_h, stride_w, PT, PH, PW)
        values = tl.load(
            video_ptr + start[:, None] + inside[None, :],
            mask=mask_r[:, None] & mask_p[None, :],
            other=0,
        )
        if CENTRE:
            values = values.to(tl.int16) - 128
        weight = tl.load(
            weight_row + offs_p[:, None], mask=mask_p[:, None] & mask_d[None, :], other=0.0
        )
        # ieee: fp32 operands stay fp32 (the default rounds them to tf32); no meaning for others.
        total = tl.dot(values.to(weight.dtype), weight, total, input_precision="ieee")
    total += tl.load(shift_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
    mask = mask_r[:, None] & mask_d[None, :]
    if HAS_POS:
        pos = pos_ptr + token[:, None] * stride_pos + offs_d[None, :]
        total += tl.load(pos, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + rows[:, None] * width + offs_d[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


def tubelet_embed_triton(
    tubelets: Tubelets, weight_DCthw: Tensor, bias_D: Tensor | None, pos_embed_ND: Tensor | None
) -> Tensor:
    """As :func:`tubelet_embed_reference`."""
    weight_DP, shift_D = _fold(tubelets, weight_DCthw, bias_D)
    dtype = tubelets.dtype
    if pos_embed_ND is not None:
        pos_embed_ND = dense_rows(pos_embed_ND)
        dtype = torch.promote_types(dtype, pos_embed_ND.dtype)
    if forward_way == "one_kernel":
        return _embed_in_one_kernel(tubelets, weight_DP, shift_D, pos_embed_ND, dtype)
    batch, count, width = tubelets.video.shape[0], tubelets.per_clip, weight_DP.shape[0]
    if pos_embed_ND is None:
        # Not by the kernel below: what it reads has been rounded, and would be once more.
        out_RD = torch.addmm(shift_D.to(dtype), _take(tubelets), weight_DP.t())
        return out_RD.view(batch, count, width)
    product_RD = matmul_accumulated(_take(tubelets), weight_DP.t(), dtype)
    _launch.launch(
        _finish_kernel,
        cdiv(batch * count, _FINISH.blocks["BLOCK_R"]) * cdiv(width, _FINISH.blocks["BLOCK_D"]),
        product_RD, shift_D, pos_embed_ND, tubelets.idx, product_RD, batch * count, count, width,
        pos_embed_ND.stride(0), *_strides(tubelets.idx, 2),
        HAS_IDX=tubelets.idx is not None,
        row=_FINISH,
    )  # fmt: skip
    return product_RD.view(batch, count, width)


def tubelet_embed_backward_triton(
    tubelets: Tubelets,
    weight_DCthw: Tensor,
    grad_BVD: Tensor,
    need_weight: bool,
    need_bias: bool,
    need_pos: bool,
    need_video: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`tubelet_embed_backward_reference`."""
    grad_weight = grad_bias = grad_pos = grad_video = None
    centred = not tubelets.video.is_floating_point()
    grad_BVD = dense_rows(grad_BVD)
    narrow_RD = grad_BVD.to(tubelets.dtype).flatten(0, 1)
    if need_bias or (need_weight and centred):
        grad_bias = column_sum_triton(grad_BVD)
    if need_weight:
        grad_DP = weight_gradient(narrow_RD, _take(tubelets))
        if centred:
            assert grad_bias is not None
            grad_DP = _unfold_gradient_(tubelets, grad_DP, grad_bias)
        grad_weight = grad_DP.view(weight_DCthw.shape)
    if need_pos:
        t, h, w = tubelets.grid
        grad_pos = position_gradient_triton(grad_BVD, tubelets.positions, t * h * w)
    if need_video:
        rows_RP = narrow_RD @ weight_DCthw.flatten(1).to(tubelets.dtype)
        grad_video = torch.zeros_like(tubelets.video, memory_format=torch.contiguous_format)
        _move(tubelets, grad_video, rows_RP, take=False)
    return grad_weight, grad_bias if need_bias else None, grad_pos, grad_video


def _fold(tubelets: Tubelets, weight_DCthw: Tensor, bias_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weight ``(D, P)`` for the values as they lie in memory, and what to add, (D,) fp32."""
    weight_DP = weight_DCthw.flatten(1).contiguous()
    bias_D = None if bias_D is None else bias_D.contiguous()
    width, values = weight_DP.shape
    if tubelets.video.is_floating_point():
        shift_D = weight_DP.new_zeros(width, dtype=torch.float32)
        return weight_DP.to(tubelets.dtype), shift_D if bias_D is None else shift_D + bias_D
    folded_DP = torch.empty_like(weight_DP, dtype=tubelets.dtype)
    shift_D = weight_DP.new_empty(width, dtype=torch.float32)
    _launch.launch(
        _fold_kernel,
        width,
        weight_DP, bias_D, folded_DP, shift_D, values,
        **_centring(tubelets),
        HAS_BIAS=bias_D is not None,
        row=_FOLD,
    )  # fmt: skip
    return folded_DP, shift_D


def _unfold_gradient_(tubelets: Tubelets, grad_DP: Tensor, column_sum_D: Tensor) -> Tensor:
    """The weight's gradient in the place of the folded weight's, for centred values."""
    _launch.launch(
        _unfold_kernel,
        grad_DP.shape[0],
        grad_DP, column_sum_D, grad_DP.shape[1],
        **_centring(tubelets),
        row=_FOLD,
    )  # fmt: skip
    return grad_DP


def _centring(tubelets: Tubelets) -> dict[str, Any]:
    """Constants of folding: per channel 1 / (255 std), and 128 - 255 mean."""
    return {
        "SCALE": tuple(1 / (255 * s) for s in tubelets.std),
        "OFFSET": tuple(128 - 255 * m for m in tubelets.mean),
        "CHANNELS": tubelets.video.shape[1],
        "PIXELS": tubelets.size[0] * tubelets.size[1] * tubelets.size[2],
    }


def _take(tubelets: Tubelets) -> Tensor:
    """Tubelets as rows ``(R, P)`` in the dtype of the product; uint8 less 128."""
    batch, channels = tubelets.video.shape[:2]
    pt, ph, pw = tubelets.size
    rows = tubelets.video.new_empty(
        batch * tubelets.per_clip, channels * pt * ph * pw, dtype=tubelets.dtype
    )
    _move(tubelets, tubelets.video, rows, take=True)
    return rows


def _move(tubelets: Tubelets, video: Tensor, rows: Tensor, take: bool) -> None:
    """Copy from the video to rows, or from rows to the video."""
    pt, ph, pw = tubelets.size
    _launch.launch(
        _move_kernel,
        cdiv(rows.shape[0], _MOVE.blocks["BLOCK_R"]) * cdiv(rows.shape[1], _MOVE.blocks["BLOCK_P"]),
        video, rows, tubelets.idx, rows.shape[0], tubelets.per_clip, rows.shape[1],
        *tubelets.grid[1:], *video.stride(), *_strides(tubelets.idx, 2),
        PT=pt, PH=ph, PW=pw,
        HAS_IDX=tubelets.idx is not None,
        TAKE=take,
        CENTRE=not video.is_floating_point(),
        row=_MOVE,
    )  # fmt: skip


def _embed_in_one_kernel(
    tubelets: Tubelets,
    weight_DP: Tensor,
    shift_D: Tensor,
    pos_embed_ND: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    batch, count = tubelets.video.shape[0], tubelets.per_clip
    width, num_values = weight_DP.shape
    out = weight_DP.new_empty(batch, count, width, dtype=dtype)
    video = tubelets.video
    line_bytes = tubelets.size[2] * video.element_size()
    dense = video.stride(4) == 1 and line_bytes % 16 == 0
    row = _launch.pick(_GEMM if dense else _GEMM_SCATTERED, video.device, tubelets.dtype)
    pt, ph, pw = tubelets.size
    _launch.launch(
        _embed_kernel,
        cdiv(batch * count, row.blocks["BLOCK_R"]) * cdiv(width, row.blocks["BLOCK_D"]),
        video, weight_DP, shift_D, pos_embed_ND, tubelets.idx, out,
        batch * count, count, num_values, width, *tubelets.grid[1:],
        *video.stride(), *_strides(pos_embed_ND, 1), *_strides(tubelets.idx, 2),
        PT=pt, PH=ph, PW=pw,
        HAS_POS=pos_embed_ND is not None,
        HAS_IDX=tubelets.idx is not None,
        CENTRE=not video.is_floating_point(),
        row=row,
    )  # fmt: skip
    return out


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The first strides of a tensor that may be missing."""
    return (0,) * count if tensor is None else tensor.stride()[:count]
