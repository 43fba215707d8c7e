"""What to say when memory runs out: how much there was, and which micro-batch would fit."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vmae_fast.data import WorkersEnded
from vmae_fast.plan import Settings
from vmae_fast.plan.memory import CONTEXT_BYTES, memory_parts

from .schedule import micro_batches
from .setup import Setup

# What torch, its allocators and CUDA's libraries say, where the type of the error does not.
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
_TRIED = re.compile(r"tried to allocate ([\d.]+) ?(\w+)", re.IGNORECASE)
# Less than this share of the memory, taken by others or forbidden, is not worth words.
_NOTICED = 0.05


class Memory(NamedTuple):
    """Of a device, in bytes.

    Attributes:
        total: what it has.
        available: what this process could have of it, what it has already counted in.
    """

    total: int
    available: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that memory ran out."""
    return any(
        isinstance(one, MemoryError | torch.OutOfMemoryError)
        or (isinstance(one, RuntimeError) and any(sign in str(one) for sign in _SIGNS))
        for one in _chain(error)
    )


def explain(setup: Setup, error: BaseException) -> str | None:
    """What happened, what is kept, and what to do next; None where memory was not the reason.

    Args:
        setup: of the run that ended.
        error: what ended it.
    """
    if is_out_of_memory(error):
        return _of_device(setup, error)
    if isinstance(error, WorkersEnded):
        return f"{error}. " + _kept(setup, f"--workers {setup.inputs.workers // 2}")
    return None


def _of_device(setup: Setup, error: BaseException) -> str:
    device, schedule = setup.ranks.device, setup.schedule
    lines = [
        f"out of memory on {device}: {schedule.micro_batch} clips at a time do not fit"
        + _asked_for(error)
    ]
    try:
        memory = memory_of(device)
        lines.append(_amount(memory))
        advice, flags = _advise(setup, memory)
    except Exception as failure:  # The planner may want memory too: the first error is the one.
        smaller = [m for m in _possible(setup) if m < schedule.micro_batch]
        advice, flags = f"What would fit could not be worked out ({failure!r})", ""
        if smaller:
            flags = f"--micro-batch {smaller[-1]}"
            advice += f"; try {flags}"
    lines += [advice, _kept(setup, flags)]
    return ". ".join(lines)


def memory_of(device: torch.device) -> Memory:
    """The memory that a device has; of a CPU, and of what shares its memory, the machine's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # The planner counts the context as well, which is in neither.
        mine = torch.cuda.memory_reserved(device) + CONTEXT_BYTES
        return Memory(total, min(free + mine, total))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = total
    info = Path("/proc/meminfo")
    if info.is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text())
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        if found:
            available = int(found[1]) * 1024 + resident * os.sysconf("SC_PAGE_SIZE")
    return Memory(total, min(available, total, _address_limit()))


def settings_of(setup: Setup, micro_batch: int) -> Settings:
    """The run as the planner takes it, with a micro-batch that divides its batch."""
    per_rank = setup.schedule.micro_batch * setup.schedule.accumulate
    run = setup.config.run
    return Settings(
        setup.model.config,
        micro_batch,
        gpus=setup.ranks.world_size,
        accumulate=per_rank // micro_batch,
        precision="fp32" if setup.autocast_dtype is None else "bf16",
        residual=run.residual,
        checkpointing=run.checkpointing,
        averaged=setup.average is not None,
        parallel=run.parallel,
    )


def needed_bytes(settings: Settings) -> int:
    """What one device holds when it holds most, by the planner."""
    return sum(memory_parts(settings, settings.trace()).values())


def _advise(setup: Setup, memory: Memory) -> tuple[str, str]:
    """What would fit, in words, and its flags."""
    smaller = [m for m in _possible(setup) if m < setup.schedule.micro_batch]
    for saving, change in _savings(setup):
        # Without a change only a smaller batch helps; with one, the same may.
        choices = [*smaller, setup.schedule.micro_batch] if saving else smaller
        settings = [replace(settings_of(setup, m), **change) for m in choices]
        # A whole batch at once need not hold the gradients of those before it: it may take less.
        if choices and needed_bytes(settings[-1]) <= memory.available:
            count = len(choices)
        else:
            count = bisect_right(settings, memory.available, key=needed_bytes)
        if count:
            flags = " ".join([f"--micro-batch {choices[count - 1]}", *saving])
            batch = setup.config.optim.batch_size
            same = f"the batch stays {batch}: gradients accumulate, with the same result"
            if "residual" in change:
                same = f"the batch stays {batch}, the result is a little less exact"
            return f"By the plan {flags} fits: {same}", flags
    least = settings_of(setup, (smaller or [setup.schedule.micro_batch])[0])
    fsdp = " and --parallel fsdp" * _may_shard(setup)
    return (
        f"Even {least.batch} at a time, which takes {_gib(needed_bytes(least))}, and "
        f"--checkpointing block{fsdp} do not make it fit: take a smaller --model, fewer --frames "
        "or a smaller --image-size (vmae-fast plan says what each takes)"
    ), ""


def _savings(setup: Setup) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Flags that save memory with what they change of the plan, those that cost least first."""
    run = setup.config.run
    flags: list[str] = []
    change: dict[str, Any] = {}
    yield flags, change
    if run.checkpointing != "block":
        flags, change = ["--checkpointing block"], {"checkpointing": "block"}
        yield flags, change
    if _may_shard(setup):
        # What it costs hangs on the links between the GPUs.
        sharded = (["--parallel fsdp"], {"parallel": "fsdp"})
        yield sharded
        both = ([*flags, *sharded[0]], {**change, **sharded[1]})
        if flags:
            yield both
        flags, change = both
    if run.residual != "bf16" and setup.autocast_dtype is not None:
        yield [*flags, "--residual bf16"], {**change, "residual": "bf16"}


def _may_shard(setup: Setup) -> bool:
    return setup.ranks.world_size > 1 and setup.config.run.parallel == "ddp"


def _possible(setup: Setup) -> list[int]:
    return micro_batches(setup.config, setup.ranks.world_size)


def _amount(memory: Memory) -> str:
    noticed = memory.total - memory.available > _NOTICED * memory.total
    mine = f", of which this process can have {_gib(memory.available)}" if noticed else ""
    return f"It has {_gib(memory.total)}{mine}"


def _asked_for(error: BaseException) -> str:
    found = next((m for one in _chain(error) if (m := _TRIED.search(str(one)))), None)
    if found is None:
        return ""
    size = _gib(int(found[1])) if found[2] == "bytes" else f"{found[1]} {found[2]}"
    return f" (it asked for {size} more)"


def _kept(setup: Setup, flags: str) -> str:
    """Where the run's state is, and the command line that goes on."""
    checkpoint, run = setup.folder.latest(), setup.config.run
    if checkpoint is None:
        flags = " ".join(filter(None, [flags, "--overwrite" if run.out is not None else ""]))
        return f"No checkpoint was written yet: start again{' with ' * bool(flags)}{flags}"
    command = f"vmae-fast pretrain --out {setup.folder.path} --resume {flags}".rstrip()
    return f"The state up to {checkpoint} is kept; go on with: {command}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _address_limit() -> int:
    """Bytes that this process may have by ``ulimit -v``."""
    try:
        import resource
    except ImportError:  # Windows has no such limits.
        return 1 << 62
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return 1 << 62 if soft == resource.RLIM_INFINITY else soft


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.1f} GiB"
