"""A contact sheet of what a model is fed: frames after crop and flip, and both masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vmae_fast.masking import Mask
from vmae_fast.models import VideoMAEConfig

from .draw import LABEL_MARGIN, as_rgb, caption, label_left, panel, save_stacked

if TYPE_CHECKING:
    from PIL.Image import Image

# Frames of a row: more would not be seen.
_MOST_COLUMNS = 8
# What stands for a token the encoder does not see, and for one that is not decoded (0 to 255).
_HIDDEN, _NOT_DECODED = 128, 24
# Tint of tokens that are decoded but were seen, so do not count.
_UNSCORED = (70, 110, 255)


@dataclass(frozen=True)
class PreviewClip:
    """A clip as the model gets it.

    Attributes:
        video: uint8 ``(T, H, W, C)``, after crop and flip.
        title: file, label, crop: a line above it.
        times_s: when each frame is shown, seconds; NaN without a clock.
    """

    video: Tensor
    title: str
    times_s: tuple[float, ...]


def token_states(mask: Mask) -> tuple[Tensor, Tensor]:
    """What becomes of each token of a mask.

    Returns:
        ``(B, N)`` bool, True where the encoder sees it; and ``(B, N)`` int64: 2 where it is
        decoded and scored, 1 where it is decoded only, 0 where it is not decoded.
    """
    state = torch.zeros(mask.batch_size, mask.num_tokens, dtype=torch.int64)
    state.scatter_(1, mask.decode_idx, 1)
    scored = torch.full_like(mask.target_idx, 2)
    if mask.scored is not None:
        scored = torch.where(mask.scored > 0, 2, 1)
    state.scatter_(1, mask.target_idx, scored)
    return ~mask.to_bool(), state


def save_preview(
    path: Path, clips: Sequence[PreviewClip], mask: Mask, config: VideoMAEConfig, header: str
) -> Path:
    """Write clips and their masks as one PNG.

    Each clip has three rows: its frames; what the encoder sees of them; what the decoder makes,
    where tokens that it decodes without being scored are tinted, and those left out are dark.

    Args:
        path: PNG to write.
        clips: B of them.
        mask: of those clips.
        config: of the model, for its grid and tubelets.
        header: lines above everything.
    """
    sees, decodes = token_states(mask)
    step = math.ceil(config.frames / _MOST_COLUMNS)
    shown = range(0, config.frames, step)
    rows: list[Image] = []
    for clip, visible, state in zip(clips, sees, decodes, strict=True):
        video = as_rgb(clip.video)
        pictures = {
            "input": video,
            "encoder sees": _paint(video, config, visible, None),
            "decoder makes": _paint(video, config, state == 2, state == 1),
        }
        strips = [
            label_left(name, [panel(frames[t]) for t in shown]) for name, frames in pictures.items()
        ]
        rows.append(caption(strips[0].width, clip.title))
        rows += strips
        rows.append(_times(strips[0].width, [clip.times_s[t] for t in shown], len(shown)))
    rows.insert(0, caption(max(row.width for row in rows), header))
    return save_stacked(path, rows)


def _paint(video: Tensor, config: VideoMAEConfig, kept: Tensor, tinted: Tensor | None) -> Tensor:
    """``video`` with the tokens that are not ``kept`` covered, ``(T, H, W, 3)`` uint8."""
    cover = torch.full_like(video, _HIDDEN if tinted is None else _NOT_DECODED)
    painted = torch.where(_pixels(kept, config), video, cover)
    if tinted is None:
        return painted
    tint = (video // 2 + torch.tensor(_UNSCORED, dtype=torch.uint8) // 2).to(torch.uint8)
    return torch.where(_pixels(tinted, config), tint, painted)


def _pixels(tokens: Tensor, config: VideoMAEConfig) -> Tensor:
    """``(N,)`` of tokens to ``(T, H, W, 1)`` of pixels."""
    pt, ph, pw = config.tubelet
    grid = tokens.view(config.grid)
    for dim, size in enumerate((pt, ph, pw)):
        grid = grid.repeat_interleave(size, dim)
    return grid.unsqueeze(-1)


def _times(width: int, times: Sequence[float], columns: int) -> Image:
    """A strip with the time of each frame below it."""
    from PIL import Image, ImageDraw, ImageFont

    strip = Image.new("RGB", (width, 24), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(12)
    each = (width - LABEL_MARGIN) / columns
    for column, time in enumerate(times):
        text = "" if math.isnan(time) else f"{time:.2f} s"
        draw.text((LABEL_MARGIN + column * each + 4, 2), text, fill="black", font=font)
    return strip
