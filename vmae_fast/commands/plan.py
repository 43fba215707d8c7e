"""vmae-fast plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vmae_fast.models import VideoMAEConfig
from vmae_fast.plan import (
    GPUS,
    Links,
    Plan,
    Rates,
    Settings,
    default_results,
    find_gpu,
    make_plan,
    measured_efficiency,
    measured_rates,
)
from vmae_fast.plan.text import describe
from vmae_fast.train import ConfigError, ModelSettings, load_config

from ._arguments import parse, shown_of_model, take_option


@dataclass
class PlanArgs:
    """What is planned."""

    model: ModelSettings = field(default_factory=ModelSettings)
    batch_size: int = 32
    """Clips that each GPU holds at a time (the --micro-batch of pretrain)."""
    accumulate: int = 1
    """Such batches of each GPU in an optimiser step."""
    gpu: str = "h200"
    """Which GPU."""
    gpus: int = 1
    """How many of them."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several share the work: fsdp keeps a part of the model on each."""
    gpus_per_node: int = 8
    """How many of them one machine has."""
    node_gbs: float | None = None
    """GB/s that a GPU sends to another one of its machine. None: the GPU's published NVLink or
    PCIe."""
    network_gbs: float | None = None
    """GB/s that a GPU sends to another machine: the machine's network over its GPUs. None: 6.25,
    400 Gbit/s for eight."""
    clips: float | None = None
    """Clips of an epoch: files of the data set. None: no time of the run."""
    epochs: float | None = None
    """Epochs as papers count them: passes over the files times --repeats. None: one."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 autocast with fp32 weights, or fp32."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Residual stream under autocast."""
    checkpointing: Literal["none", "mlp", "block"] = "none"
    """What is computed again in the backward pass."""
    ema: bool = False
    """Keep an averaged copy of the weights."""
    results: str | None = None
    """Folder of benchmark results to take measured rates from. None: a checkout's own."""
    plot: bool = False
    """Draw it, too."""
    out: str = "plan.png"
    """Where the picture goes."""


# Flags that --help shows; the others are for --help-all.
USUAL = (
    "batch-size", "accumulate", "gpu", "gpus", "parallel", "clips", "epochs", "precision",
    "residual", "checkpointing", "ema", "plot", "out", "model", "frames", "image-size",
    "mask-ratio", "decoder-mask-ratio",
)  # fmt: skip


def run(args: list[str]) -> int:
    """Print a plan, and draw it where asked for; the exit status.

    Raises:
        ConfigError: settings that cannot be used.
        OSError: the picture cannot be written.
    """
    defaults = PlanArgs()
    source, args = take_option(args, "--config")
    if source is not None:
        recipe = load_config(source)
        defaults.model = recipe.model
        defaults.epochs = recipe.optim.epochs * recipe.sources[0].repeats
        defaults.checkpointing, defaults.residual = recipe.run.checkpointing, recipe.run.residual
        defaults.parallel = recipe.run.parallel
    shown = shown_of_model(defaults.model, args) | ({"config": source} if source else {})
    options = parse(
        PlanArgs,
        prog="vmae-fast plan",
        description=(
            "Say what a pretraining run takes, before it is started: memory of a GPU by part, the "
            "largest batch, time of a step and of the run. Memory is that of the step followed on "
            "tensors without data; time is a roofline, times the share of it that was measured on "
            f"this GPU, if it was. GPUs: {', '.join(GPUS)}."
        ),
        default=defaults,
        args=args,
        usual=USUAL,
        config=True,
        shown=shown,
        examples=(
            "vmae-fast plan --model base --batch-size 64 --gpu a100",
            "vmae-fast plan --config v2-base --gpu h200 --gpus 8 --clips 1.35e6 --plot",
        ),
    )
    try:
        plan = plan_of(options)
        print(describe(plan))
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    if options.plot:
        from vmae_fast.plan.picture import save_picture

        print(f"\nwrote {save_picture(plan, Path(options.out).expanduser())}")
    return 0


def plan_of(options: PlanArgs) -> Plan:
    """The plan that the flags ask for.

    Raises:
        ValueError: settings that cannot be used.
    """
    for name in ("clips", "epochs"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, got {value:g}")
    gpu = find_gpu(options.gpu)
    config = VideoMAEConfig.of(options.model.model or "base", **options.model.overrides())
    settings = Settings(
        config,
        options.batch_size,
        options.gpus,
        options.accumulate,
        options.precision,
        options.residual,
        options.checkpointing,
        options.ema,
        options.parallel,
    )
    links = Links.of(gpu, options.gpus_per_node, options.node_gbs, options.network_gbs)
    results = default_results() if options.results is None else Path(options.results)
    if results is not None and not results.is_dir():
        raise ValueError(f"no folder of results at {results}")
    rates = Rates.assumed(gpu, options.precision)
    efficiency = None
    if results is not None:
        rates = measured_rates(results, gpu, options.precision) or rates
        efficiency = measured_efficiency(results, gpu, rates, settings)
    clips = options.clips
    if clips is not None:
        clips *= 1 if options.epochs is None else options.epochs
    return make_plan(settings, gpu, rates=rates, efficiency=efficiency, links=links, clips=clips)
