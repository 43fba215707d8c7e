"""Tubelets of a video by index, through whatever strides the video has.

Shapes: video (B, C, T, H, W); tubelet = (pt, ph, pw); grid = (T/pt, H/ph, W/pw), t-major;
idx (B, n) of token positions.
"""

import torch
from torch import Tensor


def take_tubelets(video: Tensor, idx: Tensor | None, tubelet: tuple[int, int, int]) -> Tensor:
    """Copy the tubelets at ``idx`` (all when None) to ``(B, n, C, pt, ph, pw)``, video's dtype.

    Reads only what it copies: splitting each dimension is a view for any strides.
    """
    pt, ph, pw = tubelet
    # (B, C, t, pt, h, ph, w, pw)
    cells = video.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
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
    clip = torch.arange(video.shape[0], device=video.device).unsqueeze(1)
    return cells[clip, :, idx // (h * w), :, idx // w % h, :, idx % w, :]


def scale_channels_(tubelets: Tensor, scale: list[float], shift: list[float]) -> Tensor:
    """``x * scale[c] + shift[c]`` in place on floating tubelets ``(B, n, C, ...)``.

    Python scalars rather than tensors: exact in every dtype, nothing to copy to the device.
    """
    for c, (a, b) in enumerate(zip(scale, shift, strict=True)):
        tubelets.select(2, c).mul_(a).add_(b)
    return tubelets
