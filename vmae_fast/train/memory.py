"""What a training step takes of memory, worked out without running it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vmae_fast.models import VideoMAE


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
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    parts = {
        "weights": weights,
        "gradients": weights,
        "AdamW": 2 * weights,
        **({"averaged weights": weights} if averaged else {}),
        f"kept for the backward pass of {micro_batch} clips": activation_bytes(
            model, micro_batch, autocast_dtype
        ),
    }
    total = sum(parts.values())
    listing = ", ".join(f"{_mib(size)} {name}" for name, size in parts.items())
    return f"memory: {_mib(total)} = {listing}"


def activation_bytes(model: VideoMAE, batch: int, autocast_dtype: torch.dtype | None) -> int:
    """Bytes that the forward pass of a training step keeps for the backward pass.

    What is kept hangs on shapes and dtypes alone, so the model's double runs on tensors without
    data. Counted are tensors made on the way, each memory once: activations, and the copies that
    autocast makes of the weights; not the weights themselves nor the video.

    Args:
        model: residual_dtype and checkpointing are taken from it.
        batch: clips.
        autocast_dtype: None without autocast.
    """
    with torch.device("meta"):
        double = VideoMAE(model.config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        double = double.to_empty(device="cpu")
        double.residual_dtype, double.checkpointing = model.residual_dtype, model.checkpointing
        config = double.config
        video = torch.empty(
            batch, config.in_channels, config.frames, *config.size, dtype=torch.uint8
        )
        autocast: AbstractContextManager[Any] = nullcontext()
        if autocast_dtype is not None:
            autocast = torch.autocast("cpu", autocast_dtype)
        with _MadeMemory() as made, autocast:
            loss = double(video, double.masking(torch.arange(batch))).loss
        size = made.alive_bytes()
        del loss
    return size


class _MadeMemory(TorchDispatchMode):
    """Notes the memory of every tensor that is made while the context lasts."""

    def __enter__(self) -> _MadeMemory:
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_memory(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and _memory(one) not in given:
                storage = one.untyped_storage()
                self._made[_memory(one)] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive_bytes(self) -> int:
        """Of those that something still holds."""
        return sum(size for memory, size in self._made.values() if not memory.expired())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
