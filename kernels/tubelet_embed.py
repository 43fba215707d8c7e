"""Tubelet embedding: a Conv3d with kernel = stride, of chosen tubelets only.

out[b, i] = weight . tubelet(video[b], visible_idx[b, i]) + bias + pos_embed[visible_idx[b, i]]
"""

import torch
from torch import Tensor

from .linear import linear_reference
from .tubelets import scale_channels_, take_tubelets


def tubelet_embed_reference(
    video_BCTHW: Tensor,
    weight_DCthw: Tensor,
    bias_D: Tensor | None,
    pos_embed_ND: Tensor | None,
    visible_idx_BV: Tensor | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """Definition of the op in plain PyTorch, ``(B, V, D)``; uint8 is normalised on the way."""
    pt, ph, pw = weight_DCthw.shape[2:]
    tubelets = take_tubelets(video_BCTHW, visible_idx_BV, (pt, ph, pw))
    if not tubelets.is_floating_point():
        # In fp32 at least: bf16 cannot hold the steps of 8-bit video once the mean is off.
        precise = tubelets.to(torch.promote_types(weight_DCthw.dtype, torch.float32))
        scale_channels_(
            precise,
            [1 / (255 * s) for s in std],
            [-m / s for m, s in zip(mean, std, strict=True)],
        )
        tubelets = precise.to(weight_DCthw.dtype)
    tokens_BVD = linear_reference(tubelets.flatten(2), weight_DCthw.flatten(1), bias_D)
    if pos_embed_ND is None:
        return tokens_BVD
    pos = pos_embed_ND if visible_idx_BV is None else pos_embed_ND[visible_idx_BV]
    return tokens_BVD + pos
