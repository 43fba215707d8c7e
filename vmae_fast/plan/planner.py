"""What a pretraining run takes: memory, time and GPU-hours, before it is started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from vmae_fast.models import VideoMAEConfig

from .communication import Exchange, Links, copied_bytes, exchange_of
from .flops import FLOP_PER_MAC, published_macs
from .gpus import STEP_SHARE, Gpu, Rates
from .memory import largest_batch, memory_parts
from .settings import Settings
from .trace import StepTrace

# Bytes that AdamW moves for each parameter: weight, gradient and both moments read, all but the
# gradient written; and the gradient read for its norm.
ADAMW_BYTES = 4 * 4 + 3 * 4 + 4
# Numbers of GPUs for which a plan says how it scales.
SCALES = (1, 2, 4, 8, 16, 32, 64)


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
    def of(
        cls,
        trace: StepTrace,
        rates: Rates,
        accumulate: int = 1,
        shards: int = 1,
        copied_bytes: int = 0,
    ) -> StepTime:
        """By roofline: each call as long as its operations or its bytes take.

        Args:
            trace: one batch's forward and backward pass.
            rates: what they run at.
            accumulate: batches of a step.
            shards: GPUs that AdamW's work is divided among.
            copied_bytes: read and written beside the passes, once a step.
        """
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
            accumulate * taken["pass"] + copied_bytes / bytes_per_ms,
            ADAMW_BYTES * trace.num_parameters / shards / bytes_per_ms,
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
        links: between the GPUs.
        clips: of all the run, None where it is not said how long it is.
    """

    settings: Settings
    gpu: Gpu
    rates: Rates
    efficiency: Efficiency
    trace: StepTrace
    links: Links
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
        settings = self.settings
        return StepTime.of(
            self.trace, self.rates, settings.accumulate, settings.shards, copied_bytes(settings)
        )

    @property
    def compute_ms(self) -> float:
        """The step as one GPU is expected to compute it."""
        return self.floor.total / self.efficiency.share

    @cached_property
    def exchange(self) -> Exchange:
        """What the GPUs send each other."""
        forward, backward = (self._pass_ms(phase) for phase in ("forward", "backward"))
        return exchange_of(self.settings, self.links, backward, forward)

    @property
    def step_ms(self) -> float:
        """The step as it is expected. Loading of clips is not counted."""
        return self.compute_ms + self.exchange.exposed_ms

    @cached_property
    def scaling(self) -> tuple[Plan, ...]:
        """The same on other numbers of GPUs, each with as many clips."""
        counts = sorted({*SCALES, self.settings.gpus})
        found = (replace(self.settings, gpus=count) for count in counts)
        return tuple(replace(self, settings=one, trace=one.trace()) for one in found)

    @property
    def scaling_efficiency(self) -> float:
        """Clips a second over what as many GPUs would see if none had to wait for another."""
        alone = replace(self.settings, gpus=1)
        one = replace(self, settings=alone, trace=alone.trace())
        return self.clips_per_s / (self.settings.gpus * one.clips_per_s)

    def _pass_ms(self, phase: str) -> float:
        """One batch's forward or backward pass, as it is expected."""
        calls = tuple(call for call in self.trace.calls if call.phase == phase)
        time = StepTime.of(replace(self.trace, calls=calls, num_parameters=0), self.rates)
        return time.total / self.efficiency.share

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
    links: Links | None = None,
    clips: float | None = None,
) -> Plan:
    """Plan a run.

    Args:
        settings: model, batch and so on.
        gpu: each of them.
        rates: None assumes shares of the published peaks.
        efficiency: of a whole step at these rates; None assumes it.
        links: between several GPUs; None takes those of eight to a machine.
        clips: of all the run: files times passes over them, times repeats.
    """
    return Plan(
        settings,
        gpu,
        rates or Rates.assumed(gpu, settings.precision),
        efficiency or Efficiency(),
        settings.trace(),
        links or Links.of(gpu),
        clips,
    )


def parameters_of(config: VideoMAEConfig) -> dict[str, int]:
    """Parameters of the encoder and of what is thrown away after pretraining."""
    from vmae_fast.models import VideoMAE

    with torch.device("meta"):
        model: Any = VideoMAE(config)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    return {"encoder": encoder, "decoder": sum(p.numel() for p in model.parameters()) - encoder}
