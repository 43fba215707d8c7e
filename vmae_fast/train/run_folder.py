"""The folder of a run: checkpoints, metrics, the list of bad files.

RUN/config.toml              the settings
RUN/resolved.json            numbers that follow from them, versions
RUN/metrics.jsonl            one line every few steps
RUN/tensorboard/             the same for TensorBoard
RUN/bad_files.txt            files that could not be read, with the reason
RUN/checkpoints/step-N/      model.safetensors, config.json, trainer.pt (ema/ where kept)
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vmae_fast._files import atomic_file, atomic_folder, write_errors
from vmae_fast.models import CheckpointError, VideoMAE

from .config import ConfigError
from .optimizer import AveragedWeights, optimizer_state

# trainer.pt says with which layout it was written.
_STATE_VERSION = 1


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

    @classmethod
    def open(cls, path: Path, *, resume: bool, overwrite: bool) -> RunFolder:
        """Take a folder for a run.

        Raises:
            ConfigError: it holds a run and neither resume nor overwrite was asked for; or
                resume was, and it holds none; or it is something other than a run's folder.
        """
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out {path} is a file; name a folder")
        held = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
        if resume:
            if run.latest() is None:
                raise ConfigError(
                    f"--resume: {path} holds no complete checkpoint; start anew with --overwrite"
                    if held
                    else f"--resume: no run at {path}; name the folder of one by --out, or leave "
                    "--resume out to start one there"
                )
        elif held and "config.toml" not in held:
            raise ConfigError(
                f"--out {path} holds files that are no run's ({', '.join(held[:5])}); name a new "
                "folder, or one that is empty"
            )
        elif held and not overwrite:
            raise ConfigError(
                f"--out {path} holds a run already; --resume goes on with it, --overwrite "
                "deletes it"
            )
        elif held:
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
        for leftover in run.checkpoints.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        return run

    def latest(self) -> Path | None:
        """The checkpoint of the highest step, or None. Folders get their name once complete."""
        steps = self._steps()
        return self.checkpoints / f"step-{steps[-1]:08d}" if steps else None

    def write(self, name: str, text: str) -> None:
        """Write a small file whole."""
        with atomic_file(self.path / name) as temporary:
            temporary.write_text(text)

    def write_bad_files(self, bad: dict[str, str]) -> None:
        """Write the list of files that could not be read."""
        lines = (f"{path}\t{reason}\n" for path, reason in sorted(bad.items()))
        self.write(self.bad_files.name, "".join(lines))

    def read_bad_files(self) -> dict[str, str]:
        """The list written before, path to reason."""
        if not self.bad_files.exists():
            return {}
        lines = self.bad_files.read_text().splitlines()
        return {path: reason for path, _, reason in (line.partition("\t") for line in lines)}

    def save(
        self,
        step: int,
        model: VideoMAE,
        optimizer: torch.optim.Optimizer,
        average: AveragedWeights | None,
        extra: dict[str, Any],
        *,
        keep: int,
    ) -> Path:
        """Write the checkpoint of ``step`` steps done, then delete all but the last ``keep``."""
        path = self.checkpoints / f"step-{step:08d}"
        self.save_at(path, step, model, optimizer, average, extra)
        for old in self._steps()[:-keep]:
            shutil.rmtree(self.checkpoints / f"step-{old:08d}", ignore_errors=True)
        return path

    @staticmethod
    def save_at(
        path: Path,
        step: int,
        model: VideoMAE,
        optimizer: torch.optim.Optimizer,
        average: AveragedWeights | None,
        extra: dict[str, Any],
    ) -> None:
        """Write a checkpoint to a temporary name and rename it: it is whole or not there."""
        with atomic_folder(path) as folder:
            model.save_pretrained(folder)
            if average is not None:
                average.swap(model)
                try:
                    model.save_pretrained(folder / "ema")
                finally:
                    average.swap(model)
            state = {
                "version": _STATE_VERSION,
                "step": step,
                "optimizer": optimizer_state(optimizer),
                **extra,
            }
            with write_errors(folder / "trainer.pt"):
                torch.save(state, folder / "trainer.pt")

    @staticmethod
    def load_state(checkpoint: Path) -> dict[str, Any]:
        """Read a checkpoint's trainer state.

        Raises:
            CheckpointError: it is missing, damaged or of another version.
        """
        file = checkpoint / "trainer.pt"
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if state.get("version") != _STATE_VERSION:
            raise CheckpointError(
                f"{file} has version {state.get('version')}, this release reads {_STATE_VERSION}"
            )
        return state

    def _steps(self) -> list[int]:
        if not self.checkpoints.is_dir():
            return []
        names = (entry.name for entry in self.checkpoints.iterdir())
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name)))


def digest(lines: Iterable[str]) -> str:
    """Fingerprint of a list of files: a resumed run must see the same ones in the same order."""
    whole = hashlib.sha256()
    for line in lines:
        whole.update(line.encode(errors="surrogateescape") + b"\0")
    return whole.hexdigest()
