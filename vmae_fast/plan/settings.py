"""How a model is trained, as far as memory and time hang on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from vmae_fast.models import VideoMAEConfig
from vmae_fast.nn.block import Checkpointing

from .trace import StepTrace, trace_step

Parallel = Literal["ddp", "fsdp"]


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
        parallel: "ddp" keeps all of the model on each GPU, "fsdp" a part.
    """

    config: VideoMAEConfig
    batch: int
    gpus: int = 1
    accumulate: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    residual: Literal["fp32", "bf16"] = "fp32"
    checkpointing: Checkpointing = "none"
    averaged: bool = False
    parallel: Parallel = "ddp"

    def __post_init__(self) -> None:
        for name in ("batch", "gpus", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.config.decoder_depth == 0:
            raise ValueError("the model has no decoder (decoder_depth=0): it cannot be pretrained")
        if self.residual == "bf16" and self.precision != "bf16":
            raise ValueError("residual bf16 goes with precision bf16")

    @property
    def shards(self) -> int:
        """Parts that weights, gradients and AdamW's state are in; 1 where each GPU has all."""
        return self.gpus if self.parallel == "fsdp" else 1

    @property
    def gathered_itemsize(self) -> int:
        """Bytes of a weight as the parts are gathered: in autocast's dtype, where it is on."""
        return 2 if self.precision == "bf16" else 4

    def trace(self) -> StepTrace:
        """The step of one batch, followed without data; once for all who ask."""
        return _traced(
            self.config, self.batch, self.precision, self.residual, self.checkpointing,
            self.shards > 1,
        )  # fmt: skip

    @property
    def clips_per_step(self) -> int:
        """Clips of an optimiser step over all GPUs."""
        return self.batch * self.gpus * self.accumulate


@lru_cache(maxsize=64)
def _traced(
    config: VideoMAEConfig,
    batch: int,
    precision: str,
    residual: str,
    checkpointing: Checkpointing,
    sharded: bool,
) -> StepTrace:
    low = torch.bfloat16
    autocast = low if precision == "bf16" else None
    return trace_step(
        config,
        batch,
        autocast_dtype=autocast,
        residual_dtype=low if residual == "bf16" else None,
        checkpointing=checkpointing,
        # What was gathered in autocast's dtype is not copied once more.
        weight_dtype=(sharded and autocast) or torch.float32,
    )
