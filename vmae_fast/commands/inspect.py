"""vmae-fast inspect."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

from vmae_fast.commands._arguments import parse
from vmae_fast.commands._checkpoints import (
    by,
    describe_grid,
    dtypes,
    find_checkpoint,
    millions,
    parameters,
    published_size,
)
from vmae_fast.models import VideoMAE, VideoMAEConfig
from vmae_fast.models.checkpoint import differences
from vmae_fast.models.dialects import CheckpointError, HeadsUnknown
from vmae_fast.models.files import torch_load
from vmae_fast.models.reading import Checkpoint, read_checkpoint
from vmae_fast.train import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# How many names of each kind of misfit are shown; --json has all.
_SHOWN = 20


@dataclass
class InspectArgs:
    """Say what a checkpoint is, without loading its weights."""

    checkpoint: Positional[Annotated[str, arg(metavar="CHECKPOINT")]]
    """Checkpoint: a folder of ours or Hugging Face's, a .pth of MCG-NJU's or OpenGVLab's, a hub
    id; or a run's folder, of which the latest is taken."""
    ema: bool = False
    """Look at a run's averaged weights."""
    tensors: bool = False
    """List every tensor under the file's names, with its shape and dtype."""
    json: bool = False
    """Print it as JSON."""


def run(args: list[str]) -> int:
    """Describe a checkpoint; the exit status, 1 where its tensors do not fit its settings.

    Raises:
        CheckpointError: it cannot be read, or its settings not be inferred.
        ConfigError: its settings go with no model.
        OSError: there is none.
    """
    options = parse(
        InspectArgs,
        prog="vmae-fast inspect",
        description="Say what a checkpoint is, without loading its weights.",
        args=args,
        examples=("vmae-fast inspect runs/mine", "vmae-fast inspect checkpoint.pth --tensors"),
    )
    about = describe(find_checkpoint(options.checkpoint, ema=options.ema), options.tensors)
    print(json.dumps(about, indent=2) if options.json else "\n".join(_lines(about)))
    return 1 if any(about["misfits"].values()) else 0


def describe(path: str, tensors: bool = False) -> dict[str, Any]:
    """What a checkpoint is, in plain values; its weights are not read.

    Args:
        path: the checkpoint.
        tensors: list all of them.

    Raises:
        CheckpointError: it cannot be read, or its settings not be inferred.
        ConfigError: its settings go with no model.
    """
    try:
        found, heads_known = _read(path)
        misfits = _misfits(found)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    config = found.config
    size = published_size(config) if heads_known else None
    about: dict[str, Any] = {
        "path": str(found.path),
        "dialect": found.dialect,
        "container": found.container,
        "beside": found.beside,
        "files": {str(file): file.stat().st_size for file in found.files},
        "dtypes": dtypes(found.state.values()),
        "weights_bytes": sum(t.numel() * t.element_size() for t in found.state.values()),
        "parameters": parameters(found.state),
        "size": None if size is None else size[0],
        "decoder_as_published": None if size is None else size[1],
        "heads_known": heads_known,
        "model": config.to_dict(),
        "assumed": sorted(_assumed(found)),
        "grid": {
            "text": describe_grid(config), "tokens": config.grid, "num_tokens": config.num_tokens
        },
        "mask": _mask(config) if config.decoder_depth else None,
        "labels": found.labels,
        "license": config.license,
        "license_from": found.license_from,
        "misfits": misfits,
        "run": _run(found.path),
    }  # fmt: skip
    if tensors:
        about["tensors"] = {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in found.named.items()
        }
    return about


def _read(path: str) -> tuple[Checkpoint, bool]:
    """The checkpoint, and whether its numbers of heads are known."""
    try:
        return read_checkpoint(path, {}, shapes_only=True), True
    except HeadsUnknown:
        # Nothing that is told here but the heads themselves depends on how many there are.
        found = read_checkpoint(path, {"heads": 1, "decoder_heads": 1}, shapes_only=True)
        return found, False


def _misfits(found: Checkpoint) -> dict[str, list[str]]:
    """Tensors that the settings do not expect, or have otherwise; on shapes alone."""
    # Masks that cannot be drawn are told of elsewhere, and are no matter of tensors.
    masks: dict[str, Any] = {"mask_kind": "random", "mask_ratio": 0.5, "decoder_mask_ratio": 0.0}
    with torch.device("meta"):
        expected = VideoMAE(dataclasses.replace(found.config, **masks)).state_dict()
    missing, unexpected, reshaped = differences(expected, found.state)
    return {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}


def _assumed(found: Checkpoint) -> set[str]:
    """Settings that the checkpoint does not say, among those that change what it computes."""
    config = found.config
    used = ["frames", "image_size", "image_mean", "image_std", "heads", "norm_eps"]
    if config.decoder_depth:
        used += ["decoder_heads", "decoder_norm_eps", "mask_kind", "mask_ratio", "norm_pix"]
    if config.num_classes and not config.final_norm:
        used += ["fc_norm_eps"]
    return set(used) - found.recorded


def _mask(config: VideoMAEConfig) -> dict[str, Any]:
    """Counts of tokens under the checkpoint's own masks."""
    try:
        masking = config.masking
    except ValueError as error:
        return {"error": str(error)}
    counts: dict[str, Any] = {"visible": masking.num_visible}
    if config.decoder_mask_ratio:
        counts["decoded"] = masking.num_decoded
        if masking.num_unscored is not None:
            counts["scored"] = masking.num_decoded - masking.num_unscored
    else:
        counts["decoded"] = counts["scored"] = config.num_tokens - masking.num_visible
    return counts


def _run(path: Path) -> dict[str, Any] | None:
    """The run that a checkpoint lies in: its step, seed and settings; None outside of one."""
    step = path.absolute().parent if path.name == "ema" else path.absolute()
    trainer, settings = step / "trainer.pt", step.parent.parent / "config.toml"
    if not trainer.is_file():
        return None
    # The optimiser's state is as large as two models: its shapes only.
    state = torch_load(trainer, shapes_only=True)
    about: dict[str, Any] = {name: state.get(name) for name in ("step", "seed")}
    about["averaged_weights"] = "these" if path.name == "ema" else (step / "ema").is_dir()
    about["folder"] = str(step.parent.parent) if settings.is_file() else None
    if settings.is_file():
        with settings.open("rb") as file:
            about["settings"] = tomllib.load(file)
    return about


# ---- text ---------------------------------------------------------------------------------


def _lines(about: dict[str, Any]) -> Iterable[str]:
    rows = [("checkpoint", about["path"]), ("dialect", _dialect(about))]
    rows += [("weights", _weights(about)), ("size", _size(about)), *_stacks(about)]
    rows += [("grid", about["grid"]["text"]), ("positions", _positions(about["model"]))]
    rows += [*_recipe(about), ("normalised by", _statistics(about["model"]))]
    if about["labels"]:
        labels = about["labels"]
        more = f", ... ({len(labels)})" if len(labels) > 3 else ""
        rows.append(("classes", ", ".join(labels[:3]) + more))
    rows.append(("licence", about["license"] or "none stated"))
    rows.append(("licence from", about["license_from"]))
    rows += _of_run(about["run"])
    if about["assumed"]:
        rows.append(("not in the file", f"{', '.join(about['assumed'])}: as published, assumed"))
    yield from (f"{name:16} {value}" for name, value in rows)
    yield from _list_misfits(about["misfits"])
    for name, tensor in about.get("tensors", {}).items():
        yield f"{by(tensor['shape']) or 'scalar':>20} {tensor['dtype']:9} {name}"


def _dialect(about: dict[str, Any]) -> str:
    if about["container"] in ("folder", "bare"):
        where = "a folder" if about["container"] == "folder" else "a bare state dict"
        return f"{about['dialect']}, {where}"
    under = f"{about['dialect']}, weights under {about['container']!r}"
    under += " (DeepSpeed)" if about["container"] == "module" else ""
    return under + (f", beside {', '.join(about['beside'])}" if about["beside"] else "")


def _weights(about: dict[str, Any]) -> str:
    counts = about["parameters"]
    parts = ", ".join(f"{part} {millions(count)}" for part, count in counts.items())
    return (
        f"{sum(counts.values()):,} parameters ({parts}), {', '.join(about['dtypes'])}, "
        f"{about['weights_bytes'] / 2**20:,.1f} MiB"
    )


def _size(about: dict[str, Any]) -> str:
    if about["size"] is None:
        return "of no published model"
    if about["model"]["decoder_depth"] and not about["decoder_as_published"]:
        return f"{about['size']} (the encoder; the decoder is another)"
    return str(about["size"])


def _stacks(about: dict[str, Any]) -> list[tuple[str, str]]:
    config = VideoMAEConfig.from_dict(about["model"])

    def stack(depth: int, width: int, heads: int, hidden: int) -> str:
        of_heads = _count(heads, "head") if about["heads_known"] else "heads unknown"
        return f"{_count(depth, 'block')}, width {width}, {of_heads}, MLP {hidden}"

    rows = [
        ("encoder", stack(config.depth, config.width, config.heads, config.encoder_hidden)
         + f", LayerNorm eps {config.norm_eps:g}"
         + ("" if config.final_norm else ", no final norm")
         + (", layer scale" if config.init_values else "")),
    ]  # fmt: skip
    if config.decoder_depth:
        settings = (config.decoder_depth, config.decoder_width, config.decoder_heads)
        rows.append(
            ("decoder", stack(*settings, config.decoder_hidden)
             + f", last LayerNorm eps {config.decoder_norm_eps:g}")
        )  # fmt: skip
    if config.num_classes:
        norm = "first token" if config.final_norm else f"mean, LayerNorm eps {config.fc_norm_eps:g}"
        rows.append(("classifier", f"{config.num_classes} classes, {norm}"))
    return rows


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _positions(model: dict[str, Any]) -> str:
    trained = model["positions_from"]
    return "of this grid" if trained is None else f"interpolated from {by(trained)} tokens"


def _recipe(about: dict[str, Any]) -> list[tuple[str, str]]:
    model, mask = about["model"], about["mask"]
    if mask is None:
        return []
    if "error" in mask:
        return [("mask", f"none can be drawn: {mask['error']}")]
    rows = [("mask", f"{model['mask_kind']} {model['mask_ratio']:g}: {mask['visible']} visible")]
    if model["decoder_mask_ratio"]:
        scored = f", {mask['scored']} scored" if "scored" in mask else ""
        kind = f"{model['decoder_mask_kind']} {model['decoder_mask_ratio']:g}"
        rows.append(("decoder mask", f"{kind}: {mask['decoded']} decoded{scored}"))
    target = "normalised tubelets (norm_pix)" if model["norm_pix"] else "pixels"
    return [*rows, ("target", target)]


def _statistics(model: dict[str, Any]) -> str:
    mean, std = (", ".join(f"{v:g}" for v in model[f"image_{name}"]) for name in ("mean", "std"))
    return f"mean {mean}; std {std}"


def _of_run(about: dict[str, Any] | None) -> list[tuple[str, str]]:
    if about is None:
        return []
    rows = [("run", about["folder"] or "-"), ("step", f"{about['step']}, seed {about['seed']}")]
    if about["averaged_weights"]:
        kept = "these" if about["averaged_weights"] == "these" else "kept beside them (--ema)"
        rows.append(("averaged", kept))
    for group, settings in about.get("settings", {}).items():
        values = settings if isinstance(settings, dict) else {group: settings}
        if values:
            rows.append((f"  [{group}]", ", ".join(f"{k}={v}" for k, v in values.items())))
    return rows


def _list_misfits(misfits: dict[str, list[str]]) -> Iterable[str]:
    if any(misfits.values()):
        yield "the tensors do not fit these settings, so the checkpoint will not load:"
    for kind, names in misfits.items():
        if names:
            yield f"  {len(names)} {kind}:"
            yield from (f"    {name}" for name in names[:_SHOWN])
            if len(names) > _SHOWN:
                yield f"    ... and {len(names) - _SHOWN} more"
