"""Masked pixel reconstruction loss, read from the video itself.

Target of one tubelet: its pixels in [0, 1] as (pt ph pw c), channel last; with norm_pix, per
channel (x - mean) / (sqrt(unbiased var) + 1e-6) over the tubelet's pt*ph*pw pixels.

What the backward pass needs is the difference of prediction and target, of order 1: scaled by
1/(B*M*P) it would vanish in fp16. It is kept channel-major, (c pt ph pw), as the video lies in
memory; predictions are pixel-major, (pt ph pw c), except inside linear_masked_mse.

Shapes: n = B * M tokens of P = C * q values, q = pt * ph * pw.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import _launch
from ._launch import Row, cdiv, jit, power_of_2, tl
from .tubelets import (
    channel_constant,
    pixel_offset,
    scale_channels_,
    take_tubelets,
    tubelet_origin,
)

# Added to the standard deviation, not to the variance: the published V1 and V2 targets.
NORM_PIX_EPS = 1e-6

# Values worked on at a time on a CPU: what one pass writes is still in the cache for the next.
_CHUNK_VALUES = 1 << 18

# By how many values a channel of a tubelet holds, at most: a program takes as many tokens as
# make 1024 values, or one: never fewer values than threads, which would read what another has
# overwritten. Not yet measured.
_LOSS = {
    1024: Row(num_warps=4, num_stages=1),
    4096: Row(num_warps=8, num_stages=1),
}
_SCALE = Row({"BLOCK_R": 4, "BLOCK_P": 512}, num_warps=4, num_stages=1)


class Differences(Protocol):
    """Turns channel-major predictions into weighted differences, in place."""

    def __call__(self, pred_nP: Tensor, first: int, weight_n: Tensor | None) -> Tensor:
        """Work on the tokens from number ``first`` on.

        Returns:
            Squared error averaged over each token's values, not weighted, ``(n,)`` fp32 (fp64
            for fp64).
        """


class Targets(NamedTuple):
    """Which pixels are to be predicted.

    Attributes:
        video: ``(B, C, T, H, W)`` uint8, or floating and normalised with mean and std.
        idx: ``(B, M)`` token positions.
        size: ``(pt, ph, pw)``.
        norm_pix: normalise each tubelet, channel by channel.
        mean: per-channel mean that a floating video was normalised with.
        std: per-channel standard deviation.
    """

    video: Tensor
    idx: Tensor
    size: tuple[int, int, int]
    norm_pix: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def rows(self) -> int:
        """n, tokens of all clips."""
        return self.idx.shape[0] * self.idx.shape[1]

    @property
    def pixels(self) -> int:
        """q, values of one channel of a tubelet."""
        return self.size[0] * self.size[1] * self.size[2]

    @property
    def values(self) -> int:
        """P."""
        return self.video.shape[1] * self.pixels


def pixel_targets_reference(targets: Targets, dtype: torch.dtype) -> Tensor:
    """Targets ``(B, M, P)`` in ``dtype``, pixel-major."""
    target_nCq = _targets(_tubelets(targets), targets, dtype)
    return target_nCq.transpose(1, 2).reshape(*targets.idx.shape, -1)


def _tubelets(targets: Targets) -> Tensor:
    """``(n, C, q)`` in the video's dtype."""
    tubelets = take_tubelets(targets.video, targets.idx, targets.size)
    return tubelets.flatten(3).flatten(0, 1)


def _targets(tubelets_nCq: Tensor, targets: Targets, dtype: torch.dtype) -> Tensor:
    """Targets of some tubelets ``(n, C, q)``; a copy."""
    pixels_nCq = tubelets_nCq.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if tubelets_nCq.is_floating_point():
        scale_channels_(pixels_nCq.unsqueeze(0), list(targets.std), list(targets.mean))
    else:
        pixels_nCq.div_(255)
    if targets.norm_pix:
        var, mu = torch.var_mean(pixels_nCq, dim=-1, correction=1, keepdim=True)
        pixels_nCq.sub_(mu).div_(var.sqrt_().add_(NORM_PIX_EPS))
    return pixels_nCq


def masked_mse_reference(
    pred_BMP: Tensor | None, targets: Targets, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Squared error averaged over each token's values, ``(B, M)``, and the difference if kept.

    The loss is in fp32 (fp64 for fp64), the difference ``(n, P)``, channel-major, in the dtype of
    pred. No pred means zeros.
    """
    pred_dtype = torch.float32 if pred_BMP is None else pred_BMP.dtype
    dtype = torch.promote_types(pred_dtype, torch.float32)
    loss_n = targets.video.new_empty(targets.rows, dtype=dtype)
    kept_nP = None
    if keep:
        kept_nP = loss_n.new_empty(targets.rows, targets.values, dtype=pred_dtype)
    tubelets_nCq = _tubelets(targets)
    pred_nP = None if pred_BMP is None else pred_BMP.flatten(0, 1)
    step = _chunk_rows(targets)
    for first in range(0, targets.rows, step):
        part = slice(first, first + step)
        difference_nCq = _targets(tubelets_nCq[part], targets, dtype).neg_()
        if pred_nP is not None:
            difference_nCq += pred_nP[part].unflatten(1, (targets.pixels, -1)).transpose(1, 2)
        loss_n[part] = _mean_square(difference_nCq.flatten(1))
        if kept_nP is not None:
            kept_nP[part] = difference_nCq.flatten(1)
    return loss_n.view(targets.idx.shape), kept_nP


def scale_rows_reference(
    rows_nP: Tensor, scale_n: Tensor, factor: float, channels: int, dtype: torch.dtype
) -> Tensor:
    """``rows * scale * factor``, multiplied in fp32 at least; channel-major to pixel-major."""
    out_nP = rows_nP.new_empty(rows_nP.shape, dtype=dtype)
    scale_n1 = scale_n.reshape(-1, 1).mul(factor)
    step = max(_CHUNK_VALUES // max(rows_nP.shape[1], 1), 1)
    step = step if rows_nP.device.type == "cpu" else max(rows_nP.shape[0], 1)
    for first in range(0, rows_nP.shape[0], step):
        part = slice(first, first + step)
        scaled_nP = rows_nP[part] * scale_n1[part]
        pixel_major_nqC = scaled_nP.unflatten(1, (channels, -1)).transpose(1, 2)
        out_nP[part].unflatten(1, (-1, channels)).copy_(pixel_major_nqC)
    return out_nP


def differences_reference(targets: Targets) -> Differences:
    """See :class:`Differences`."""
    tubelets_nCq = _tubelets(targets)

    def turn(pred_nP: Tensor, first: int, weight_n: Tensor | None) -> Tensor:
        dtype = torch.promote_types(pred_nP.dtype, torch.float32)
        part = tubelets_nCq[first : first + pred_nP.shape[0]]
        difference_nP = _targets(part, targets, dtype).flatten(1).neg_().add_(pred_nP)
        loss_n = _mean_square(difference_nP)
        if weight_n is not None:
            difference_nP *= weight_n.unsqueeze(1)
        pred_nP.copy_(difference_nP)
        return loss_n

    return turn


def _mean_square(values_nP: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values_nP, dim=1).square_().div_(values_nP.shape[1])


def _chunk_rows(targets: Targets) -> int:
    """How many tokens to work on at a time; all of them where that is no gain."""
    if targets.video.device.type != "cpu":
        return max(targets.rows, 1)
    return max(_CHUNK_VALUES // max(targets.values, 1), 1)


@jit
def _masked_mse_kernel(
    pred_ptr, video_ptr, idx_ptr, weight_ptr, loss_ptr, difference_ptr,
    first_row, num_rows, rows_per_clip, grid_h, grid_w,
    stride_clip, stride_c, stride_t, stride_h, stride_w, stride_idx_clip, stride_idx_token, eps,
    MEAN: tl.constexpr, STD: tl.constexpr, CHANNELS: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    UINT8: tl.constexpr, NORM_PIX: tl.constexpr, HAS_PRED: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr, HAS_WEIGHT: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Loss of BLOCK_R tokens, channel by channel; the statistics of uint8 pixels are exact.

    Grid: row blocks. Writes one loss a token, and with KEEP its differences, channel-major, which
    may take the place of channel-major predictions: each channel is read before it is written.
    """
    PIXELS: tl.constexpr = PT * PH * PW
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_q = tl.arange(0, BLOCK_Q)
    mask_r = rows < num_rows
    mask = mask_r[:, None] & (offs_q < PIXELS)[None, :]
    clip, number = (rows + first_row) // rows_per_clip, (rows + first_row) % rows_per_clip
    at = clip * stride_idx_clip + number * stride_idx_token
    token = tl.load(idx_ptr + at, mask=mask_r, other=0).to(tl.int64)
    start = clip * stride_clip + tubelet_origin(
        token, grid_h, grid_w, stride_t, stride_h, stride_w, PT, PH, PW
    )
    pixel = pixel_offset(offs_q, stride_t, stride_h, stride_w, PH, PW)
    values_at = video_ptr + start[:, None] + pixel[None, :]
    row_at = rows * CHANNELS * PIXELS
    weight = tl.full([BLOCK_R], 1.0, dtype=tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + rows, mask=mask_r, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    for channel in range(CHANNELS):
        raw = tl.load(values_at + tl.cast(channel, tl.int64) * stride_c, mask=mask, other=0)
        # Read before the statistics, which have to wait for the pixels.
        pred = tl.zeros([BLOCK_R, BLOCK_Q], dtype=tl.float32)
        if HAS_PRED:
            inside = offs_q * CHANNELS + channel
            if CHANNEL_MAJOR:
                inside = channel * PIXELS + offs_q
            pred_at = pred_ptr + row_at[:, None] + inside[None, :]
            pred = tl.load(pred_at, mask=mask, other=0.0).to(tl.float32)
        if UINT8 and NORM_PIX:
            # In integers: sums are exact, and a flat tubelet's target is exactly zero.
            whole = raw.to(tl.int32)
            added = tl.sum(whole, axis=1)
            squares = tl.sum(whole * whole, axis=1).to(tl.int64)
            spread = squares * PIXELS - added.to(tl.int64) * added.to(tl.int64)
            variance = spread.to(tl.float32) / (PIXELS * (PIXELS - 1.0))
            scale = 1.0 / (PIXELS * (tl.sqrt(variance) + 255.0 * eps))
            target = (whole * PIXELS - added[:, None]).to(tl.float32) * scale[:, None]
        elif UINT8:
            target = raw.to(tl.float32) / 255.0
        else:
            which = tl.full([1, 1], 0, dtype=tl.int32) + channel
            target = raw.to(tl.float32) * channel_constant(which, STD, CHANNELS)
            target += channel_constant(which, MEAN, CHANNELS)
            if NORM_PIX:
                centre = tl.sum(tl.where(mask, target, 0.0), axis=1) / PIXELS
                target = tl.where(mask, target - centre[:, None], 0.0)
                variance = tl.sum(target * target, axis=1) / (PIXELS - 1.0)
                target = target / (tl.sqrt(variance) + eps)[:, None]
        difference = pred - target
        difference = tl.where(mask, difference, 0.0)
        total += tl.sum(difference * difference, axis=1)
        if KEEP:
            kept = (difference * weight[:, None]).to(difference_ptr.dtype.element_ty)
            kept_at = row_at[:, None] + (channel * PIXELS + offs_q)[None, :]
            tl.store(difference_ptr + kept_at, kept, mask=mask)
    tl.store(loss_ptr + rows, total / (CHANNELS * PIXELS), mask=mask_r)


@jit
def _scale_kernel(
    rows_ptr, scale_ptr, out_ptr, num_rows, num_values, num_channels, factor, stride_scale,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Scale BLOCK_P values of BLOCK_R rows, from channel-major to pixel-major.

    Grid: row blocks x value blocks, values fastest. Writes all of out.
    """
    value_blocks = tl.cdiv(num_values, BLOCK_P)
    program = tl.program_id(0)
    rows = (program // value_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_p = (program % value_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_r = rows < num_rows
    mask = mask_r[:, None] & (offs_p < num_values)[None, :]
    pixels = num_values // num_channels
    source = (offs_p % num_channels) * pixels + offs_p // num_channels
    start = rows[:, None] * num_values
    scale = tl.load(scale_ptr + rows * stride_scale, mask=mask_r, other=0.0).to(tl.float32)
    scale = scale * factor
    values = tl.load(rows_ptr + start + source[None, :], mask=mask, other=0.0)
    values = values.to(tl.float32) * scale[:, None]
    tl.store(out_ptr + start + offs_p[None, :], values.to(out_ptr.dtype.element_ty), mask=mask)


def masked_mse_triton(
    pred_BMP: Tensor | None, targets: Targets, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """As :func:`masked_mse_reference`."""
    loss_n = targets.video.new_empty(targets.rows, dtype=torch.float32)
    pred_nP = None if pred_BMP is None else pred_BMP.contiguous().flatten(0, 1)
    difference_nP = None
    if keep:
        assert pred_nP is not None
        difference_nP = torch.empty_like(pred_nP)
    _launch_loss(pred_nP, targets, 0, None, loss_n, difference_nP, channel_major=False)
    return loss_n.view(targets.idx.shape), difference_nP


def scale_rows_triton(
    rows_nP: Tensor, scale_n: Tensor, factor: float, channels: int, dtype: torch.dtype
) -> Tensor:
    """As :func:`scale_rows_reference`."""
    out_nP = torch.empty_like(rows_nP, dtype=dtype)
    count, values = rows_nP.shape
    _launch.launch(
        _scale_kernel,
        cdiv(count, _SCALE.blocks["BLOCK_R"]) * cdiv(values, _SCALE.blocks["BLOCK_P"]),
        rows_nP, scale_n, out_nP, count, values, channels, factor, scale_n.stride(0),
        row=_SCALE,
    )  # fmt: skip
    return out_nP


def differences_triton(targets: Targets) -> Differences:
    """See :class:`Differences`."""

    def turn(pred_nP: Tensor, first: int, weight_n: Tensor | None) -> Tensor:
        loss_n = pred_nP.new_empty(pred_nP.shape[0], dtype=torch.float32)
        _launch_loss(pred_nP, targets, first, weight_n, loss_n, pred_nP, channel_major=True)
        return loss_n

    return turn


def too_large(targets: Targets) -> str:
    """What the kernel cannot hold of these targets, in words; "" if it can hold them."""
    most = max(_LOSS)
    if power_of_2(targets.pixels) <= most:
        return ""
    return f"tubelets of more than {most} pixels, got {targets.pixels}"


def _launch_loss(
    pred_nP: Tensor | None,
    targets: Targets,
    first: int,
    weight_n: Tensor | None,
    loss_n: Tensor,
    difference_nP: Tensor | None,
    channel_major: bool,
) -> None:
    video = targets.video
    pt, ph, pw = targets.size
    normalised = video.is_floating_point()
    block_q = max(power_of_2(targets.pixels), 16)
    block_r = max(1024 // block_q, 1)
    listed = _LOSS[min(limit for limit in _LOSS if limit >= block_q)]
    _launch.launch(
        _masked_mse_kernel,
        cdiv(loss_n.shape[0], block_r),
        pred_nP, video, targets.idx,
        weight_n, loss_n, difference_nP,
        first, loss_n.shape[0], targets.idx.shape[1],
        video.shape[3] // ph, video.shape[4] // pw,
        *video.stride(), *targets.idx.stride(), NORM_PIX_EPS,
        MEAN=targets.mean if normalised else None,
        STD=targets.std if normalised else None,
        CHANNELS=video.shape[1],
        PT=pt, PH=ph, PW=pw,
        UINT8=not normalised,
        NORM_PIX=targets.norm_pix,
        HAS_PRED=pred_nP is not None,
        CHANNEL_MAJOR=channel_major,
        HAS_WEIGHT=weight_n is not None,
        KEEP=difference_nP is not None,
        BLOCK_R=block_r,
        BLOCK_Q=block_q,
        row=listed,
    )  # fmt: skip
