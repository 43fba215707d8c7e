"""Masked pixel reconstruction loss, read from the video itself.

Target of one tubelet: its pixels in [0, 1] as (pt ph pw c), channel last; with norm_pix, per
channel (x - mean) / (sqrt(unbiased var) + 1e-6) over the tubelet's pt*ph*pw pixels.
"""

from typing import Any

import torch
from torch import Tensor

from .tubelets import scale_channels_, take_tubelets

# Added to the standard deviation, not to the variance: the published V1 and V2 targets.
NORM_PIX_EPS = 1e-6


# Values worked on at a time on a CPU: what one pass writes is still in the cache for the next.
_CHUNK_VALUES = 1 << 18


@torch.no_grad()
def pixel_targets_reference(
    video_BCTHW: Tensor,
    target_idx_BM: Tensor,
    tubelet: tuple[int, int, int],
    norm_pix: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Targets ``(B, M, P)`` in ``dtype``; floating video is un-normalised with mean and std."""
    tubelets = take_tubelets(video_BCTHW, target_idx_BM, tubelet)
    targets_npC = _targets(tubelets.flatten(0, 1), norm_pix, mean, std, dtype)
    return targets_npC.reshape(*target_idx_BM.shape, -1)


def _targets(
    tubelets_nCtyx: Tensor,
    norm_pix: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Targets of n tubelets as ``(n, pt*ph*pw, C)``, a transposed view; overwrites a copy."""
    pixels = tubelets_nCtyx.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if tubelets_nCtyx.is_floating_point():
        scale_channels_(pixels.unsqueeze(0), list(std), list(mean))
    else:
        pixels.div_(255)
    pixels_nCp = pixels.flatten(2)
    if norm_pix:
        var, mu = torch.var_mean(pixels_nCp, dim=-1, correction=1, keepdim=True)
        pixels_nCp.sub_(mu).div_(var.sqrt_().add_(NORM_PIX_EPS))
    return pixels_nCp.transpose(1, 2)


def _chunk_rows(rows: Tensor) -> int:
    """How many rows of ``(n, P)`` to work on at a time; all of them where that is no gain."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return max(rows.shape[0], 1)
    return max(_CHUNK_VALUES // max(rows.shape[1], 1), 1)


class MaskedMSEReference(torch.autograd.Function):
    """Squared error averaged over each token's values, ``(B, M)``, fp32 (fp64 for fp64).

    Keeps only the difference, of order 1: scaled by 1/(B*M*P) it would vanish in fp16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pred_BMP: Tensor,
        video_BCTHW: Tensor,
        target_idx_BM: Tensor,
        tubelet: tuple[int, int, int],
        norm_pix: bool,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> Tensor:
        """See :func:`pixel_targets_reference` for the arguments."""
        dtype = torch.promote_types(pred_BMP.dtype, torch.float32)
        tubelets = take_tubelets(video_BCTHW, target_idx_BM, tubelet).flatten(0, 1)
        pred_nP = pred_BMP.flatten(0, 1)
        difference_nP = torch.empty_like(pred_nP, dtype=dtype)
        channels = tubelets.shape[1]
        step = _chunk_rows(pred_nP)
        for first in range(0, pred_nP.shape[0], step):
            part = slice(first, first + step)
            target_npC = _targets(tubelets[part], norm_pix, mean, std, dtype)
            pred_npC = pred_nP[part].to(dtype).unflatten(1, (-1, channels))
            difference_nP[part].unflatten(1, (-1, channels)).copy_(pred_npC - target_npC)
        ctx.save_for_backward(difference_nP)
        ctx.pred_dtype = pred_BMP.dtype
        squared = torch.linalg.vector_norm(difference_nP, dim=1).square_()
        return squared.div_(difference_nP.shape[1]).view(target_idx_BM.shape)

    @staticmethod
    def backward(ctx: Any, grad_BM: Tensor) -> tuple[Tensor | None, ...]:
        """``grad * 2 / P * difference``, multiplied in fp32 and written in pred's dtype."""
        if torch.is_grad_enabled():
            raise RuntimeError("masked_mse cannot be differentiated twice")
        (difference_nP,) = ctx.saved_tensors
        grad_pred_nP = torch.empty_like(difference_nP, dtype=ctx.pred_dtype)
        scale = grad_BM.flatten().mul(2 / difference_nP.shape[1]).unsqueeze(1)
        step = _chunk_rows(difference_nP)
        for first in range(0, difference_nP.shape[0], step):
            part = slice(first, first + step)
            grad_pred_nP[part] = difference_nP[part] * scale[part]
        return grad_pred_nP.view(*grad_BM.shape, -1), None, None, None, None, None, None
