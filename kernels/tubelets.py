"""Tubelets of a video by index, through whatever strides the video has.

Shapes: video (B, C, T, H, W); tubelet = (pt, ph, pw); grid = (T/pt, H/ph, W/pw), t-major;
idx (B, n) of token positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import jit, tl


def take_tubelets(video: Tensor, idx: Tensor | None, tubelet: tuple[int, int, int]) -> Tensor:
    """Copy the tubelets at ``idx`` (all when None) to ``(B, n, C, pt, ph, pw)``, video's dtype.

    Reads only what it copies: splitting each dimension is a view for any strides.
    """
    cells = _cells(video, tubelet)
    t, h, w = cells.shape[2], cells.shape[4], cells.shape[6]
    if idx is None or 2 * idx.shape[1] > t * h * w:
        # One ordered copy of all, then whole rows: elementwise indexing is slower per value,
        # and pays only where most tubelets are left out.
        all_tubelets = cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(1, 3)
        if idx is None:
            return all_tubelets
        rows = all_tubelets.flatten(2)
        at = idx.long().unsqueeze(-1).expand(-1, -1, rows.shape[2])
        return rows.gather(1, at).unflatten(2, all_tubelets.shape[2:])
    return cells[_at(idx, h, w)]


def put_tubelets(
    tubelets: Tensor,
    idx: Tensor | None,
    shape: tuple[int, ...],
) -> Tensor:
    """The inverse of :func:`take_tubelets`: a video of ``shape``, zero where no tubelet goes.

    Args:
        tubelets: ``(B, n, C, pt, ph, pw)``.
        idx: ``(B, n)`` distinct positions within each clip, or None for all in order.
        shape: ``(B, C, T, H, W)``.
    """
    video = tubelets.new_zeros(shape)
    pt, ph, pw = tubelets.shape[3:]
    cells = _cells(video, (pt, ph, pw))
    t, h, w = cells.shape[2], cells.shape[4], cells.shape[6]
    if idx is None:
        cells.copy_(tubelets.unflatten(1, (t, h, w)).permute(0, 4, 1, 5, 2, 6, 3, 7))
    else:
        cells[_at(idx, h, w)] = tubelets
    return video


def _cells(video: Tensor, tubelet: tuple[int, int, int]) -> Tensor:
    """View ``(B, C, t, pt, h, ph, w, pw)``."""
    pt, ph, pw = tubelet
    return video.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))


def _at(idx: Tensor, h: int, w: int) -> tuple[Tensor | slice, ...]:
    clip = torch.arange(idx.shape[0], device=idx.device).unsqueeze(1)
    every = slice(None)
    return clip, every, idx // (h * w), every, idx // w % h, every, idx % w, every


def scale_channels_(tubelets: Tensor, scale: list[float], shift: list[float]) -> Tensor:
    """``x * scale[c] + shift[c]`` in place on floating tubelets ``(B, n, C, ...)``.

    Python scalars rather than tensors: exact in every dtype, nothing to copy to the device.
    """
    for c, (a, b) in enumerate(zip(scale, shift, strict=True)):
        tubelets.select(2, c).mul_(a).add_(b)
    return tubelets


@jit
def tubelet_origin(
    token, grid_h, grid_w, stride_t, stride_h, stride_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """Offset in a clip of the first value of the tubelets at ``token``, int64."""
    row = token // grid_w
    frame = (row // grid_h).to(tl.int64) * PT
    top = (row % grid_h).to(tl.int64) * PH
    left = (token % grid_w).to(tl.int64) * PW
    return frame * stride_t + top * stride_h + left * stride_w


@jit
def pixel_offset(
    offs_q, stride_t, stride_h, stride_w, PH: tl.constexpr, PW: tl.constexpr
):  # fmt: skip
    """Offset in a tubelet of its pixels ``offs_q``, counted (pt ph pw), int64."""
    frame = (offs_q // (PH * PW)).to(tl.int64)
    line = ((offs_q // PW) % PH).to(tl.int64)
    return frame * stride_t + line * stride_h + (offs_q % PW).to(tl.int64) * stride_w


@jit
def channel_constant(channel, TABLE: tl.constexpr, CHANNELS: tl.constexpr):
    """``TABLE[channel]`` of a tuple of floats, for a tensor of channel numbers, fp32.

    Constants of the kernel, not a tensor: nothing to copy to the device or to keep there.
    """
    value = tl.zeros(channel.shape, dtype=tl.float32)
    for number in tl.static_range(CHANNELS):
        value = tl.where(channel == number, TABLE[number], value)
    return value
