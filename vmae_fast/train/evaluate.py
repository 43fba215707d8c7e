"""Held-out loss under fixed masks."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from vmae_fast.data import BadFile, ClipDataset, ClipRequest, collate_clips
from vmae_fast.masking import clip_keys
from vmae_fast.models import VideoMAE

from .distributed import Ranks

# Masks of held-out clips hang on the file alone, never on the run's seed or epoch: the figures
# of different runs on the same files can be compared.
_MASK_SEED = 0


@torch.no_grad()
def held_out_loss(
    model: VideoMAE,
    dataset: ClipDataset,
    requests: list[ClipRequest],
    micro_batch: int,
    ranks: Ranks,
    autocast: AbstractContextManager[None],
) -> tuple[float, float, list[BadFile]]:
    """Mean loss of the held-out clips' scored tokens and of predicting zeros for the same ones.

    Args:
        model: put into eval mode for the while.
        dataset: the held-out clips.
        requests: this process's part of them.
        micro_batch: clips at a time.
        ranks: this process; sums are taken over all.
        autocast: context to compute in.

    Returns:
        Loss, zero-prediction loss, files that could not be read.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")
    bad: list[BadFile] = []
    try:
        for first in range(0, len(requests), micro_batch):
            items = [dataset[request] for request in requests[first : first + micro_batch]]
            batch = collate_clips(items).to(ranks.device)
            bad += batch.bad
            mask = model.masking(clip_keys(_MASK_SEED, 0, batch.clip))
            with autocast:
                loss = model(batch.video, mask).loss
            zero = model.zero_prediction(batch.video, mask)
            # By tokens where their number differs: how clips fall into batches must not matter.
            weight = len(items) if mask.scored is None else mask.scored.mean().item() * len(items)
            sums += torch.tensor([loss.item() * weight, zero.item() * weight, weight])
    finally:
        model.train(training)
    total = ranks.sum(sums.to(ranks.device, torch.float32)).tolist()
    return total[0] / total[2], total[1] / total[2], bad
