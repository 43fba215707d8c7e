"""How a call is timed, how much memory it takes, and what the machine can do at most.

Several ways of doing the same thing are timed together, in turn, so that whatever the machine
does meanwhile meets all of them. Each goes round several input sets, which together exceed the
GPU's L2: a single set would be read from the cache the second time.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]

CUDA_ROUNDS = 30
CPU_ROUNDS = 5
# How often the input sets must exceed L2: half of it is evicted for sure between two uses.
L2_MULTIPLE = 2
# On a CPU sets are for variety only; its caches are not flushed.
CPU_SETS = 2


@dataclass(frozen=True)
class Timing:
    """Median time of one call, and how it was taken.

    Attributes:
        time_ms: milliseconds.
        how: "graph" (CUDA-graph replays), "events" (eager, launches and waiting included),
            "perf_counter" (CPU).
        why: why no graph could be captured; empty otherwise.
    """

    time_ms: float
    how: str
    why: str = ""


def num_sets(size_bytes: int, device: torch.device) -> int:
    """How many input sets to go round when one call moves ``size_bytes``."""
    if device.type != "cuda":
        return CPU_SETS
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(L2_MULTIPLE * l2_bytes / size_bytes))


def time_ways(
    ways: Mapping[str, Callable[[Any], Call]], sets: Sequence[Any], device: torch.device
) -> dict[str, Timing]:
    """Time several ways on the same input sets, interleaved.

    Args:
        ways: by name; each takes an input set and returns the call to be timed on it, so that
            what comes before (the forward pass of a backward pass, say) is not.
        sets: input sets of random data, never zeros.
        device: where they run.

    Returns:
        A :class:`Timing` of one call by name. On CUDA the median of graph replays, after warm-up;
        a way that cannot be captured is timed with events and says why.
    """
    return (_time_cuda if device.type == "cuda" else _time_cpu)(ways, sets)


def _time_cpu(ways: Mapping[str, Callable[[Any], Call]], sets: Sequence[Any]) -> dict[str, Timing]:
    calls = {name: [prepare(one) for one in sets] for name, prepare in ways.items()}
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    for warm in (False, *[True] * CPU_ROUNDS):
        for name, calls_of_way in calls.items():
            for call in calls_of_way:
                start = time.perf_counter()
                call()
                if warm:
                    times_s[name].append(time.perf_counter() - start)
    return {name: Timing(1e3 * statistics.median(t), "perf_counter") for name, t in times_s.items()}


def _time_cuda(ways: Mapping[str, Callable[[Any], Call]], sets: Sequence[Any]) -> dict[str, Timing]:
    torch.cuda.synchronize()
    # One stream throughout: a backward pass runs on the stream of its forward pass, and can be
    # captured on no other.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        rounds = {
            name: _captured([prepare(one) for one in sets], stream)
            for name, prepare in ways.items()
        }
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
        events = {name: [] for name in ways}
        for _ in range(CUDA_ROUNDS):
            for name, (go_round, _) in rounds.items():
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                # The first keeps the GPU busy while the second is being launched.
                go_round()
                start.record()
                go_round()
                end.record()
                events[name].append((start, end))
    torch.cuda.synchronize()
    timings = {}
    for name, (_, why) in rounds.items():
        median_ms = statistics.median(start.elapsed_time(end) for start, end in events[name])
        timings[name] = Timing(median_ms / len(sets), "events" if why else "graph", why)
    return timings


def _captured(calls: Sequence[Call], stream: torch.cuda.Stream) -> tuple[Call, str]:
    """All calls once, as a graph's replay or, with the reason, as they are."""

    def go_round() -> list[Any]:
        # Results live until the round is over: else each call would write where the one before
        # did, into L2.
        return [call() for call in calls]

    for _ in range(2):
        go_round()
    torch.cuda.synchronize()
    # Tried before capturing, since a capture that fails leaves the allocator in its pool.
    torch.cuda.set_sync_debug_mode("error")
    try:
        go_round()
    except RuntimeError as error:
        return go_round, str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            go_round()
    except RuntimeError as error:
        return go_round, str(error).splitlines()[0]
    graph.replay()
    return graph.replay, ""


@cache
def ceilings(device: torch.device) -> dict[str, float | str]:
    """What this machine reaches, measured once in a process.

    Returns:
        ``copy_gb_per_s``: a copy of 1 GiB (64 MiB on a CPU) within the device's memory, bytes
        read and bytes written. ``matmul_tflop_per_s``: a product of square matrices of random
        numbers (zeros would be faster), 8192 wide in bf16 on CUDA, 1024 wide in fp32 on a CPU,
        and there the quicker one of a product and the same as a 1x1 convolution.
        ``matmul_dtype``: "bfloat16" or "float32", what the product is of; that of another dtype
        has no share in it.
    """
    size_bytes = 2**30 if device.type == "cuda" else 2**26
    times = time_ways({"copy": copy_of(2 * size_bytes, device)}, range(2), device)
    width, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    matrices = [torch.randn(2, width, width, device=device).to(dtype) for _ in range(2)]
    products = time_ways(_products(device), matrices, device)
    quickest_ms = min(timing.time_ms for timing in products.values())
    return {
        "copy_gb_per_s": 2 * size_bytes / times["copy"].time_ms / 1e6,
        "matmul_tflop_per_s": 2 * width**3 / quickest_ms / 1e9,
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }


def _products(device: torch.device) -> dict[str, Callable[[Any], Call]]:
    """Ways to multiply two square matrices: torch's, and on a CPU as a convolution too.

    They are two libraries' there, and which one is quicker depends on the processor.
    """
    ways: dict[str, Callable[[Any], Call]] = {"matmul": lambda ab: lambda: ab[0] @ ab[1]}
    if device.type != "cuda":
        ways["convolution"] = lambda ab: (
            lambda: F.conv2d(ab[0][None, :, None].permute(0, 3, 1, 2), ab[1][:, :, None, None])
        )
    return ways


def copy_of(moved_bytes: int, device: torch.device) -> Callable[[Any], Call]:
    """A way that reads and writes ``moved_bytes`` in all, half each; its input set is ignored."""

    def prepare(_: Any) -> Call:
        words = torch.rand(max(moved_bytes // 8, 1), device=device)
        into = torch.empty_like(words)
        return lambda: into.copy_(words)

    return prepare


def peak_memory_bytes(call: Call, device: torch.device) -> int:
    """Most that tensors take at once during a call, above what was held before it.

    The call is made once before, so that what it makes for good is not counted.
    """
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(events, key=_start)), initial=0))


def _start(event: Any) -> int:
    return event.start_ns()
