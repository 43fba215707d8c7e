"""Launches the CUDA C++ kernel of the masked loss (csrc/masked_mse.h), where it takes the call.

Shapes: as in vmae_fast/kernels/masked_mse.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmae_fast.kernels import linear_masked_mse as linear_kernels
from vmae_fast.kernels.masked_mse import NORM_PIX_EPS, Differences, Targets
from vmae_fast.kernels.token_gather import column_sum_reference, column_sum_triton

from ._extension import extension, stream_of, view

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Of csrc/masked_mse.h: a row of a tubelet is one load, and a block holds a tubelet's rows.
_ALIGNMENT = 16
_WIDTH = 16
_MOST_ROWS = 256
_MOST_CHANNELS = 4


def why_not(targets: Targets, dtype: torch.dtype) -> str:
    """What of these targets, with predictions of a dtype, the kernel does not take; "" if all."""
    video, (pt, ph, pw) = targets.video, targets.size
    if video.dtype != torch.uint8:
        return f"{video.dtype} video"
    if dtype not in _DTYPES:
        return f"{dtype} predictions"
    if pw != _WIDTH or pt * ph > _MOST_ROWS:
        return f"tubelets of {pt * ph} rows of {pw} pixels"
    if not 1 <= video.shape[1] <= _MOST_CHANNELS:
        return f"{video.shape[1]} channels"
    if targets.rows >= 2**30:
        return f"{targets.rows} tokens"
    # A decoder's memory has the channels of a pixel together.
    together = video.shape[1] == 3 and video.stride(1) == 1 and video.stride(4) == 3
    dense = (1, 4) if together else (4,)
    apart = [video.stride(i) for i in range(5) if i not in dense and video.shape[i] > 1]
    aligned = all(stride % _ALIGNMENT == 0 for stride in [video.data_ptr(), *apart])
    if aligned and (together or video.stride(4) == 1):
        return ""
    return f"video of strides {video.stride()}, {video.data_ptr() % _ALIGNMENT} bytes off alignment"


def masked_mse_cuda(
    pred_BMP: Tensor | None, targets: Targets, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """As :func:`vmae_fast.kernels.masked_mse.masked_mse_reference`."""
    loss_n = targets.video.new_empty(targets.rows, dtype=torch.float32)
    pred_nP = difference_nP = None
    if pred_BMP is not None:
        pred_nP = pred_BMP.contiguous().flatten(0, 1)
        if pred_nP.data_ptr() % _ALIGNMENT:
            pred_nP = pred_nP.clone()
        difference_nP = torch.empty_like(pred_nP) if keep else None
    _launch(pred_nP, targets, 0, None, loss_n, difference_nP, channel_major=False)
    return loss_n.view(targets.idx.shape), difference_nP


def linear_masked_mse_cuda(
    x_BSE: Tensor,
    weight_PE: Tensor,
    bias_P: Tensor | None,
    targets: Targets,
    scored_BS: Tensor | None,
    keep: bool,
    triton: bool,
) -> linear_kernels.Result:
    """As :func:`vmae_fast.kernels.linear_masked_mse.linear_masked_mse_reference`.

    Args:
        triton: the other kernel of a chunk is Triton's.
    """
    column_sum = column_sum_triton if triton else column_sum_reference
    turn = _differences(targets)
    return linear_kernels.in_chunks(
        x_BSE, weight_PE, bias_P, targets, scored_BS, keep, turn, column_sum
    )


def _differences(targets: Targets) -> Differences:
    def turn(pred_nP: Tensor, first: int, weight_n: Tensor | None) -> Tensor:
        loss_n = pred_nP.new_empty(pred_nP.shape[0], dtype=torch.float32)
        _launch(pred_nP, targets, first, weight_n, loss_n, pred_nP, channel_major=True)
        return loss_n

    return turn


def _launch(
    pred_nP: Tensor | None,
    targets: Targets,
    first: int,
    weight_n: Tensor | None,
    loss_n: Tensor,
    difference_nP: Tensor | None,
    channel_major: bool,
) -> None:
    extension().masked_mse(
        None if pred_nP is None else view(pred_nP),
        view(targets.video),
        view(targets.idx),
        None if weight_n is None else view(weight_n),
        view(loss_n),
        None if difference_nP is None else view(difference_nP),
        first,
        targets.idx.shape[1],
        targets.size,
        targets.norm_pix,
        channel_major,
        NORM_PIX_EPS,
        stream_of(targets.video.device),
    )
