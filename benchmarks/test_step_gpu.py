"""The whole training step on a GPU: masks, forward, backward, fused AdamW, under bf16 autocast.

Ours as a CUDA graph, launched, and compiled by torch.compile; each with a residual stream in bf16
and in fp32, as Hugging Face's has. Its class, with torch's fused AdamW, is timed beside base V1:
eager, with SDPA, and with SDPA compiled. It reads a normalised float video and a boolean mask that
were made before, ours draws its masks and reads uint8.

Steps of a case are timed in turn where all of them are held at once, else one after the other.
"""

import gc
import statistics
import time

import pytest
import torch
from peers import PEERS, training_step_of
from rows import DEVICE, judged, rounded
from step_cases import CASES, FLOP_PER_MAC, RESIDUALS, contender, macs_per_clip, training_step
from timing import CPU_ROUNDS, CUDA_ROUNDS, Timing, ceilings
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vmae_fast.train.graph import CudaCapture

# Compiling, recording and the allocator settle in the first ones.
WARM_UPS = 3
# Kernels listed of a step's timeline.
MOST_KERNELS = 40
NAME_LENGTH = 100
# Above this size models are not held beside each other.
TOGETHER = ("tiny", "small", "base")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_step(benchmark, record, case):
    if case.peers:
        pytest.importorskip("transformers")
    figures = measure(case, DEVICE, CudaCapture)
    record(case.name.replace(" ", "_"), figures)
    benchmark.extra_info.update(figures)
    # The figures are those above; pytest-benchmark wants a call of its own.
    benchmark.pedantic(torch.cuda.synchronize, rounds=1)


@needs_cuda
def test_timeline(benchmark, record):
    figures = timeline(CASES[0], DEVICE)
    record("step_timeline", figures)
    benchmark.pedantic(torch.cuda.synchronize, rounds=1)


def measure(case, device, capture):
    """Rows of all of ours, as many clips as fit, each judged by its targets."""
    clips = case.clips
    while True:
        try:
            found = run(case, clips, device, capture)
            break
        except torch.OutOfMemoryError:
            if clips == 1:
                raise
        # Out of the handler, whose traceback holds the steps that did not fit.
        clips //= 2
        release(device)
    release(device)
    what = (
        f"{case.size}, {clips} clips, a whole step in bf16 autocast with fused AdamW, "
        f"{'V2' if case.config.decoder_mask_ratio else 'V1'} masks"
    )
    rows = [judged(row) for row in rows_of(case, clips, found, ceilings(device))]
    return {"what": what, "ceilings": rounded(ceilings(device)), "rows": rows}


def run(case, clips, device, capture):
    """By contender: time, and most bytes held at once."""
    makers = {
        contender(launch, residual): (
            lambda launch=launch, residual=residual: training_step(
                case, launch, residual, clips, device, capture
            )
        )
        for residual in RESIDUALS
        for launch in case.launches
    }
    if case.peers:
        makers |= {
            name: (
                lambda name=name: training_step_of(
                    name, "bf16", device=str(device), clips=clips, **case.settings
                )
            )
            for name in PEERS
        }
    groups = [makers] if case.size in TOGETHER else [{n: make} for n, make in makers.items()]
    found = {}
    for group in groups:
        steps, peak_bytes = {}, {}
        for name, make in group.items():
            steps[name], peak_bytes[name] = held(make, device)
        times = time_steps(steps, device)
        found |= {name: (times[name], peak_bytes[name]) for name in group}
        del steps
        # What was compiled for one model would count against the next one's recompilations.
        torch.compiler.reset()
        release(device)
    return found


def held(make, device):
    """A step that ran some times, and the most bytes that all of its own takes at once.

    Weights, gradients, optimiser state, input and activations; of a recorded step the memory that
    is the graph's for good. 0 on a CPU.
    """
    if device.type != "cuda":
        step = make()
        step()
        return step, 0
    release(device)
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    step = make()
    for _ in range(WARM_UPS):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - allocated
    release(device)
    # A graph's memory is never handed back, and nothing says how much of it was in use at once.
    return step, max(peak, torch.cuda.memory_reserved() - reserved)


def release(device):
    """Hand unused memory back to the GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def time_steps(steps, device):
    """Median milliseconds of each step, in turn. One input: a step moves many times what L2 holds.

    On CUDA a step is timed while the one before it still keeps the GPU busy, as in training.
    """
    cuda = device.type == "cuda"
    spans = {name: [] for name in steps}
    for _ in range(CUDA_ROUNDS if cuda else CPU_ROUNDS):
        for name, step in steps.items():
            if cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                step()
                start.record()
                step()
                end.record()
                spans[name].append((start, end))
            else:
                start = time.perf_counter()
                step()
                spans[name].append(1e3 * (time.perf_counter() - start))
    if not cuda:
        return {n: Timing(statistics.median(each), "perf_counter") for n, each in spans.items()}
    torch.cuda.synchronize()
    return {
        name: Timing(
            statistics.median(start.elapsed_time(end) for start, end in each),
            "graph" if name.startswith("graph") else "events",
        )
        for name, each in spans.items()
    }


def rows_of(case, clips, found, best):
    """One row for each of ours; its peers are the others of its residual stream, and theirs."""
    flops = FLOP_PER_MAC * macs_per_clip(case.config) * clips
    rows = []
    for residual in RESIDUALS:
        mine = {launch: found[contender(launch, residual)] for launch in case.launches}
        theirs = {name: found[name] for name in PEERS if name in found}
        for launch, (timing, peak_bytes) in mine.items():
            peers = {name: it for name, it in mine.items() if name != launch} | theirs
            tflop_per_s = flops / timing.time_ms / 1e9
            row = {
                "op": case.name,
                "direction": contender(launch, residual),
                "clips": clips,
                "time_ms": timing.time_ms,
                "how": timing.how,
                "clips_per_s": 1e3 * clips / timing.time_ms,
                "flops": flops,
                "tflop_per_s": tflop_per_s,
                "peak_gib": peak_bytes / 2**30,
                "peers": {
                    name: {"time_ms": t.time_ms, "how": t.how, "peak_gib": peak / 2**30}
                    for name, (t, peak) in peers.items()
                },
                "speedup": {name: t.time_ms / timing.time_ms for name, (t, _) in peers.items()},
                "peak_ratio": {
                    name: peak_bytes / peak for name, (_, peak) in peers.items() if peak
                },
            }
            if "matmul_tflop_per_s" in best:
                row["percent_of_matmul"] = 100 * tflop_per_s / best["matmul_tflop_per_s"]
            rows.append(row)
    return rows


def timeline(case, device):
    """Kernels of one steady step, launched, by the time they take."""
    step = training_step(case, "launched", "bf16", case.clips, device, CudaCapture)
    for _ in range(WARM_UPS):
        step()
    release(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        step()
        if cuda:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    kernels = [
        (e.key, e.count, e.self_device_time_total if cuda else e.self_cpu_time_total)
        for e in seen.key_averages()
        if e.device_type == kind
    ]
    kernels.sort(key=lambda kernel: -kernel[2])
    total_us = sum(taken for *_, taken in kernels)
    rest = kernels[MOST_KERNELS:]
    others = ("all others", sum(n for _, n, _ in rest), sum(taken for *_, taken in rest))
    listed = [*kernels[:MOST_KERNELS], *([others] if rest else [])]
    return {
        "what": f"{case.size}, {case.clips} clips, one step, launched, bf16 residual: its kernels",
        "total_ms": round(total_us / 1e3, 3),
        "kernels": [
            {
                # A table on a page is drawn with these.
                "name": name.replace("|", "/")[:NAME_LENGTH],
                "calls": calls,
                "ms": round(taken / 1e3, 3),
                "percent": round(100 * taken / total_us, 2),
            }
            for name, calls, taken in listed
        ],
    }
