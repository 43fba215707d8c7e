"""Launching Triton kernels: the target at hand and tables of block sizes as data.

Nothing is tuned at run time. A table is keyed by target and dtype; every row of every table is
compiled for its own target by ``tests/kernels/test_compile.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as missing:  # there is no Triton outside Linux
    if missing.name != "triton":
        raise
    triton, tl = None, None

__all__ = ["Row", "available", "cdiv", "find", "jit", "launch", "pick", "power_of_2", "tl"]

# Compute capabilities with table rows of their own. 86 and 89 share rows: 99 KiB of shared memory.
TARGETS = (80, 86, 89, 90, 100, 120)

# What kernels compute in. Anything else goes to the reference.
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def jit(fn: Callable[..., None]) -> Any:
    """:func:`triton.jit`, or the function as it is where there is no Triton to launch it."""
    return fn if triton is None else triton.jit(fn)


@dataclass(frozen=True)
class Row:
    """One row of a launch table.

    Attributes:
        blocks: block sizes by the name the kernel gives them.
        num_warps: warps a program.
        num_stages: depth of the software pipeline of loads.
    """

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of this device."""
    if triton is None:
        return False
    if device.type == "cuda":
        return torch.version.hip is None and target_of(device) >= TARGETS[0]
    return interpreting() and device.type == "cpu"


@lru_cache
def target_of(device: torch.device) -> int:
    """Compute capability of a device as two digits, 90 for 9.0; the CPU stands for the first."""
    if device.type != "cuda":
        return TARGETS[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def find(table: Mapping[Any, Any], device: torch.device, *rest: Any) -> Any:
    """The table's entry for a device and what else it is keyed by, a dtype first; None without one.

    That of the newest listed target the device is not older than.
    """
    at_hand = target_of(device)
    listed = max((key[0] for key in table if key[1:] == rest and key[0] <= at_hand), default=None)
    return table.get((listed, *rest))


def pick(table: Mapping[Any, Row], device: torch.device, *rest: Any) -> Row:
    """The row that :func:`find` finds, of a table that has one for all."""
    row: Row | None = find(table, device, *rest)
    assert row is not None, rest
    return row


def launch(kernel: Any, programs: int, *args: Any, row: Row, **constants: Any) -> None:
    """Run ``kernel`` in so many programs along x, the one grid axis that cannot overflow."""
    if programs == 0:
        return
    # Said, because Triton's default is about to change.
    options = {
        "num_warps": row.num_warps,
        "num_stages": row.num_stages,
        "enable_fp_fusion": True,
    }
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **row.blocks, **constants, **options)


def cdiv(a: int, b: int) -> int:
    """Quotient rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
