"""Reconstruction loss module."""

from typing import Literal

import torch.nn as nn
from torch import Tensor

from vmae_fast import ops


class MaskedMSELoss(nn.Module):
    """Mean squared error between predictions and the video's own tubelets.

    Args:
        tubelet: ``(pt, ph, pw)``.
        norm_pix: normalise each target tubelet per channel.
        reduction: "mean" or "none" (per token).
        mean: per-channel mean of a floating video's normalisation.
        std: per-channel standard deviation of it.

    Source: VideoMAE (arXiv 2203.12602), section 3.
    """

    def __init__(
        self,
        tubelet: tuple[int, int, int],
        *,
        norm_pix: bool = True,
        reduction: Literal["mean", "none"] = "mean",
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.tubelet, self.norm_pix, self.reduction = tubelet, norm_pix, reduction
        self.mean, self.std = mean, std

    def forward(
        self, pred: Tensor, video: Tensor, target_idx: Tensor, scored: Tensor | None = None
    ) -> Tensor:
        """See :func:`vmae_fast.ops.masked_mse`."""
        return ops.masked_mse(
            pred,
            video,
            target_idx,
            self.tubelet,
            norm_pix=self.norm_pix,
            scored=scored,
            reduction=self.reduction,
            mean=self.mean,
            std=self.std,
        )
