"""Tubelet embedding, and picking tokens out of it."""

import torch.nn as nn
from torch import Tensor

from vmae_fast import ops


class TubeletEmbed(nn.Conv3d):
    """Embed the visible tubelets of a video; a Conv3d's weights, init and state dict.

    Takes the place of ``nn.Conv3d(in_channels, width, tubelet, stride=tubelet)`` and of the
    indexing after it: tubelets that are not visible are not read.

    Example:
        >>> import torch
        >>> from vmae_fast.nn import TubeletEmbed
        >>> embed = TubeletEmbed(3, 192, (2, 16, 16))
        >>> _ = embed.load_state_dict(torch.nn.Conv3d(3, 192, (2, 16, 16)).state_dict())
        >>> video = torch.randint(0, 256, (1, 3, 4, 64, 64), dtype=torch.uint8)
        >>> embed(video).shape  # a grid of 2 x 4 x 4
        torch.Size([1, 32, 192])
        >>> embed(video, visible_idx=torch.tensor([[0, 5, 31]])).shape
        torch.Size([1, 3, 192])

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


class GatherVisible(nn.Module):
    """Keep the visible tokens of a sequence: what a boolean mask is used for, without its stall.

    Example:
        >>> import torch
        >>> from vmae_fast import Mask
        >>> from vmae_fast.nn import GatherVisible
        >>> mask = Mask.from_bool(torch.tensor([[True, False, True, False]]))  # True = masked
        >>> tokens = torch.arange(4.0).view(1, 4, 1)
        >>> GatherVisible()(tokens, mask.visible_idx).flatten().tolist()
        [1.0, 3.0]
    """

    def forward(self, x: Tensor, visible_idx: Tensor) -> Tensor:
        """``(B, N, D)`` to ``(B, V, D)``; see :func:`vmae_fast.ops.gather_tokens`."""
        return ops.gather_tokens(x, visible_idx)
