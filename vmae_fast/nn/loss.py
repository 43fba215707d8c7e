"""Reconstruction loss module."""

from typing import Literal

import torch.nn as nn
from torch import Tensor

from vmae_fast import ops


class MaskedMSELoss(nn.Module):
    """Mean squared error between predictions and the video's own tubelets.

    Example:
        >>> import torch
        >>> from vmae_fast.nn import MaskedMSELoss
        >>> loss = MaskedMSELoss((2, 16, 16))
        >>> video = torch.randint(0, 256, (1, 3, 4, 64, 64), dtype=torch.uint8)
        >>> masked = torch.arange(32).view(1, 32)
        >>> pred = torch.zeros(1, 32, 3 * 2 * 16 * 16, requires_grad=True)
        >>> loss(pred, video, masked).backward()
        >>> head, features = torch.nn.Linear(192, 1536), torch.randn(1, 32, 192)
        >>> loss.of_features(features, head, video, masked).shape  # makes no predictions
        torch.Size([])

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

    def of_features(
        self,
        features: Tensor,
        head: nn.Linear,
        video: Tensor,
        target_idx: Tensor,
        scored: Tensor | None = None,
    ) -> Tensor:
        """The same loss of ``head(features)``; see :func:`vmae_fast.ops.linear_masked_mse`.

        Args:
            features: ``(B, S, E)``.
            head: linear layer from E to P.
            video: as in :meth:`forward`, as are the following.
            target_idx: ``(B, S)``.
            scored: ``(B, S)`` weights, or None.

        Returns:
            A scalar.

        Raises:
            ValueError: a shape or dtype does not fit, or the reduction is "none".
        """
        if self.reduction != "mean":
            raise ValueError(f"of_features gives a mean only, not reduction={self.reduction!r}")
        return ops.linear_masked_mse(
            features,
            head.weight,
            head.bias,
            video,
            target_idx,
            self.tubelet,
            norm_pix=self.norm_pix,
            scored=scored,
            mean=self.mean,
            std=self.std,
        )
