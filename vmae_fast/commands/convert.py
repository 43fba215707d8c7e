"""vmae-fast convert."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

from vmae_fast._files import atomic_folder
from vmae_fast.commands._arguments import parse
from vmae_fast.commands._checkpoints import (
    by,
    describe_grid,
    dtypes,
    find_checkpoint,
    millions,
    parameters,
    part_of,
)
from vmae_fast.models import CheckpointError, VideoMAE, VideoMAEConfig
from vmae_fast.models.checkpoint import check_target, load_strictly
from vmae_fast.models.dialects import State
from vmae_fast.models.licence import is_stated
from vmae_fast.models.reading import Checkpoint, read_checkpoint
from vmae_fast.train import ConfigError

# What a folder that --overwrite may replace holds: files of checkpoints, and nothing else.
_OF_CHECKPOINTS = (
    "config.json", "preprocessor_config.json", "README.md", "model*.safetensors*",
    "pytorch_model*.bin*", "generation_config.json", ".gitattributes",
)  # fmt: skip


@dataclass
class ConvertArgs:
    """Read a checkpoint of any dialect and write it in another."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """Checkpoint: a folder of ours or Hugging Face's, a .pth of MCG-NJU's or OpenGVLab's, a hub
    id; or a run's folder, of which the latest is taken."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """What to write: a folder, or for the dialect videomae a .pth file."""
    dialect: str = "vmae-fast"
    """What it is written as: vmae-fast, huggingface (which transformers loads), or videomae (the
    names of MCG-NJU's and OpenGVLab's code)."""
    ema: bool = False
    """Take a run's averaged weights."""
    encoder_only: bool = False
    """Leave the decoder out."""
    frames: int | None = None
    """Frames of a clip, of a .pth that does not say; or others, with --interpolate-positions.
    None: the source's."""
    image_size: int | None = None
    """Pixels of a clip's side, likewise. None: the source's."""
    interpolate_positions: bool = False
    """Interpolate the tables of positions from the trained grid to that of --frames and
    --image-size."""
    positions_from: tuple[int, int, int] | None = None
    """Grid of tokens (t h w) that a .pth was trained on, where it does not say. None: its own."""
    heads: int | None = None
    """Attention heads, of a .pth of no published width. None: the published."""
    decoder_heads: int | None = None
    """Heads of its decoder. None: the published."""
    license: str | None = None
    """Licence of the weights, where the source states none (cc-by-nc-4.0, mit, ...). None: the
    source's."""
    overwrite: bool = False
    """Replace what is at OUT."""


def run(args: list[str]) -> int:
    """Convert a checkpoint, read the result back and compare it; the exit status.

    Raises:
        CheckpointError: the source cannot be read, or the dialect cannot express it.
        ConfigError: flags that do not go together, or OUT holds something.
        OSError: OUT cannot be written.
    """
    options = parse(
        ConvertArgs,
        prog="vmae-fast convert",
        description="Read a checkpoint of any dialect and write it in another.",
        args=args,
        examples=(
            "vmae-fast convert checkpoint.pth base",
            "vmae-fast convert runs/mine base-hf --dialect huggingface --encoder-only",
        ),
    )
    out = options.out.expanduser()
    # What can be refused without reading a large file is refused before.
    check_target(out, options.dialect)
    _check_free(out, options)
    try:
        source, model = _read(options)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    _say("read", source, source.state)
    if source.container not in ("folder", "bare"):
        print(f"  weights under  {source.container!r}, beside {', '.join(source.beside) or '-'}")
    if not {"frames", "image_size"} <= source.recorded:
        print("  grid           is not in the file: --frames and --image-size say it")
    print(f"  licence from   {'--license' if options.license else source.license_from}")
    _write(model, out, options)
    written = read_checkpoint(out, {})
    _say("wrote", written, written.state)
    for line in [*_compare(source, model, written), *_not_kept(source, model.config, written)]:
        print(line)
    return 0


def _check_free(out: Path, options: ConvertArgs) -> None:
    if options.positions_from is not None and not options.interpolate_positions:
        raise ConfigError("--positions-from goes with --interpolate-positions")
    if options.dialect != "videomae" and out.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise ConfigError(
            f"the dialect {options.dialect} is a folder, and {out.name} looks like a file: give "
            "another name, or --dialect videomae, which is one .pth file"
        )
    if not out.exists():
        return
    if not options.overwrite:
        raise ConfigError(f"{out} exists; --overwrite replaces it")
    if out.is_dir() != (options.dialect != "videomae"):
        raise ConfigError(
            f"{out} is a {'folder' if out.is_dir() else 'file'}, and the dialect "
            f"{options.dialect} is not: give another name"
        )
    if out.is_dir():
        others = [
            entry.name for entry in sorted(out.iterdir())
            if not any(entry.match(pattern) for pattern in _OF_CHECKPOINTS)
        ]  # fmt: skip
        if others:
            raise ConfigError(
                f"{out} holds {', '.join(others[:5])}, which is no part of a checkpoint and would "
                "be lost: --overwrite does not replace it"
            )


def _read(options: ConvertArgs) -> tuple[Checkpoint, VideoMAE]:
    names = ("frames", "image_size", "positions_from", "heads", "decoder_heads", "license")
    given = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    source = read_checkpoint(
        find_checkpoint(options.source, ema=options.ema),
        given,
        interpolate_positions=options.interpolate_positions,
    )
    model = VideoMAE(source.config)
    load_strictly(model, source.state, str(source.path))
    if options.encoder_only:
        # Loaded whole first: a checkpoint that does not fit is refused all the same.
        encoder = VideoMAE(dataclasses.replace(source.config, decoder_depth=0))
        encoder.load_state_dict(
            {n: t for n, t in model.state_dict().items() if part_of(n) != "decoder"}
        )
        model = encoder
    return source, model


def _write(model: VideoMAE, out: Path, options: ConvertArgs) -> None:
    if options.dialect == "videomae":
        model.save_pretrained(out, dialect="videomae")
        return
    # The whole folder at once: nothing of what was there is left to be read with the new weights.
    with atomic_folder(out) as folder:
        model.save_pretrained(folder, dialect=options.dialect)


def _say(verb: str, checkpoint: Checkpoint, state: State) -> None:
    config = checkpoint.config
    counts = parameters(state)
    parts = ", ".join(f"{part} {millions(count)}" for part, count in counts.items())
    print(f"{verb} {checkpoint.path}")
    print(f"  dialect        {checkpoint.dialect}")
    print(
        f"  parameters     {sum(counts.values()):,} ({parts}), {', '.join(dtypes(state.values()))}"
    )
    print(f"  grid           {describe_grid(config)}")
    if config.positions_from is not None:
        print(f"  positions      interpolated from {by(config.positions_from)} tokens")
    print(f"  licence        {config.license or 'none stated'}")


def _compare(source: Checkpoint, model: VideoMAE, written: Checkpoint) -> list[str]:
    """Compare what is on disk now with what was read; lines about it.

    Raises:
        CheckpointError: they are not the same.
    """
    expected = {name: source.state[name] for name in model.state_dict()}
    if written.state.keys() != expected.keys():
        raise CheckpointError(
            f"{written.path} was read back with other tensors than were read: "
            f"{sorted(written.state.keys() ^ expected.keys())[:5]}: do not use it"
        )
    changed = [
        name
        for name, tensor in expected.items()
        if not _same_bits(tensor.to(written.state[name].dtype), written.state[name])
    ]
    if changed:
        raise CheckpointError(
            f"{written.path} was read back with other values in {changed[:5]}: do not use it"
        )
    before, after = dtypes(expected.values()), dtypes(written.state.values())
    lines = [f"checked: {len(expected)} tensors read back, all bitwise equal to those read"]
    if before != after:
        lines[-1] += f", which were converted from {', '.join(before)} to {', '.join(after)}"
    left_out = len(source.state) - len(expected)
    if left_out:
        lines.append(f"left out: {left_out} tensors of the decoder")
    return lines


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    # As bytes, so that a NaN equals itself and -0 does not equal 0.
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    flat = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second))
    return torch.equal(*flat)


def _not_kept(source: Checkpoint, config: VideoMAEConfig, written: Checkpoint) -> list[str]:
    """Settings that the dialect written has no word for, with what they become."""
    irrelevant: tuple[str, ...] = ("drop_path",)
    if not config.decoder_depth:
        irrelevant += ("decoder_", "mask_", "norm_pix")
    if not config.num_classes or config.final_norm:
        irrelevant += ("fc_norm",)
    if not config.decoder_mask_ratio:
        irrelevant += ("decoder_mask_kind",)
    before, after = config.to_dict(), written.config.to_dict()
    # None stands for 4 times the width: the same model, spelt otherwise.
    for values, settings in ((before, config), (after, written.config)):
        values |= {"mlp_dim": settings.encoder_hidden, "decoder_mlp_dim": settings.decoder_hidden}
    lines = [
        f"not kept by {written.dialect}: {name}={before[name]} is read back as {after[name]}"
        for name in before
        if before[name] != after[name] and not name.startswith(irrelevant)
    ]
    if any(not label.startswith("LABEL_") for label in source.labels) and config.num_classes:
        lines.append("not kept: the names of the classes (id2label in the source's config.json)")
    if config.license is not None and not is_stated(config.license):
        lines.append("the source states no licence; --license NAME says which, where you know")
    return lines
