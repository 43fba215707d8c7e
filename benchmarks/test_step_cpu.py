"""Training steps of the base and the small model on this CPU, against the same in plain PyTorch.

Two clips of 16x224x224, forward and backward, the contenders' rounds interleaved. The plain model
has SDPA for attention, Hugging Face's class has SDPA or eager attention; it has no decoder masking,
so that V2 stands beside the plain model alone. Ratios are reported, not asserted: they depend on
the machine.

Hugging Face's model is compiled on a GPU only (test_step_gpu.py): compiling takes a minute here.
"""

import statistics
import time

import pytest
import torch
from peers import CLIPS, saved_bytes, step_of
from rows import DEVICE, rounded
from step_cases import flops_run
from timing import ceilings, peak_memory_bytes

from vmae_fast import VideoMAEConfig
from vmae_fast.plan import FLOP_PER_MAC, published_macs

ROUNDS = 3
# Figures are named so.
CONTENDERS = {"ours": "ours", "plain": "plain", "huggingface": "huggingface_sdpa"}
SMALL = {
    "v1": {
        "ours": "ours",
        "huggingface_eager": "huggingface_eager",
        "huggingface": "huggingface_sdpa",
    },
    "v2": {"ours": "ours", "plain": "plain"},
}
SETTINGS = {"v1": {}, "v2": {"decoder_mask_ratio": 0.5}}
# As torch names processors: with less, bf16 is computed in fp32 bit by bit.
FAST_BF16 = "AVX512"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step(benchmark, record, precision):
    pytest.importorskip("transformers")
    units = torch.backends.cpu.get_cpu_capability()
    if precision == "bf16" and not units.startswith(FAST_BF16):
        pytest.skip(f"a step in bf16 takes minutes without {FAST_BF16}; this processor has {units}")
    figures = {"what": f"base V1, {CLIPS} clips of 16x224x224, forward and backward, {precision}"}
    figures |= measure(benchmark, VideoMAEConfig.of("base"), CONTENDERS, precision)
    figures |= saved(precision)
    benchmark.extra_info.update(figures)
    record(f"step_base_{precision}", figures)


@pytest.mark.parametrize("masks", SMALL)
def test_small_step(benchmark, record, masks):
    pytest.importorskip("transformers")
    what = f"small {masks.upper()}, {CLIPS} clips of 16x224x224, forward and backward, fp32"
    config = VideoMAEConfig.of("small", **SETTINGS[masks])
    figures = {"what": what} | measure(benchmark, config, SMALL[masks], "fp32")
    benchmark.extra_info.update(figures)
    record("step_small_fp32" if masks == "v1" else f"step_small_{masks}_fp32", figures)


def measure(benchmark, config, contenders, precision):
    """Peak memory, times and rates of a step, all in this process."""
    steps = {name: step_of(name, precision, size=config) for name in contenders}
    # Each is called twice here, which warms it up.
    mib = {name: peak_memory_bytes(step, DEVICE) / 2**20 for name, step in steps.items()}
    figures = times(benchmark, steps, contenders)
    figures |= rates(config, contenders, figures, precision)
    for name, called in contenders.items():
        figures[f"{called}_peak_tensors_mib"] = round(mib[name])
    ratios = {"tensors_ratio": "huggingface", "tensors_ratio_to_plain": "plain"}
    return figures | {
        ratio: round(mib["ours"] / mib[other], 3) for ratio, other in ratios.items() if other in mib
    }


def times(benchmark, steps, contenders):
    """Median seconds of each contender's step, and how many times ours is quicker."""
    taken_s = {name: [] for name in steps}

    def timed(name):
        start = time.perf_counter()
        steps[name]()
        taken_s[name].append(time.perf_counter() - start)

    def others_first():
        for name in steps:
            if name != "ours":
                timed(name)

    benchmark.pedantic(timed, args=("ours",), setup=others_first, rounds=ROUNDS)
    median_s = {name: statistics.median(each) for name, each in taken_s.items()}
    ours_s = median_s["ours"]
    # The first is over Hugging Face's with SDPA.
    speedups = {"speedup": "huggingface", "speedup_over_eager": "huggingface_eager"}
    speedups |= {"speedup_over_plain": "plain"}
    return {
        **{f"{contenders[name]}_s": round(each, 4) for name, each in median_s.items()},
        **{k: round(median_s[name] / ours_s, 3) for k, name in speedups.items() if name in steps},
        "ours_clips_per_s": round(CLIPS / ours_s, 3),
    }


def rates(config, contenders, figures, precision):
    """Operations of a step as the papers count them and as ours runs them, and a second's share.

    All contenders get the papers' count. The share of a large product is given in fp32, which is
    what the product is measured in on a CPU.
    """
    gflop = FLOP_PER_MAC * published_macs(config) * CLIPS / 1e9
    found = {"gflop": gflop, "ours_run_gflop": flops_run(config, CLIPS) / 1e9}
    per_s = {called: gflop / figures[f"{called}_s"] for called in contenders.values()}
    found |= {f"{called}_gflop_per_s": each for called, each in per_s.items()}
    best = ceilings(DEVICE)
    if precision == "fp32" and best.get("matmul_dtype") == "float32":
        found["matmul_gflop_per_s"] = 1e3 * best["matmul_tflop_per_s"]
        found["ours_percent_of_matmul"] = 0.1 * per_s["ours"] / best["matmul_tflop_per_s"]
    return rounded(found)


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
