"""The parts in which a model's weights are gathered under FSDP: its blocks, and all the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from vmae_fast.models import VideoMAEConfig


@dataclass(frozen=True)
class Unit:
    """Weights that are gathered together.

    Attributes:
        shapes: of each, rows and values of a row.
    """

    shapes: tuple[tuple[int, int], ...]

    def shard(self, gpus: int) -> int:
        """Values that each of some GPUs keeps: whole rows, as many on each (the last filled up)."""
        return sum(math.ceil(rows / gpus) * row for rows, row in self.shapes)


@dataclass(frozen=True)
class Units:
    """All weights of a model.

    Attributes:
        root: outside of blocks.
        blocks: in the order in which they run.
    """

    root: Unit
    blocks: tuple[Unit, ...]

    @property
    def values(self) -> int:
        """Of all weights."""
        return self.shard(1)

    def shard(self, gpus: int) -> int:
        """Values that each of some GPUs keeps."""
        return sum(unit.shard(gpus) for unit in (self.root, *self.blocks))

    def largest_block(self, gpus: int) -> int:
        """Values of the largest block as it is gathered."""
        return gpus * max(block.shard(gpus) for block in self.blocks)


@lru_cache(maxsize=16)
def units_of(config: VideoMAEConfig) -> Units:
    """How a model with a decoder is taken apart."""
    from vmae_fast.models import VideoMAE

    with torch.device("meta"):
        model: Any = VideoMAE(config)
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    within = {id(parameter) for block in blocks for parameter in block.parameters()}
    return Units(
        _unit(p for p in model.parameters() if id(p) not in within),
        tuple(_unit(block.parameters()) for block in blocks),
    )


def _unit(parameters: Any) -> Unit:
    return Unit(tuple((p.shape[0], p.numel() // p.shape[0]) for p in parameters))
