"""Tubelet embedding module."""

import torch.nn as nn
from torch import Tensor

from vmae_fast import ops


class TubeletEmbed(nn.Conv3d):
    """Embed the visible tubelets of a video; a Conv3d's weights, init and state dict.

    Args:
        in_channels: C.
        width: D.
        tubelet: ``(pt, ph, pw)``, kernel and stride.
        mean: per-channel mean that uint8 video is normalised with.
        std: per-channel standard deviation.

    Source: VideoMAE (arXiv 2203.12602), joint space-time cube embedding.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        tubelet: tuple[int, int, int],
        *,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__(in_channels, width, kernel_size=tubelet, stride=tubelet)
        self.mean, self.std = mean, std

    def forward(
        self, video: Tensor, pos_embed: Tensor | None = None, visible_idx: Tensor | None = None
    ) -> Tensor:
        """Embed ``(B, C, T, H, W)`` to ``(B, V, D)``; see :func:`vmae_fast.ops.tubelet_embed`."""
        return ops.tubelet_embed(
            video, self.weight, self.bias, pos_embed, visible_idx, mean=self.mean, std=self.std
        )
