"""Reading and writing checkpoints: ours, MCG-NJU's and OpenGVLab's, Hugging Face's.

A checkpoint cannot run code: only safetensors and weights-only torch loading are used.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vmae_fast._files import atomic_file, write_errors

from . import dialects, huggingface
from .config import VideoMAEConfig
from .dialects import CheckpointError, State
from .licence import model_card
from .reading import FORMAT, FORMAT_VERSION, read_checkpoint

if TYPE_CHECKING:
    from .videomae import VideoMAE

# Names that :func:`save_model` takes.
DIALECTS = ("vmae-fast", "huggingface", "videomae")
# How many names of each kind an error lists.
_LISTED = 20


def load_model(
    cls: type[VideoMAE], path: str | Path, *, interpolate_positions: bool, **overrides: Any
) -> VideoMAE:
    """Build ``cls`` from a checkpoint; see :meth:`VideoMAE.from_pretrained`."""
    found = read_checkpoint(path, overrides, interpolate_positions=interpolate_positions)
    model = cls(found.config)
    load_strictly(model, found.state, str(path))
    return model


def load_strictly(model: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy ``state`` into ``model``, all of it or nothing.

    Raises:
        CheckpointError: lists every tensor that is missing, unexpected or of another shape.
    """
    missing, unexpected, reshaped = differences(model.state_dict(), state)
    problems = [
        f"  {len(names)} {kind}:" + "".join(f"\n    {name}" for name in names[:_LISTED])
        + (f"\n    ... and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        for kind, names in (
            ("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)
        )
        if names
    ]  # fmt: skip
    if problems:
        raise CheckpointError(
            f"{source} does not fit the model, nothing was loaded:\n" + "\n".join(problems)
        )
    model.load_state_dict(dict(state))


def differences(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Names of ``expected`` that ``state`` lacks, names it has besides, and shapes that differ."""
    reshaped = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing = sorted(expected.keys() - state.keys())
    return missing, sorted(state.keys() - expected.keys()), reshaped


def check_target(path: Path, dialect: str) -> None:
    """Refuse a dialect that there is not, or a name that is not one of its.

    Raises:
        CheckpointError: with what would do.
    """
    if dialect not in DIALECTS:
        near = difflib.get_close_matches(dialect, DIALECTS, n=1)
        raise CheckpointError(
            f"dialect must be {', '.join(map(repr, DIALECTS[:-1]))} or {DIALECTS[-1]!r}, got "
            f"{dialect!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    is_file = path.suffix in (".pth", ".pt", ".bin")
    if dialect == "videomae" and not is_file:
        raise CheckpointError(f"the videomae dialect is one file: name it .pth, not {path.name!r}")


def save_model(model: VideoMAE, path: str | Path, dialect: str) -> Path:
    """Write ``model``; see :meth:`VideoMAE.save_pretrained`."""
    path = Path(path)
    check_target(path, dialect)
    config = model.config
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    if dialect == "vmae-fast":
        _write_folder(path, state, {"config.json": settings_text(config)})
    elif dialect == "huggingface":
        theirs, settings, processor = huggingface.to_huggingface(state, config)
        texts = {"config.json": _json(settings), "preprocessor_config.json": _json(processor)}
        # A card of the user's own is left alone; config.json states the licence as well.
        if config.license is not None and not (path / "README.md").exists():
            texts["README.md"] = model_card(config.license)
        _write_folder(path, theirs, texts)
    else:
        theirs, args = dialects.to_videomae(state, config)
        with atomic_file(path) as temporary, write_errors(path):
            torch.save({"model": theirs, "args": args}, temporary)
    return path


def settings_text(config: VideoMAEConfig) -> str:
    """What ``config.json`` of our dialect holds."""
    return _json({"format": FORMAT, "version": FORMAT_VERSION, "model": config.to_dict()})


# ---- writing ------------------------------------------------------------------------------


def _write_folder(folder: Path, state: State, texts: dict[str, str]) -> None:
    from safetensors.torch import save_file

    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; this dialect writes a folder")
    weights = folder / "model.safetensors"
    # The renames come when the stack unwinds, after every write: a disk that fills in between
    # leaves the folder as it was.
    with ExitStack() as files:
        temporary = files.enter_context(atomic_file(weights))
        with write_errors(weights):
            save_file(state, temporary, metadata={"format": "pt"})
        for name, text in texts.items():
            temporary = files.enter_context(atomic_file(folder / name))
            temporary.write_text(text)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"
