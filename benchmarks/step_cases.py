"""Training steps to time: which models, masks and batches, and what they cost at least."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import flops
import torch
from torch import Tensor

from vmae_fast import VideoMAE, VideoMAEConfig, clip_keys
from vmae_fast.plan.gpus import GPUS
from vmae_fast.train.config import OptimSettings
from vmae_fast.train.graph import Capture
from vmae_fast.train.optimizer import make_optimizer
from vmae_fast.train.step import TrainStep

LR = 1e-4
LAUNCHES = ("graph", "launched", "compiled")
RESIDUALS = {"bf16": torch.bfloat16, "fp32": None}


@dataclass(frozen=True)
class StepCase:
    """A step, by model, masks and clips.

    Attributes:
        name: its row's, the same however many clips fit.
        size: of SIZES.
        clips: how many; halved until they fit.
        launches: of LAUNCHES.
        peers: of peers.PEERS, timed too.
        settings: of the model where they are not the size's.
    """

    name: str
    size: str
    clips: int
    launches: tuple[str, ...] = ("graph", "launched")
    peers: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> VideoMAEConfig:
        """The model's settings."""
        return VideoMAEConfig.of(self.size, **self.settings)


_V2 = {"decoder_mask_ratio": 0.5}
_PEERS = ("huggingface_eager", "huggingface", "huggingface_compiled")
# Whole models of 36 to 52 blocks would take inductor minutes.
_DEEP_PEERS = (*_PEERS[:2], "huggingface_compiled_blocks")
# Worth most first: the time on a GPU may run out, and compiling takes much of it.
CASES = (
    StepCase("step base v1", "base", 64, LAUNCHES, peers=_PEERS),
    StepCase("step base v2", "base", 64, settings=_V2),
    StepCase("step large v1", "large", 64, peers=_DEEP_PEERS),
    StepCase("step huge v1", "huge", 32, peers=_DEEP_PEERS),
    StepCase("step giant v1", "giant", 16, peers=_DEEP_PEERS),
    StepCase("step giant v2", "giant", 16, settings=_V2),
    StepCase("step large v2", "large", 64, settings=_V2),
    StepCase("step huge v2", "huge", 32, settings=_V2),
    StepCase("step small v1", "small", 64, peers=_PEERS),
    StepCase("step small v2", "small", 64, settings=_V2),
    StepCase("step base v1 of 8 clips", "base", 8, LAUNCHES),
)


def contender(launch: str, residual: str) -> str:
    """Name of one way of ours to take a step."""
    return f"{launch}, {residual} residual"


def training_step(
    case: StepCase,
    launch: str,
    residual: str,
    clips: int,
    device: torch.device,
    capture: Callable[[torch.device], Capture],
) -> Callable[[], Tensor]:
    """A whole step of ours under bf16 autocast: masks, forward, backward, fused AdamW, no clipping.

    The video is uint8 and on the device already; what a recorded step copies of it is timed.

    Args:
        case: the model.
        launch: "graph", "launched", or "compiled" by torch.compile, then launched.
        residual: of RESIDUALS.
        clips: how many.
        device: where.
        capture: makes what records the "graph".
    """
    torch.manual_seed(0)
    with device:
        model = VideoMAE(case.config)
    model.residual_dtype = RESIDUALS[residual]
    config = model.config
    # As a decoder's memory comes.
    shape = (clips, config.frames, *config.size, config.in_channels)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)
    keys = clip_keys(0, 0, torch.arange(clips, device=device))
    step = TrainStep(
        model,
        make_optimizer(model, OptimSettings()),
        autocast=partial(torch.autocast, device.type, torch.bfloat16),
        trained=torch.compile(model) if launch == "compiled" else None,
        capture=capture(device) if launch == "graph" else None,
    )

    def call() -> Tensor:
        step.forward_backward(video, keys)
        return step.update(LR)

    return call


def flops_run(config: VideoMAEConfig, clips: int) -> int:
    """Operations of the forward and backward pass over a batch as ours runs them.

    Unlike the papers' count: only visible tubelets are embedded, a video has no gradient, the last
    decoder block works on scored tokens only, mask tokens share a product, and attention's logits
    are computed a second time in the backward pass.
    """
    return round(clips * flops.step(flops.model_of(config), config, clips))


def published_peak(device_name: str) -> float | None:
    """TFLOP/s of dense bf16 products by a GPU's data sheet; None where it is not known."""
    peaks = [g.bf16_tflop_per_s for g in GPUS.values() if device_name.endswith(f" {g.name}")]
    return peaks[0] if peaks else None


def release(device: torch.device) -> None:
    """Hand unused memory back to the GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call on a CPU; each round makes all of them once."""
    taken_ms: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken_ms[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in taken_ms.items()}
