"""A training step of the base model on this CPU, against the plain model and Hugging Face's.

Two clips of 16x224x224, forward and backward, the contenders' rounds interleaved; both others have
SDPA for attention. Ratios are reported, not asserted: they depend on the machine.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peers import CLIPS, saved_bytes, step_of

ROUNDS = 7
# Figures are named so.
CONTENDERS = {"ours": "ours", "plain": "plain", "huggingface": "huggingface_sdpa"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step(benchmark, record, precision):
    pytest.importorskip("transformers")
    figures = {"what": f"base, {CLIPS} clips of 16x224x224, forward and backward, {precision}"}
    figures |= times(benchmark, precision) | peaks(precision) | saved(precision)
    benchmark.extra_info.update(figures)
    record(f"step_base_{precision}", figures)


def times(benchmark, precision):
    """Median seconds of each contender's step, and how many times ours is quicker."""
    steps = {name: step_of(name, precision) for name in CONTENDERS}
    taken_s = {name: [] for name in CONTENDERS}

    def timed(name):
        start = time.perf_counter()
        steps[name]()
        taken_s[name].append(time.perf_counter() - start)

    def others_first():
        for name in ("plain", "huggingface"):
            timed(name)

    benchmark.pedantic(timed, args=("ours",), setup=others_first, rounds=ROUNDS, warmup_rounds=1)
    # The warm-up rounds come first in all lists.
    median_s = {name: statistics.median(each[-ROUNDS:]) for name, each in taken_s.items()}
    ours_s = median_s["ours"]
    return {
        **{f"{CONTENDERS[name]}_s": round(each, 4) for name, each in median_s.items()},
        "speedup": round(median_s["huggingface"] / ours_s, 3),
        "speedup_over_plain": round(median_s["plain"] / ours_s, 3),
        "ours_clips_per_s": round(CLIPS / ours_s, 3),
    }


def peaks(precision):
    """Peak memory of each contender's step, and ours over theirs."""
    mib = {name: _peak_memory(name, precision) for name in CONTENDERS}
    figures = {}
    for kind in ("tensors", "resident"):
        figures |= {f"{CONTENDERS[n]}_peak_{kind}_mib": round(mib[n][kind]) for n in mib}
        ours = mib["ours"][kind]
        figures[f"{kind}_ratio"] = round(ours / mib["huggingface"][kind], 3)
        figures[f"{kind}_ratio_to_plain"] = round(ours / mib["plain"][kind], 3)
    return figures


def saved(precision):
    """What ours and the plain model keep for the backward pass: in all, and for one clip more."""
    figures, ratios = {}, []
    for name in ("ours", "plain"):
        few, more = (saved_bytes(name, precision, clips=n) for n in (CLIPS, 2 * CLIPS))
        ratios.append((few, (more - few) / CLIPS))
        figures[f"{name}_saved_mib"] = round(few / 2**20, 1)
        figures[f"{name}_saved_mib_a_clip"] = round((more - few) / CLIPS / 2**20, 1)
    ours, plain = ratios
    figures["saved_ratio"] = round(ours[0] / plain[0], 3)
    figures["saved_ratio_a_clip"] = round(ours[1] / plain[1], 3)
    return figures


def _peak_memory(contender, precision):
    script = Path(__file__).with_name("peers.py")
    command = [sys.executable, str(script), contender, precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
