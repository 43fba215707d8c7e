"""Masked pixel reconstruction loss."""

from typing import Literal

import torch
from torch import Tensor

from vmae_fast.kernels.masked_mse import MaskedMSEReference, pixel_targets_reference

from ._checks import check, check_channels, check_index, check_video


def masked_mse(
    pred: Tensor,
    video: Tensor,
    target_idx: Tensor,
    tubelet: tuple[int, int, int],
    *,
    norm_pix: bool = True,
    scored: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> Tensor:
    """Mean squared error between predictions and the video's own tubelets.

    Args:
        pred: ``(B, M, P)`` with ``P = C * pt * ph * pw``, any floating dtype.
        video: ``(B, C, T, H, W)``, any strides; uint8, or floating and normalised with mean
            and std, which are undone: the target is in units of [0, 1].
        target_idx: ``(B, M)`` int32 or int64 token positions of the predictions.
        tubelet: ``(pt, ph, pw)``.
        norm_pix: normalise each target tubelet, channel by channel, to mean 0 and unbiased
            standard deviation 1.
        scored: ``(B, M)`` weights, 0 for tokens that do not count; None scores all.
        reduction: "mean" over scored tokens (of the mean over a token's values), or "none".
        mean: per-channel mean of a floating video's normalisation.
        std: per-channel standard deviation of it.

    Returns:
        A scalar, or ``(B, M)`` for ``reduction="none"`` (not weighted), in fp32 (fp64 for
        fp64 predictions). The gradient flows to pred only.

    Raises:
        ValueError: a shape or dtype does not fit.

    Source: VideoMAE (arXiv 2203.12602) for the target; VideoMAE V2 (arXiv 2303.16727) for the
    mean over scored tokens.
    """
    _check_targets(video, target_idx, tubelet, mean, std)
    check(reduction in ("mean", "none"), f"reduction must be 'mean' or 'none', got {reduction!r}")
    expected = (*target_idx.shape, video.shape[1] * tubelet[0] * tubelet[1] * tubelet[2])
    check(
        tuple(pred.shape) == expected,
        f"pred must be (B, M, P) = {expected}, got shape {tuple(pred.shape)}",
    )
    per_token: Tensor = MaskedMSEReference.apply(
        pred, video, target_idx, tubelet, norm_pix, mean, std
    )
    return per_token if reduction == "none" else weighted_mean(per_token, scored)


@torch.no_grad()
def zero_prediction_mse(
    video: Tensor,
    target_idx: Tensor,
    tubelet: tuple[int, int, int],
    *,
    norm_pix: bool = True,
    scored: Tensor | None = None,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> Tensor:
    """What predicting zeros would cost on the same tubelets: the bar a model has to get under.

    Arguments as in :func:`masked_mse`; returns an fp32 scalar without gradient.
    """
    targets = pixel_targets(video, target_idx, tubelet, norm_pix=norm_pix, mean=mean, std=std)
    return weighted_mean(targets.square().mean(dim=-1), scored)


def pixel_targets(
    video: Tensor,
    target_idx: Tensor,
    tubelet: tuple[int, int, int],
    *,
    norm_pix: bool = True,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> Tensor:
    """The targets themselves, ``(B, M, P)`` fp32, for pictures and tests; training makes none.

    Arguments and errors as in :func:`masked_mse`. Values are ordered (pt ph pw c), channel last.
    """
    _check_targets(video, target_idx, tubelet, mean, std)
    targets: Tensor = pixel_targets_reference(
        video, target_idx, tubelet, norm_pix, mean, std, torch.float32
    )
    return targets


def weighted_mean(per_token: Tensor, scored: Tensor | None) -> Tensor:
    """Mean of ``(B, M)`` values over the scored tokens (all when None)."""
    if scored is None:
        return per_token.mean()
    check(
        scored.shape == per_token.shape,
        f"scored must be (B, M) = {tuple(per_token.shape)}, got shape {tuple(scored.shape)}",
    )
    weight = scored.to(per_token.dtype)
    return (per_token * weight).sum() / weight.sum()


def _check_targets(
    video: Tensor,
    target_idx: Tensor,
    tubelet: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    check_video(video, tubelet)
    check_index("target_idx", target_idx, video.shape[0])
    check_channels("mean", mean, video.shape[1])
    check_channels("std", std, video.shape[1])
