"""A training step of the base model on this CPU, against Hugging Face's with SDPA.

Two clips of 16x224x224, forward and backward, the two contenders' rounds interleaved. Ratios
are reported, not asserted: they depend on the machine.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peers import CLIPS, step_of

ROUNDS = 7


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step(benchmark, record, precision):
    pytest.importorskip("transformers")
    ours, theirs = step_of("ours", precision), step_of("huggingface", precision)
    their_times_s: list[float] = []
    our_times_s: list[float] = []

    def timed_ours():
        start = time.perf_counter()
        ours()
        our_times_s.append(time.perf_counter() - start)

    def theirs_first():
        start = time.perf_counter()
        theirs()
        their_times_s.append(time.perf_counter() - start)

    benchmark.pedantic(timed_ours, setup=theirs_first, rounds=ROUNDS, warmup_rounds=1)
    # The warm-up rounds come first in both lists.
    our_s = statistics.median(our_times_s[-ROUNDS:])
    their_s = statistics.median(their_times_s[-ROUNDS:])
    ours_mib, theirs_mib = (_peak_memory(name, precision) for name in ("ours", "huggingface"))
    figures = {
        "what": f"base, {CLIPS} clips of 16x224x224, forward and backward, {precision}",
        "ours_s": round(our_s, 4),
        "huggingface_sdpa_s": round(their_s, 4),
        "speedup": round(their_s / our_s, 3),
        "ours_clips_per_s": round(CLIPS / our_s, 3),
    }
    for kind in ("tensors", "resident"):
        figures |= {
            f"ours_peak_{kind}_mib": round(ours_mib[kind]),
            f"huggingface_sdpa_peak_{kind}_mib": round(theirs_mib[kind]),
            f"{kind}_ratio": round(ours_mib[kind] / theirs_mib[kind], 3),
        }
    benchmark.extra_info.update(figures)
    record(f"step_base_{precision}", figures)


def _peak_memory(contender, precision):
    script = Path(__file__).with_name("peers.py")
    command = [sys.executable, str(script), contender, precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
