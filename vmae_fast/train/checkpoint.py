"""The checkpoint of a step: written whole or not at all, and known again when it is damaged.

step-N/config.json              the model's settings
step-N/model.safetensors        its weights; of a sharded model shard-*.safetensors, one a process
step-N/ema/                     the averaged weights, likewise
step-N/trainer.pt               step, seed, AdamW's state
step-N/optimizer/               of a sharded model AdamW's moments, shard-*.safetensors
step-N/SHA256SUMS               checksums of all of these
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vmae_fast._files import atomic_folder, write_checksums, write_errors
from vmae_fast.models import CheckpointError, VideoMAE
from vmae_fast.models.checkpoint import settings_text

from .distributed import Ranks
from .graph import is_sharded
from .optimizer import AveragedWeights, load_optimizer_state, optimizer_state
from .sharded import read_moments, without_moments, write_moments, write_shards

# trainer.pt says with which layout it was written.
_STATE_VERSION = 1


def write_checkpoint(
    path: Path,
    step: int,
    model: VideoMAE,
    optimizer: torch.optim.Optimizer,
    average: AveragedWeights | None,
    extra: dict[str, Any],
    ranks: Ranks,
) -> None:
    """Write the checkpoint of ``step`` steps done; all processes call this.

    It is written under another name and renamed: it is whole, or not there.

    Args:
        path: its folder, replaced where it is there.
        step: steps done.
        model: what is trained; of a sharded one each process writes its part.
        optimizer: AdamW.
        average: averaged weights, where kept.
        extra: plain values for ``trainer.pt``.
        ranks: this process.

    Raises:
        OSError: it could not be written, by this process or another one.
    """
    failed: OSError | None = None
    try:
        with _shared_folder(path, is_sharded(model), ranks) as folder:
            _write_weights(folder, model, ranks)
            if average is not None:
                with average.in_place(model):
                    _write_weights(folder / "ema", model, ranks)
            kept = optimizer_state(optimizer)
            if is_sharded(model):
                write_moments(folder / "optimizer", model, optimizer)
                kept = without_moments(kept)
            if ranks.is_main:
                _write_settings(folder, model, average is not None)
                state = {"version": _STATE_VERSION, "step": step, "optimizer": kept, **extra}
                with write_errors(folder / "trainer.pt"):
                    torch.save(state, folder / "trainer.pt")
                write_checksums(folder)
    except OSError as error:
        failed = error
    # What stops one stops all: none waits for another that has given up.
    reasons = [reason for reason in ranks.gather(failed and str(failed)) if reason]
    if failed is not None:
        raise failed
    if reasons:
        raise OSError(reasons[0])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's ``trainer.pt``.

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


def load_optimizer(
    checkpoint: Path, state: dict[str, Any], model: VideoMAE, optimizer: torch.optim.Optimizer
) -> None:
    """Put AdamW's state of a checkpoint into an optimiser.

    Whether one process wrote it or several does not matter, nor whether this model is sharded.

    Args:
        checkpoint: its folder.
        state: what :func:`read_state` gave.
        model: what is trained.
        optimizer: over its parameters.

    Raises:
        CheckpointError: AdamW's moments cannot be read.
    """
    whole = read_moments(checkpoint / "optimizer", model, optimizer, state["optimizer"])
    load_optimizer_state(optimizer, whole)


@contextmanager
def _shared_folder(path: Path, sharded: bool, ranks: Ranks) -> Iterator[Path]:
    """The folder that is written to, of all processes where they all write."""
    if not ranks.is_main:
        yield Path(str(ranks.gather(None)[0])) if sharded else path
        return
    with atomic_folder(path) as folder:
        if sharded:
            ranks.gather(str(folder))
        yield folder


def _write_weights(folder: Path, model: VideoMAE, ranks: Ranks) -> None:
    if is_sharded(model):
        write_shards(folder, model.state_dict())
    elif ranks.is_main:
        model.save_pretrained(folder)


def _write_settings(folder: Path, model: VideoMAE, averaged: bool) -> None:
    """The settings beside a sharded model's weights; a whole one has written its own."""
    if is_sharded(model):
        for place in [folder, folder / "ema"] if averaged else [folder]:
            (place / "config.json").write_text(settings_text(model.config))
