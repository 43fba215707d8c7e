"""Batches by processes that decode ahead, any of which may be lost at any file."""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Final

from .dataset import ClipBatch, ClipDataset, collate_clips
from .listing import DataError
from .order import ClipRequest
from .worker import Worker, WorkerDied

# Batches that each worker holds ready: enough to ride out one slow file, few enough that 16
# workers do not fill the memory.
PREFETCH: Final = 3

# How reasons begin for which a file is not opened again.
_LOST: Final = ("its decoder crashed", "its decoder hung")

# Deaths of one worker in a row, none at a file that had killed it before and no batch in between.
_MOST_DEATHS: Final = 4

# Seconds from the end of a worker's pipe to its own.
_DYING_S: Final = 2.0


class WorkersEnded(DataError):
    """Processes that decode end again and again, and no file is to blame."""


def lost_files(reasons: Mapping[str, str]) -> dict[str, str]:
    """Those of some bad files, path to reason, that took a process down or held it up."""
    return {path: reason for path, reason in reasons.items() if reason.startswith(_LOST)}


@dataclass
class LoadingWork:
    """What loading took so far, over all workers.

    Attributes:
        clips: decoded and cropped.
        wall_s: seconds in which a worker was at them.
        cpu_s: CPU seconds of these.
    """

    clips: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def add(self, clips: int, wall_s: float, cpu_s: float) -> None:
        """Count a batch."""
        self.clips += clips
        self.wall_s += wall_s
        self.cpu_s += cpu_s


@dataclass
class ClipLoader:
    """One ``ClipBatch`` for each list of requests, in their order.

    See :func:`make_loader`. Workers start with ``iter()``, and end with the iterator.

    Attributes:
        work: what loading took so far.
    """

    dataset: ClipDataset
    requests: Iterable[list[ClipRequest]]
    workers: int
    pin_memory: bool = False
    decode_timeout: float | None = None
    work: LoadingWork = field(default_factory=LoadingWork)

    def __iter__(self) -> Iterator[ClipBatch]:
        return _Loading(self) if self.workers else self._here()

    def _here(self) -> Iterator[ClipBatch]:
        for requests in self.requests:
            wall_s, cpu_s = time.perf_counter(), time.thread_time()
            batch = collate_clips([self.dataset[request] for request in requests])
            self.work.add(
                len(batch.paths), time.perf_counter() - wall_s, time.thread_time() - cpu_s
            )
            yield batch.pin_memory() if self.pin_memory else batch


def make_loader(
    dataset: ClipDataset,
    requests: Iterable[list[ClipRequest]],
    *,
    workers: int,
    pin_memory: bool,
    decode_timeout: float | None = None,
) -> ClipLoader:
    """A loader that yields one ``ClipBatch`` for each list of requests, in their order.

    A worker that dies is replaced, and what it had to do is done again: batches are those of a
    run in which it lived. A file at which a worker dies twice, or once by ``decode_timeout``, is
    a bad file from then on: it gets into ``dataset.lost`` and is not opened again.

    Args:
        dataset: the clips.
        requests: what each batch holds, as :class:`ClipSampler` gives it.
        workers: processes that decode; 0 decodes in this one, which a decoder that crashes takes
            along. Each runs torch on one thread.
        pin_memory: page-lock the batches, for copies to a GPU that overlap its work.
        decode_timeout: seconds that a file may take; None: any. Not with 0 workers.

    Raises:
        ValueError: ``workers`` is negative, or ``decode_timeout`` not above 0.
        DataError: (from its iterator) what the data set raises.
        WorkersEnded: (from its iterator) workers die again and again without a file to blame.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if decode_timeout is not None and not decode_timeout > 0:
        raise ValueError(f"decode_timeout must be above 0 seconds, got {decode_timeout}")
    return ClipLoader(dataset, requests, workers, pin_memory, decode_timeout)


@dataclass
class _Slot:
    """A worker, and how those before it in this place ended since their last batch."""

    worker: Worker
    deaths: int = 0
    suspects: set[str] = field(default_factory=set)


class _Loading(Iterator[ClipBatch]):
    """The batches of a loader, by its workers."""

    def __init__(self, loader: ClipLoader) -> None:
        self._loader, self._requests = loader, enumerate(loader.requests)
        self._sent = self._given = 0
        self._came: dict[int, Future[ClipBatch] | ClipBatch | Exception] = {}
        self._slots: list[_Slot] = []
        self._pinning = ThreadPoolExecutor(1) if loader.pin_memory else None
        self.close = weakref.finalize(self, _end, self._slots, self._pinning, os.getpid())
        for _ in range(loader.workers):
            self._slots.append(_Slot(self._start()))
        self._send()

    def __next__(self) -> ClipBatch:
        try:
            return self._next()
        except BaseException:
            # Its end too: there is nothing left to decode.
            self.close()
            raise

    def ready(self) -> bool:
        """Whether the next call gives a batch, or its error, without waiting."""
        if self._over():
            return True
        while self._receive(wait_for_one=False):
            pass
        came = self._came.get(self._given)
        return came.done() if isinstance(came, Future) else came is not None

    def _over(self) -> bool:
        return self._given == self._sent or not self.close.alive

    def _next(self) -> ClipBatch:
        if self._over():
            raise StopIteration
        # What came in the meantime is taken in as well, so that it can be pinned by its turn.
        while self._receive(wait_for_one=self._given not in self._came):
            pass
        came = self._came.pop(self._given)
        self._given += 1
        if isinstance(came, Exception):
            raise came
        self._send()
        return came.result() if isinstance(came, Future) else came

    def _start(self) -> Worker:
        return Worker(self._loader.dataset, self._loader.decode_timeout)

    def _send(self) -> None:
        """Ask for as many batches as may be on their way."""
        while self._sent - self._given < PREFETCH * len(self._slots):
            number, requests = next(self._requests, (0, None))
            if requests is None:
                return
            idlest = min(self._slots, key=lambda slot: len(slot.worker.jobs))
            idlest.worker.ask(number, requests)
            self._sent += 1

    def _receive(self, *, wait_for_one: bool) -> bool:
        """Take in what is there; returns whether there was something."""
        by_source = {
            source: slot
            for slot in self._slots
            for source in (slot.worker.connection, slot.worker.process.sentinel)
        }
        ready = wait(by_source, None if wait_for_one else 0)
        # Both the pipe and the end of a worker may have come up.
        slots = {id(slot): slot for slot in (by_source[source] for source in ready)}  # type: ignore[index]
        for slot in slots.values():
            self._take(slot)
        return bool(slots)

    def _take(self, slot: _Slot) -> None:
        try:
            loaded = slot.worker.answer()
        except WorkerDied:
            self._bury(slot)
            return
        except DataError as error:
            self._give_up(slot, error)
            return
        slot.deaths = 0
        slot.suspects.clear()
        if loaded.batch is None:
            assert loaded.error is not None
            self._came[loaded.number] = loaded.error
            return
        self._loader.work.add(len(loaded.batch.paths), loaded.wall_s, loaded.cpu_s)
        self._came[loaded.number] = (
            self._pinning.submit(loaded.batch.pin_memory) if self._pinning else loaded.batch
        )

    def _bury(self, slot: _Slot) -> None:
        """End what is left of a worker, and go on with another one or without."""
        code, path = slot.worker.end(_DYING_S)
        complaint = self._blame(slot, code, path)
        if complaint is not None:
            self._give_up(slot, WorkersEnded(complaint))
            return
        try:
            self._restart(slot)
        except DataError as error:
            self._give_up(slot, error)

    def _blame(self, slot: _Slot, code: int, path: str | None) -> str | None:
        """Draw conclusions from how a worker ended; returns what to say where it is the last."""
        hung = code == -signal.SIGALRM
        if path is not None and (hung or path in slot.suspects):
            self._loader.dataset.lost[path] = (
                f"its decoder hung for {self._loader.decode_timeout:g} s"
                if hung
                else f"its decoder crashed ({_cause(code)})"
            )
            slot.deaths = 0
            return None
        # Once may be chance, as when the system runs out of memory.
        slot.deaths += 1
        if path is not None:
            slot.suspects.add(path)
        return _complaint(slot.deaths, code, path) if slot.deaths >= _MOST_DEATHS else None

    def _restart(self, slot: _Slot) -> None:
        """Put another worker in the place of one that ended, to do what that had to do."""
        jobs = slot.worker.jobs
        slot.worker = self._start()
        for number, requests in jobs.items():
            slot.worker.ask(number, requests)

    def _give_up(self, slot: _Slot, error: DataError) -> None:
        """Do without a worker: the error comes when it is the turn of what it had to do."""
        self._came.update(dict.fromkeys(slot.worker.jobs, error))
        if not slot.worker.ended:
            slot.worker.end()
        self._slots.remove(slot)


def _end(slots: list[_Slot], pinning: ThreadPoolExecutor | None, owner: int) -> None:
    # A worker that was forked holds a copy of what its parent had: these are not its own to end.
    if os.getpid() != owner:
        return
    for slot in slots:
        if not slot.worker.ended:
            slot.worker.end()
    slots.clear()
    if pinning is not None:
        pinning.shutdown(wait=False, cancel_futures=True)


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _complaint(deaths: int, code: int, path: str | None) -> str:
    where = "with no file in hand" if path is None else f"the last time while it read {path}"
    return (
        f"a process that decodes ended {deaths} times in a row ({_cause(code)}), {where}, and no "
        "one file is to blame. If the system is out of memory (SIGKILL; dmesg says so), try fewer "
        "--workers; else look at its limits (ulimit -a) and at the space in /dev/shm, or find out "
        "more with --workers 0, which decodes in the process itself"
    )
