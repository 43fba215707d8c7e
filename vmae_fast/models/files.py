"""The files of a checkpoint: finding them, and reading them without running any code.

Only safetensors and weights-only torch loading are used.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .dialects import CheckpointError, State
from .shards import shard_files

# What safetensors files call the dtypes that weights have.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def locate(path: str | Path) -> Path:
    """The file or folder at ``path``, fetched first where it is a hub id.

    Raises:
        FileNotFoundError: there is none, and it is no hub id or could not be fetched.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FileNotFoundError(
            f"no checkpoint at {path}: give a checkpoint's folder, a .pth file or a hub id"
        )
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"no checkpoint at {path}; if it is a hub id, `pip install huggingface_hub` to fetch it"
        ) from None
    try:
        # README.md states the licence.
        about = ["*.json", "README.md"]
        folder = Path(snapshot_download(str(path), allow_patterns=[*about, "*.safetensors"]))
        if not _has_weights(folder):
            folder = Path(
                snapshot_download(str(path), allow_patterns=[*about, "pytorch_model*.bin"])
            )
    except Exception as error:
        # Whatever the client raises (no network, no such repository), the user asked for a path.
        raise FileNotFoundError(
            f"no checkpoint at {path}, and fetching it as a hub id failed: {error}"
        ) from error
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights; none where it has none.

    Raises:
        CheckpointError: an index names files that are not there.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        # A whole file first: where one was saved over a sharded checkpoint, the shards are old.
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            lost = [part for part in names if not (folder / part).exists()]
            if lost:
                raise CheckpointError(f"{index} names files that are not there: {lost}")
            return [folder / part for part in names]
    return shard_files(folder)


def _has_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(folder))
    except CheckpointError:
        # An index whose shards were not among what was fetched.
        return False


def read_tensors(file: Path, *, shapes_only: bool = False) -> State:
    """A file's tensors by their names.

    Args:
        file: ``.safetensors``, or a torch file that holds a state dict.
        shapes_only: give tensors without data (on the device "meta"), which takes no time.

    Raises:
        CheckpointError: it holds something else, or is not whole.
    """
    if file.suffix != ".safetensors":
        content = torch_load(file, shapes_only=shapes_only)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{file} holds a {type(content).__name__}, not a state dict")
        return dict(content)
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        if not shapes_only:
            return dict(load_file(file))
        with safe_open(file, framework="pt") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
            return {
                name: torch.empty(
                    part.get_shape(),
                    dtype=_DTYPES.get(part.get_dtype(), torch.uint8),
                    device="meta",
                )
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file: {_looks_like(file) or error}"
        ) from error


def torch_load(file: Path, *, shapes_only: bool = False) -> Any:
    """What a torch file holds; with ``shapes_only`` its tensors have no data (device "meta").

    Raises:
        CheckpointError: it holds objects other than tensors and plain values, or is not whole.
    """
    # Official files carry their command line as an argparse.Namespace: plain data, and the one
    # class allowed beside tensors and containers.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            device = "meta" if shapes_only else "cpu"
            return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds a {refused[1]}, and only tensors and plain values are read, so that a "
            "checkpoint cannot run code"
            if refused
            else _looks_like(file) or "it is not a torch checkpoint, or not a whole one"
        )
        raise CheckpointError(f"{file} was not loaded: {reason}") from error
    except FileNotFoundError:
        raise
    except Exception as error:
        # A damaged file ends anywhere in the reader: KeyError, IndexError, OSError, ...
        reason = _looks_like(file) or (
            "it is not a torch checkpoint, or not a whole one "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )
        raise CheckpointError(f"{file} was not loaded: {reason}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The settings in a JSON file.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{file.parent} holds no {file.name}: is it a checkpoint folder?{_instead(file.parent)}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not settings")
    return content


def _instead(folder: Path) -> str:
    """What to give instead of a folder that is no checkpoint's, by what lies in it."""
    steps = sorted(folder.glob("checkpoints/step-*/config.json"))
    if steps:
        return f" It is a run's; its latest checkpoint is {steps[-1].parent}"
    files = sorted(entry.name for entry in folder.glob("*") if entry.suffix in (".pth", ".pt"))
    if files:
        return f" It holds {', '.join(files[:5])}: give the file"
    inner = sorted(folder.glob("*/config.json"))
    if inner:
        return f" There is one in {inner[-1].parent}"
    if _has_weights(folder):
        return " It has weights: put the config.json that belongs to them beside them"
    return ""


def _looks_like(file: Path) -> str | None:
    """What a file is that is no checkpoint, and what to do; None where that does not show."""
    with file.open("rb") as content:
        start = content.read(512)
    if start.startswith(b"version https://git-lfs"):
        return (
            "it is not a torch checkpoint but git-lfs's note of one: fetch it with `git lfs pull`"
        )
    if start.lstrip()[:1] == b"<":
        return "it is not a torch checkpoint but a web page: the download went wrong"
    # A short one of nothing but printable characters; a pickle starts with a byte that is none.
    if start and not start.translate(None, bytes(range(32, 127)) + b"\t\n\r"):
        return "it is not a torch checkpoint but a text file"
    return None
