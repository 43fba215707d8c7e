"""The pretraining loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vmae_fast.data import BadFile, ClipBatch
from vmae_fast.masking import Mask, clip_keys
from vmae_fast.masking.hashing import combine

from .config import ConfigError, PretrainConfig
from .distributed import Ranks
from .evaluate import held_out_loss
from .inputs import RunError
from .metrics import Metrics
from .optimizer import gradient_norm, learning_rate
from .setup import Setup
from .stop import StopRequest


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        path: its folder.
        checkpoint: the last checkpoint.
        steps: optimiser steps done.
        val_loss: held-out loss, None without held-out files.
        val_zero_prediction: the same of predicting zeros.
        signal: number of the signal that stopped it, 0 if it came to its end.
        samples: some held-out clips (training ones where none are), uint8 ``(C, T, H, W)``.
    """

    path: Path
    checkpoint: Path
    steps: int
    val_loss: float | None
    val_zero_prediction: float | None
    signal: int
    samples: list[Tensor]


@dataclass
class _Report:
    """One optimiser step, as the log and a failure report see it."""

    loss: float = math.nan
    grad_norm: float = math.nan
    lr: float = 0.0
    wait_s: float = 0.0
    paths: list[str] = field(default_factory=list)
    bad: list[BadFile] = field(default_factory=list)
    last: tuple[ClipBatch, Mask] | None = None


class Pretraining:
    """A run: everything :class:`Setup` made, and the loop over it.

    Args:
        config: the settings.
        ranks: this process.
    """

    def __init__(self, config: PretrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.setup = Setup(config, ranks)
        self.model, self.schedule = self.setup.model, self.setup.schedule
        self.trained: Any = self.model
        if ranks.world_size > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self.trained = DistributedDataParallel(self.model, device_ids=ids)
        self.val: tuple[float, float] | None = None

    def train(self, stop: StopRequest) -> RunResult:
        """Run to the end, or to a stop request; both end with a checkpoint.

        Raises:
            RunError: the loss or a gradient is not finite, or too many files are bad.
        """
        setup, run = self.setup, self.config.run
        metrics = Metrics(
            setup.folder.path,
            self.schedule.total_steps,
            setup.start_step,
            active=self.ranks.is_main,
        )
        step, saved, signal = setup.start_step, setup.start_step, 0
        try:
            metrics.say(setup.describe())
            batches = setup.inputs.train_batches(self.schedule, step)
            started, since = time.perf_counter(), step
            waited = 0.0
            while step < self.schedule.total_steps and not signal:
                done = self._step(step, batches)
                step += 1
                waited += done.wait_s
                signal = self._watch(done.bad, stop, step, saved)
                shown = None
                last = step == self.schedule.total_steps
                if step % run.log_every == 0 or last:
                    now = time.perf_counter()
                    speed = (step - since) * self.config.optim.batch_size / (now - started)
                    shown = self._log(metrics, step, done, speed, waited / (now - started))
                    started, since, waited = now, step, 0.0
                metrics.step(shown)
                if setup.inputs.val and (step % run.val_every == 0 or last):
                    self._validate(metrics, step)
                if step % run.save_every == 0 or last or signal:
                    self._save(step)
                    saved = step
        finally:
            metrics.close()
        checkpoint = setup.folder.latest()
        assert checkpoint is not None
        loss, zero = self.val or (None, None)
        samples = setup.inputs.samples(setup.validation) if self.ranks.is_main else []
        return RunResult(setup.folder.path, checkpoint, step, loss, zero, signal, samples)

    def _step(self, step: int, batches: Iterator[ClipBatch]) -> _Report:
        """One optimiser step over all its micro-batches."""
        setup, schedule, config = self.setup, self.schedule, self.config
        # Drop path draws from torch's generator: seeded by the step, so that a resumed run
        # draws the same and no generator state needs to be kept.
        torch.manual_seed(combine_seed(config.run.seed, step, self.ranks.rank))
        self.model.train()
        setup.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.ranks.device)
        report = _Report()
        count = schedule.accumulate
        if self.model.masking.num_unscored is not None:
            # As many tokens count in every clip: each micro-batch weighs the same, and is
            # loaded when it is its turn.
            for number in range(count):
                self._micro_step(*self._load(batches, report), 1 / count, loss, number)
        else:
            loaded = [self._load(batches, report) for _ in range(count)]
            shares = self._shares([mask for _, mask in loaded])
            for number, ((batch, mask), share) in enumerate(zip(loaded, shares, strict=True)):
                self._micro_step(batch, mask, share, loss, number)
        norm = gradient_norm(self.model.parameters(), config.optim.clip_grad)
        # The one read-back of a step: a loss that is not finite must stop before the update.
        loss_value, norm_value = torch.stack(
            [self.ranks.sum(loss) / self.ranks.world_size, norm.to(loss.dtype)]
        ).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._stop_nonfinite(step, loss_value, norm_value, report.paths)
        lr = learning_rate(step, schedule)
        for group in setup.optimizer.param_groups:
            group["lr"] = lr
        setup.optimizer.step()
        if setup.average is not None:
            setup.average.update(self.model)
        report.loss, report.grad_norm, report.lr = loss_value, norm_value, lr
        return report

    def _load(self, batches: Iterator[ClipBatch], report: _Report) -> tuple[ClipBatch, Mask]:
        """The next micro-batch on the device, with its masks; noted in ``report``."""
        before = time.perf_counter()
        batch = next(batches)
        report.wait_s += time.perf_counter() - before
        report.paths += batch.paths
        report.bad += batch.bad
        batch = batch.to(self.ranks.device)
        seed = self.config.run.seed
        mask = self.model.masking(clip_keys(seed, batch.epoch, batch.clip, batch.repeat))
        report.last = (batch, mask)
        return batch, mask

    def _shares(self, masks: list[Mask]) -> Tensor:
        """Each micro-batch's share of the step's loss: its part of all scored tokens."""
        counts = torch.stack([torch.as_tensor(mask.scored_count()) for mask in masks]).float()
        total = self.ranks.sum(counts.sum())
        # DDP averages over processes, and these sum to 1 over all of them.
        return counts / total * self.ranks.world_size

    def _micro_step(
        self, batch: ClipBatch, mask: Mask, share: float | Tensor, loss: Tensor, number: int
    ) -> None:
        """Forward and backward of a micro-batch; adds its share to ``loss`` in place."""
        last = number == self.schedule.accumulate - 1
        # Gradients are exchanged once a step, with the last micro-batch.
        hold = self.trained.no_sync() if self.ranks.world_size > 1 and not last else nullcontext()
        with hold:
            with self.setup.autocast():
                part = self.trained(batch.video, mask).loss * share
            part.backward()
        loss += part.detach()

    def _watch(self, bad: list[BadFile], stop: StopRequest, step: int, saved: int) -> int:
        """Note bad files and stop requests of all processes; returns the signal, 0 for none."""
        known = self.setup.bad_files
        any_bad, signal = self.ranks.any(bool(bad), stop.signal)
        if any_bad:
            self._note_bad(bad)
        if known.too_many:
            if step != saved:
                self._save(step)
            raise RunError(known.message(self.setup.folder.bad_files))
        return signal

    def _note_bad(self, bad: list[BadFile]) -> None:
        """Add all processes' bad files to the list."""
        parts: list[Any] = self.ranks.gather(bad)
        fresh = self.setup.bad_files.add([file for part in parts for file in part])
        if fresh and self.ranks.is_main:
            self.setup.folder.write_bad_files(self.setup.bad_files.reasons)

    def _log(
        self, metrics: Metrics, step: int, done: _Report, speed: float, waiting: float
    ) -> dict[str, float]:
        assert done.last is not None
        batch, mask = done.last
        zero = self.model.zero_prediction(batch.video, mask).item()
        shown = {
            "loss": done.loss,
            "zero_prediction": zero,
            "lr": done.lr,
            "grad_norm": done.grad_norm,
            "clips_per_s": speed,
            "data_wait": waiting,
        }
        epoch = step * self.schedule.files_per_step / len(self.setup.inputs.train)
        bad = len(self.setup.bad_files.reasons)
        metrics.write(step, {**shown, "epoch": round(epoch, 4), "bad_files": bad})
        return {**shown, **({"bad_files": bad} if bad else {})}

    def _validate(self, metrics: Metrics, step: int) -> None:
        inputs = self.setup.inputs
        loss, zero, bad = held_out_loss(
            self.model,
            self.setup.validation,
            inputs.validation_requests(),
            self.schedule.micro_batch,
            self.ranks,
            self.setup.autocast(),
        )
        self.val = (loss, zero)
        self._note_bad(bad)
        metrics.write(step, {"val_loss": loss, "val_zero_prediction": zero})

    def _save(self, step: int) -> None:
        if self.ranks.is_main:
            self.setup.save(step)
        self.ranks.barrier()

    def _stop_nonfinite(self, step: int, loss: float, norm: float, paths: list[str]) -> None:
        """Save the weights from before the update and what went in; then end the run."""
        folder = self.setup.folder.path / f"nonfinite-step-{step:08d}"
        everyone: list[Any] = self.ranks.gather(paths)
        if self.ranks.is_main:
            self.setup.save(step, folder)
            listing = "".join(f"{path}\n" for part in everyone for path in part)
            (folder / "clips.txt").write_text(listing)
        self.ranks.barrier()
        raise RunError(
            f"step {step}: loss {loss}, gradient norm {norm}: not finite, so the weights were not "
            f"updated. The state before the step is in {folder}, its clips in "
            f"{folder / 'clips.txt'}. A lower --lr, --clip-grad or --precision fp32 may help"
        )


def combine_seed(seed: int, step: int, rank: int) -> int:
    """A seed for torch's generator from the run's seed, the step and the process."""
    word = torch.zeros((), dtype=torch.int64)
    for counter in (seed, step, rank):
        word = combine(word, counter)
    return int(word.item())


def pretrain(config: PretrainConfig) -> RunResult:
    """Run pretraining as configured.

    Args:
        config: the settings; see :class:`PretrainConfig`.

    Raises:
        ConfigError: settings that cannot be used.
        DataError: data that cannot be used.
        CheckpointError: ``--init`` or the run to resume cannot be read.
        RunError: the run had to stop; its state was saved.
    """
    from .distributed import process_group

    config.check()
    with StopRequest() as stop, process_group(config.run.device) as ranks:
        return Pretraining(config, ranks).train(stop)


__all__ = ["ConfigError", "Pretraining", "RunError", "RunResult", "pretrain"]
