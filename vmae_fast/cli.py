"""The command line: vmae-fast pretrain | plan | reconstruct | env."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional

# The recipe of a run that names neither a model nor a config.
DEFAULT_RECIPE = "tiny"

# Flags, and the setting that takes each one's place where it is set.
_REPLACED = {
    "epochs": "steps",
    "base-lr": "lr",
    "base-min-lr": "min_lr",
    "warmup-epochs": "warmup_steps",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors a user can mend are one message."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "pretrain": (_pretrain, "train a VideoMAE on a folder of videos (or on made ones)"),
        "plan": (_plan, "say what a run takes: memory, largest batch, time, GPU-hours"),
        "reconstruct": (_reconstruct, "show what a checkpoint makes of a masked video"),
        "env": (_env, "print versions, devices, backends and decoders"),
    }
    if not args or args[0] in ("-h", "--help"):
        print("usage: vmae-fast COMMAND [options]\n\ncommands:")
        for name, (_, what) in commands.items():
            print(f"  {name:12} {what}")
        print("\nvmae-fast COMMAND --help shows a command's options")
        return 0 if args else 2
    if args[0] == "--version":
        from vmae_fast import __version__

        print(__version__)
        return 0
    if args[0] not in commands:
        print(
            f"vmae-fast: no command {args[0]!r}; there are {', '.join(commands)}", file=sys.stderr
        )
        return 2
    # Threads that wait for each other by spinning double a small model's time where other
    # processes want the cores; sleeping costs it half as much again where they do not
    # (benchmarks/NOTES.md). The user's own setting holds. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from vmae_fast.data import DataError, DecodeError
    from vmae_fast.models import CheckpointError
    from vmae_fast.ops import BackendError
    from vmae_fast.train import ConfigError, RunError

    mendable = (
        DataError,
        DecodeError,
        CheckpointError,
        ConfigError,
        RunError,
        BackendError,
        OSError,
    )
    try:
        return commands[args[0]][0](args[1:])
    except mendable as error:
        print(f"vmae-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vmae-fast: interrupted; the last complete checkpoint is kept", file=sys.stderr)
        return 130


# ---- pretrain -----------------------------------------------------------------------------


def _pretrain(args: list[str]) -> int:
    from vmae_fast.train import PretrainConfig, load_config, pretrain

    source, rest = _take_option(args, "--config")
    flags = {arg.split("=")[0].replace("_", "-") for arg in rest}
    run = Path(_peek_option(rest, "--out") or "").expanduser() / "config.toml"
    if source is None and "--resume" in flags and run.is_file():
        # A run goes on with the settings it was started with.
        source = str(run)
    implied = source is None and not flags & {"--model", "--init"}
    base = PretrainConfig() if source is None else load_config(source)
    if implied:
        base = load_config(DEFAULT_RECIPE)
        if not flags & {"-h", "--help"}:
            print(f"no --model, --config or --init: taking the recipe {DEFAULT_RECIPE!r}")
        if "--data" in flags:
            # What suits 256 small files made for it does not suit any folder.
            base.data.cache, base.run.target = False, None
    for flag, replaced_by in _REPLACED.items():
        if f"--{flag}" in flags:
            # A flag must not lose to the setting of a recipe that takes its place.
            setattr(base.optim, replaced_by, None)
    config: PretrainConfig = tyro.cli(
        OmitArgPrefixes[PretrainConfig],
        prog="vmae-fast pretrain",
        description=(
            "Pretrain a VideoMAE. --config FILE.toml|RECIPE starts from its settings; with no "
            f"--config, --model or --init, the recipe {DEFAULT_RECIPE!r} is taken. Under torchrun "
            "every process takes its GPU."
        ),
        default=base,
        args=rest,
    )
    if config.data.data is not None:
        config.data.data = str(Path(config.data.data).expanduser().absolute())
    result = pretrain(config)
    return _report(config, result)


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


# ---- plan ---------------------------------------------------------------------------------


def _plan(args: list[str]) -> int:
    from vmae_fast.plan_command import run

    source, rest = _take_option(args, "--config")
    return run(source, rest)


# ---- reconstruct --------------------------------------------------------------------------


@dataclass
class ReconstructArgs:
    """Reconstruct a masked clip of a video: a PNG sheet and a moving picture."""

    checkpoint: Positional[str]
    """Checkpoint (ours, MCG-NJU's or OpenGVLab's .pth, Hugging Face's folder), or a run folder."""
    video: Positional[str]
    """Video file; the clip is taken from its middle."""
    out: str | None = None
    """Where to write, without suffix; default beside the working folder, after the video."""
    stride: int = 4
    """Source frames from one frame of the clip to the next."""
    seed: int = 0
    """Of the mask."""
    gif: bool = False
    """Write the moving picture as GIF, not mp4."""


def _reconstruct(args: list[str]) -> int:
    from vmae_fast import VideoMAE
    from vmae_fast.data import ClipDataset, ClipRequest, VideoFile
    from vmae_fast.models import CheckpointError
    from vmae_fast.pictures import reconstruct, save_contact_sheet, save_video
    from vmae_fast.train.run_folder import RunFolder

    options = tyro.cli(ReconstructArgs, prog="vmae-fast reconstruct", args=args)
    checkpoint = RunFolder(Path(options.checkpoint)).latest() or options.checkpoint
    model = VideoMAE.from_pretrained(checkpoint)
    if model.decoder is None:
        raise CheckpointError(f"{checkpoint} has no decoder: it cannot reconstruct")
    dataset = ClipDataset(
        [VideoFile(options.video)],
        frames=model.config.frames,
        stride=options.stride,
        image_size=model.config.size,
        train=False,
    )
    clip = dataset[ClipRequest(0, 0)].crops[0].permute(3, 0, 1, 2)
    picture = reconstruct(model, clip, seed=options.seed)
    stem = options.out or f"{Path(options.video).stem}-reconstruction"
    sheet = save_contact_sheet(Path(f"{stem}.png"), [picture])
    moving = save_video(Path(f"{stem}.gif" if options.gif else f"{stem}.mp4"), picture, fps=6)
    print(f"loss {picture.loss:.4f}, predicting zeros {picture.zero_prediction:.4f}")
    print(f"wrote {sheet} and {moving}")
    return 0


# ---- env ----------------------------------------------------------------------------------


def _env(args: list[str]) -> int:
    import platform

    import torch

    from vmae_fast import __version__
    from vmae_fast.ops._backend import backend_summary, extension_summary

    if args:
        print("usage: vmae-fast env", file=sys.stderr)
        return 0 if args[0] in ("-h", "--help") else 2
    rows = [
        ("vmae-fast", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    rows += [(name, _version(name)) for name in ("triton", "einops", "numpy")]
    rows += _devices()
    rows += [
        ("backends", backend_summary(extension=False)),
        ("extension", extension_summary()),
        ("decoders", _decoder()),
    ]
    rows += [
        (name, _version(name))
        for name in ("safetensors", "tensorboard", "matplotlib", "huggingface_hub", "transformers")
    ]
    for name, value in rows:
        print(f"{name:16} {value}")
    return 0


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    import torch

    rows = [("cpu", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = about.total_memory / 2**30
        rows.append(
            (f"cuda:{index}", f"{about.name}, {memory:.0f} GiB, sm_{about.major}{about.minor}")
        )
    if not torch.cuda.device_count():
        built = torch.version.cuda
        why = f"no GPU seen (torch built for {built})" if built else "this torch is built without"
        rows.append(("cuda", why))
    return rows


def _decoder() -> str:
    try:
        import av
    except ImportError as error:
        return f"none: PyAV cannot be imported ({error})"
    version = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"PyAV {av.__version__} (libavcodec {version})"


# ---- arguments ----------------------------------------------------------------------------


def _take_option(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of an option and the arguments without it."""
    rest, value = [], None
    remaining = iter(args)
    for arg in remaining:
        if arg == name:
            value = next(remaining, None)
            if value is None:
                from vmae_fast.train import ConfigError

                raise ConfigError(f"{name} needs a value")
        elif arg.startswith(f"{name}="):
            value = arg.split("=", 1)[1]
        else:
            rest.append(arg)
    return value, rest


def _peek_option(args: list[str], name: str) -> str | None:
    return _take_option(args, name)[0]


if __name__ == "__main__":
    sys.exit(main())
