"""Training steps to time: which models, masks and batches, and what they cost at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vmae_fast import VideoMAE, VideoMAEConfig, clip_keys
from vmae_fast.train.config import OptimSettings
from vmae_fast.train.graph import Capture
from vmae_fast.train.optimizer import make_optimizer
from vmae_fast.train.step import TrainStep

LR = 1e-4
# A forward pass multiplies and adds once for each MAC, a backward pass twice.
FLOP_PER_MAC = 6
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
        peers: whether Hugging Face's class is timed too.
        settings: of the model where they are not the size's.
    """

    name: str
    size: str
    clips: int
    launches: tuple[str, ...] = ("graph", "launched")
    peers: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> VideoMAEConfig:
        """The model's settings."""
        return VideoMAEConfig.of(self.size, **self.settings)


_V2 = {"decoder_mask_ratio": 0.5}
# Larger models are not compiled here: inductor would take minutes for their 36 to 52 blocks.
CASES = (
    StepCase("step base v1", "base", 64, LAUNCHES, peers=True),
    StepCase("step base v2", "base", 64, LAUNCHES, settings=_V2),
    StepCase("step base v1 of 8 clips", "base", 8, LAUNCHES),
    StepCase("step large v1", "large", 64),
    StepCase("step huge v1", "huge", 32),
    StepCase("step giant v1", "giant", 16),
    StepCase("step giant v2", "giant", 16, settings=_V2),
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


def macs_per_clip(config: VideoMAEConfig) -> int:
    """Multiply-accumulates of a forward pass over a clip, as the papers count them.

    Matrix products alone, those of attention included; all tubelets embedded, and all decoded
    tokens taken to the end, so that a step that leaves some of it out gets the credit.

    Sources: VideoMAE V2 (arXiv 2303.16727), tables of pretraining costs.
    """
    tokens, masking = config.num_tokens, config.masking
    seen, decoded = masking.num_visible, masking.num_decoded

    def blocks(depth: int, count: int, width: int, hidden: int) -> int:
        linears = count * (4 * width * width + 2 * width * hidden)
        return depth * (linears + 2 * count * count * width)

    narrow = config.decoder_width
    return (
        tokens * config.tubelet_values * config.width
        + blocks(config.depth, seen, config.width, config.encoder_hidden)
        + seen * config.width * narrow
        + blocks(config.decoder_depth, seen + decoded, narrow, config.decoder_hidden)
        + decoded * narrow * config.tubelet_values
    )
