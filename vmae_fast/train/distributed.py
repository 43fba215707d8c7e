"""Processes of a run: one without torchrun, one a GPU under it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import ConfigError
from .meeting import agent_store, meet

# How often torchrun has started this process group again.
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
# How errors of gloo and NCCL begin or go on.
_OF_GROUP = ("gloo", "Timed out", "timed out", "Connection closed by peer", "Connection reset")


def is_of_group(error: BaseException) -> bool:
    """Whether an error says that another process did not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_GROUP)
    )


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number; 0 writes files and prints.
        world_size: how many there are.
        device: where it computes.
        start: a name that the processes have in common, and none of an earlier start has.
    """

    rank: int
    world_size: int
    device: torch.device
    start: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum over processes, in place; the value itself where there is one."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: object) -> list[object]:
        """Every process's value, in order of rank, on all of them."""
        if self.world_size == 1:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def alone() -> Ranks:
    """One process on the CPU, for what looks at data without training."""
    return Ranks(0, 1, torch.device("cpu"))


@contextmanager
def process_group(device: str, timeout_s: float = 1800.0) -> Iterator[Ranks]:
    """Join the process group that torchrun describes, or be the only process.

    Args:
        device: "auto", or a torch device; under torchrun each process takes its own GPU.
        timeout_s: after which processes that wait for one that hangs give up.

    Raises:
        ConfigError: no such device.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Ranks(0, 1, chosen)
        return
    place: dict[str, Any] = {}
    store, name = agent_store(timeout_s), ""
    if store is not None:
        rank = int(os.environ["RANK"])
        name = meet(store, rank, world_size, timeout_s)
        place = {
            "store": dist.PrefixStore(f"vmae-fast/{name}", store),  # type: ignore[attr-defined]
            "rank": rank,
            "world_size": world_size,
        }
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s), **place
    )
    try:
        yield Ranks(dist.get_rank(), world_size, chosen, name)
    finally:
        # What holds the group in cycles, as DistributedDataParallel does, goes before it: else its
        # threads may end with the interpreter, which can abort.
        gc.collect()
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"--device {name}: torch knows no such device; auto, cuda, cuda:1, mps and cpu are some"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {name}: torch {torch.__version__} sees no GPU here (vmae-fast env says "
            "why); --device cpu does without"
        )
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.index is not None and count and device.index >= count:
        raise ConfigError(f"--device {name}: the last of {count} GPUs is cuda:{count - 1}")
    return device
