"""Tubelet embedding of the visible tubelets only."""

import torch
from torch import Tensor

from vmae_fast.kernels.tubelet_embed import tubelet_embed_reference

from ._checks import check, check_channels, check_index, check_video


def tubelet_embed(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    visible_idx: Tensor | None = None,
    *,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> Tensor:
    """Embed chosen tubelets of a video: Conv3d with kernel = stride, gathered, plus position.

    Args:
        video: ``(B, C, T, H, W)``, any strides; uint8 0..255, normalised here, or floating
            point, already normalised.
        weight: ``(D, C, pt, ph, pw)``, as a Conv3d holds it.
        bias: ``(D,)`` or None.
        pos_embed: ``(N, D)`` with ``N = T/pt * H/ph * W/pw`` in t-major order, or None.
        visible_idx: ``(B, V)`` int32 or int64 token positions; None embeds all N in order.
            Positions outside 0..N-1 are not checked here.
        mean: per-channel mean for uint8 video, in units of [0, 1].
        std: per-channel standard deviation for uint8 video.

    Returns:
        ``(B, V, D)``. Gradients flow to weight, bias, pos_embed and a floating video.

    Raises:
        ValueError: a shape or dtype does not fit; the message names it.

    Source: VideoMAE (arXiv 2203.12602), section 3: joint space-time cube embedding.
    """
    check(
        weight.dim() == 5,
        f"weight must be (D, C, pt, ph, pw), got shape {tuple(weight.shape)}",
    )
    pt, ph, pw = weight.shape[2:]
    t, h, w = check_video(video, (pt, ph, pw))
    check(
        video.shape[1] == weight.shape[1],
        f"video has {video.shape[1]} channels but weight expects {weight.shape[1]}",
    )
    if bias is not None:
        check(
            tuple(bias.shape) == (weight.shape[0],),
            f"bias must be (D,) = ({weight.shape[0]},), got shape {tuple(bias.shape)}",
        )
    if video.is_floating_point():
        check(
            video.dtype == weight.dtype or torch.is_autocast_enabled(video.device.type),
            f"video is {video.dtype} but weight is {weight.dtype}; cast one of them",
        )
    else:
        check_channels("mean", mean, video.shape[1])
        check_channels("std", std, video.shape[1])
    if pos_embed is not None:
        expected = (t * h * w, weight.shape[0])
        check(
            tuple(pos_embed.shape) == expected,
            f"pos_embed must be (N, D) = {expected}, got shape {tuple(pos_embed.shape)}",
        )
    if visible_idx is not None:
        check_index("visible_idx", visible_idx, video.shape[0])
    return tubelet_embed_reference(video, weight, bias, pos_embed, visible_idx, mean, std)
