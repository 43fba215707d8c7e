"""Settings of a pretraining run: dataclasses, read from and written to TOML.

Each group is a table of the TOML file and a group of flags. Names are unique over all groups,
so that a flag needs no prefix.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from vmae_fast.models import SIZES, CheckpointError, VideoMAE, VideoMAEConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Files per step that the published base learning rates are stated for.
LR_REFERENCE_FILES = 256
# Warm-up where none is set: V1 warms up for 40 of its 800 epochs.
WARMUP_SHARE = 0.05
# Largest micro-batch chosen without being asked; larger ones are the user's to try.
AUTO_MICRO_BATCH = 32


class ConfigError(ValueError):
    """Settings that cannot be used; the message says which and what would do."""


@dataclass
class ModelSettings:
    """What is trained. None takes the size's own value."""

    model: str | None = None
    """Size: small, base, large, huge, giant, or tiny (the demonstration). Default base."""
    frames: int | None = None
    """Frames of a clip."""
    image_size: int | None = None
    """Height and width of a clip in pixels."""
    patch_size: int | None = None
    """Height and width of a tubelet in pixels."""
    tubelet_size: int | None = None
    """Frames of a tubelet."""
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
        except CheckpointError:
            raise
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
            raise ConfigError(f"{init} has no decoder: it cannot be pretrained further")
        return model


@dataclass
class DataSettings:
    """What it is trained on."""

    data: str | None = None
    """Folder of videos (any nesting), or a list of `path[,label]` lines. None makes a small set."""
    stride: int = 4
    """Source frames from one frame of a clip to the next."""
    repeats: int = 1
    """Crops and masks drawn from each decoded clip (V2 has 4)."""
    flip: bool = False
    """Mirror half of the clips."""
    cache: bool = False
    """Decode each file once and hold it in memory: for sets far smaller than memory."""
    workers: int | None = None
    """Decoding processes for each GPU; None chooses by cores (0 on two)."""
    val: float = 0.02
    """Share of the files held out for validation."""
    max_bad: float = 0.1
    """Share of unreadable files that ends the run."""


@dataclass
class OptimSettings:
    """How it is trained. The defaults are V1's."""

    batch_size: int = 256
    """Clips in an optimiser step over all GPUs, after repeats."""
    micro_batch: int | None = None
    """Clips at a time on each GPU; gradients accumulate up to the batch. None chooses."""
    epochs: float = 800
    """Passes over the files."""
    steps: int | None = None
    """Optimiser steps; takes the place of epochs."""
    base_lr: float = 1.5e-4
    """Learning rate for 256 files a step; scaled by batch_size / repeats / 256."""
    lr: float | None = None
    """Learning rate as it is; takes the place of base_lr."""
    base_min_lr: float = 1e-5
    """Where the cosine ends, for 256 files a step."""
    min_lr: float | None = None
    """Where the cosine ends, as it is; takes the place of base_min_lr."""
    warmup_epochs: float | None = None
    """Passes over which the rate rises from 0; None is 5% of the run."""
    warmup_steps: int | None = None
    """Steps over which the rate rises from 0; takes the place of warmup_epochs."""
    beta1: float = 0.9
    """AdamW's first beta."""
    beta2: float = 0.95
    """AdamW's second beta."""
    weight_decay: float = 0.05
    """AdamW's decay; none on biases, norms and the mask token."""
    clip_grad: float | None = None
    """Largest gradient norm; None does not clip."""
    ema_decay: float = 0.0
    """Decay of an averaged copy of the weights; 0 keeps none."""


@dataclass
class RunSettings:
    """Where and how it runs."""

    out: str | None = None
    """Run folder; None names one after the time."""
    resume: bool = False
    """Go on with the run in --out."""
    overwrite: bool = False
    """Delete what is in --out and start anew."""
    init: str | None = None
    """Checkpoint to start from (its weights only)."""
    seed: int = 0
    """Decides weights, order, crops and masks."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast: bf16 keeps fp32 weights and residual stream. auto is bf16 on GPUs."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Residual stream under autocast; bf16 halves its memory, and is not what was published."""
    checkpointing: Literal["none", "mlp", "block"] = "none"
    """What is computed again in the backward pass to save memory."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Record the step as CUDA graphs. auto does for one process on a CUDA device."""
    device: str = "auto"
    """cuda, cpu, mps, ...; auto takes a GPU where there is one."""
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
    """Held-out loss over its zero prediction that this recipe should end at or below."""


@dataclass
class PretrainConfig:
    """All settings of a pretraining run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def check(self) -> None:
        """Check what does not depend on the data.

        Raises:
            ConfigError: a value out of its range.
        """
        optim, data, run = self.optim, self.data, self.run
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
            ("stride", data.stride, 1),
            ("repeats", data.repeats, 1),
            ("workers", data.workers, 0),
            ("save_every", run.save_every, 1),
            ("log_every", run.log_every, 1),
            ("val_every", run.val_every, 1),
            ("keep", run.keep, 1),
        )
        for name, value, least in at_least:
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if optim.epochs <= 0:
            raise ConfigError(f"epochs must be above 0, got {optim.epochs}")
        if optim.clip_grad is not None and optim.clip_grad <= 0:
            raise ConfigError(f"clip_grad must be above 0, got {optim.clip_grad}")
        for name, share in (
            ("val", data.val), ("max_bad", data.max_bad), ("ema_decay", optim.ema_decay)
        ):  # fmt: skip
            if not 0 <= share < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {share}")
        if optim.batch_size % data.repeats:
            raise ConfigError(
                f"batch_size={optim.batch_size} is not a multiple of repeats={data.repeats}"
            )
        if run.resume and run.overwrite:
            raise ConfigError("--resume goes on with a run, --overwrite deletes it: choose one")
        if run.resume and run.out is None:
            raise ConfigError("--resume needs --out, the folder of the run to go on with")

    def to_toml(self) -> str:
        """The settings as TOML, those that are None left out.

        So are ``resume``, ``overwrite`` and ``profile``: they say what was asked of one start, not
        what the run is, and its settings are read again when it goes on.
        """
        import tomli_w

        tables = dataclasses.asdict(self)
        for name in ("resume", "overwrite", "profile"):
            del tables["run"][name]
        return tomli_w.dumps(
            {
                table: {name: value for name, value in values.items() if value is not None}
                for table, values in tables.items()
            }
        )


@dataclass(frozen=True)
class Schedule:
    """Numbers that follow from settings, data and the number of processes."""

    total_steps: int
    warmup_steps: int
    lr: float
    min_lr: float
    micro_batch: int
    accumulate: int
    files_per_step: int

    @classmethod
    def of(cls, config: PretrainConfig, num_files: int, world_size: int) -> Schedule:
        """Work out the schedule.

        Args:
            config: checked settings.
            num_files: training files, held-out ones not counted.
            world_size: number of processes.

        Raises:
            ConfigError: batch, micro-batch and processes do not divide, or the warm-up is longer
                than the run.
        """
        optim, repeats = config.optim, config.data.repeats
        files_per_step = optim.batch_size // repeats
        per_rank, rest = divmod(optim.batch_size, world_size)
        if rest or per_rank % repeats:
            raise ConfigError(
                f"batch_size={optim.batch_size} does not divide over {world_size} processes into "
                f"whole files of {repeats} repeats; {world_size * repeats} and its multiples do"
            )
        micro = optim.micro_batch
        if micro is None:
            fits = [m for m in range(repeats, per_rank + 1, repeats) if per_rank % m == 0]
            micro = max([m for m in fits if m <= AUTO_MICRO_BATCH], default=fits[0])
        elif per_rank % micro or micro % repeats:
            raise ConfigError(
                f"micro_batch={micro} must divide the {per_rank} clips of each process and be a "
                f"multiple of repeats={repeats}"
            )

        def steps(epochs: float) -> int:
            return max(round(epochs * num_files / files_per_step), 1)

        total = optim.steps if optim.steps is not None else steps(optim.epochs)
        warmup = optim.warmup_steps
        if warmup is None:
            share = optim.warmup_epochs
            warmup = round(WARMUP_SHARE * total) if share is None else steps(share) if share else 0
        if warmup >= total and warmup:
            raise ConfigError(
                f"the warm-up of {warmup} steps is as long as the run of {total}; set "
                "--warmup-steps or --warmup-epochs"
            )
        scale = files_per_step / LR_REFERENCE_FILES
        return cls(
            total_steps=total,
            warmup_steps=warmup,
            lr=optim.base_lr * scale if optim.lr is None else optim.lr,
            min_lr=optim.base_min_lr * scale if optim.min_lr is None else optim.min_lr,
            micro_batch=micro,
            accumulate=per_rank // micro,
            files_per_step=files_per_step,
        )


def load_config(source: str | Path) -> PretrainConfig:
    """Read a TOML file, or a recipe by name ("tiny", "v1-base-k400", ...).

    Raises:
        ConfigError: no such file or recipe, not TOML, an unknown table or key (the nearest real
            one is named), or a value of the wrong type.
    """
    path = Path(source)
    if path.suffix == ".toml" or path.exists():
        if not path.is_file():
            raise ConfigError(f"no config file at {path}")
        text, name = path.read_text(), str(path)
    else:
        recipes = {Path(f.name).stem: f for f in _recipe_files()}
        if str(source) not in recipes:
            raise ConfigError(
                f"no config file or recipe {str(source)!r}; recipes are "
                f"{', '.join(sorted(recipes))}"
            )
        text, name = recipes[str(source)].read_text(), f"recipe {source}"
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}") from error
    return _from_tables(tables, name)


def _recipe_files() -> list[Any]:
    folder = resources.files("vmae_fast.configs")
    return [entry for entry in folder.iterdir() if entry.name.endswith(".toml")]


def _from_tables(tables: dict[str, Any], source: str) -> PretrainConfig:
    config = PretrainConfig()
    groups = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    home = {f.name: table for table, group in groups.items() for f in dataclasses.fields(group)}
    for table, values in tables.items():
        if table not in groups:
            if table in home and not isinstance(values, dict):
                raise ConfigError(f"{source}: {table!r} belongs into the table [{home[table]}]")
            raise ConfigError(f"{source}: unknown table [{table}]{_suggest(table, groups)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: [{table}] is a table, got {values!r}")
        types = typing.get_type_hints(type(groups[table]))
        for key, value in values.items():
            if key not in types:
                hint = f"; it belongs into [{home[key]}]" if key in home else _suggest(key, home)
                raise ConfigError(f"{source}: unknown key {key!r} in [{table}]{hint}")
            setattr(groups[table], key, _typed(value, types[key], f"{source}: [{table}] {key}"))
    return config


def _typed(value: Any, kind: Any, where: str) -> Any:
    options = typing.get_args(kind) if not isinstance(kind, type) else (kind,)
    if typing.get_origin(kind) is Literal:
        options = (kind,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif type(value) is option:
            return value
        elif option is float and type(value) is int:
            return float(value)
    expected = " or ".join(
        ", ".join(map(repr, typing.get_args(option)))
        if typing.get_origin(option) is Literal
        else option.__name__
        for option in options
        if option is not type(None)
    )
    raise ConfigError(f"{where} must be {expected}, got {value!r}")


def _suggest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
