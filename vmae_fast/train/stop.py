"""Stopping a run from outside without losing it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# Schedulers announce the end of a job by SIGTERM, or by a signal that is asked for: SIGUSR1, as
# a rule, which Windows has not.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


class StopRequest:
    """Context in which Ctrl-C, SIGTERM and SIGUSR1 set a flag, on which the loop saves and stops.

    A second Ctrl-C interrupts at once.

    Attributes:
        signal: number of the signal that came, 0 if none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Handlers can only be set in the main thread; elsewhere the run cannot be signalled.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
