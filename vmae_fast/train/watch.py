"""Knowing where every process of a run is, so that one that hangs can be named."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from .distributed import Ranks

# Of the time that is waited for a process that hangs: after the first part the others look where
# each is, after the second they say so, before the process group gives up.
_LOOK, _SAY = 0.4, 0.8
# How often a process says where it is: this part of that time, and at most so many seconds.
_EVERY, _MOST_S = 0.05, 5.0
# Processes that a report lists one by one.
_LISTED = 8


class Watch:
    """Context in which the processes of a run tell each other where they are.

    Each has a thread that writes its step, and what it does there, to the store by which the
    processes found each other. One that gets no further reads what the others wrote, and one of
    them reports it. Alone, a process does nothing of this.

    Args:
        ranks: this process.
        timeout_s: after which the process group gives up on one that hangs.
        say: prints a report.
    """

    def __init__(self, ranks: Ranks, timeout_s: float, say: Callable[[str], None]) -> None:
        self.ranks, self.timeout_s, self.say = ranks, timeout_s, say
        self._interval = min(timeout_s * _EVERY, _MOST_S)
        self._place: tuple[int, str] = (0, "starting")
        self._since = time.monotonic()
        self._beat = 0
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}
        self._end = threading.Event()
        self._main = threading.get_ident()
        self._thread: threading.Thread | None = None

    def at(self, step: int, doing: str) -> None:
        """Note what this process does from now on; ``step`` steps are done."""
        self._place, self._since = (step, doing), time.monotonic()

    def __enter__(self) -> Watch:
        if self.ranks.world_size > 1 and "MASTER_PORT" in os.environ:
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(self._interval + 1)

    def report(self) -> str:
        """Where each process was when it was last heard of; "" where that is not known."""
        now = time.monotonic()
        heard = sorted(
            (place["step"], rank, place, now - when) for rank, (place, when) in self._heard.items()
        )
        # Those that are behind, or silent, first.
        silent = [entry for entry in heard if entry[3] > 3 * self._interval]
        order = [*silent, *(entry for entry in heard if entry not in silent)]
        lines = [
            f"  process {rank}: {step} steps done, {place['doing']}"
            + (f", at {place['where']}" if place["where"] else "")
            + (f"; not heard of for {age:.0f} s" if age > 3 * self._interval else "")
            for step, rank, place, age in order[:_LISTED]
        ]
        more = len(order) - len(lines)
        return "\n".join([*lines, *([f"  and {more} more"] if more > 0 else [])])

    def _run(self) -> None:
        # The store may be gone before this process is.
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            # A connection of its own: the process group's is used by the main thread.
            store = dist.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                wait_for_workers=False,
            )  # fmt: skip
            prefix = f"vmae-fast/places/{self.ranks.start}"
            said = False
            while not self._end.wait(self._interval):
                stalled_s = time.monotonic() - self._since
                looking = stalled_s > _LOOK * self.timeout_s
                self._beat += 1
                step, doing = self._place
                place = {"step": step, "doing": doing, "beat": self._beat,
                         "where": self._where() if looking else ""}  # fmt: skip
                store.set(f"{prefix}/{self.ranks.rank}", json.dumps(place))
                if looking:
                    self._listen(store, prefix)
                said = said and looking
                if not said and stalled_s > _SAY * self.timeout_s:
                    said = True
                    self._tell(stalled_s)

    def _listen(self, store: Any, prefix: str) -> None:
        now = time.monotonic()
        for rank in range(self.ranks.world_size):
            key = f"{prefix}/{rank}"
            if not store.check([key]):
                continue
            place = json.loads(store.get(key))
            known = self._heard.get(rank)
            if known is None or known[0]["beat"] != place["beat"]:
                self._heard[rank] = (place, now)

    def _tell(self, stalled_s: float) -> None:
        fresh = [
            rank
            for rank, (_, when) in self._heard.items()
            if time.monotonic() - when < 3 * self._interval
        ]
        if min(fresh, default=self.ranks.rank) == self.ranks.rank:
            self.say(
                f"no step for {stalled_s:.0f} s; the run is given up after {self.timeout_s:.0f} s "
                f"(--timeout). Where its processes are:\n{self.report()}"
            )

    def _where(self) -> str:
        """The innermost place of the main thread that is this package's."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        package = Path(__file__).parents[1]
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(package):
                name = path.relative_to(package).as_posix()
                return f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return ""
