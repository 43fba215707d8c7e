"""vmae-fast pretrain."""

from __future__ import annotations

import dataclasses
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from ._arguments import parse, peek_option, shown_of_model, take_option

# What a run reads, writes and draws with.
_NEEDED = ("av", "matplotlib", "PIL", "safetensors", "tensorboard", "tqdm")
# The recipe of a run that names neither a model nor a config.
DEFAULT_RECIPE = "tiny"

# Flags that --help shows; the others are for --help-all.
USUAL = (
    "data", "model", "frames", "image-size", "stride", "repeats", "workers", "batch-size",
    "micro-batch", "epochs", "steps", "lr", "out", "resume", "init", "precision", "device",
)  # fmt: skip

# Flags, and the setting that takes each one's place where it is set.
_REPLACED = {
    "epochs": "steps",
    "base-lr": "lr",
    "base-min-lr": "min_lr",
    "warmup-epochs": "warmup_steps",
}


def run(args: list[str]) -> int:
    """Train; the exit status."""
    from vmae_fast.train import PretrainConfig, load_config, pretrain

    source, rest = take_option(args, "--config")
    flags = {arg.split("=")[0].replace("_", "-") for arg in rest}
    held = Path(peek_option(rest, "--out") or "").expanduser() / "config.toml"
    resumes = bool(flags & {"--resume", "--auto-resume"})
    if source is None and resumes and held.is_file():
        # A run goes on with the settings it was started with.
        source = str(held)
    implied = source is None and not flags & {"--model", "--init"}
    base = PretrainConfig() if source is None else load_config(source)
    if implied:
        base = load_config(DEFAULT_RECIPE)
        if not flags & {"-h", "--help", "--help-all", "--resume"}:
            print(f"no --model, --config or --init: taking the recipe {DEFAULT_RECIPE!r}")
        if "--data" in flags:
            # What suits 256 small files made for it does not suit any folder.
            base.loading.cache, base.run.target = False, None
    mixture = _mixture(base, flags)
    for flag, replaced_by in _REPLACED.items():
        if f"--{flag}" in flags:
            # A flag must not lose to the setting of a recipe that takes its place.
            setattr(base.optim, replaced_by, None)
    config = parse(
        PretrainConfig,
        prog="vmae-fast pretrain",
        description=(
            f"Pretrain a VideoMAE; with no --config, --model or --init the recipe {DEFAULT_RECIPE}."
        ),
        default=base,
        args=rest,
        usual=USUAL,
        config=True,
        shown=_shown(base, rest, DEFAULT_RECIPE if implied else source),
        examples=(
            "vmae-fast pretrain --data /my/videos",
            "vmae-fast pretrain --config v1-base-k400 --data /my/videos --out runs/mine",
            "torchrun --nproc-per-node 8 -m vmae_fast.cli pretrain --config v2-base --data my.csv",
        ),
    )
    config.mixture = mixture
    for part in config.sources:
        # The settings are read again from another folder when the run goes on.
        for name in ("data", "data_root"):
            if getattr(part, name) is not None:
                setattr(part, name, str(Path(getattr(part, name)).expanduser().absolute()))
    for package in _NEEDED:
        # What is missing is said now, not when a run of days wants to write something.
        import_module(package)
    result = pretrain(config)
    return _report(config, result)


def _shown(base: Any, args: list[str], source: str | None) -> dict[str, object]:
    """What help says of defaults that other settings decide."""
    shown: dict[str, object] = {} if source is None else {"config": source}
    for flag, replaced_by in _REPLACED.items():
        if getattr(base.optim, replaced_by) is not None:
            shown[flag.replace("-", "_")] = f"--{replaced_by.replace('_', '-')} instead"
    of_checkpoint = base.run.init or peek_option(args, "--init")
    return shown | shown_of_model(base.model, args, of_checkpoint=bool(of_checkpoint))


def _mixture(base: Any, flags: set[str]) -> list[Any]:
    """The ``[[data]]`` tables that a run takes: --data goes before them."""
    from vmae_fast.train import ConfigError

    count = len(base.mixture)
    if not count:
        return []
    if "--data" in flags:
        print(f"--data takes the place of the {count} [[data]] tables")
        return []
    of_one = [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(base.data)]
    given = sorted(flags & {flag.replace("_", "-") for flag in of_one})
    if given:
        raise ConfigError(
            f"{', '.join(given)}: each of the {count} [[data]] tables has its own; change them in "
            "a copy of the TOML file, or name one source with --data"
        )
    kept: list[Any] = base.mixture
    return kept


def _report(config: Any, result: Any) -> int:
    """Print what a run came to, with its pictures; on the main process only."""
    import signal

    if int(os.environ.get("RANK", 0)):
        return 128 + result.signal if result.signal else 0
    if result.signal:
        name = signal.Signals(result.signal).name
        print(f"stopped by {name} after step {result.steps}; saved {result.checkpoint}")
        print(f"go on with: vmae-fast pretrain --out {result.path} --resume")
        return 128 + result.signal
    written = [("checkpoint", result.checkpoint), ("metrics", result.path / "metrics.jsonl")]
    written += zip(("profile trace", "profile summary"), result.profile, strict=False)
    written += _pictures(config, result)
    if result.val_loss is not None:
        _print_held_out(result.val_loss, result.val_zero_prediction, config.run.target)
    if result.features is not None:
        print(result.features.describe())
    print("wrote")
    for what, path in written:
        print(f"  {what:16} {path}")
    return 0


def _print_held_out(loss: float, zero: float, target: float | None) -> None:
    ratio = loss / zero
    print(
        f"held-out loss {loss:.4f}, predicting zeros for the same tubelets {zero:.4f}: "
        f"{ratio:.3f} of it"
    )
    if target is not None and ratio <= target:
        print(f"the model learnt: it ended at or below {target:g} of the zero prediction")
    elif target is not None:
        print(f"NOT reached: this recipe should end at or below {target:g} of the zero prediction")
    elif ratio >= 1:
        print("the model does not yet predict better than zeros would; train longer")


def _pictures(config: Any, result: Any) -> list[tuple[str, Path]]:
    from vmae_fast import VideoMAE
    from vmae_fast.pictures import reconstruct, save_contact_sheet, save_loss_curve
    from vmae_fast.train.metrics import read_metrics

    rows = read_metrics(result.path / "metrics.jsonl")
    curve = save_loss_curve(result.path / "loss_curve.png", rows)
    pictures = [
        reconstruct(VideoMAE.from_pretrained(result.checkpoint), clip, seed=number)
        for number, clip in enumerate(result.samples)
    ]
    sheet = save_contact_sheet(result.path / "reconstruction.png", pictures)
    return [("loss curve", curve), ("reconstruction", sheet)]
