"""What one GPU holds of a training step, by part, and how many clips fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from vmae_fast.models import VideoMAEConfig

from .gpus import Gpu
from .settings import Settings
from .trace import StepTrace
from .units import units_of

# What the driver's context and the libraries' kernels and workspaces hold beside torch's tensors,
# and what is lost between them. Guesses.
CONTEXT_BYTES = 1 << 30
LOST_SHARE = 0.02
# Traces to find the largest batch.
MOST_TRIES = 8


def state_parts(
    config: VideoMAEConfig,
    *,
    gpus: int = 1,
    shards: int = 1,
    accumulate: int = 1,
    averaged: bool = False,
    gathered_itemsize: int = 4,
) -> dict[str, int]:
    """Bytes that one GPU holds whatever its batch, by part; gradients are all of them.

    Args:
        config: of the model.
        gpus: how many share the work.
        shards: parts that the model is in, 1 or as many as GPUs.
        accumulate: batches of a step. Until the last of them each GPU holds all gradients.
        averaged: a moving average of the weights is kept.
        gathered_itemsize: bytes of a weight as the parts are gathered.
    """
    units = units_of(config)
    mine = 4 * units.shard(shards)
    parts = {
        "weights": mine,
        "gradients": mine + (4 * units.values if shards > 1 and accumulate > 1 else 0),
        "AdamW": 2 * mine,
        "averaged weights": mine if averaged else 0,
    }
    if shards > 1:
        block = units.largest_block(shards)
        # The block that is computed with, and the next one; what is outside of blocks stays.
        root = shards * units.root.shard(shards)
        parts["gathered weights"] = gathered_itemsize * (root + 2 * block)
        parts["exchange of gradients"] = 4 * block
    else:
        parts["exchange of gradients"] = mine if gpus > 1 else 0
    return parts


def memory_parts(settings: Settings, trace: StepTrace) -> dict[str, int]:
    """Bytes that one GPU holds when it holds most, by part.

    Gradients are those there at that moment: most of them are made when activations are gone.
    Where several batches make a step, all of the earlier ones' are there.
    """
    workspace = trace.peak_bytes - trace.peak_gradient_bytes - trace.peak_kept_bytes
    config = settings.config
    clip = config.in_channels * config.frames * math.prod(config.size)
    parts = state_parts(
        config,
        gpus=settings.gpus,
        shards=settings.shards,
        accumulate=settings.accumulate,
        averaged=settings.averaged,
        gathered_itemsize=settings.gathered_itemsize,
    )
    if settings.accumulate == 1:
        # In fp32, whatever the dtype of the weights that were followed.
        share = trace.peak_gradient_bytes / trace.weight_bytes if trace.weight_bytes else 0
        parts["gradients"] = round(share * parts["weights"])
    parts |= {
        "activations": trace.peak_kept_bytes,
        "workspace": workspace,
        "clips": settings.batch * clip,
    }
    tensors = sum(parts.values())
    parts["context, libraries, gaps"] = CONTEXT_BYTES + round(LOST_SHARE * tensors)
    return {name: size for name, size in parts.items() if size}


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
