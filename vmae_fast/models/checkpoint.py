"""Reading and writing checkpoints: ours, MCG-NJU's and OpenGVLab's, Hugging Face's.

A checkpoint cannot run code: only safetensors and weights-only torch loading are used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vmae_fast._files import atomic_file, write_errors

from . import dialects
from .config import VideoMAEConfig
from .dialects import CheckpointError, State

if TYPE_CHECKING:
    from .videomae import VideoMAE

_FORMAT = "vmae-fast"
_FORMAT_VERSION = 1
# Settings that decide what the trained positions mean, though no tensor's shape shows them.
_GRID = ("frames", "image_size", "patch_size", "tubelet_size")
# How many names of each kind an error lists.
_LISTED = 20


def load_model(cls: type[VideoMAE], path: str | Path, **overrides: Any) -> VideoMAE:
    """Build ``cls`` from a checkpoint; see :meth:`VideoMAE.from_pretrained`."""
    found = _locate(path)
    if found.is_dir():
        state, config = _read_folder(found, overrides)
    else:
        state, config = _read_pth(found, overrides)
    model = cls(config)
    load_strictly(model, state, str(path))
    return model


def load_strictly(model: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy ``state`` into ``model``, all of it or nothing.

    Raises:
        CheckpointError: lists every tensor that is missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    reshaped = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
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


def save_model(model: VideoMAE, path: str | Path, dialect: str) -> Path:
    """Write ``model``; see :meth:`VideoMAE.save_pretrained`."""
    path = Path(path)
    config = model.config
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    if dialect == "vmae-fast":
        description = {
            "format": _FORMAT, "version": _FORMAT_VERSION, "model": config.to_dict()
        }  # fmt: skip
        _write_folder(path, state, {"config.json": description})
    elif dialect == "huggingface":
        theirs, settings, processor = dialects.to_huggingface(state, config)
        _write_folder(
            path, theirs, {"config.json": settings, "preprocessor_config.json": processor}
        )
    elif dialect == "videomae":
        if path.suffix not in (".pth", ".pt", ".bin"):
            raise CheckpointError(
                f"the videomae dialect is one file: name it .pth, not {path.name!r}"
            )
        theirs, args = dialects.to_videomae(state, config)
        with atomic_file(path) as temporary, write_errors(path):
            torch.save({"model": theirs, "args": args}, temporary)
    else:
        raise CheckpointError(
            f"dialect must be 'vmae-fast', 'huggingface' or 'videomae', got {dialect!r}"
        )
    return path


# ---- reading ------------------------------------------------------------------------------


def _locate(path: str | Path) -> Path:
    local = Path(path).expanduser()
    if local.exists():
        return local
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"no checkpoint at {path}; if it is a hub id, `pip install huggingface_hub` to fetch it"
        ) from None
    try:
        folder = Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
        if not _has_weights(folder):
            folder = Path(
                snapshot_download(str(path), allow_patterns=["*.json", "pytorch_model*.bin"])
            )
    except Exception as error:
        # Whatever the client raises (no network, no such repository), the user asked for a path.
        raise FileNotFoundError(
            f"no checkpoint at {path}, and fetching it as a hub id failed: {error}"
        ) from error
    return folder


def _read_folder(folder: Path, overrides: dict[str, Any]) -> tuple[State, VideoMAEConfig]:
    settings = _read_json(folder / "config.json")
    files = _weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder} holds no model.safetensors or pytorch_model.bin")
    state: State = {}
    for file in files:
        state |= _read_tensors(file)
    if settings.get("format") == _FORMAT:
        if settings.get("version") != _FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} is format version {settings.get('version')}, this release reads "
                f"{_FORMAT_VERSION}"
            )
        if not isinstance(settings.get("model"), dict):
            raise CheckpointError(f"{folder / 'config.json'} holds no model settings")
        config = VideoMAEConfig.from_dict(settings["model"])
    else:
        processor_file = folder / "preprocessor_config.json"
        processor = _read_json(processor_file) if processor_file.exists() else {}
        state, config = dialects.from_huggingface(state, settings, processor)
    _check_recorded(folder, config, overrides)
    return state, dataclasses.replace(config, **_known(overrides))


def _read_pth(file: Path, overrides: dict[str, Any]) -> tuple[State, VideoMAEConfig]:
    content = _torch_load(file)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a checkpoint")
    args = content.get("args") or {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    state = next(
        (content[key] for key in ("model", "module", "state_dict") if key in content), content
    )
    if not isinstance(args, Mapping) or not isinstance(state, Mapping):
        raise CheckpointError(
            f"{file} holds a {type(state).__name__} of weights and a {type(args).__name__} of "
            "args, not a state dict and its settings"
        )
    tensors = {str(name): t for name, t in state.items() if isinstance(t, Tensor)}
    ours, hints = dialects.from_videomae(tensors, args)
    recorded = {name: hints[name] for name in _GRID if name in hints}
    config = dialects.infer_config(ours, hints | _known(overrides) | recorded)
    # Only what the file says or shows can contradict the caller; the rest is his to say.
    shown = {*recorded, "patch_size", "tubelet_size"}
    _check_recorded(file, config, {name: v for name, v in overrides.items() if name in shown})
    return ours, config


def _known(overrides: dict[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(VideoMAEConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise TypeError(f"unknown model settings {unknown}; known are {sorted(known)}")
    return overrides


def _check_recorded(source: Path, config: VideoMAEConfig, overrides: dict[str, Any]) -> None:
    """Refuse overrides of what the weights were trained with, though any value would load."""
    for name in ("heads", "decoder_heads"):
        if overrides.get(name, getattr(config, name)) != getattr(config, name):
            raise CheckpointError(
                f"{source} was trained with {name}={getattr(config, name)} (asked for "
                f"{overrides[name]})"
            )
    asked = dataclasses.replace(config, **{n: overrides[n] for n in _GRID if n in overrides})
    differs = [
        f"{name}={getattr(config, name)} (asked for {getattr(asked, name)})"
        for name in _GRID
        if getattr(config, name) != getattr(asked, name)
    ]
    if differs:
        raise CheckpointError(
            f"{source} was trained with {', '.join(differs)}, a grid of {config.grid} tokens: on "
            "another grid the same weights load but its positions mean something else"
        )


def _has_weights(folder: Path) -> bool:
    try:
        return bool(_weight_files(folder))
    except CheckpointError:
        # An index whose shards were not among what was fetched.
        return False


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        # A whole file first: where one was saved over a sharded checkpoint, the shards are old.
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            names = sorted(set(_read_json(index).get("weight_map", {}).values()))
            lost = [part for part in names if not (folder / part).exists()]
            if lost:
                raise CheckpointError(f"{index} names files that are not there: {lost}")
            return [folder / part for part in names]
    return []


def _read_tensors(file: Path) -> State:
    if file.suffix != ".safetensors":
        content = _torch_load(file)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{file} holds a {type(content).__name__}, not a state dict")
        return dict(content)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(file))
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error


def _torch_load(file: Path) -> Any:
    # Official files carry their command line as an argparse.Namespace: plain data, and the one
    # class allowed beside tensors and containers.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds a {refused[1]}, and only tensors and plain values are read, so that a "
            "checkpoint cannot run code"
            if refused
            else "it is not a torch checkpoint, or not a whole one"
        )
        raise CheckpointError(f"{file} was not loaded: {reason}") from error
    except FileNotFoundError:
        raise
    except Exception as error:
        # A damaged file ends anywhere in the reader: KeyError, IndexError, OSError, ...
        raise CheckpointError(
            f"{file} was not loaded: it is not a torch checkpoint, or not a whole one "
            f"({type(error).__name__}: {error})"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{file.parent} holds no {file.name}: is it a checkpoint folder?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not settings")
    return content


# ---- writing ------------------------------------------------------------------------------


def _write_folder(folder: Path, state: State, documents: dict[str, dict[str, Any]]) -> None:
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
        for name, document in documents.items():
            temporary = files.enter_context(atomic_file(folder / name))
            temporary.write_text(json.dumps(document, indent=2) + "\n")
