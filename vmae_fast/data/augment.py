"""Cropping, scaling and flipping of decoded frames, uint8 from end to end.

A box is ``(top, left, height, width)`` in pixels of the source frame; a size is ``(height,
width)``. Boxes are drawn apart from being applied, so that a box can be shown, logged or tested.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

Box = tuple[int, int, int, int]
Size = tuple[int, int]

# VideoMAE V1's multi-scale corner crop: sides as shares of the frame's short side, height and
# width at most this many entries apart, a side within this many pixels of the target taken as
# the target (so that such a crop needs no scaling).
CROP_SCALES: Final = (1.0, 0.875, 0.75, 0.66)
CROP_MAX_APART: Final = 1
CROP_SNAP_PX: Final = 2

# Where a crop may lie, in quarters of the room that it leaves, as (down, right): the corners, the
# centre, the middles of the edges, and the quarter points.
CROP_OFFSETS: Final = (
    *((0, 0), (0, 4), (4, 0), (4, 4)),
    (2, 2),
    *((2, 0), (2, 4), (4, 2), (0, 2)),
    *((1, 1), (1, 3), (3, 1), (3, 3)),
)

_SCALE_PAIRS: Final = tuple(
    (down, across)
    for down in range(len(CROP_SCALES))
    for across in range(len(CROP_SCALES))
    if abs(down - across) <= CROP_MAX_APART
)


def multi_scale_crop_box(height: int, width: int, size: Size, rng: np.random.Generator) -> Box:
    """Draw a box by VideoMAE V1's multi-scale corner crop.

    Height and width are each a scale of the frame's short side, drawn together from the pairs of
    scales at most one step apart; a side within 2 pixels of the target's becomes the target's;
    the box lies at one of 13 places. A box never leaves the frame.

    Args:
        height: of the frame, in pixels.
        width: of the frame, in pixels.
        size: ``(height, width)`` that the crop will be scaled to.
        rng: two draws are taken from it.

    Raises:
        ValueError: a side is below 1.
    """
    _check_sides(height, width, size)
    down, across = _SCALE_PAIRS[rng.integers(len(_SCALE_PAIRS))]
    short = min(height, width)
    box_height = _snap(int(short * CROP_SCALES[down]), size[0], height)
    box_width = _snap(int(short * CROP_SCALES[across]), size[1], width)
    rows, columns = CROP_OFFSETS[rng.integers(len(CROP_OFFSETS))]
    # Whole quarters first, as published: the far edge may stay up to 3 pixels away.
    top = rows * ((height - box_height) // 4)
    left = columns * ((width - box_width) // 4)
    return top, left, box_height, box_width


def center_crop_box(height: int, width: int, size: Size = (1, 1)) -> Box:
    """The largest centred box with the aspect of ``size``: for a square, the short side's square.

    Raises:
        ValueError: a side is below 1.
    """
    _check_sides(height, width, size)
    # Whichever side binds is taken whole; the other follows, rounded to the nearest pixel.
    box_height = min(height, max(1, (2 * width * size[0] + size[1]) // (2 * size[1])))
    box_width = min(width, max(1, (2 * height * size[1] + size[0]) // (2 * size[0])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def crop_resize(
    frames: npt.NDArray[np.uint8] | Tensor, box: Box, size: Size, *, flip: bool = False
) -> Tensor:
    """Cut ``box`` out of every frame and scale it to ``size``.

    Bilinear with antialiasing, in uint8: no floating-point copy of the frames is made. A box that
    is already of the target size is copied and not scaled.

    Args:
        frames: uint8 ``(T, H, W, C)``, numpy or torch, any strides.
        box: ``(top, left, height, width)`` inside the frames.
        size: ``(height, width)`` of the result.
        flip: mirror left and right.

    Returns:
        uint8 ``(T, size[0], size[1], C)``, contiguous, with memory of its own.

    Raises:
        ValueError: ``frames`` is not uint8 of four dimensions, or ``box`` leaves it.
    """
    source = frames if isinstance(frames, Tensor) else _as_tensor(frames)
    if source.dtype != torch.uint8 or source.dim() != 4:
        raise ValueError(
            f"frames must be uint8 (T, H, W, C), got {source.dtype} {tuple(source.shape)}"
        )
    top, left, height, width = box
    _check_sides(height, width, size)
    if top < 0 or left < 0 or top + height > source.shape[1] or left + width > source.shape[2]:
        raise ValueError(
            f"box (top, left, height, width) = {box} leaves the frame of "
            f"{source.shape[1]}x{source.shape[2]} pixels (height x width)"
        )
    crop = source[:, top : top + height, left : left + width]
    if (height, width) != tuple(size):
        # As (T, C, H, W) over channel-last memory, which is the layout with a fast uint8 path,
        # and which is (T, H, W, C) contiguous again once permuted back.
        scaled = F.interpolate(crop.permute(0, 3, 1, 2), size=size, mode="bilinear", antialias=True)
        crop = scaled.permute(0, 2, 3, 1)
        if not flip:
            return crop.contiguous()
    # One copy either way; without it, a crop would keep the whole decoded clip alive.
    return crop.flip(2) if flip else crop.clone(memory_format=torch.contiguous_format)


def _as_tensor(frames: npt.NDArray[np.uint8]) -> Tensor:
    # torch has no negative strides, which numpy's flips and turns leave behind.
    if min(frames.strides, default=0) < 0:
        frames = np.ascontiguousarray(frames)
    return torch.from_numpy(frames)


def _snap(side: int, target: int, limit: int) -> int:
    if abs(side - target) <= CROP_SNAP_PX:
        side = target
    return min(max(side, 1), limit)


def _check_sides(height: int, width: int, size: Size) -> None:
    if min(height, width, *size) < 1:
        raise ValueError(
            f"height, width and size must be at least 1, got {height}, {width} and {size}"
        )
