"""Named ranges of ops, blocks and phases for profilers.

Off until :func:`ranges` or ``VMAE_FAST_NVTX=1`` in the environment turns them on. A range is then
one of torch.profiler's, and where there is a GPU one of NVTX, for Nsight Systems and Nsight
Compute. ``train/profile.py`` records them; ``benchmarks/PROFILING.md`` says how to read them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

# Ranges of a training step and of what stands between steps; others are of ops or blocks.
PHASES = (
    "step", "wait for clips", "copy to device", "masks", "forward", "backward", "update",
    "recorded step", "read figures", "validate", "save",
)  # fmt: skip
# An op's range is its name in torch.ops; a block's its name among the model's modules.
OP = "vmae_fast::"
# Ends the name of a block's range in the backward pass.
BACKWARD = " backward"

_NO_TASK = -1
_OFF: AbstractContextManager[Any] = nullcontext()
# How often ranges were turned on and not off again.
_depth = int(os.environ.get("VMAE_FAST_NVTX", "0") not in ("", "0"))


@contextmanager
def ranges() -> Iterator[None]:
    """Turn ranges on for the while, on all threads. Can be nested.

    Example:
        >>> import torch
        >>> from vmae_fast import profiling
        >>> with profiling.ranges(), torch.profiler.profile() as seen:
        ...     with profiling.span("forward"):
        ...         _ = torch.ones(3) + 1
        >>> "forward" in {event.key for event in seen.key_averages()}
        True
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def enabled() -> bool:
    """Whether ranges are on; never where torch.compile traces, which has no ranges."""
    # Asked first, so that what is compiled does not depend on the flag; costs nothing elsewhere.
    if torch.compiler.is_dynamo_compiling():
        return False
    return _depth > 0 and not torch.compiler.is_compiling()


def span(name: str) -> AbstractContextManager[Any]:
    """A range around what is run within; the same empty context each time while they are off."""
    return _Range(name) if enabled() else _OFF


def backward_begins(name: str, *values: Any) -> tuple[Any, ...]:
    """The values that come out of a block; when their gradients are there, its range begins.

    Args:
        name: the block's.
        *values: tensors, and anything else, which is passed on as it is. Tensors that need no
            gradient are too: nothing more is computed or kept than without ranges.
    """
    return _edge(name, True, values)


def backward_ends(name: str, *values: Any) -> tuple[Any, ...]:
    """The values that go into a block; when their gradients are there, its range ends.

    Where none of them needs one, it ends with the backward pass.
    """
    return _edge(name, False, values)


def _edge(name: str, begins: bool, values: tuple[Any, ...]) -> tuple[Any, ...]:
    def wanted(value: Any) -> bool:
        return isinstance(value, Tensor) and value.requires_grad

    if not (enabled() and torch.is_grad_enabled() and any(map(wanted, values))):
        return values
    passed = iter(_Edge.apply(name, begins, *filter(wanted, values)))
    return tuple(next(passed) if wanted(value) else value for value in values)


class _Edge(torch.autograd.Function):
    """Identity of tensors, in whose backward pass a range begins or ends. Keeps nothing.

    It runs once the gradients of all of them are there, and before anything that was done earlier
    in the forward pass: autograd takes what is ready and was done last.
    """

    @staticmethod
    def forward(name: str, begins: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.of, ctx.begins = inputs[:2]
        # A tensor that got no gradient hands on none, not zeros.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        name = ctx.of + BACKWARD
        if ctx.begins:
            if enabled():
                _Range(name).__enter__()
                task = torch._C._current_graph_task_id()
                engine: Any = torch.autograd.Variable._execution_engine
                engine.queue_callback(lambda: _threads.close(lambda one: one.task == task))
        else:
            _threads.close(lambda one: one.name == name)
        return None, None, *grads


# What autograd's events of them have in their names.
EDGE = _Edge.__name__


class _Range:
    """A range of one thread.

    Attributes:
        name: as profilers show it.
        task: autograd's number of the backward pass that it is in.
    """

    def __init__(self, name: str) -> None:
        self.name, self.task = name, _NO_TASK
        self._record = record_function(name)

    def __enter__(self) -> None:
        self.task = torch._C._current_graph_task_id()
        # Ranges of a backward pass that an error ended have nobody else to end them.
        _threads.close(lambda one: one.task not in (_NO_TASK, self.task))
        if _has_nvtx():
            torch.cuda.nvtx.range_push(self.name)
        self._record.__enter__()
        _threads.open.append(self)

    def __exit__(self, *_: object) -> None:
        _threads.close(lambda one: one is self)

    def close(self) -> None:
        self._record.__exit__(None, None, None)
        if _has_nvtx():
            torch.cuda.nvtx.range_pop()


class _Threads(threading.local):
    """Each thread's open ranges, the outermost first."""

    def __init__(self) -> None:
        self.open: list[_Range] = []

    def close(self, which: Callable[[_Range], bool]) -> None:
        """End the first range of that kind with all within it; nothing where there is none."""
        first = next((i for i, one in enumerate(self.open) if which(one)), None)
        while first is not None and len(self.open) > first:
            self.open.pop().close()


_threads = _Threads()


@cache
def _has_nvtx() -> bool:
    return torch.cuda.is_available()


def kind_of(name: str) -> str:
    """What a range is of: "phase", "op" or "block"; "" where it is none of ours."""
    if name in PHASES:
        return "phase"
    if name.startswith(OP):
        return "op"
    return "block" if ".blocks." in name else ""
