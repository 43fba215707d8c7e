"""What a training step takes of memory, worked out without running it."""

from __future__ import annotations

import torch

from vmae_fast.models import VideoMAE
from vmae_fast.plan.memory import state_parts
from vmae_fast.plan.trace import trace_step


def memory_report(
    model: VideoMAE,
    micro_batch: int,
    autocast_dtype: torch.dtype | None,
    averaged: bool,
    *,
    accumulate: int = 1,
    processes: int = 1,
    sharded: bool = False,
) -> str:
    """One line for the start of a log: weights, gradients, AdamW's state, activations.

    Args:
        model: what is trained.
        micro_batch: clips at a time.
        autocast_dtype: of the forward pass, None without autocast.
        averaged: a moving average of the weights is kept.
        accumulate: micro-batches of a step.
        processes: that share the work.
        sharded: each of them keeps a part of the model.
    """
    shards = processes if sharded else 1
    low = None if shards == 1 else autocast_dtype
    trace = trace_step(
        model.config,
        micro_batch,
        autocast_dtype=autocast_dtype,
        residual_dtype=model.residual_dtype,
        checkpointing=model.checkpointing,
        backward=False,
        # Gathered in that dtype, weights are not copied once more.
        weight_dtype=low or torch.float32,
    )
    parts = state_parts(
        model.config,
        gpus=processes,
        shards=shards,
        accumulate=accumulate,
        averaged=averaged,
        gathered_itemsize=(low or torch.float32).itemsize,
    )
    parts[f"kept for the backward pass of {micro_batch} clips"] = trace.kept_bytes
    listing = ", ".join(f"{_mib(size)} {name}" for name, size in parts.items() if size)
    part = f"a part of {shards} of the model: " if shards > 1 else ""
    return f"memory: {_mib(sum(parts.values()))} = {part}{listing}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
