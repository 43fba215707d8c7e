"""The folder of a run: checkpoints, metrics, the list of bad files.

RUN/config.toml              the settings
RUN/resolved.json            numbers that follow from them, versions
RUN/metrics.jsonl            one line every few steps
RUN/tensorboard/             the same for TensorBoard
RUN/bad_files.txt            files that could not be read, with the reason
RUN/checkpoints/step-N/      see checkpoint.py
RUN/checkpoints/damaged-*    those that were not what had been written when the run went on
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmae_fast._files import atomic_file, find_damage
from vmae_fast.models import VideoMAE

from .checkpoint import write_checkpoint
from .config import ConfigError, RunSettings
from .distributed import RESTARTS, Ranks, alone
from .optimizer import AveragedWeights


@dataclass(frozen=True)
class Start:
    """How a run begins in its folder.

    Attributes:
        checkpoint: what it goes on from; None starts anew.
        damaged: later checkpoints that are not as they were written, and what is wrong with each.
        overwrite: what is in the folder is deleted.
    """

    checkpoint: Path | None
    damaged: dict[Path, str]
    overwrite: bool

    def warnings(self) -> list[str]:
        """A line for each damaged checkpoint, once it was set aside."""
        return [
            f"warning: {path} is damaged ({reason}); going on from {self.checkpoint}"
            for path, reason in self.damaged.items()
        ]


class RunFolder:
    """Paths of a run and what is written there.

    Args:
        path: the folder; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.bad_files = path / "bad_files.txt"

    def start(self, run: RunSettings) -> Start:
        """Find out how a run begins here; nothing is changed.

        Raises:
            ConfigError: it is to go on, and there is no checkpoint that is whole.
        """
        # A process group that its launcher started again goes on: it must not delete its own run.
        restarted = run.out is not None and int(os.environ.get(RESTARTS) or 0) > 0
        if not (run.resume or run.auto_resume or restarted):
            return Start(None, {}, run.overwrite)
        checkpoint, damaged = self.newest_whole()
        if checkpoint is None and damaged:
            listing = "".join(f"\n  {path}: {reason}" for path, reason in damaged.items())
            raise ConfigError(
                f"{self.path}: no checkpoint is as it was written; start anew in another folder, "
                f"or from the weights of one that may do with --init:{listing}"
            )
        if checkpoint is None and run.resume and not restarted:
            held = self.path.is_dir() and any(self.path.iterdir())
            raise ConfigError(
                f"--resume: {self.path} holds no complete checkpoint; start anew with --overwrite"
                if held
                else f"--resume: no run at {self.path}; name the folder of one by --out, or leave "
                "--resume out to start one there"
            )
        # A run that came to no checkpoint has nothing to lose.
        return Start(checkpoint, damaged, overwrite=checkpoint is None)

    @classmethod
    def open(cls, path: Path, *, resume: bool, overwrite: bool) -> RunFolder:
        """Take a folder for a run.

        Raises:
            ConfigError: it holds a run and neither resume nor overwrite was asked for; or it is
                something other than a run's folder.
        """
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out {path} is a file; name a folder")
        held = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
        if held and not resume and "config.toml" not in held:
            raise ConfigError(
                f"--out {path} holds files that are no run's ({', '.join(held[:5])}); name a new "
                "folder, or one that is empty"
            )
        if held and not resume and not overwrite:
            raise ConfigError(
                f"--out {path} holds a run already; --resume goes on with it, --overwrite "
                "deletes it"
            )
        if held and not resume:
            shutil.rmtree(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--out {path} cannot be made ({error.strerror}); name a folder that you may "
                "write to"
            ) from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(f"--out {path} may not be written to; name another folder")
        # What a process killed while saving left half written.
        for ending in ("tmp", "old"):
            for leftover in run.checkpoints.glob(f".step-*.{ending}"):
                shutil.rmtree(leftover, ignore_errors=True)
        return run

    def latest(self) -> Path | None:
        """The checkpoint of the highest step, or None. Folders get their name once complete."""
        steps = self._steps()
        return self.checkpoints / f"step-{steps[-1]:08d}" if steps else None

    def write(self, name: str, text: str) -> None:
        """Write a small file whole."""
        with atomic_file(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_bad_files(self, bad: dict[str, str]) -> None:
        """Write the list of files that could not be read, a line each.

        A path that does not fit on a line, or is no text, is written as a JSON string.
        """
        lines = (
            f"{_written(path)}\t{' '.join(reason.split())}\n"
            for path, reason in sorted(bad.items())
        )
        self.write(self.bad_files.name, "".join(lines))

    def read_bad_files(self) -> dict[str, str]:
        """The list written before, path to reason."""
        if not self.bad_files.exists():
            return {}
        lines = self.bad_files.read_text(encoding="utf-8").splitlines()
        found = (line.partition("\t") for line in lines)
        return {_read(path): reason for path, _, reason in found}

    def save(
        self,
        step: int,
        model: VideoMAE,
        optimizer: torch.optim.Optimizer,
        average: AveragedWeights | None,
        extra: dict[str, Any],
        *,
        keep: int,
        ranks: Ranks | None = None,
    ) -> Path:
        """Write the checkpoint of ``step`` steps done, then delete all but the last ``keep``.

        All processes call this; see :func:`write_checkpoint`.
        """
        path = self.checkpoints / f"step-{step:08d}"
        ranks = ranks or alone()
        write_checkpoint(path, step, model, optimizer, average, extra, ranks)
        for old in self._steps()[:-keep] if ranks.is_main else ():
            # Under its name it is whole for as long as it is there.
            going = self.checkpoints / f".step-{old:08d}.old"
            (self.checkpoints / f"step-{old:08d}").rename(going)
            shutil.rmtree(going, ignore_errors=True)
        return path

    def newest_whole(self) -> tuple[Path | None, dict[Path, str]]:
        """The checkpoint of the highest step that is as it was written, and damaged later ones.

        Returns:
            Its path, None where there is none; and what is wrong with each that was passed over.
        """
        damaged: dict[Path, str] = {}
        for step in reversed(self._steps()):
            path = self.checkpoints / f"step-{step:08d}"
            reason = find_damage(path)
            if reason is None:
                return path, damaged
            damaged[path] = reason
        return None, damaged

    def set_aside(self, checkpoint: Path) -> Path:
        """Give a damaged checkpoint a name under which no run takes it."""
        number, aside = 1, checkpoint.with_name(f"damaged-{checkpoint.name}")
        while aside.exists():
            number += 1
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}")
        checkpoint.rename(aside)
        return aside

    def _steps(self) -> list[int]:
        if not self.checkpoints.is_dir():
            return []
        names = (entry.name for entry in self.checkpoints.iterdir())
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name)))


def _written(path: str) -> str:
    # Line breaks and tabs, and what stands for bytes that are not UTF-8.
    return path if path.isprintable() and not path.startswith('"') else json.dumps(path)


def _read(path: str) -> str:
    return str(json.loads(path)) if path.startswith('"') else path


def digest(lines: Iterable[str]) -> str:
    """Fingerprint of a list of files: a resumed run must see the same ones in the same order."""
    whole = hashlib.sha256()
    for line in lines:
        whole.update(line.encode(errors="surrogateescape") + b"\0")
    return whole.hexdigest()
