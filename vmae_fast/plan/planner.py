"""What a pretraining run takes: memory, time and GPU-hours, before it is started."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch

from vmae_fast.models import VideoMAEConfig
from vmae_fast.nn.block import Checkpointing

from .flops import FLOP_PER_MAC, published_macs
from .gpus import STEP_SHARE, Gpu, Rates
from .trace import StepTrace, trace_step

# What the driver's context and the libraries' kernels and workspaces hold beside torch's tensors,
# and what is lost between them. Guesses.
CONTEXT_BYTES = 1 << 30
LOST_SHARE = 0.02
# Bytes that AdamW moves for each parameter: weight, gradient and both moments read, all but the
# gradient written; and the gradient read for its norm.
ADAMW_BYTES = 4 * 4 + 3 * 4 + 4
# Traces to find the largest batch.
MOST_TRIES = 8


@dataclass(frozen=True)
class Settings:
    """How a model is trained, on one of several GPUs alike.

    Attributes:
        config: of the model.
        batch: clips that each GPU holds at a time.
        gpus: how many.
        accumulate: such batches of a step.
        precision: "bf16" is autocast with fp32 weights.
        residual: the residual stream's under autocast.
        checkpointing: as in :class:`~vmae_fast.VideoMAE`.
        averaged: a moving average of the weights is kept.
    """

    config: VideoMAEConfig
    batch: int
    gpus: int = 1
    accumulate: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    residual: Literal["fp32", "bf16"] = "fp32"
    checkpointing: Checkpointing = "none"
    averaged: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "gpus", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.config.decoder_depth == 0:
            raise ValueError("the model has no decoder (decoder_depth=0): it cannot be pretrained")
        if self.residual == "bf16" and self.precision != "bf16":
            raise ValueError("residual bf16 goes with precision bf16")

    def trace(self) -> StepTrace:
        """The step of one batch, followed without data; once for all who ask."""
        return _traced(self.config, self.batch, self.precision, self.residual, self.checkpointing)

    @property
    def clips_per_step(self) -> int:
        """Clips of an optimiser step over all GPUs."""
        return self.batch * self.gpus * self.accumulate


@lru_cache(maxsize=64)
def _traced(
    config: VideoMAEConfig, batch: int, precision: str, residual: str, checkpointing: Checkpointing
) -> StepTrace:
    low = torch.bfloat16
    return trace_step(
        config,
        batch,
        autocast_dtype=low if precision == "bf16" else None,
        residual_dtype=low if residual == "bf16" else None,
        checkpointing=checkpointing,
    )


def memory_parts(settings: Settings, trace: StepTrace) -> dict[str, int]:
    """Bytes that one GPU holds when it holds most, by part.

    Gradients are those there at that moment: most of them are made when activations are gone.
    Where several batches make a step, all of the earlier ones' are there.
    """
    weights = trace.weight_bytes
    gradients = weights if settings.accumulate > 1 else trace.peak_gradient_bytes
    workspace = trace.peak_bytes - trace.peak_gradient_bytes - trace.peak_kept_bytes
    config = settings.config
    clip = config.in_channels * config.frames * math.prod(config.size)
    parts = {
        "weights": weights,
        "gradients": gradients,
        "AdamW": 2 * weights,
        "averaged weights": weights if settings.averaged else 0,
        "exchange of gradients": weights if settings.gpus > 1 else 0,
        "activations": trace.peak_kept_bytes,
        "workspace": workspace,
        "clips": settings.batch * clip,
    }
    tensors = sum(parts.values())
    parts["context, libraries, gaps"] = CONTEXT_BYTES + round(LOST_SHARE * tensors)
    return {name: size for name, size in parts.items() if size}


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one optimiser step at given rates, by what they go into.

    Attributes:
        products, attention, passes, optimizer: of an optimiser step.
    """

    products: float
    attention: float
    passes: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it, one after the other."""
        return self.products + self.attention + self.passes + self.optimizer

    @classmethod
    def of(cls, trace: StepTrace, rates: Rates, accumulate: int = 1) -> StepTime:
        """By roofline: each call as long as its operations or its bytes take."""
        per_ms = {
            "product": 1e9 * rates.matmul_tflop_per_s,
            "attention": 1e9 * rates.attention_tflop_per_s,
        }
        bytes_per_ms = 1e6 * rates.copy_gb_per_s
        taken = {"product": 0.0, "attention": 0.0, "pass": 0.0}
        for call in trace.calls:
            moving = call.moved_bytes / bytes_per_ms
            if call.kind == "attention":
                taken["attention"] += max(call.flops / per_ms["attention"], moving)
                continue
            # What stands beside a product is a pass of its own.
            taken["pass"] += moving
            if call.kind == "product":
                taken["product"] += call.flops / per_ms["product"]
        return cls(
            accumulate * taken["product"],
            accumulate * taken["attention"],
            accumulate * taken["pass"],
            ADAMW_BYTES * trace.num_parameters / bytes_per_ms,
        )


@dataclass(frozen=True)
class Efficiency:
    """Share of the roofline's rates that a whole step reaches.

    Attributes:
        share: in (0, 1].
        source: where it is from, in words.
        measured: whether a GPU of this kind ran it.
    """

    share: float = STEP_SHARE
    source: str = f"assumed: {STEP_SHARE:.0%} of these rates; not yet measured"
    measured: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything about a run before it is started.

    Attributes:
        settings: what is planned.
        gpu: on what.
        rates, efficiency: what its time is worked out from.
        trace: one batch's forward and backward pass.
        clips: of all the run, None where it is not said how long it is.
    """

    settings: Settings
    gpu: Gpu
    rates: Rates
    efficiency: Efficiency
    trace: StepTrace
    clips: float | None = None

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes by part, see :func:`memory_parts`."""
        return memory_parts(self.settings, self.trace)

    @property
    def memory_bytes(self) -> int:
        """All parts."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether one GPU holds it."""
        return self.memory_bytes <= self.gpu.memory_gib * 2**30

    @cached_property
    def largest_batch(self) -> int:
        """Most clips that one GPU can hold at a time; 0 where one is too many."""
        return largest_batch(self.settings, self.gpu, self.trace)

    @cached_property
    def floor(self) -> StepTime:
        """The step at the roofline's rates."""
        return StepTime.of(self.trace, self.rates, self.settings.accumulate)

    @property
    def step_ms(self) -> float:
        """The step as it is expected. Loading of clips and exchange of gradients not counted."""
        return self.floor.total / self.efficiency.share

    @property
    def clips_per_s(self) -> float:
        """Of all GPUs."""
        return 1e3 * self.settings.clips_per_step / self.step_ms

    @property
    def model_flop_utilization(self) -> float:
        """The papers' operations in a second over the published peak."""
        done = FLOP_PER_MAC * published_macs(self.settings.config) * self.clips_per_s
        peak = self.gpu.tflop_per_s(self.settings.precision) * 1e12
        return done / (peak * self.settings.gpus)

    @property
    def hours(self) -> float | None:
        """Of the whole run."""
        return None if self.clips is None else self.clips / self.clips_per_s / 3600


def make_plan(
    settings: Settings,
    gpu: Gpu,
    *,
    rates: Rates | None = None,
    efficiency: Efficiency | None = None,
    clips: float | None = None,
) -> Plan:
    """Plan a run.

    Args:
        settings: model, batch and so on.
        gpu: each of them.
        rates: None assumes shares of the published peaks.
        efficiency: of a whole step at these rates; None assumes it.
        clips: of all the run: files times passes over them, times repeats.
    """
    return Plan(
        settings,
        gpu,
        rates or Rates.assumed(gpu, settings.precision),
        efficiency or Efficiency(),
        settings.trace(),
        clips,
    )


def largest_batch(settings: Settings, gpu: Gpu, trace: StepTrace) -> int:
    """Most clips at a time that fit; 0 where one is too many.

    Memory grows by about as much with each clip, but not where mask tokens begin to be shared or
    the peak moves: so the answer is tried.
    """
    limit = gpu.memory_gib * 2**30
    known = {settings.batch: sum(memory_parts(settings, trace).values())}

    def needed(batch: int) -> int:
        if batch not in known:
            one = replace(settings, batch=batch)
            known[batch] = sum(memory_parts(one, one.trace()).values())
        return known[batch]

    return _largest(needed, limit, settings.batch, trace.peak_bytes / settings.batch)


def _largest(needed: Callable[[int], float], limit: float, start: int, slope: float) -> int:
    """Largest whole number whose growing ``needed`` is at most ``limit``; 0 where none is.

    Args:
        needed: of a whole number from 1 on.
        limit: what it may be at most.
        start: number to begin with.
        slope: how much one more takes, roughly.
    """
    fits, too_many, guess = 0, 0, start
    for _ in range(MOST_TRIES):
        found = needed(guess)
        if found <= limit:
            fits = guess
        else:
            too_many = guess
        if too_many == fits + 1:
            break
        # One more than fits by the slope is tried as well: it shows that no more do.
        ahead = math.floor((limit - found) / slope) or (1 if found <= limit else -1)
        upper = too_many - 1 if too_many else guess + ahead
        following = min(max(guess + ahead, fits + 1), upper)
        slope = (needed(following) - found) / (following - guess) or slope
        guess = following
    return fits


def parameters_of(config: VideoMAEConfig) -> dict[str, int]:
    """Parameters of the encoder and of what is thrown away after pretraining."""
    from vmae_fast.models import VideoMAE

    with torch.device("meta"):
        model: Any = VideoMAE(config)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    return {"encoder": encoder, "decoder": sum(p.numel() for p in model.parameters()) - encoder}
