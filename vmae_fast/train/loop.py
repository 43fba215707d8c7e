"""The pretraining loop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vmae_fast.data import BadFile, ClipBatch
from vmae_fast.masking import clip_keys
from vmae_fast.masking.hashing import combine
from vmae_fast.profiling import span

from .config import ConfigError, PretrainConfig
from .distributed import Ranks, is_of_group
from .evaluate import evaluate
from .features import FeatureFigures
from .graph import is_sharded
from .inputs import RunError
from .metrics import Metrics
from .optimizer import learning_rate
from .out_of_memory import explain, is_out_of_memory
from .pace import Pace, Report
from .profile import WARM_UPS, ProfiledSteps, steady_steps
from .readback import Readback
from .setup import Setup
from .step import TrainStep
from .stop import STOP_SIGNALS, StopRequest
from .watch import Watch


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
        profile: the trace and the summary of the steps that ``--profile`` recorded, if any.
        features: what the encoder's features came to in the last validation, if there was one.
    """

    path: Path
    checkpoint: Path
    steps: int
    val_loss: float | None
    val_zero_prediction: float | None
    signal: int
    samples: list[Tensor]
    profile: tuple[Path, ...] = ()
    features: FeatureFigures | None = None


class Pretraining:
    """A run: everything :class:`Setup` made, and the loop over it.

    The host runs some steps ahead of the device. What a step came to is read back as many steps
    later, and before anything is written that depends on it.

    Args:
        config: the settings.
        ranks: this process.
        stop: requests to stop.
    """

    def __init__(self, config: PretrainConfig, ranks: Ranks, stop: StopRequest) -> None:
        self.config, self.ranks, self.stop = config, ranks, stop
        self.setup = setup = Setup(config, ranks)
        self.model, self.schedule = setup.model, setup.schedule
        trained = None
        if ranks.world_size > 1 and not is_sharded(self.model):
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            # Its buffers are tables of positions, which nothing changes.
            trained = DistributedDataParallel(self.model, device_ids=ids, broadcast_buffers=False)
        self.train_step = TrainStep(
            self.model,
            setup.optimizer,
            autocast=setup.autocast,
            trained=trained,
            ranks=ranks,
            clip_grad=config.optim.clip_grad,
            average=setup.average,
            accumulate=self.schedule.accumulate,
            skip_nonfinite=config.run.skip_nonfinite,
            capture=setup.capture,
        )
        self.readback: Readback[Report] = Readback()
        self.val: tuple[float, float] | None = None
        self.features: FeatureFigures | None = None
        self.signal = 0
        self.bad_clips: list[str] = []
        self.saved = setup.start_step
        self.metrics = Metrics(
            setup.folder.path,
            self.schedule.total_steps,
            setup.start_step,
            active=ranks.is_main,
        )
        self.profile = self._profile()
        self.watch = Watch(ranks, config.run.timeout, self._alarm)

    def train(self) -> RunResult:
        """Run to the end, or to a stop request; both end with a checkpoint.

        Raises:
            RunError: the loss or a gradient is not finite, too many files are bad, or memory ran
                out.
        """
        try:
            if self.ranks.is_main:
                self.metrics.say(self.setup.describe())
            with self.profile, self.watch:
                step = self._loop()
                self.profile.finish(step)
        except Exception as error:
            # Steps done before something else failed keep their rows, where no other process has
            # to agree.
            if self.ranks.world_size == 1:
                self._read(everything=True)
            reason = explain(self.setup, error) or self._other_process(error)
            if reason is not None:
                raise RunError(reason) from error
            raise
        finally:
            self.metrics.close()
        setup = self.setup
        checkpoint = setup.folder.latest()
        assert checkpoint is not None
        loss, zero = self.val or (None, None)
        samples = setup.inputs.samples(setup.validation) if self.ranks.is_main else []
        return RunResult(
            setup.folder.path, checkpoint, step, loss, zero, self.signal, samples,
            self.profile.written, self.features,
        )  # fmt: skip

    def _profile(self) -> ProfiledSteps:
        """Records some steps where that is asked for, on one of the processes."""
        start, total = self.setup.start_step, self.schedule.total_steps
        asked = self.config.run.profile and self.ranks.is_main
        steps = steady_steps(start, total) if asked else range(0)
        note = ""
        if asked and not steps:
            self.metrics.say("--profile: no step is left to record")
        elif asked and steps.start - start < WARM_UPS:
            note = f", not steady yet (that takes {WARM_UPS} steps)"
            self.metrics.say(f"--profile: steps {steps.start + 1} to {steps.stop}{note}")
        folder = self.setup.folder.path / "profile"
        return ProfiledSteps(steps, self.ranks.device, folder, note, self.metrics.say)

    def _loop(self) -> int:
        """All steps; returns how many are done."""
        run, total = self.config.run, self.schedule.total_steps
        step = self.setup.start_step
        batches = self.setup.inputs.train_batches(self.schedule, step)
        pace = Pace(step, self.config.optim.batch_size)
        self.model.train()
        if step == 0:
            # Untrained: what there is to rise from.
            self._validate(step)
        while step < total and not self.signal:
            self.profile.at(step)
            with span("step"):
                report = self._step(step, batches)
            step += 1
            with span("read figures"):
                self._read()
            pace.waited_s += report.wait_s
            if self._logged(step):
                report.pace = pace.figures(step)
            if self.ranks.world_size == 1:
                self.signal = self.stop.signal
            validates = step % run.val_every == 0 or step == total
            saves = step % run.save_every == 0 or step == total
            if validates or saves or self.signal:
                with span("read figures"):
                    self._read(everything=True)
            self._check_bad(step)
            if validates:
                with span("validate"):
                    self._validate(step)
            if saves or self.signal:
                with span("save"):
                    self._save(step)
        return step

    def _logged(self, step: int) -> bool:
        return step % self.config.run.log_every == 0 or step == self.schedule.total_steps

    def _step(self, step: int, batches: Iterator[ClipBatch]) -> Report:
        """Enqueue one optimiser step over all its micro-batches."""
        ranks, device_step = self.ranks, self.train_step
        # Drop path draws from torch's generator: seeded by the step, so that a resumed run
        # draws the same and no generator state needs to be kept.
        torch.manual_seed(combine_seed(self.config.run.seed, step, ranks.rank))
        report = Report(step, learning_rate(step, self.schedule))
        count = self.schedule.accumulate
        if self.model.masking.num_unscored is not None:
            # As many tokens count in every clip: each micro-batch weighs the same, and is
            # loaded when it is its turn.
            for number in range(count):
                device_step.forward_backward(*self._load(batches, report), number=number)
        else:
            loaded = [self._load(batches, report) for _ in range(count)]
            shares = device_step.shares([keys for _, keys in loaded])
            for number, ((video, keys), share) in enumerate(zip(loaded, shares, strict=True)):
                device_step.forward_backward(video, keys, share, number)
        flags = (len(report.bad), *(self.stop.signal == number for number in STOP_SIGNALS))
        values = device_step.update(report.lr, *(flags if ranks.world_size > 1 else ()))
        if self._logged(step + 1):
            values = torch.cat([values, device_step.zero_prediction().float().view(1)])
        self.readback.put(report, values)
        return report

    def _load(self, batches: Iterator[ClipBatch], report: Report) -> tuple[Tensor, Tensor]:
        """The next micro-batch and its masks' keys, on the host; noted in ``report``."""
        before = time.perf_counter()
        self.watch.at(report.step, "loading clips")
        with span("wait for clips"):
            batch = next(batches)
        self.watch.at(report.step, "computing")
        report.wait_s += time.perf_counter() - before
        report.paths += batch.paths
        report.bad += batch.bad
        keys = clip_keys(self.config.run.seed, batch.epoch, batch.clip, batch.repeat)
        return batch.video, keys.pin_memory() if self.ranks.device.type == "cuda" else keys

    def _read(self, *, everything: bool = False) -> None:
        """Act on the figures of steps that are far enough back, or of all."""
        for report, values in self.readback.take(everything=everything):
            loss, norm, bad_in_a_row, *more = values
            if bad_in_a_row:
                self._note_nonfinite(report, loss, norm, int(bad_in_a_row))
            any_bad = bool(report.bad)
            if self.ranks.world_size > 1:
                # All processes read the same sums of the same step, and so do the same.
                any_bad = bool(more[0])
                came = [n for n, flag in zip(STOP_SIGNALS, more[1:], strict=False) if flag]
                self.signal = max(came, default=self.signal)
            if any_bad:
                self._note_bad(report.bad)
            self._log(report, loss, norm, more[-1] if report.pace is not None else math.nan)

    def _check_bad(self, step: int) -> None:
        """End the run where too many files are bad; its ``step`` steps are saved."""
        known = self.setup.bad_files
        if known.too_many:
            self._read(everything=True)
            if step != self.saved:
                self._save(step)
            raise RunError(known.message(self.setup.folder.bad_files))

    def _note_bad(self, bad: list[BadFile]) -> None:
        """Add all processes' bad files to the list."""
        parts: list[Any] = self.ranks.gather(bad)
        fresh = self.setup.bad_files.add([file for part in parts for file in part])
        if fresh and self.ranks.is_main:
            self.setup.folder.write_bad_files(self.setup.bad_files.reasons)

    def _log(self, report: Report, loss: float, norm: float, zero: float) -> None:
        """Count a step, and write its row where it has one."""
        if report.pace is None:
            self.metrics.step()
            return
        shown = {
            "loss": loss,
            "zero_prediction": zero,
            "lr": report.lr,
            "grad_norm": norm,
            **report.pace,
        }
        step = report.step + 1
        epoch = step * self.schedule.files_per_step / self.schedule.files_per_epoch
        bad, skipped = len(self.setup.bad_files.reasons), self.setup.skipped
        counts = {"bad_files": bad, **({"skipped": skipped} if skipped else {})}
        self.metrics.write(step, {**shown, "epoch": round(epoch, 4), **counts})
        self.metrics.step({**shown, **{name: count for name, count in counts.items() if count}})
        advice = self.setup.inputs.waiting_advice(report.pace["data_wait"])
        if advice is not None:
            self.metrics.say(f"step {step}: {advice}")

    def _validate(self, step: int) -> None:
        """Write the figures of held-out clips; before the first step those of features alone."""
        setup = self.setup
        self.watch.at(step, "validating")
        found = evaluate(
            self.model,
            setup.inputs,
            setup.validation,
            self.schedule.micro_batch,
            setup.autocast(),
            loss=step > 0,
        )
        if found.loss is not None and found.zero_prediction is not None:
            self.val = (found.loss, found.zero_prediction)
        self.features = found.features
        self._note_bad(found.bad)
        self.metrics.write(step, found.row())
        if found.features.collapsed:
            self.metrics.say(f"step {step}: {found.features.warning()}")

    def _save(self, step: int) -> None:
        self.watch.at(step, "saving")
        self.setup.save(step)
        self.saved = step

    def _alarm(self, text: str) -> None:
        """Print what every process should, should it be the one that still can."""
        print(text, file=sys.stderr, flush=True)

    def _other_process(self, error: Exception) -> str | None:
        """What to say of an error that another process caused; None where it is of this one."""
        if self.ranks.world_size == 1 or not is_of_group(error):
            return None
        places = self.watch.report()
        return (
            f"process {self.ranks.rank}: another process of the run has ended, or hung for "
            f"{self.config.run.timeout:g} s (--timeout): {str(error).splitlines()[0]}. What it "
            f"said itself is above. Go on with --out {self.setup.folder.path} --resume"
            + (f"\n{places}" if places else "")
        )

    def _note_nonfinite(self, report: Report, loss: float, norm: float, in_a_row: int) -> None:
        """Count a skipped update; too many in a row end the run."""
        step, allowed = report.step, self.config.run.skip_nonfinite
        self.bad_clips = [*(self.bad_clips if in_a_row > 1 else ()), *report.paths]
        if in_a_row > allowed:
            # Those after it were skipped.
            self.readback.clear()
            self._stop_nonfinite(step, loss, norm, in_a_row)
        self.setup.skipped += 1
        self.metrics.say(
            f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite, update skipped "
            f"({in_a_row} in a row of at most {allowed}, {self.setup.skipped} in all)"
        )

    def _stop_nonfinite(self, step: int, loss: float, norm: float, in_a_row: int) -> NoReturn:
        """Save the weights from before the update and what went in; then end the run."""
        folder = self.setup.folder.path / f"nonfinite-step-{step:08d}"
        everyone: list[Any] = self.ranks.gather(self.bad_clips)
        self.setup.save(step, folder)
        if self.ranks.is_main:
            listing = "".join(f"{path}\n" for part in everyone for path in part)
            (folder / "clips.txt").write_text(listing, "utf-8", "surrogateescape")
        self.ranks.barrier()
        many = f", as {in_a_row - 1} times in a row before" if in_a_row > 1 else ""
        raise RunError(
            f"step {step}: loss {loss}, gradient norm {norm}: not finite{many}, so the weights "
            f"were not updated. The state before that is in {folder}, the clips in "
            f"{folder / 'clips.txt'}. A lower --lr, --clip-grad or --precision fp32 may help"
            + ("" if many else ", and --skip-nonfinite N goes on after up to N such steps")
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
    stop = StopRequest()
    with process_group(config.run.device, config.run.timeout) as ranks:
        try:
            run = Pretraining(config, ranks, stop)
        except Exception as error:
            if is_out_of_memory(error):
                raise RunError(
                    f"out of memory on {ranks.device} before the first step: take a smaller "
                    "--model, or end what else is on it (vmae-fast plan says what a run takes)"
                ) from error
            raise
        # Until here Ctrl-C ends it at once: there is nothing to save.
        with stop:
            return run.train()


__all__ = ["ConfigError", "Pretraining", "RunError", "RunResult", "pretrain"]
