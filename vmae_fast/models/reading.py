"""Reading a checkpoint of any dialect: its tensors under our names, its settings, its licence."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from . import dialects, files, huggingface, licence, shards
from .config import VideoMAEConfig
from .dialects import CheckpointError, State

FORMAT = "vmae-fast"
FORMAT_VERSION = 1
# Settings that decide what the trained positions mean, though no tensor's shape shows them.
GRID = ("frames", "image_size", "patch_size", "tubelet_size")
# The part of the grid that positions can be interpolated over; the rest is in the weights' shapes.
_CLIP = ("frames", "image_size")
# Where the weights lie in a torch file, in the order looked for; DeepSpeed has "module".
_CONTAINERS = ("model", "module", "state_dict")


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        path: file or folder it was read from.
        files: those that hold its weights.
        dialect: "vmae-fast", "huggingface" or "videomae".
        container: "folder", or the key of a torch file that the weights lie under ("model",
            "module", "state_dict"), or "bare" for one that holds nothing else.
        beside: what else a torch file holds, by its keys.
        named: tensors by the names of the file.
        state: the same under our names.
        config: settings, those asked for included.
        recorded: settings that the file says or shows; the rest is assumed, or asked for.
        license_from: what the licence is known from, or why it is not.
        labels: names of a fine-tuned model's classes where the file has some.
    """

    path: Path
    files: list[Path]
    dialect: str
    container: str
    named: State
    state: State
    config: VideoMAEConfig
    recorded: set[str]
    license_from: str
    beside: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


def read_checkpoint(
    path: str | Path,
    overrides: Mapping[str, Any],
    *,
    interpolate_positions: bool = False,
    shapes_only: bool = False,
) -> Checkpoint:
    """Read a checkpoint; whether its tensors fit its settings is not looked at.

    Args:
        path: as :meth:`VideoMAE.from_pretrained` takes it, which also says what is raised.
        overrides: settings that take the place of the checkpoint's.
        interpolate_positions: allow a grid other than the trained one.
        shapes_only: give tensors without data (device "meta").
    """
    known = {setting.name for setting in dataclasses.fields(VideoMAEConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise TypeError(f"unknown model settings {unknown}; known are {sorted(known)}")
    found = files.locate(path)
    try:
        if found.is_dir():
            checkpoint = _read_folder(found, shapes_only)
            config = checkpoint.config
        else:
            checkpoint, hints = _read_pth(found, shapes_only)
            config = _infer(checkpoint, hints, overrides, interpolate_positions)
    except CheckpointError as error:
        # What the parts of a checkpoint say of themselves does not tell whose they are.
        if str(found) in str(error):
            raise
        raise type(error)(f"{found}: {error}") from error
    # Only what the file says or shows can contradict the caller; the rest is his to say.
    checkpoint.config = _with_overrides(checkpoint, config, dict(overrides), interpolate_positions)
    return checkpoint


def _read_folder(folder: Path, shapes_only: bool) -> Checkpoint:
    settings = files.read_json(folder / "config.json")
    weights = files.weight_files(folder)
    if not weights:
        raise CheckpointError(
            f"{folder} holds no model.safetensors or pytorch_model.bin: name a folder that "
            "save_pretrained wrote, a run folder, or a .pth file"
        )
    named: State = {}
    if weights == shards.shard_files(folder):
        named = shards.read_all_shards(folder, shapes_only=shapes_only)
    else:
        for file in weights:
            named |= files.read_tensors(file, shapes_only=shapes_only)
    labels: list[str] = []
    processor: dict[str, Any] = {}
    if settings.get("format") == FORMAT:
        if settings.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} is format version {settings.get('version')}, this release reads "
                f"{FORMAT_VERSION}"
            )
        if not isinstance(settings.get("model"), dict):
            raise CheckpointError(f"{folder / 'config.json'} holds no model settings")
        dialect, state = "vmae-fast", named
        config = VideoMAEConfig.from_dict(settings["model"])
        license_from = "config.json"
    else:
        processor_file = folder / "preprocessor_config.json"
        if processor_file.exists():
            processor = files.read_json(processor_file)
        dialect = "huggingface"
        state, config = huggingface.from_huggingface(named, settings, processor)
        stated, license_from = licence.of_huggingface(folder, settings)
        config = dataclasses.replace(config, license=stated)
        labels = [str(name) for name in (settings.get("id2label") or {}).values()]
    recorded = {setting.name for setting in dataclasses.fields(VideoMAEConfig)}
    if dialect == "huggingface":
        recorded -= set(huggingface.LACKS)
        recorded -= {name for name in ("image_mean", "image_std") if name not in processor}
    return Checkpoint(
        folder, weights, dialect, "folder", named, state, config, recorded, license_from,
        labels=labels,
    )  # fmt: skip


def _read_pth(file: Path, shapes_only: bool) -> tuple[Checkpoint, dict[str, Any]]:
    """A torch file without its settings, which are still to be inferred, and what it says."""
    of_folder = file.suffix == ".bin" and (file.parent / "config.json").exists()
    if file.suffix == ".safetensors" or of_folder:
        raise CheckpointError(
            f"{file} was not loaded: it is one file of a checkpoint, not a .pth with its settings. "
            f"Give the folder, {file.parent}"
        )
    content = files.torch_load(file, shapes_only=shapes_only)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a checkpoint")
    args = content.get("args") or {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    container = next((key for key in _CONTAINERS if key in content), "bare")
    state = content if container == "bare" else content[container]
    if not isinstance(args, Mapping) or not isinstance(state, Mapping):
        raise CheckpointError(
            f"{file} holds a {type(state).__name__} of weights and a {type(args).__name__} of "
            "args, not a state dict and its settings"
        )
    named = {str(name): t for name, t in state.items() if isinstance(t, Tensor)}
    ours, hints = dialects.from_videomae(named, args)
    if any(".attention.attention." in name for name in named):
        raise CheckpointError(
            f"{file} was not loaded: its tensors have Hugging Face's names, whose settings are in "
            "a config.json. Put both in one folder, as pytorch_model.bin and config.json, and "
            "give the folder"
        )
    dialect = "vmae-fast" if "encoder.patch_embed.weight" in named else "videomae"
    if dialect == "vmae-fast":
        stated, license_from = args.get("license"), "the file states none"
    else:
        stated, license_from = licence.of_args(args)
    beside = [] if container == "bare" else [str(key) for key in content if key != container]
    checkpoint = Checkpoint(
        file, [file], dialect, container, named, ours, VideoMAEConfig(), {"license"},
        license_from, beside,
    )  # fmt: skip
    return checkpoint, hints | {"license": stated}


def _infer(
    checkpoint: Checkpoint,
    hints: dict[str, Any],
    overrides: Mapping[str, Any],
    interpolate_positions: bool,
) -> VideoMAEConfig:
    """Settings of a ``.pth``: what it says, what its shapes show, and then what is asked for."""
    recorded = {name: hints[name] for name in _CLIP if name in hints}
    asked = dict(overrides)
    asked.pop("license", None)
    trained = asked.pop("positions_from", None)
    if interpolate_positions and len(recorded) < len(_CLIP):
        if trained is None:
            raise CheckpointError(
                f"{checkpoint.path} does not say on which grid it was trained, which its positions "
                "are interpolated from: pass positions_from=(t, h, w) (--positions-from), in "
                "tokens; that of the released models of 16 frames and 224 pixels is (8, 14, 14), "
                "of giant (8, 16, 16)"
            )
        asked["positions_from"] = trained
        recorded = {}
    checkpoint.recorded |= {*hints, *dialects.SHOWN_BY_SHAPES}
    checkpoint.recorded -= set(_CLIP) - set(recorded)
    return dialects.infer_config(checkpoint.state, hints | asked | recorded)


def _with_overrides(
    checkpoint: Checkpoint,
    config: VideoMAEConfig,
    overrides: dict[str, Any],
    interpolate_positions: bool,
) -> VideoMAEConfig:
    """Refuse overrides of what the weights were trained with, though any value would load."""
    source = checkpoint.path
    fixed = checkpoint.recorded
    stated = config.license
    if licence.is_stated(stated) and overrides.get("license", stated) != stated:
        raise CheckpointError(
            f"{source} states the licence {stated} (asked for {overrides['license']}); only where "
            "a checkpoint states none can it be said"
        )
    for name in ("heads", "decoder_heads"):
        if overrides.get(name, getattr(config, name)) != getattr(config, name):
            raise CheckpointError(
                f"{source} was trained with {name}={getattr(config, name)} (asked for "
                f"{overrides[name]})"
            )
    shown = {name: overrides[name] for name in GRID if name in overrides and name in fixed}
    asked = dataclasses.replace(config, **shown)
    differs = [
        f"{name}={getattr(config, name)} (asked for {getattr(asked, name)})"
        for name in GRID
        if getattr(config, name) != getattr(asked, name)
    ]
    only_clip = all(name.startswith(_CLIP) for name in differs)
    if differs and not (only_clip and interpolate_positions):
        raise CheckpointError(
            f"{source} was trained with {', '.join(differs)}, a grid of {config.grid} tokens: on "
            "another grid the same weights load but its positions mean something else"
            + (
                ". interpolate_positions=True (--interpolate-positions of `vmae-fast convert`) "
                "interpolates them"
                if only_clip
                else ""
            )
        )
    given = overrides.pop("positions_from", None)
    if set(_CLIP) <= fixed:
        # A second time, too, from what was trained and not from what was interpolated.
        trained = config.positions_from or config.grid
        if given is not None and tuple(given) != trained:
            raise CheckpointError(
                f"{source} was trained on a grid of {trained} tokens (asked for positions_from="
                f"{tuple(given)})"
            )
        overrides["positions_from"] = trained if interpolate_positions else config.positions_from
    elif given is not None and not interpolate_positions:
        raise CheckpointError("positions_from= goes with interpolate_positions=True")
    return dataclasses.replace(config, **overrides)
