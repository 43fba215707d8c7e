"""vmae-fast preview."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from vmae_fast.train import ConfigError, DataSettings, ModelSettings, PretrainConfig

from ._arguments import parse, shown_of_model
from ._looking import lay_over, model_of, settings_before_flags, shown_source

if TYPE_CHECKING:
    from vmae_fast.data import ClipItem, VideoFile
    from vmae_fast.models import VideoMAEConfig


@dataclass
class PreviewArgs:
    """What is shown."""

    videos: Positional[str | None] = None
    """Folder, list or file, as --data of pretrain. None: that of --config, else made videos."""
    out: str = "preview.png"
    """Where the picture goes."""
    clips: int = 4
    """Clips shown."""
    step: int = 0
    """Step of the run whose first clips are shown."""
    batch_size: int | None = None
    """Clips of a step, of which the step's number is counted. None: that of --config, or 256."""
    flip: bool = False
    """Mirror half of the clips."""
    seed: int | None = None
    """Decides order, crops and masks. None: that of --config, or 0."""
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)


def run(args: list[str]) -> int:
    """Draw the first clips of a training step as the model gets them; the exit status.

    Raises:
        ConfigError, DataError: settings or data that cannot be used.
    """
    from vmae_fast.data import collate_clips
    from vmae_fast.masking import clip_keys
    from vmae_fast.pictures import PreviewClip, save_preview
    from vmae_fast.train.distributed import alone
    from vmae_fast.train.inputs import Inputs

    config, options = _settings(args)
    model = model_of(config)
    inputs = Inputs(config, model, alone())
    dataset = inputs.dataset(train=True)
    first = options.step * config.optim.batch_size
    items = [dataset[request] for request in inputs.epoch().requests(first, options.clips)]
    batch = collate_clips(items)
    keys = clip_keys(config.run.seed, batch.epoch, batch.clip, batch.repeat)
    mask = model.masking(keys)
    shown = [
        PreviewClip(video, title, times)
        for item in items
        for video, title, times in zip(
            item.crops, _titles(item, inputs.files[item.clip]),
            [item.times_s] * len(item.crops), strict=True,
        )
    ]  # fmt: skip
    header = [*inputs.notes, _describe(model)]
    path = save_preview(Path(options.out).expanduser(), shown, mask, model, "\n".join(header))
    print("\n".join(header))
    for file in batch.bad:
        print(f"cannot read {file.path}: {file.reason}; another file stands in for it")
    print(f"wrote {path}: {len(shown)} clips of step {options.step}")
    return 0


def _settings(args: list[str]) -> tuple[PretrainConfig, PreviewArgs]:
    """The settings of the run whose clips are shown, and what of them is."""
    base, source, rest = settings_before_flags(args)
    options = parse(
        PreviewArgs,
        prog="vmae-fast preview",
        description=(
            "Draw what a model is fed: the first clips of a training step after crop and flip, "
            "what the encoder sees of them and what the decoder makes, with files and times. "
            "They are those of `vmae-fast pretrain` with the same settings."
        ),
        args=rest,
        default=PreviewArgs(model=base.model, data=base.data, flip=base.loading.flip),
        usual=(
            "videos",
            "out",
            "clips",
            "step",
            "model",
            "stride",
            "sample_fps",
            "decoder_mask_ratio",
        ),
        examples=(
            "vmae-fast preview /my/videos",
            "vmae-fast preview --config runs/base/config.toml --step 1000 --clips 8",
        ),
        config=True,
        shown=shown_source(source) | shown_of_model(base.model, rest),
    )
    if options.clips < 1 or options.step < 0:
        raise ConfigError(
            f"--clips must be at least 1 and --step at least 0, got {options.clips} and "
            f"{options.step}"
        )
    lay_over(base, options)
    base.loading.flip = options.flip
    if options.batch_size is not None:
        base.optim.batch_size = options.batch_size
    if options.seed is not None:
        base.run.seed = options.seed
    base.check()
    return base, options


def _titles(item: ClipItem, file: VideoFile) -> list[str]:
    """A line for each crop of a clip."""
    times = [t for t in item.times_s if t == t]
    span = f", {times[0]:.2f} to {times[-1]:.2f} s" if times else ""
    label = f", label {file.label}" if file.label is not None else ""
    repeats = len(item.crops) > 1 or item.first
    return [
        f"{file.path}{label}{span}" + (f", repeat {item.first + k + 1}" if repeats else "")
        for k in range(len(item.crops))
    ]


def _describe(model: VideoMAEConfig) -> str:
    masking = model.masking
    t, h, w = model.grid
    height, width = model.size
    unscored = masking.num_unscored
    text = (
        f"{model.frames} frames of {width}x{height}, {t}x{h}x{w} = {model.num_tokens} tokens; "
        f"{masking.kind} mask {masking.ratio:g}: the encoder sees {masking.num_visible}; "
    )
    if not masking.decoder_ratio:
        return text + f"the decoder makes the other {masking.num_decoded}"
    scored = "" if unscored is None else f", {masking.num_decoded - unscored} of them scored"
    return text + (
        f"{masking.decoder_kind} mask {masking.decoder_ratio:g}: the decoder makes "
        f"{masking.num_decoded}{scored} (seen ones are tinted)"
    )
