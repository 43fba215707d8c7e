"""Everything a run needs before its first step."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch

from vmae_fast.models import CheckpointError, VideoMAE

from .checkpoint import load_optimizer, read_state, write_checkpoint
from .config import ConfigError, PretrainConfig
from .distributed import Ranks
from .graph import choose_capture, is_sharded
from .inputs import BadFiles, Inputs, RunError
from .optimizer import AveragedWeights, make_optimizer, placed_as
from .recipe import to_toml
from .run_folder import RunFolder, Start
from .schedule import Schedule
from .sharded import shard


class Setup:
    """Model, data, optimiser and folder of a run, new or resumed.

    Args:
        config: checked settings.
        ranks: this process.

    Raises:
        ConfigError, DataError, CheckpointError: settings, data or a checkpoint cannot be used.
    """

    def __init__(self, config: PretrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        path = self._out()
        self.start = start = self._start(RunFolder(path))
        resumed = start.checkpoint
        torch.manual_seed(config.run.seed)
        self.model = config.model.build(resumed or config.run.init).to(ranks.device)
        self._configure(self.model)
        if config.run.parallel == "fsdp":
            shard(self.model, ranks, self.autocast_dtype)
        # A recorded step is one launch: its kernels show in a profile, but no range is about them.
        launched = config.run.profile and config.run.cuda_graph == "auto"
        setting = "off" if launched else config.run.cuda_graph
        self.capture = choose_capture(setting, self.model, ranks)
        self.inputs = Inputs(config, self.model.config, ranks)
        epoch = self.inputs.epoch()
        self.schedule = Schedule.of(config, epoch.files, ranks.world_size, epoch.clips)
        # The folder is taken only once nothing else can be wrong with the settings.
        if ranks.is_main:
            self.folder = RunFolder.open(
                path, resume=resumed is not None, overwrite=start.overwrite
            )
            for damaged in start.damaged:
                self.folder.set_aside(damaged)
        ranks.barrier()
        self.folder = RunFolder(path)
        self.optimizer = make_optimizer(self.model, config.optim)
        decay = config.optim.ema_decay
        self.average = AveragedWeights(self.model, decay) if decay else None
        self.start_step = self.skipped = 0
        if resumed:
            self._resume(resumed)
        known = self.folder.read_bad_files() if resumed else {}
        self.inputs.pass_over(known)
        self.bad_files = BadFiles(self.inputs.num_files, config.loading.max_bad, known)
        self.validation = self.inputs.validation_dataset()
        if ranks.is_main:
            self.folder.write("config.toml", to_toml(config))
            self.folder.write("resolved.json", json.dumps(self._resolved(), indent=2) + "\n")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What autocast computes in; None where it is off."""
        precision, device = self.config.run.precision, self.ranks.device.type
        enabled = precision == "bf16" or (precision == "auto" and device == "cuda")
        return torch.bfloat16 if enabled else None

    def autocast(self) -> AbstractContextManager[None]:
        """Context of the forward pass."""
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=enabled)

    def save(self, step: int, path: Path | None = None) -> None:
        """Write the checkpoint of ``step`` steps done, to the run's checkpoints or to ``path``.

        All processes call this, and all leave it together.

        Raises:
            RunError: it could not be written (a full disk); those before it are whole.
        """
        extra = {
            "seed": self.config.run.seed, "files": self.inputs.fingerprint, "skipped": self.skipped
        }  # fmt: skip
        parts = (step, self.model, self.optimizer, self.average, extra)
        try:
            if path is None:
                self.folder.save(*parts, keep=self.config.run.keep, ranks=self.ranks)
            else:
                write_checkpoint(path, *parts, self.ranks)
        except OSError as error:
            before = self.folder.latest()
            raise RunError(
                f"the checkpoint of step {step} could not be written: {error}. "
                + (
                    "There is none before it; make room, and start again with --overwrite"
                    if before is None
                    else f"Those before it are whole; make room and go on with: vmae-fast pretrain "
                    f"--out {self.folder.path} --resume"
                )
            ) from error

    def describe(self) -> str:
        """Some lines for the start of the log."""
        from .memory import memory_report

        model, schedule = self.model.config, self.schedule
        parameters = sum(p.numel() for p in self.model.parameters())
        t, h, w = model.grid
        lines = [
            *self.start.warnings(),
            f"model: {parameters / 1e6:.1f} M parameters, {t}x{h}x{w} = {model.num_tokens} tokens, "
            f"{self.model.masking.num_visible} visible",
            *self.inputs.notes,
            self._describe_data(),
            f"run: {schedule.total_steps} steps of {self.config.optim.batch_size} clips "
            f"({self.ranks.world_size} x {schedule.accumulate} x {schedule.micro_batch}"
            f"{', fsdp' if is_sharded(self.model) else ''}), "
            f"lr {schedule.lr:.3g}, on {self.ranks.device}, in {self.folder.path}",
        ]
        lines.append(
            memory_report(
                self.model,
                schedule.micro_batch,
                self.autocast_dtype,
                self.average is not None,
                accumulate=schedule.accumulate,
                processes=self.ranks.world_size,
                sharded=self.config.run.parallel == "fsdp",
            )
        )
        if self.start_step:
            lines.append(f"going on after step {self.start_step}")
        return "\n".join(lines)

    def _describe_data(self) -> str:
        inputs, schedule = self.inputs, self.schedule
        parts = [
            f"{inputs.num_files} files",
            f"{schedule.files_per_epoch} clips an epoch to train on",
            f"{len(inputs.val)} held out",
            f"{inputs.workers} workers",
        ]
        return "data: " + ", ".join(parts)

    def _out(self) -> Path:
        if self.config.run.out is not None:
            return Path(self.config.run.out).expanduser()
        # All processes must agree on the name, and their clocks need not.
        name = time.strftime("%Y%m%d-%H%M%S") + f"-{self.config.model.model or 'base'}"
        first = self.ranks.gather(name)[0]
        return Path("runs") / str(first)

    def _start(self, folder: RunFolder) -> Start:
        """How the run begins; found out by one process, for all."""
        found: Any = None
        if self.ranks.is_main:
            try:
                found = folder.start(self.config.run)
            except ConfigError as error:
                found = error
        found = self.ranks.gather(found)[0]
        if isinstance(found, ConfigError):
            raise found
        return cast(Start, found)

    def _configure(self, model: VideoMAE) -> None:
        run = self.config.run
        if run.residual == "bf16" and self.autocast_dtype is None:
            raise ConfigError(
                f"--residual bf16 goes with --precision bf16; {run.precision} computes in fp32 on "
                f"{self.ranks.device}"
            )
        trained: Any = model
        trained.residual_dtype = torch.bfloat16 if run.residual == "bf16" else None
        trained.checkpointing = run.checkpointing

    def _resume(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        if state["files"] != self.inputs.fingerprint:
            raise ConfigError(
                f"{checkpoint} was trained on another list of files: the order of clips would "
                "change; start a new run with --init instead"
            )
        if state["seed"] != self.config.run.seed:
            raise ConfigError(f"{checkpoint} was trained with seed {state['seed']}")
        load_optimizer(checkpoint, state, self.model, self.optimizer)
        self.start_step, self.skipped = state["step"], state.get("skipped", 0)
        if self.start_step > self.schedule.total_steps:
            raise ConfigError(
                f"{checkpoint} is {self.start_step} steps in, past the run's "
                f"{self.schedule.total_steps}"
            )
        if self.average is not None:
            if not (checkpoint / "ema").is_dir():
                raise CheckpointError(f"{checkpoint} holds no averaged weights (--ema-decay)")
            averaged = VideoMAE.from_pretrained(checkpoint / "ema").to(self.ranks.device)
            self.average.average = [
                placed_as(mine, theirs.detach())
                for mine, theirs in zip(self.model.parameters(), averaged.parameters(), strict=True)
            ]

    def _resolved(self) -> dict[str, Any]:
        return {
            "model": self.model.config.to_dict(),
            "schedule": dataclasses.asdict(self.schedule),
            "files": {"train": len(self.inputs.train), "held_out": len(self.inputs.val)},
            "world_size": self.ranks.world_size,
            "device": str(self.ranks.device),
            "torch": torch.__version__,
        }
