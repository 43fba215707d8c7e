"""Masked pixel reconstruction loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vmae_fast.kernels import masked_mse as kernels
from vmae_fast.kernels.masked_mse import Targets

from ._backend import use_cuda, use_triton
from ._checks import check, check_channels, check_index, check_same_device, check_video
from ._library import once_differentiable, refuse_double_backward, register
from ._masked_mse_cuda import masked_mse_cuda, why_not


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
        target_idx: ``(B, M)`` int32 or int64 token positions of the predictions, distinct within
            each clip and in range, which is checked in :func:`vmae_fast.ops.debug` mode only.
        tubelet: ``(pt, ph, pw)``.
        norm_pix: normalise each target tubelet, channel by channel, to mean 0 and unbiased
            standard deviation 1.
        scored: ``(B, M)`` weights, 0 for tokens that do not count; None scores all.
        reduction: "mean" over scored tokens (of the mean over a token's values), or "none".
        mean: per-channel mean of a floating video's normalisation.
        std: per-channel standard deviation of it.

    Returns:
        A scalar, or ``(B, M)`` for ``reduction="none"`` (not weighted), in fp32 (fp64 for
        fp64 predictions). The gradient flows to pred only. No tensor of targets is made; kept
        for the backward pass is the difference, in pred's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        IndexError: in debug mode, a position is out of range or given twice.

    Source: VideoMAE (arXiv 2203.12602) for the target; VideoMAE V2 (arXiv 2303.16727) for the
    mean over scored tokens.
    """
    targets = check_targets(video, target_idx, tubelet, norm_pix, mean, std)
    check(
        reduction in ("mean", "none"),
        lambda: f"reduction must be 'mean' or 'none', got {reduction!r}",
    )
    expected = (*target_idx.shape, targets.values)
    check(
        tuple(pred.shape) == expected,
        lambda: f"pred must be (B, M, P) = {expected}, got shape {tuple(pred.shape)}",
    )
    check(pred.is_floating_point(), lambda: f"pred must be floating point, got {pred.dtype}")
    check_same_device("video", video, pred=pred, target_idx=target_idx, scored=scored)
    keep = torch.is_grad_enabled() and pred.requires_grad
    per_token, _ = _masked_mse(pred, *targets, keep)
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
    targets = check_targets(video, target_idx, tubelet, norm_pix, mean, std)
    check_same_device("video", video, target_idx=target_idx, scored=scored)
    per_token, _ = _masked_mse(None, *targets, False)
    return weighted_mean(per_token, scored)


@torch.no_grad()
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
    targets = check_targets(video, target_idx, tubelet, norm_pix, mean, std)
    return kernels.pixel_targets_reference(targets, torch.float32)


def weighted_mean(per_token: Tensor, scored: Tensor | None) -> Tensor:
    """Mean of ``(B, M)`` values over the scored tokens (all when None)."""
    if scored is None:
        return per_token.mean()
    check(
        scored.shape == per_token.shape,
        lambda: (
            f"scored must be (B, M) = {tuple(per_token.shape)}, got shape {tuple(scored.shape)}"
        ),
    )
    weight = scored.to(per_token.dtype)
    return (per_token * weight).sum() / weight.sum()


def check_targets(
    video: Tensor,
    target_idx: Tensor,
    tubelet: tuple[int, int, int],
    norm_pix: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Targets:
    """Check the arguments that say what is to be predicted, and put them together."""
    t, h, w = check_video(video, tubelet)
    check(
        not norm_pix or tubelet[0] * tubelet[1] * tubelet[2] > 1,
        lambda: f"norm_pix needs tubelets of more than one pixel, got {tuple(tubelet)}",
    )
    check_index("target_idx", target_idx, video.shape[0], t * h * w)
    check_channels("mean", mean, video.shape[1])
    check_channels("std", std, video.shape[1])
    return Targets(video, target_idx, tubelet, norm_pix, mean, std)


def targets_of(
    video: Tensor,
    target_idx: Tensor,
    tubelet: list[int],
    norm_pix: bool,
    mean: list[float],
    std: list[float],
) -> Targets:
    """The same from what an op was given."""
    pt, ph, pw = tubelet
    return Targets(video, target_idx, (pt, ph, pw), norm_pix, tuple(mean), tuple(std))


def _forward(pred: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *targets_args, keep = rest
    targets = targets_of(*targets_args)
    dtype = torch.float32 if pred is None else pred.dtype
    if use_cuda(targets.video, pred, unsuited=why_not(targets, dtype)):
        per_token, kept = masked_mse_cuda(pred, targets, keep)
    elif use_triton(targets.video, pred, too_large=kernels.too_large(targets)):
        per_token, kept = kernels.masked_mse_triton(pred, targets, keep)
    else:
        per_token, kept = kernels.masked_mse_reference(pred, targets, keep)
    return per_token, per_token.new_empty(0) if kept is None else kept


def _forward_fake(pred: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *targets_args, keep = rest
    targets = targets_of(*targets_args)
    dtype = torch.float32 if pred is None else torch.promote_types(pred.dtype, torch.float32)
    per_token = targets.video.new_empty(targets.idx.shape, dtype=dtype)
    if pred is None or not keep:
        return per_token, per_token.new_empty(0)
    return per_token, pred.new_empty(targets.rows, targets.values)


def _backward(grad: Tensor, kept: Tensor, channels: int) -> Tensor:
    triton = use_triton(kept, grad)
    scale_rows = kernels.scale_rows_triton if triton else kernels.scale_rows_reference
    factor = 2 / max(kept.shape[1], 1)
    scaled = scale_rows(kept, grad.reshape(-1), factor, channels, kept.dtype)
    return scaled.view(*grad.shape, kept.shape[1])


_masked_mse = register(
    "masked_mse(Tensor? pred, Tensor video, Tensor target_idx, int[] tubelet, bool norm_pix,"
    " float[] mean, float[] std, bool keep) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_masked_mse_backward = register(
    "masked_mse_backward(Tensor grad, Tensor kept, int channels) -> Tensor",
    _backward,
    fake=lambda grad, kept, channels: kept.new_empty(*grad.shape, kept.shape[1]),
)
once_differentiable(_masked_mse_backward, "masked_mse")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(kept)
    ctx.channels = inputs[1].shape[1]


def _grad(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("masked_mse")
    (kept,) = ctx.saved_tensors
    found = None
    if grad is not None and ctx.needs_input_grad[0]:
        found = _masked_mse_backward(grad, kept, ctx.channels)
    return found, *[None] * 7


torch.library.register_autograd(_masked_mse, _grad, setup_context=_setup)
