"""What a model makes of a masked clip, as a sheet and as a moving picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vmae_fast._files import atomic_file
from vmae_fast.masking import Masking, clip_keys
from vmae_fast.models import VideoMAE

from .draw import as_rgb, caption, label_left, panel, save_stacked, strip

if TYPE_CHECKING:
    from PIL.Image import Image

# What stands for a hidden token, in units of [0, 1].
_MASKED_GREY = 0.5
# Frames of a contact sheet: more would not be seen.
_MOST_COLUMNS = 8
NORM_PIX_NOTE = (
    "Targets are normalised: the mean and deviation of each reconstructed patch come from the "
    "original."
)


@dataclass(frozen=True)
class Reconstruction:
    """A clip, what the encoder saw of it, and what the model made of the rest.

    Attributes:
        original, masked, reconstructed: uint8 ``(T, H, W, 3)``. Visible tokens stand as they
            were in the last two.
        loss: over the hidden tokens.
        zero_prediction: the same of predicting zeros.
        note: what a viewer must know of the picture, or "".
    """

    original: Tensor
    masked: Tensor
    reconstructed: Tensor
    loss: float
    zero_prediction: float
    note: str


@torch.no_grad()
def reconstruct(model: VideoMAE, video: Tensor, *, seed: int = 0) -> Reconstruction:
    """Reconstruct one clip; every hidden token is decoded, whatever the decoder's masking.

    Args:
        model: with a decoder; 1, 3 or 4 channels.
        video: uint8 ``(C, T, H, W)``: grey, RGB or RGBA.
        seed: of the mask.

    Raises:
        ValueError: the model has another number of channels.
    """
    config = model.config
    if config.in_channels not in (1, 3, 4):
        raise ValueError(f"pictures need 1, 3 or 4 channels, the model has {config.in_channels}")
    device = next(model.parameters()).device
    masking = Masking(config.grid, config.mask_kind, config.mask_ratio)
    mask = masking(clip_keys(seed, 0, torch.zeros(1, dtype=torch.int64, device=device)))
    batch = video.to(device).unsqueeze(0)
    training = model.training
    model.eval()
    output = model(batch, mask, return_pred=True)
    model.train(training)
    assert output.pred is not None

    pixels = batch[0].float() / 255
    tokens = _to_tokens(pixels, config.tubelet)
    hidden = mask.target_idx[0]
    made = output.pred[0].float().view(len(hidden), -1, config.in_channels)
    if config.norm_pix:
        var, mean = torch.var_mean(tokens[hidden], dim=1, correction=1, keepdim=True)
        made = made * (var.sqrt() + 1e-6) + mean
    masked, whole = tokens.clone(), tokens.clone()
    masked[hidden] = _MASKED_GREY
    whole[hidden] = made

    def frames(t: Tensor) -> Tensor:
        picture = _from_tokens(t, config.grid, config.tubelet)
        return as_rgb((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).cpu())

    return Reconstruction(
        original=as_rgb(video.permute(1, 2, 3, 0).cpu()),
        masked=frames(masked),
        reconstructed=frames(whole),
        loss=output.loss.item(),
        zero_prediction=model.zero_prediction(batch, mask).item(),
        note=NORM_PIX_NOTE if config.norm_pix else "",
    )


def save_contact_sheet(path: Path, pictures: Sequence[Reconstruction]) -> Path:
    """Write frames of original, masked and reconstructed clips as one PNG, a row each."""
    rows = []
    for picture in pictures:
        count = len(picture.original)
        step = math.ceil(count / _MOST_COLUMNS)
        for name in ("original", "masked", "reconstructed"):
            shown = getattr(picture, name)[::step]
            rows.append(label_left(name, [panel(frame) for frame in shown]))
        figure = f"loss {picture.loss:.3f}, predicting zeros {picture.zero_prediction:.3f}"
        rows.append(caption(rows[-1].width, f"{figure}. {picture.note}".strip()))
    return save_stacked(path, rows)


def save_video(path: Path, picture: Reconstruction, *, fps: float) -> Path:
    """Write original, masked and reconstructed clip side by side, ``.mp4`` or ``.gif``.

    Raises:
        ValueError: another suffix.
    """
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"a moving picture is written as .mp4 or .gif, not {path.name!r}")
    clips = (picture.original, picture.masked, picture.reconstructed)
    frames = [_side_by_side(trio, picture.note) for trio in zip(*clips, strict=True)]
    with atomic_file(path) as temporary:
        if path.suffix == ".gif":
            frames[0].save(
                temporary, format="GIF", save_all=True, append_images=frames[1:],
                duration=round(1000 / fps), loop=0,
            )  # fmt: skip
        else:
            _write_mp4(temporary, frames, fps)
    return path


def _to_tokens(pixels_CTHW: Tensor, tubelet: tuple[int, int, int]) -> Tensor:
    """``(N, pt * ph * pw, C)``."""
    pt, ph, pw = tubelet
    cells = pixels_CTHW.unflatten(3, (-1, pw)).unflatten(2, (-1, ph)).unflatten(1, (-1, pt))
    return cells.permute(1, 3, 5, 2, 4, 6, 0).flatten(3, 5).flatten(0, 2)


def _from_tokens(
    tokens: Tensor, grid: tuple[int, int, int], tubelet: tuple[int, int, int]
) -> Tensor:
    """Inverse of :func:`_to_tokens`, ``(C, T, H, W)``."""
    cells = tokens.unflatten(1, tubelet).unflatten(0, grid)
    return cells.permute(6, 0, 3, 1, 4, 2, 5).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _side_by_side(trio: Sequence[Tensor], note: str) -> Image:
    from PIL import Image

    panels = [panel(frame) for frame in trio]
    width = sum(each.width for each in panels)
    below = caption(width, note) if note else None
    height = 24 + panels[0].height + (below.height if below else 0)
    # H.264 in 4:2:0 has even sides only.
    whole = Image.new("RGB", (width + width % 2, height + height % 2), "white")
    left = 0
    for label, each in zip(("original", "masked", "reconstructed"), panels, strict=True):
        whole.paste(strip(each.width, 24, label, 14), (left, 0))
        whole.paste(each, (left, 24))
        left += each.width
    if below:
        whole.paste(below, (0, 24 + panels[0].height))
    return whole


def _write_mp4(path: Path, frames: Sequence[Image], fps: float) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_image(frame)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
