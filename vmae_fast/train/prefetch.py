"""Clips on their way to the GPU while it computes the steps before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Final, Protocol

import torch

from vmae_fast.data import ClipBatch

# Batches on the device beside those of the step: one is copied while the step before it runs.
_AHEAD: Final = 1


class _Copies(Protocol):
    """How a batch gets to the device."""

    def start(self, batch: ClipBatch) -> tuple[ClipBatch, object]:
        """The batch as it will be, and what its arrival is known by."""
        ...

    def finish(self, batch: ClipBatch, arrival: object) -> ClipBatch:
        """The batch, for what the device is given to do from now on."""
        ...


def prefetched(batches: Iterator[ClipBatch], device: torch.device) -> Iterator[ClipBatch]:
    """The same batches, their videos on the device where that is a CUDA one.

    Copies run beside the device's computing, on a stream of their own; nothing waits for them but
    the device, where it needs them. What decides masks stays on the host. A batch is taken from
    ``batches`` early only where it is there without waiting (``batches.ready()``): the call that
    finds nothing waits, as it would without this. An error comes at the batch that it is about.

    Args:
        batches: pinned ones, so that copies need not wait.
        device: of the model.
    """
    if device.type != "cuda":
        return batches
    return Prefetched(batches, SideStream(device))


class Prefetched(Iterator[ClipBatch]):
    """See :func:`prefetched`.

    Args:
        batches: they.
        copies: how they get to the device.
        ahead: batches that may be under way beside the one that is asked for.
    """

    def __init__(self, batches: Iterator[ClipBatch], copies: _Copies, ahead: int = _AHEAD) -> None:
        self._batches, self._copies, self._ahead = batches, copies, ahead
        self._under_way: deque[tuple[ClipBatch, object] | Exception] = deque()

    def __next__(self) -> ClipBatch:
        if not self._under_way:
            self._fetch()
        while len(self._under_way) <= self._ahead and self._ready():
            self._fetch()
        first = self._under_way.popleft()
        if isinstance(first, Exception):
            raise first
        return self._copies.finish(*first)

    def _ready(self) -> bool:
        # Nothing comes after an error, the end among them.
        if self._under_way and isinstance(self._under_way[-1], Exception):
            return False
        ready = getattr(self._batches, "ready", None)
        return ready is not None and ready()

    def _fetch(self) -> None:
        try:
            batch = next(self._batches)
        except Exception as error:
            self._under_way.append(error)
        else:
            self._under_way.append(self._copies.start(batch))


class SideStream:
    """Copies to a CUDA device on a stream of their own.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def start(self, batch: ClipBatch) -> tuple[ClipBatch, torch.cuda.Event]:
        """Start the copy; the batch must not be used before :meth:`finish`."""
        arrival = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            sent = replace(batch, video=batch.video_to(self._device))
            arrival.record(self._stream)
        return sent, arrival

    def finish(self, batch: ClipBatch, arrival: object) -> ClipBatch:
        """Let the stream that computes wait for the copy, and keep the memory until it is done."""
        computing = torch.cuda.current_stream(self._device)
        assert isinstance(arrival, torch.cuda.Event)
        computing.wait_event(arrival)
        batch.video.record_stream(computing)
        return batch
