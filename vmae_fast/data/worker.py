"""A process that decodes batches. Should a file take it down, its last note says which one."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import pickle
import signal
import tempfile
import time
import traceback
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Final

import torch
from torch import Tensor

from .dataset import BadFile, ClipBatch, ClipDataset, ClipItem, collate_clips
from .listing import DataError
from .order import ClipRequest

# Seconds between two looks at whether the process that asks for batches is still there.
_PARENT_CHECK_S: Final = 5.0
# Buffers for batches that a worker keeps: those that are on their way, and what the step holds.
# Others are used once.
_BUFFERS: Final = 6
# What the note says between two files.
_NOTHING: Final = -1

_NO_ROOM: Final = (
    "a batch could not be handed over from the process that decoded it ({error}): try fewer "
    "--workers, a smaller --micro-batch, or more memory, open files and file size for this "
    "process (ulimit -v, -n, -f)"
)


_NO_START: Final = (
    "a process that decodes could not be started ({error}): try fewer --workers, or allow more "
    "processes, open files and memory (ulimit -u, -n, -v)"
)


class WorkerDied(Exception):
    """A process is gone, or what came from it is cut short."""


@dataclass(frozen=True)
class Loaded:
    """A batch from a worker.

    Attributes:
        number: of the batch.
        batch: in memory that was shared with the worker; None where ``error`` came instead.
        wall_s: seconds that the worker took for its files.
        cpu_s: CPU seconds of it in them.
        error: what it raised.
    """

    number: int
    batch: ClipBatch | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    error: Exception | None = None


class Worker:
    """A process, the pipe to it, and the batches that were asked of it.

    Neither a lock nor a queue is shared with other processes, and no file is left behind: it can
    be killed at any moment, and the others go on.

    Args:
        dataset: the clips. What is added to its ``lost`` later goes along with the next batch.
        decode_timeout: seconds after which a process that is at one file ends itself; None: never.

    Attributes:
        jobs: batches that were asked for and did not come yet, by number.

    Raises:
        DataError: the system starts no more.
    """

    def __init__(self, dataset: ClipDataset, decode_timeout: float | None) -> None:
        context = get_context()
        self.jobs: dict[int, list[ClipRequest]] = {}
        # Buffers that nothing here refers to any more; other threads may drop the last reference.
        self._freed: deque[int] = deque()
        self._files, self._lost = dataset.files, dataset.lost
        self._told = len(self._lost)
        try:
            self._note: Any = context.RawValue(ctypes.c_int64, _NOTHING)
            self.connection, theirs = context.Pipe()
            self.process = context.Process(
                target=_work,
                args=(dataset, theirs, self._note, decode_timeout),
                name="vmae-fast loader",
                daemon=True,
            )
            self.process.start()
        except OSError as error:
            raise DataError(_NO_START.format(error=error)) from error
        # Else its end would not be seen here when it dies.
        theirs.close()

    def ask(self, number: int, requests: list[ClipRequest]) -> None:
        """Send for a batch."""
        self.jobs[number] = requests
        news = dict(islice(self._lost.items(), self._told, None))
        self._told += len(news)
        freed = [self._freed.popleft() for _ in range(len(self._freed))]
        # Where it died, that shows when its answer is waited for.
        with suppress(OSError):
            self.connection.send((number, requests, news, freed))

    def answer(self) -> Loaded:
        """What came from it; to be called once its pipe can be read, or it has ended.

        Raises:
            WorkerDied: there will be no more.
            DataError: this process may not open what was sent.
        """
        if not self.connection.poll():
            raise WorkerDied
        try:
            number, buffer, *rest = self.connection.recv()
            handle = None if buffer is None else recv_handle(self.connection)
        except (EOFError, ConnectionError) as error:
            raise WorkerDied from error
        except (OSError, RuntimeError) as error:
            # Out of descriptors, nothing is received in place of one.
            raise DataError(_NO_ROOM.format(error=error)) from error
        del self.jobs[number]
        if handle is None:
            raised, text = rest
            raised.__cause__ = RuntimeError(f"in a process that decodes:\n{text}")
            return Loaded(number, error=raised)
        shape, bad, wall_s, cpu_s = rest
        try:
            memory = mmap.mmap(handle, _size_of(shape))
        except OSError as error:
            raise DataError(_NO_ROOM.format(error=error)) from error
        finally:
            os.close(handle)
        weakref.finalize(memory, self._freed.append, buffer).atexit = False
        video, (clip, repeat, epoch) = _tensors(memory, shape)
        paths = [self._files[index].path for index in clip.tolist()]
        batch = ClipBatch(video.permute(0, 4, 1, 2, 3), clip, repeat, epoch, paths, bad)
        return Loaded(number, batch, wall_s, cpu_s)

    @property
    def ended(self) -> bool:
        """Whether :meth:`end` was called."""
        return self.connection.closed

    def end(self, patience_s: float = 0.0) -> tuple[int, str | None]:
        """End the process.

        Args:
            patience_s: seconds in which it may end by itself.

        Returns:
            Its exit code, and the path of the file that it was at.
        """
        self.connection.close()
        if patience_s:
            self.process.join(patience_s)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        self.process.close()
        at = self._note.value
        return code, None if at == _NOTHING else self._files[at].path


def _size_of(shape: Sequence[int]) -> int:
    """Bytes of a batch whose video is ``(B, T, H, W, C)``."""
    return _padded(math.prod(shape)) + 3 * 8 * shape[0]


def _padded(size: int) -> int:
    # Numbers lie at a multiple of their size.
    return -(-size // 8) * 8


def _tensors(memory: mmap.mmap, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A batch in memory: uint8 video of that ``shape``, and ``(3, B)`` int64 behind it."""
    count, clips = math.prod(shape), shape[0]
    video = torch.frombuffer(memory, dtype=torch.uint8, count=count)
    numbers = torch.frombuffer(memory, dtype=torch.int64, offset=_padded(count), count=3 * clips)
    return video.view(*shape), numbers.view(3, clips)


# ---- in the process -----------------------------------------------------------------------


def _work(
    dataset: ClipDataset, connection: Connection, note: Any, decode_timeout: float | None
) -> None:
    """Answer jobs until the process that sends them is gone."""
    torch.set_num_threads(1)
    # Forked workers inherit the trainer's handlers. Ctrl-C reaches the whole group: they go on
    # until the trainer has saved. SIGTERM must end them, and so must the alarm.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM, signal.SIGTERM})
    dataset.reading = _Watch(note, decode_timeout)
    parent, buffers = os.getppid(), _Buffers()
    try:
        while True:
            # Workers forked later hold the pipe's other end too: it need not close with the parent.
            while not connection.poll(_PARENT_CHECK_S):
                if os.getppid() != parent:
                    return
            number, requests, lost, freed = connection.recv()
            dataset.lost.update(lost)
            buffers.free(freed)
            _answer(dataset, connection, buffers, number, requests)
    except (EOFError, ConnectionError):
        return


class _Watch:
    """Notes which file is being read, and lets no file take longer than the limit."""

    def __init__(self, note: Any, limit_s: float | None) -> None:
        self._note, self._limit_s = note, limit_s

    def __call__(self, index: int | None) -> None:
        self._note.value = _NOTHING if index is None else index
        if self._limit_s is not None:
            # The kernel's clock, because a decoder that hangs may never return to Python. Without
            # a handler the alarm ends the process.
            signal.setitimer(signal.ITIMER_REAL, 0.0 if index is None else self._limit_s)


def _answer(
    dataset: ClipDataset,
    connection: Connection,
    buffers: _Buffers,
    number: int,
    requests: list[ClipRequest],
) -> None:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    try:
        items = [dataset[request] for request in requests]
        shape = (sum(len(item.crops) for item in items), *items[0].crops[0].shape)
        try:
            buffer = buffers.take(_size_of(shape))
        except OSError as error:
            raise DataError(_NO_ROOM.format(error=error)) from error
        bad = _fill(buffer.memory, shape, items)
    except Exception as error:
        connection.send((number, None, _sendable(error), traceback.format_exc()))
        return
    took = time.perf_counter() - wall_s, time.process_time() - cpu_s
    connection.send((number, buffer.number, shape, bad, *took))
    send_handle(connection, buffer.handle, None)
    buffers.sent(buffer)


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same where it does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _fill(memory: mmap.mmap, shape: tuple[int, ...], items: list[ClipItem]) -> list[BadFile]:
    """Join clips in memory that another process can map; returns the files that were bad."""
    video, numbers = _tensors(memory, shape)
    batch = collate_clips(items, out=video)
    for row, values in zip(numbers, (batch.clip, batch.repeat, batch.epoch), strict=True):
        row.copy_(values)
    return batch.bad


@dataclass(frozen=True)
class _Buffer:
    """A file without a name, in memory where the system has such, and mapped here."""

    number: int
    handle: int
    size: int
    memory: mmap.mmap

    @classmethod
    def of(cls, number: int, size: int) -> _Buffer:
        if hasattr(os, "memfd_create"):
            # Not in /dev/shm, which is small in many containers.
            handle = os.memfd_create("vmae-fast-batch")
        else:
            with tempfile.TemporaryFile() as file:
                handle = os.dup(file.fileno())
        try:
            os.truncate(handle, size)
            return cls(number, handle, size, mmap.mmap(handle, size))
        except BaseException:
            os.close(handle)
            raise


class _Buffers:
    """Memory for batches, used again once the other process has dropped what was in it.

    New memory costs more than what is written to it: the system makes every page as it is touched.
    """

    def __init__(self) -> None:
        self._count = 0
        self._kept: dict[int, _Buffer] = {}
        self._free: list[int] = []

    def take(self, size: int) -> _Buffer:
        """One of at least ``size`` bytes."""
        for number in self._free:
            if self._kept[number].size >= size:
                self._free.remove(number)
                return self._kept[number]
        # Too small ones would keep others from being kept.
        for number in self._free:
            os.close(self._kept.pop(number).handle)
        self._free.clear()
        self._count += 1
        return _Buffer.of(self._count, size)

    def sent(self, buffer: _Buffer) -> None:
        """Keep it, or leave it to the other process."""
        if len(self._kept) < _BUFFERS or buffer.number in self._kept:
            self._kept[buffer.number] = buffer
        else:
            os.close(buffer.handle)

    def free(self, numbers: list[int]) -> None:
        """The other process is done with these."""
        self._free += [number for number in numbers if number in self._kept]
