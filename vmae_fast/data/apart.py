"""Work on numbered things in processes of their own, where a crash costs one of them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final, TypeVar

# The reason for a file that took its process down.
CRASHED: Final = "its decoder crashed"

R = TypeVar("R")


def run_apart(
    tasks: Iterable[list[int]],
    work: Callable[[list[int]], list[R]],
    *,
    workers: int,
    start: Callable[..., None],
    arguments: tuple[Any, ...],
    crashed: Callable[[int], R],
    note: Callable[[list[int], list[R]], None],
) -> None:
    """Do all tasks in several processes, each a list of numbers.

    When a process dies, those that were under way are done again, each in a process of its own,
    and what takes that down too is given up.

    Args:
        tasks: they, taken in order.
        work: a module's function: results of a task's numbers, in a process.
        workers: processes, at least 1.
        start: a module's function, called first in each process.
        arguments: of ``start``.
        crashed: result of a number that took its process down.
        note: called here with each task and its results as they come.

    Raises:
        Exception: what ``work`` or ``note`` raises; the processes are gone by then.
    """
    left = deque(tasks)
    begin = (start, arguments)
    while left:
        for number in _pass(left, work, workers, begin, note):
            # Which of those under way it was shows in a process of its own.
            if _pass(deque([[number]]), work, 1, begin, note):
                note([number], [crashed(number)])


def _pass(
    left: deque[list[int]],
    work: Callable[[list[int]], list[R]],
    workers: int,
    begin: tuple[Callable[..., None], tuple[Any, ...]],
    note: Callable[[list[int], list[R]], None],
) -> list[int]:
    """Take tasks off ``left`` until none is left or a process died; what was under way then."""
    lost: list[int] = []
    under_way: dict[Future[list[R]], list[int]] = {}
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, _context(), _begin, begin) as pool:
        try:
            while (left or under_way) and not lost:
                while left and len(under_way) < 2 * workers:
                    under_way[pool.submit(work, left[0])] = left[0]
                    left.popleft()
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    task = under_way.pop(future)
                    try:
                        results = future.result()
                    except BrokenProcessPool:
                        lost += task
                    else:
                        note(task, results)
        except BaseException:
            # The pool would wait for what is under way, which may take an hour.
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise
    return lost + [number for task in under_way.values() for number in task]


def _context() -> multiprocessing.context.BaseContext:
    # Neither a fork, which threads of this process do not survive, nor an import for each.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vmae_fast.data"])
    _start_forkserver()
    return context


def _start_forkserver() -> None:
    """Start it deaf to Ctrl-C, which would stop it with a traceback while it imports."""
    if threading.current_thread() is not threading.main_thread():
        return  # where no signal can be set
    from multiprocessing import forkserver

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def _begin(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """In each process: leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    start(*arguments)


def _end_with(sentinel: int) -> None:
    # A killed parent tells nobody: its processes would wait for work for ever.
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
