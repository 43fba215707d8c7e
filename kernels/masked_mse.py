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
    # A copy in any case: what follows works in place.
    pixels = tubelets.to(dtype) if tubelets.dtype != dtype else tubelets.contiguous()
    if tubelets.is_floating_point():
        scale_channels_(pixels, list(std), list(mean))
    else:
        pixels.div_(255)
    pixels_BMCp = pixels.flatten(3)
    if norm_pix:
        var, mu = torch.var_mean(pixels_BMCp, dim=-1, correction=1, keepdim=True)
        pixels_BMCp.sub_(mu).div_(var.sqrt_().add_(NORM_PIX_EPS))
    return pixels_BMCp.transpose(2, 3).flatten(2)


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
        target = pixel_targets_reference(
            video_BCTHW, target_idx_BM, tubelet, norm_pix, mean, std, dtype
        )
        difference = torch.sub(pred_BMP, target, out=target)
        ctx.save_for_backward(difference)
        ctx.pred_dtype = pred_BMP.dtype
        return torch.linalg.vector_norm(difference, dim=-1).square_().div_(difference.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_BM: Tensor) -> tuple[Tensor | None, ...]:
        """``grad * 2 / P * difference``, multiplied in fp32 and written in pred's dtype."""
        if torch.is_grad_enabled():
            raise RuntimeError("masked_mse cannot be differentiated twice")
        (difference,) = ctx.saved_tensors
        grad_pred = torch.empty_like(difference, dtype=ctx.pred_dtype)
        scale = (grad_BM * (2 / difference.shape[-1])).unsqueeze(-1)
        torch.mul(difference, scale, out=grad_pred)
        return grad_pred, None, None, None, None, None, None
