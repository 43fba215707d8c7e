"""What a training step takes of memory, worked out without running it."""

from __future__ import annotations

import torch

from vmae_fast.models import VideoMAE
from vmae_fast.plan.trace import trace_step


def memory_report(
    model: VideoMAE, micro_batch: int, autocast_dtype: torch.dtype | None, averaged: bool
) -> str:
    """One line for the start of a log: weights, gradients, AdamW's state, activations.

    Args:
        model: what is trained.
        micro_batch: clips at a time.
        autocast_dtype: of the forward pass, None without autocast.
        averaged: a moving average of the weights is kept.
    """
    trace = trace_step(
        model.config,
        micro_batch,
        autocast_dtype=autocast_dtype,
        residual_dtype=model.residual_dtype,
        checkpointing=model.checkpointing,
        backward=False,
    )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    parts = {
        "weights": weights,
        "gradients": weights,
        "AdamW": 2 * weights,
        **({"averaged weights": weights} if averaged else {}),
        f"kept for the backward pass of {micro_batch} clips": trace.kept_bytes,
    }
    total = sum(parts.values())
    listing = ", ".join(f"{_mib(size)} {name}" for name, size in parts.items())
    return f"memory: {_mib(total)} = {listing}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
