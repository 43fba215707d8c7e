"""A training step of the base model on a GPU: ours, and Hugging Face's eager, with SDPA, compiled.

64 clips of 16x224x224 under bf16 autocast, V1 masks, forward and backward, interleaved. Ours is
timed twice: as a CUDA graph, and launched anew each time as theirs are, whose boolean indexing
waits for the GPU.
"""

from functools import partial

import pytest
import torch
from peers import PEERS, step_of
from timing import peak_memory_bytes, time_ways

CLIPS = 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_step(benchmark, record):
    pytest.importorskip("transformers")
    device = torch.device("cuda")
    make = partial(step_of, precision="bf16", device="cuda", clips=CLIPS)
    steps = {name: make(name) for name in ("ours", *PEERS)}
    rows = measure(steps, device)
    what = f"base, {CLIPS} clips of 16x224x224, forward and backward, bf16 autocast, V1 masks"
    record("step_base_gpu", {"what": what, "contenders": rows})
    benchmark.pedantic(lambda: (steps["ours"](), torch.cuda.synchronize()), rounds=3)


def measure(steps, device):
    """One row a contender: time and how it was taken, clips a second, peak memory, speed-up."""
    ways = {name: always(step) for name, step in steps.items()}
    ways["ours_launched"] = always(waiting(steps["ours"]))
    # One set: a step moves many times what L2 holds.
    times = time_ways(ways, [None], device)
    memory = {name: peak_memory_bytes(step, device) for name, step in steps.items()}
    return [
        {
            "contender": name,
            "time_ms": round(timing.time_ms, 2),
            "how": timing.how,
            "clips_per_s": round(1e3 * CLIPS / timing.time_ms),
            "ours_is_quicker": round(timing.time_ms / times["ours"].time_ms, 2),
            "peak_gib": round(memory.get(name, memory["ours"]) / 2**30, 2),
        }
        for name, timing in times.items()
    ]


def always(step):
    """The way that makes this step of any input set."""
    return lambda _: step


def waiting(step):
    """The step, made impossible to capture: the host reads a value at its end."""

    def waits():
        step()
        torch.ones((), device="cuda").item()

    return waits
