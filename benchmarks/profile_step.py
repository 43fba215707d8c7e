"""Where the time of a training step goes: a trace, and tables of kernels, ranges and gaps.

    python benchmarks/profile_step.py --size base --clips 64 --out DIR
    python benchmarks/profile_step.py --size tiny --clips 4

The tables are printed; DIR gets trace.json.gz and them as summary.txt. Works on a CPU too, with a
small size. Steps are launched, not recorded as a CUDA graph, so that ranges are about their
kernels; with --graph one sees the kernels follow each other as in training. With VMAE_FAST_NVTX=1
the GPU is left to the nsys or ncu that starts this (PROFILING.md has the command lines).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rows import DEVICE
from step_cases import RESIDUALS, StepCase, training_step

from vmae_fast import profiling
from vmae_fast.models import SIZES
from vmae_fast.train.graph import CudaCapture
from vmae_fast.train.profile import Recorder, Trace

# Compiling and the allocator settle in the first steps.
WARM_UPS = 3
SHOWN = 3


def record(step: Callable[[], object], steps: int, device: torch.device) -> Trace:
    """A trace of some steps one after the other, after :data:`WARM_UPS` that are not recorded."""
    for _ in range(WARM_UPS):
        step()
    recorder = Recorder(device)
    recorder.start()
    try:
        for _ in range(steps):
            with profiling.span("step"):
                step()
    finally:
        events = recorder.stop()
    return Trace(events, steps)


def main(arguments: list[str] | None = None) -> int:
    """Record, print and write; the exit status."""
    parser = argparse.ArgumentParser(description="Profile a training step.")
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--v2", action="store_true", help="decode half of the hidden tokens, as V2")
    parser.add_argument("--residual", choices=sorted(RESIDUALS), default="bf16")
    parser.add_argument("--graph", action="store_true", help="record the step as a CUDA graph")
    parser.add_argument("--steps", type=int, default=SHOWN, help="how many, one after the other")
    parser.add_argument("--out", type=Path, help="folder for the trace and the tables")
    options = parser.parse_args(arguments)
    if options.graph and DEVICE.type != "cuda":
        parser.error("--graph needs a GPU")
    settings = {"decoder_mask_ratio": 0.5} if options.v2 else {}
    case = StepCase("profile", options.size, options.clips, settings=settings)
    launch = "graph" if options.graph else "launched"
    step = training_step(case, launch, options.residual, options.clips, DEVICE, CudaCapture)
    trace = record(step, options.steps, DEVICE)
    title = (
        f"{options.size}, {'V2' if options.v2 else 'V1'} masks, {options.clips} clips, {launch}, "
        f"bf16 autocast, {options.residual} residual, on {DEVICE}"
    )
    print(trace.summary(title), end="")
    if options.out is not None:
        print("\nwrote " + " and ".join(map(str, trace.write(options.out, title))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
