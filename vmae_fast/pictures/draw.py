"""Panels, labels and captions that pictures are put together from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vmae_fast._files import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image

# Smaller clips are enlarged to this many pixels, without smoothing.
_LEAST_PANEL = 128
# Width of what stands before a row of panels.
LABEL_MARGIN = 110
# Grey behind what is transparent.
_BEHIND = 128.0


def as_rgb(video: Tensor) -> Tensor:
    """A clip of 1, 3 or 4 channels as one to look at: uint8 ``(T, H, W, C)`` to ``(T, H, W, 3)``.

    Grey is repeated; what is transparent shows a checkerboard's mean grey.
    """
    channels = video.shape[-1]
    if channels == 3:
        return video
    if channels == 1:
        return video.expand(*video.shape[:-1], 3)
    alpha = video[..., 3:].float() / 255
    blended = video[..., :3] * alpha + _BEHIND * (1 - alpha)
    return blended.round().to(torch.uint8)


def panel(frame_HWC: Tensor) -> Image:
    """A frame, enlarged without smoothing where it is small; uint8 ``(H, W, 3)``."""
    from PIL import Image

    picture = Image.fromarray(frame_HWC.numpy())
    factor = math.ceil(_LEAST_PANEL / min(picture.size))
    if factor == 1:
        return picture
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def strip(width: int, height: int, text: str, size: int) -> Image:
    """A white strip with text."""
    from PIL import Image, ImageDraw, ImageFont

    made = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(size)
    ImageDraw.Draw(made).multiline_text((6, 4), text, fill="black", font=font)
    return made


def caption(width: int, text: str) -> Image:
    """A strip with the text broken to the width."""
    from textwrap import wrap

    size = 14
    # An average letter of the font is about half as wide as it is high.
    letters = max(int((width - 12) / (0.53 * size)), 20)
    lines = [part for line in text.splitlines() for part in wrap(line, letters)]
    return strip(width, len(lines) * (size + 5) + 10, "\n".join(lines), size)


def label_left(label: str, panels: Sequence[Image]) -> Image:
    """Panels side by side with a label before them."""
    from PIL import Image

    margin, gap = LABEL_MARGIN, 2
    height = panels[0].height + gap
    row = Image.new("RGB", (margin + sum(p.width + gap for p in panels), height), "white")
    row.paste(strip(margin, 24, label, 14), (0, height // 2 - 12))
    left = margin
    for panel in panels:
        row.paste(panel, (left, 0))
        left += panel.width + gap
    return row


def save_stacked(path: Path, rows: Sequence[Image]) -> Path:
    """Write rows, one below the other, as a PNG."""
    from PIL import Image

    size = (max(row.width for row in rows), sum(row.height for row in rows))
    sheet = Image.new("RGB", size, "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path
