"""What a model is worth on held-out clips: its loss under fixed masks, and its features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmae_fast.data import BadFile, ClipBatch, ClipDataset, ClipRequest
from vmae_fast.masking import clip_keys
from vmae_fast.models import VideoMAE

from .distributed import Ranks
from .features import FeatureFigures, bank_of, figures_of
from .inputs import Inputs
from .sharded import gathered

# Masks of held-out clips hang on the file alone, never on the run's seed or epoch: the figures
# of different runs on the same files can be compared.
_MASK_SEED = 0


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        loss: of the held-out clips' scored tokens; None without held-out files, or not asked for.
        zero_prediction: the same of predicting zeros.
        features: what the clips' features come to.
        bad: files of this process that could not be read.
    """

    loss: float | None
    zero_prediction: float | None
    features: FeatureFigures
    bad: list[BadFile]

    def row(self) -> dict[str, float]:
        """For the metrics."""
        found = {"val_loss": self.loss, "val_zero_prediction": self.zero_prediction}
        given = {name: value for name, value in found.items() if value is not None}
        return given | self.features.row()


def evaluate(
    model: VideoMAE,
    inputs: Inputs,
    dataset: ClipDataset,
    micro_batch: int,
    autocast: AbstractContextManager[None],
    *,
    loss: bool = True,
) -> Evaluation:
    """Loss of the held-out clips, and figures of their features beside those of training clips.

    The clips are split over processes, and the figures are those of all. No generator is drawn
    from and no parameter touched: training goes on as if this had not been.

    Args:
        model: put into eval mode for the while.
        inputs: the files, and this process among its ranks.
        dataset: their clips, each the same every time.
        micro_batch: clips at a time.
        autocast: context to compute in.
        loss: False leaves the loss out.
    """
    # Processes may have different numbers of batches.
    with gathered(model):
        return _evaluate(model, inputs, dataset, micro_batch, autocast, loss)


def _evaluate(
    model: VideoMAE,
    inputs: Inputs,
    dataset: ClipDataset,
    micro_batch: int,
    autocast: AbstractContextManager[None],
    loss: bool,
) -> Evaluation:
    ranks = inputs.ranks
    asked, chosen = bank_of(inputs.val), bank_of(inputs.train)
    held_out = ClipFeatures(model, autocast, asked)
    bank = ClipFeatures(model, autocast, chosen)
    found: tuple[float | None, float | None] = (None, None)
    if loss and inputs.val:
        *both, bad = held_out_loss(
            model, dataset, inputs.validation_requests(), micro_batch, inputs, autocast,
            each=held_out.add,
        )  # fmt: skip
        found = (both[0], both[1])
    else:
        bad = held_out.read(dataset, asked, micro_batch, inputs)
    bad += bank.read(dataset, chosen, micro_batch, inputs)
    features = figures_of(inputs.files, bank.gather(ranks), held_out.gather(ranks))
    return Evaluation(*found, features, bad)


@torch.no_grad()
def held_out_loss(
    model: VideoMAE,
    dataset: ClipDataset,
    requests: list[ClipRequest],
    micro_batch: int,
    inputs: Inputs,
    autocast: AbstractContextManager[None],
    *,
    each: Callable[[ClipBatch], None] | None = None,
) -> tuple[float, float, list[BadFile]]:
    """Mean loss of the held-out clips' scored tokens and of predicting zeros for the same ones.

    Args:
        model: put into eval mode for the while.
        dataset: the held-out clips.
        requests: this process's part of them.
        micro_batch: clips at a time.
        inputs: reads the clips; sums are taken over all of its ranks.
        autocast: context to compute in.
        each: called with every batch, on the device.

    Returns:
        Loss, zero-prediction loss, files that could not be read.
    """
    ranks, training = inputs.ranks, model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")
    bad: list[BadFile] = []
    try:
        for loaded in inputs.batches(dataset, requests, micro_batch):
            batch = loaded.to(ranks.device)
            bad += batch.bad
            mask = model.masking(clip_keys(_MASK_SEED, 0, batch.clip))
            with autocast:
                loss = model(batch.video, mask).loss
            zero = model.zero_prediction(batch.video, mask)
            # By tokens where their number differs: how clips fall into batches must not matter.
            count = len(batch.paths)
            weight = count if mask.scored is None else mask.scored.mean().item() * count
            sums += torch.tensor([loss.item() * weight, zero.item() * weight, weight])
            if each is not None:
                each(batch)
    finally:
        model.train(training)
    total = ranks.sum(sums.to(ranks.device, torch.float32)).tolist()
    return total[0] / total[2], total[1] / total[2], bad


class ClipFeatures:
    """Features of clips, collected batch by batch on each process.

    Args:
        model: the encoder is its; put into eval mode for the while.
        autocast: context to compute in.
        among: indices of the clips wanted; others are passed over. What stood in for an unreadable
            file may be another: a held-out clip must not get into the bank.
    """

    def __init__(
        self, model: VideoMAE, autocast: AbstractContextManager[None], among: Sequence[int]
    ) -> None:
        self.model, self.autocast, self.among = model, autocast, set(among)
        self._found: list[tuple[list[int], Tensor]] = []

    @torch.no_grad()
    def add(self, batch: ClipBatch) -> None:
        """Encode a batch that is on the device."""
        clips = batch.clip.tolist()
        kept = [place for place, clip in enumerate(clips) if clip in self.among]
        if not kept:
            return
        video = batch.video if len(kept) == len(clips) else batch.video[kept]
        training = self.model.training
        self.model.eval()
        try:
            with self.autocast:
                tokens_BND = self.model.encode(video)
        finally:
            self.model.train(training)
        rows = self.model.config.grid[0]
        rows_BtD = tokens_BND.float().unflatten(1, (rows, -1)).mean(dim=2)
        self._found.append(([clips[place] for place in kept], rows_BtD.cpu()))

    def read(
        self, dataset: ClipDataset, indices: Sequence[int], micro_batch: int, inputs: Inputs
    ) -> list[BadFile]:
        """Encode this process's part of some clips; returns the files that could not be read."""
        bad: list[BadFile] = []
        ranks = inputs.ranks
        mine = [ClipRequest(0, index) for index in indices[ranks.rank :: ranks.world_size]]
        for loaded in inputs.batches(dataset, mine, micro_batch):
            batch = loaded.to(ranks.device)
            bad += batch.bad
            self.add(batch)
        return bad

    def gather(self, ranks: Ranks) -> dict[int, Tensor]:
        """Each clip's feature ``(t, D)`` by index, over all processes, in order of index."""
        parts: list[Any] = ranks.gather(self._found)
        found: dict[int, Tensor] = {}
        for clips, features in (piece for part in parts for piece in part):
            found.update(zip(clips, features, strict=True))
        return dict(sorted(found.items()))
