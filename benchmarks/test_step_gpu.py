"""The whole training step on a GPU: masks, forward, backward, fused AdamW, under bf16 autocast.

Ours as a CUDA graph, launched, and compiled by torch.compile; each with a residual stream in bf16
and in fp32, as Hugging Face's has. Its class, with torch's fused AdamW, is timed beside V1 steps:
eager, with SDPA, and with SDPA compiled (of deep models each block by itself). It reads a
normalised float video and a boolean mask that were made before, ours draws its masks and reads
uint8. It has no decoder masking, and a V1 step, which decodes all hidden tokens, is no peer of a V2
step: V2 stands alone.

Steps of a case are timed in turn where all of them are held at once, else one after the other. All
cases are guessed to take twelve minutes: PYTEST_ADDOPTS="-k 'base or timeline'" in the environment,
then "-k 'not base and not timeline'", makes two runs of them.
"""

import statistics
import time

import profile_step
import pytest
import torch
from environment import device_name
from peers import training_step_of
from rows import DEVICE, judged, rounded
from step_cases import (
    CASES,
    RESIDUALS,
    contender,
    flops_run,
    in_turn,
    published_peak,
    release,
    training_step,
)
from timing import CPU_ROUNDS, CUDA_ROUNDS, Timing, ceilings

from vmae_fast.plan import FLOP_PER_MAC, published_macs
from vmae_fast.train.graph import CudaCapture
from vmae_fast.train.profile import first_rows

# Compiling, recording and the allocator settle in the first ones.
WARM_UPS = 3
# Kernels listed of a step's timeline.
MOST_KERNELS = 40
NAME_LENGTH = 100
# Above this size models are not held beside each other.
TOGETHER = ("tiny", "small", "base")
# Steps are timed for so many seconds each, or CUDA_ROUNDS times; never fewer times than this.
MOST_S, LEAST_ROUNDS = 2.5, 5

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
    benchmark.extra_info.update(figures)
    benchmark.pedantic(torch.cuda.synchronize, rounds=1)


def measure(case, device, capture):
    """Rows of all of ours, as many clips as fit, each judged by its targets."""
    clips = case.clips
    while True:
        try:
            found, left_out = run(case, clips, device, capture)
            break
        except torch.OutOfMemoryError:
            if clips == 1:
                raise
        # Out of the handler, whose traceback holds the steps that did not fit.
        clips //= 2
        release(device)
    release(device)
    masks = "V2" if case.config.decoder_mask_ratio else "V1"
    what = (
        f"{case.size}, {clips} clips, a whole step in bf16 autocast with fused AdamW, {masks} masks"
    )
    if masks == "V2":
        what += "; Hugging Face's class has no decoder masking"
    if left_out:
        what += f"; more memory than there is would be needed by {', '.join(left_out)}"
    best = ceilings(device)
    more = {"left_out": left_out} if left_out else {}
    rows = [judged(row | more) for row in rows_of(case, clips, found, best)]
    return {"what": what, "ceilings": rounded(best), "rows": rows}


def run(case, clips, device, capture):
    """By contender: time, and most bytes held at once; and why peers were left out, by name."""
    makers = {
        contender(launch, residual): (
            lambda launch=launch, residual=residual: training_step(
                case, launch, residual, clips, device, capture
            )
        )
        for residual in RESIDUALS
        for launch in case.launches
    }
    makers |= {
        name: (
            lambda name=name: training_step_of(
                name, "bf16", device=str(device), clips=clips, size=case.size, **case.settings
            )
        )
        for name in case.peers
    }
    together = case.size in TOGETHER
    groups = [makers] if together else [{n: make} for n, make in makers.items()]
    found, left_out = {}, {}
    for group in groups:
        try:
            found |= run_group(group, device)
        except torch.OutOfMemoryError as error:
            # Fewer clips would be no measure of a large model's own step.
            (*others, name) = group
            if others or name not in case.peers:
                raise
            left_out[name] = str(error).splitlines()[0]
        # What was compiled for one model would count against the next one's recompilations.
        torch.compiler.reset()
        release(device)
    return found, left_out


def run_group(makers, device):
    """Time and most bytes of steps that are held beside each other."""
    steps, peak_bytes = {}, {}
    for name, make in makers.items():
        steps[name], peak_bytes[name] = held(make, device)
    times = time_steps(steps, device)
    return {name: (times[name], peak_bytes[name]) for name in makers}


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


def time_steps(steps, device):
    """Median milliseconds of each step, in turn. One input: a step moves many times what L2 holds.

    On CUDA a step is timed while the one before it still keeps the GPU busy, as in training.
    """
    if device.type != "cuda":
        each_ms = in_turn(steps, CPU_ROUNDS)
        return {name: Timing(time_ms, "perf_counter") for name, time_ms in each_ms.items()}
    start_s = time.perf_counter()
    for step in steps.values():
        step()
    torch.cuda.synchronize()
    # Each of a round's two calls takes as long.
    round_s = 2 * (time.perf_counter() - start_s)
    rounds = min(CUDA_ROUNDS, max(LEAST_ROUNDS, int(MOST_S * len(steps) / round_s)))
    spans = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            step()
            start.record()
            step()
            end.record()
            spans[name].append((start, end))
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
    flops, run_flops = (
        FLOP_PER_MAC * published_macs(case.config) * clips,
        flops_run(case.config, clips),
    )
    published = published_peak(device_name())
    rows = []
    for residual in RESIDUALS:
        mine = {launch: found[contender(launch, residual)] for launch in case.launches}
        theirs = {name: found[name] for name in case.peers if name in found}
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
                # As the papers count them, which the rates are of, and as ours runs them.
                "flops": flops,
                "run_flops": run_flops,
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
            # Of a large product that was measured, and of what the data sheet says (MFU).
            if best.get("matmul_dtype") == "bfloat16":
                row["percent_of_matmul"] = 100 * tflop_per_s / best["matmul_tflop_per_s"]
            if published:
                row["percent_of_published_peak"] = 100 * tflop_per_s / published
            rows.append(row)
    return rows


def timeline(case, device):
    """Kernels of one steady step, launched, by the time they take."""
    step = training_step(case, "launched", "bf16", case.clips, device, CudaCapture)
    rows = profile_step.record(step, 1, device).kernels()
    total_ms, best = sum(row.ms for row in rows), ceilings(device)
    tflop = FLOP_PER_MAC * published_macs(case.config) * case.clips / 1e12
    percent = 1e3 * tflop / total_ms / best["matmul_tflop_per_s"]
    return {
        "what": f"{case.size}, {case.clips} clips, one step, launched, bf16 residual: its kernels",
        "ceilings": rounded(best),
        "total_ms": round(total_ms, 3),
        "tflop": round(tflop, 3),
        # On a CPU the product is of another dtype.
        **({"percent_of_matmul": round(100 * percent, 1)} if device.type == "cuda" else {}),
        "kernels": [
            {
                # A table on a page is drawn with these.
                "name": row.name.replace("|", "/")[:NAME_LENGTH],
                "calls": row.calls,
                "ms": round(row.ms, 3),
                "percent": round(row.percent, 2),
            }
            for row in first_rows(rows, MOST_KERNELS)
        ],
    }
