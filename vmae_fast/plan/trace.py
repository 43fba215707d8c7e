"""What a training step does and holds, seen by running it on tensors without data.

What a step computes hangs on shapes and dtypes alone, so it can be followed without a GPU, and
without memory for the weights: each call with its operations and bytes, and what is alive then.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vmae_fast.masking import Mask
from vmae_fast.models import VideoMAE, VideoMAEConfig
from vmae_fast.nn.block import Checkpointing

from .inside import inside_of, is_attention

Kind = Literal["product", "attention", "pass"]
Loss = Callable[[VideoMAE, Tensor, Mask], Tensor]


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        name: the op's, as ``aten::mm``.
        phase: "forward" or "backward".
        kind: "product" (matrix products, and what an op of ours does beside one), "attention", or
            "pass" (over memory).
        flops: floating-point operations, a multiply-add counting 2.
        moved_bytes: of the tensors it reads and writes, each once; of a "product" those of the
            passes beside the product alone.
    """

    name: str
    phase: str
    kind: Kind
    flops: int
    moved_bytes: int


@dataclass(frozen=True)
class StepTrace:
    """A forward and backward pass over a batch.

    Attributes:
        batch: clips.
        num_parameters: trained values.
        weight_bytes: of the parameters; gradients take as many.
        kept_bytes: what the forward pass keeps for the backward pass: each memory once and
            whole, copies of weights in autocast's dtype included; not weights, nor the video.
        peak_bytes: most at once of all that the step makes, gradients included.
        peak_gradient_bytes: of gradients, at that moment.
        peak_kept_bytes: of what the forward pass kept, at that moment.
        calls: in order.
    """

    batch: int
    num_parameters: int
    weight_bytes: int
    kept_bytes: int
    peak_bytes: int
    peak_gradient_bytes: int
    peak_kept_bytes: int
    calls: tuple[Call, ...]

    def flops(self, *kinds: Kind) -> int:
        """Operations of all calls of these kinds; of all kinds where none is named."""
        return sum(call.flops for call in self.calls if not kinds or call.kind in kinds)


def published_loss(model: VideoMAE, video: Tensor, mask: Mask) -> Tensor:
    """The model's own loss."""
    return model(video, mask).loss


def trace_step(
    config: VideoMAEConfig,
    batch: int,
    *,
    autocast_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    checkpointing: Checkpointing = "none",
    backward: bool = True,
    loss: Loss = published_loss,
    video_dtype: torch.dtype = torch.uint8,
    weight_dtype: torch.dtype = torch.float32,
) -> StepTrace:
    """Follow a step of the model on tensors without data.

    Args:
        config: of a model with a decoder.
        batch: clips.
        autocast_dtype: of the forward pass, None without autocast.
        residual_dtype, checkpointing: as in :class:`VideoMAE`.
        backward: follow the backward pass as well.
        loss: another way to compute it with the same parameters.
        video_dtype: uint8, or floating point.
        weight_dtype: of the parameters, and so of their gradients.

    Returns:
        :class:`StepTrace`; without a backward pass the peaks are those of the forward pass.
        Workspace that a library takes within one call is not seen.
    """
    with torch.device("meta"):
        model = VideoMAE(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_memory(model, weight_dtype)
        model.residual_dtype, model.checkpointing = residual_dtype, checkpointing
        parameters = list(model.parameters())
        shape = (batch, config.in_channels, config.frames, *config.size)
        video = torch.empty(shape, dtype=video_dtype)
        autocast: AbstractContextManager[Any] = nullcontext()
        if autocast_dtype is not None:
            autocast = torch.autocast("cpu", autocast_dtype)
        with _Recorder() as seen:
            with autocast:
                value = loss(model, video, model.masking(torch.arange(batch)))
            kept = seen.alive()
            if backward:
                seen.phase = "backward"
                value.backward()
            gradients = {seen.number(p.grad) for p in parameters if p.grad is not None}
        del value
    peak = seen.peak_alive
    return StepTrace(
        batch=batch,
        num_parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        kept_bytes=sum(kept.values()),
        peak_bytes=seen.peak_bytes,
        peak_gradient_bytes=sum(size for one, size in peak.items() if one in gradients),
        peak_kept_bytes=sum(size for one, size in peak.items() if one in kept),
        calls=tuple(seen.calls),
    )


def _give_memory(model: nn.Module, dtype: torch.dtype) -> None:
    """Put tensors without data, but with a device and memory of their own, into a meta model."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


class _Recorder(TorchDispatchMode):
    """Notes every call, and the memory of tensors made while the context lasts.

    Each memory is known by a number: its address is another's as soon as it is freed.

    Attributes:
        phase: noted with each call.
        calls: so far.
        peak_bytes: most at once.
        peak_alive: what was alive then, by number, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.calls: list[Call] = []
        self.peak_bytes = 0
        self.peak_alive: dict[int, int] = {}
        self._alive: dict[int, int] = {}
        self._alive_bytes = self._count = 0
        # By address. Holding the references, for nothing tells of an end once they are gone.
        self._watched: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def alive(self) -> dict[int, int]:
        """What is alive, by number, in bytes."""
        return dict(self._alive)

    def number(self, tensor: Tensor) -> int:
        """The number of the memory of a tensor made meanwhile and still alive."""
        return self._watched[_memory(tensor)][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        held = {_memory(one) for one in given}
        out = func(*args, **kwargs)
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        new = [one for one in made if _memory(one) not in held]
        inside = inside_of(func, args)
        for one in new:
            self._watch(one.untyped_storage())
        self._note_peak(inside.workspace_bytes)
        writes = func._schema.is_mutable
        if new or writes:
            formula = flop_registry.get(func._overloadpacket)
            flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
            kind: Kind = "product" if flops else "pass"
            moved = inside.moved_bytes
            if is_attention(func):
                kind = "attention"
            if moved is None and kind == "product":
                moved = 0
            elif moved is None:
                moved = sum(map(_bytes, given)) + sum(map(_bytes, new or made))
            self.calls.append(Call(str(func._schema.name), self.phase, kind, flops, moved))
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._watched:
            return
        self._count += 1
        self._alive[self._count] = size
        self._alive_bytes += size
        gone = functools.partial(self._gone, address)
        self._watched[address] = (self._count, weakref.ref(storage, gone))

    def _gone(self, address: int, _: Any) -> None:
        number, _ = self._watched.pop(address)
        self._alive_bytes -= self._alive.pop(number)

    def _note_peak(self, workspace_bytes: int) -> None:
        if self._alive_bytes + workspace_bytes > self.peak_bytes:
            self.peak_bytes = self._alive_bytes + workspace_bytes
            self.peak_alive = dict(self._alive)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
