"""Reading a step's figures back without waiting for the step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

# Steps launched before the figures of a step are waited for: enough to keep a GPU busy, few
# enough that a bad step is known soon. The number is a choice, not a measurement.
LAG = 4

Record = TypeVar("Record")


class _Slot(NamedTuple, Generic[Record]):
    record: Record
    values: Tensor
    copied: torch.cuda.Event | None


class Readback(Generic[Record]):
    """Figures of the last steps on their way to the host, oldest first.

    Args:
        lag: steps that stay under way, 1 or more.
    """

    def __init__(self, lag: int = LAG) -> None:
        self.lag = lag
        self._slots: deque[_Slot[Record]] = deque()

    def put(self, record: Record, values: Tensor) -> None:
        """Start the copy of a step's ``values``, ``(n,)``; they may be overwritten afterwards."""
        if values.is_cuda:
            host = torch.empty_like(values, device="cpu", pin_memory=True)
            host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(values.device))
            self._slots.append(_Slot(record, host, copied))
        else:
            self._slots.append(_Slot(record, values.clone(), None))

    def take(self, *, everything: bool = False) -> Iterator[tuple[Record, list[float]]]:
        """Steps that are ``lag`` or more back, or all; waits until their figures are there."""
        while len(self._slots) > (0 if everything else self.lag):
            slot = self._slots.popleft()
            if slot.copied is not None:
                slot.copied.synchronize()
            yield slot.record, slot.values.tolist()

    def clear(self) -> None:
        """Forget all that is under way."""
        self._slots.clear()
