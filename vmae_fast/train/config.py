"""Settings of a pretraining run, in groups.

Each group is a table of the TOML file (recipe.py reads and writes it) and a group of flags. Names
are unique over all groups, so that a flag needs no prefix.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vmae_fast.data import Sampling
from vmae_fast.models import SIZES, CheckpointError, VideoMAE, VideoMAEConfig


class ConfigError(ValueError):
    """Settings that cannot be used; the message says which and what would do."""


@dataclass
class ModelSettings:
    """What is trained. What is not given is the size's own."""

    model: str | None = None
    """Size: small, base, large, huge, giant, or tiny (the demonstration). None: base."""
    frames: int | None = None
    """Frames of a clip."""
    image_size: int | None = None
    """Height and width of a clip in pixels."""
    patch_size: int | None = None
    """Height and width of a tubelet in pixels."""
    tubelet_size: int | None = None
    """Frames of a tubelet."""
    in_channels: int | None = None
    """Channels of a clip: 3 is RGB, 1 grey, 4 RGB and transparency."""
    decoder_depth: int | None = None
    """Blocks of the decoder."""
    mask_kind: Literal["tube", "random", "frame"] | None = None
    """Which tokens are hidden: the same in every row of tubelets, any, or whole rows."""
    mask_ratio: float | None = None
    """Share of tokens hidden from the encoder."""
    decoder_mask_ratio: float | None = None
    """0 decodes all hidden tokens (V1); 0.5 or 0.75 leaves out that share (V2)."""
    decoder_mask_kind: Literal["running_cell", "frame", "random"] | None = None
    """Which tokens are not decoded; running_cell is V2's, the others take any ratio."""
    norm_pix: bool | None = None
    """Normalise each target tubelet."""
    drop_path: float | None = None
    """Rate of dropped residual branches in the last block."""
    init_values: float | None = None
    """Start of the layer scale; 0 has none."""

    def overrides(self) -> dict[str, Any]:
        """Settings that were given, as :class:`VideoMAE` takes them."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        given.pop("model", None)
        return given

    def build(self, init: str | Path | None) -> VideoMAE:
        """A new model, or one from the checkpoint ``init``.

        Raises:
            ConfigError: sizes that do not divide; the checkpoint is of another size, or has no
                decoder.
            CheckpointError: it cannot be read.
        """
        try:
            if init is None:
                return VideoMAE(self.model or "base", **self.overrides())
            model = VideoMAE.from_pretrained(init, **self.overrides())
        except CheckpointError as error:
            if str(error).startswith(str(init)) or f"at {init}" in str(error):
                raise
            raise CheckpointError(
                f"--init {init}: {error} (vmae-fast inspect says what a checkpoint is)"
            ) from error
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.model is not None:
            asked = VideoMAEConfig.of(self.model)
            for name in ("width", "depth", "heads"):
                if getattr(asked, name) != getattr(model.config, name):
                    raise ConfigError(
                        f"{init} has {name} {getattr(model.config, name)}, but --model "
                        f"{self.model} has {getattr(asked, name)}; leave --model out"
                    )
        if model.decoder is None:
            raise ConfigError(
                f"--init {init} has no decoder: it cannot be pretrained further; give a "
                "checkpoint of pretraining (vmae-fast inspect says what one is)"
            )
        return model


@dataclass
class DataSettings:
    """What it is trained on: one source of videos."""

    data: str | None = None
    """Folder of videos or of frame folders, list of files, or a file. None: a small set is made."""
    data_root: str | None = None
    """Where relative paths in a list start. None: the list's own folder."""
    stride: int = 4
    """Source frames from one frame of a clip to the next."""
    sample_fps: float | None = None
    """Frames of a clip a second of the video, whatever its own rate; takes the place of stride.
    None: by --stride."""
    clips_per_video: int | Literal["auto"] = 1
    """Clips of each file in an epoch; auto takes one for every 10 seconds."""
    repeats: int = 1
    """Crops and masks drawn from each decoded clip (V2 has 4)."""
    weight: float = 1.0
    """How often its files count in an epoch: 2 is twice, 0.5 every other time."""

    @property
    def sampling(self) -> Sampling:
        """How clips are taken from its files."""
        return Sampling(self.stride, self.sample_fps, self.repeats, self.weight)

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: a value out of its range.
        """
        for name, value, above in (
            ("stride", self.stride, 0),
            ("repeats", self.repeats, 0),
            ("sample_fps", self.sample_fps, 0.0),
            ("weight", self.weight, 0.0),
            ("clips_per_video", self.clips_per_video, 0),
        ):
            if value in (None, "auto"):
                continue
            assert isinstance(value, int | float)
            if not value > above or value == float("inf"):
                least = "at least 1" if isinstance(above, int) else "above 0"
                raise ConfigError(f"{name} must be {least}, got {value}")


@dataclass
class LoadingSettings:
    """How files become batches."""

    flip: bool = False
    """Mirror half of the clips."""
    cache: bool = False
    """Decode each file once and hold it in memory: for sets far smaller than memory."""
    decoder: Literal["pyav", "torchcodec"] = "pyav"
    """What reads video files. torchcodec is a package of its own, over the system's FFmpeg."""
    skip_nonref: bool = False
    """With pyav, leave out frames of H.264 that no other is made from and no clip holds."""
    workers: int | None = None
    """Decoding processes for each GPU. With 0, a file that crashes its decoder ends the run; with 1
    or more it costs its clip. None: by cores (0 where two compute, and with --cache)."""
    decode_timeout: float | None = 300.0
    """Seconds that a decoding process may be at one file; after them it is ended, and the file is
    bad."""
    val: float = 0.02
    """Share of the files held out for validation."""
    max_bad: float = 0.1
    """Share of unreadable files that ends the run."""


@dataclass
class OptimSettings:
    """How it is trained. The defaults are V1's."""

    batch_size: int = 256
    """Clips of a step, over all GPUs and repeats."""
    micro_batch: int | None = None
    """Clips at a time on each GPU; gradients accumulate up to the batch. None: at most 32."""
    epochs: float = 800
    """Passes over the files."""
    steps: int | None = None
    """Optimiser steps; takes the place of epochs. None: by --epochs."""
    base_lr: float = 1.5e-4
    """Learning rate for 256 files a step; scaled by batch_size / repeats / 256."""
    lr: float | None = None
    """Peak learning rate as it is; takes the place of base_lr. None: by --base-lr."""
    base_min_lr: float = 1e-5
    """Where the cosine ends, for 256 files a step."""
    min_lr: float | None = None
    """Where the cosine ends, as it is; takes the place of base_min_lr. None: by --base-min-lr."""
    warmup_epochs: float | None = None
    """Passes over which the rate rises from 0. None: 5% of the run."""
    warmup_steps: int | None = None
    """Steps over which the rate rises from 0; takes the place of warmup_epochs. None: by
    --warmup-epochs."""
    beta1: float = 0.9
    """AdamW's first beta."""
    beta2: float = 0.95
    """AdamW's second beta."""
    weight_decay: float = 0.05
    """AdamW's decay; none on biases, norms and the mask token."""
    clip_grad: float | None = None
    """Largest gradient norm, or None for any. None: not clipped."""
    ema_decay: float = 0.0
    """Decay of an averaged copy of the weights; 0 keeps none."""


@dataclass
class RunSettings:
    """Where and how it runs."""

    out: str | None = None
    """Run folder. None: runs/, by the time."""
    resume: bool = False
    """Go on with the run in --out."""
    auto_resume: bool = False
    """Go on with the run in --out where there is one, else start it: for jobs that restart."""
    overwrite: bool = False
    """Delete what is in --out and start anew."""
    init: str | None = None
    """Checkpoint to start from (its weights only). None: new weights."""
    seed: int = 0
    """Decides weights, order, crops and masks."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on GPUs, fp32 elsewhere; bf16 is autocast, weights and residual stream fp32."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Residual stream under autocast; bf16 halves its memory, and is not what was published."""
    checkpointing: Literal["none", "mlp", "block"] = "none"
    """What is computed again in the backward pass to save memory."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Record the step as CUDA graphs. auto does for one process on a CUDA device."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work: ddp keeps all of the model in each, fsdp a part of its
    weights, gradients and AdamW's state."""
    timeout: float = 1800.0
    """Seconds after which processes that wait for one that hangs give up."""
    skip_nonfinite: int = 0
    """Updates in a row that may be skipped for a loss or gradient that is not finite; one more ends
    the run."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cuda, cpu, mps, ..."""
    save_every: int = 1000
    """Steps from one checkpoint to the next."""
    keep: int = 3
    """Checkpoints kept, the latest ones."""
    log_every: int = 10
    """Steps from one line in the metrics to the next."""
    val_every: int = 1000
    """Steps from one validation to the next; one more at the end."""
    profile: bool = False
    """Write a trace and a summary of a few steps; with --cuda-graph auto, none are recorded."""
    target: float | None = None
    """Held-out loss over its zero prediction that this recipe should end at or below. None: any."""


@dataclass
class PretrainConfig:
    """All settings of a pretraining run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    loading: LoadingSettings = field(default_factory=LoadingSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)
    # The [[data]] tables of a TOML file, in the place of `data`; no flags.
    mixture: list[DataSettings] = field(default_factory=list, init=False)

    @property
    def sources(self) -> list[DataSettings]:
        """What it is trained on: one source, or the several of a mixture."""
        return self.mixture or [self.data]

    def check(self) -> None:
        """Check what does not depend on the data.

        Raises:
            ConfigError: a value out of its range.
        """
        optim, run = self.optim, self.run
        if self.model.model is not None and self.model.model not in SIZES:
            near = difflib.get_close_matches(self.model.model, SIZES, 1)
            raise ConfigError(
                f"model must be one of {', '.join(SIZES)}, got {self.model.model!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        at_least: tuple[tuple[str, Any, float], ...] = (
            ("batch_size", optim.batch_size, 1),
            ("micro_batch", optim.micro_batch, 1),
            ("steps", optim.steps, 1),
            ("warmup_steps", optim.warmup_steps, 0),
            ("warmup_epochs", optim.warmup_epochs, 0),
            ("weight_decay", optim.weight_decay, 0),
            ("lr", optim.lr, 0),
            ("base_lr", optim.base_lr, 0),
            ("in_channels", self.model.in_channels, 1),
            ("workers", self.loading.workers, 0),
            ("save_every", run.save_every, 1),
            ("log_every", run.log_every, 1),
            ("val_every", run.val_every, 1),
            ("keep", run.keep, 1),
            ("skip_nonfinite", run.skip_nonfinite, 0),
        )
        for name, value, least in at_least:
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        timeout = self.loading.decode_timeout
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"decode_timeout must be above 0 seconds, got {timeout}")
        if optim.epochs <= 0:
            raise ConfigError(f"epochs must be above 0, got {optim.epochs}")
        if optim.clip_grad is not None and optim.clip_grad <= 0:
            raise ConfigError(f"clip_grad must be above 0, got {optim.clip_grad}")
        for name, share in (
            ("val", self.loading.val),
            ("max_bad", self.loading.max_bad),
            ("ema_decay", optim.ema_decay),
        ):
            if not 0 <= share < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {share}")
        self._check_sources()
        if self.loading.skip_nonref and self.loading.decoder != "pyav":
            raise ConfigError("skip_nonref is for --decoder pyav, got torchcodec: choose one")
        if not run.timeout > 0 or run.timeout == float("inf"):
            raise ConfigError(f"timeout must be above 0 seconds, got {run.timeout}")
        for flag, asked in (("--resume", run.resume), ("--auto-resume", run.auto_resume)):
            if asked and run.overwrite:
                raise ConfigError(f"{flag} goes on with a run, --overwrite deletes it: choose one")
            if asked and run.out is None:
                raise ConfigError(f"{flag} needs --out, the folder of the run to go on with")

    def _check_sources(self) -> None:
        for source in self.sources:
            source.check()
            if self.mixture and source.data is None:
                raise ConfigError("each of several [[data]] tables needs a path")
        repeats = {source.repeats for source in self.sources}
        if len(repeats) == 1 and self.optim.batch_size % max(repeats):
            raise ConfigError(
                f"batch_size={self.optim.batch_size} is not a multiple of repeats={max(repeats)}"
            )
