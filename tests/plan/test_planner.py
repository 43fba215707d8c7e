"""Plans: memory by part, largest batch, roofline, measured rates, and the text."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest

from vmae_fast import VideoMAE, VideoMAEConfig
from vmae_fast.plan import (
    GPUS,
    Call,
    Efficiency,
    Gpu,
    Rates,
    Settings,
    StepTime,
    StepTrace,
    find_gpu,
    make_plan,
    measured_efficiency,
    measured_rates,
    parameters_of,
    published_macs,
)
from vmae_fast.plan.memory import CONTEXT_BYTES, LOST_SHARE, _largest, memory_parts
from vmae_fast.plan.text import describe

TINY = VideoMAEConfig.of("tiny")
SETTINGS = Settings(TINY, 4)
H200 = find_gpu("h200")
UNIT = Rates(1e-9, 1e-9, 1e-6, "one operation or byte a millisecond")


def trace_of(*calls, parameters=0):
    return StepTrace(1, parameters, 4 * parameters, 0, 0, 0, 0, calls)


def call(kind, flops, moved_bytes):
    return Call("op", "forward", kind, flops, moved_bytes)


# ---- memory -------------------------------------------------------------------------------


def test_memory_by_part():
    trace = SETTINGS.trace()
    weights = 4 * sum(p.numel() for p in VideoMAE(TINY).parameters())
    parts = memory_parts(SETTINGS, trace)
    assert (parts["weights"], parts["AdamW"]) == (weights, 2 * weights)
    assert parts["clips"] == 4 * 3 * 8 * 64 * 64
    assert "averaged weights" not in parts
    assert "exchange of gradients" not in parts
    made = ("gradients", "activations", "workspace")
    assert sum(parts.get(name, 0) for name in made) == trace.peak_bytes
    tensors = sum(parts.values()) - parts["context, libraries, gaps"]
    assert parts["context, libraries, gaps"] == CONTEXT_BYTES + round(LOST_SHARE * tensors)


def test_more_is_held_where_asked_for():
    trace, alone = SETTINGS.trace(), memory_parts(SETTINGS, SETTINGS.trace())
    averaged = memory_parts(replace(SETTINGS, averaged=True), trace)
    assert averaged["averaged weights"] == trace.weight_bytes
    several = memory_parts(replace(SETTINGS, gpus=2), trace)
    assert several["exchange of gradients"] == trace.weight_bytes
    batches = memory_parts(replace(SETTINGS, accumulate=2), trace)
    # Those of earlier batches are there all the time.
    assert batches["gradients"] == trace.weight_bytes > alone.get("gradients", 0)


def test_options_save_memory():
    settings = Settings(VideoMAEConfig.of("base", depth=3, decoder_depth=2), 16)
    held = [
        make_plan(replace(settings, **change), H200).memory["activations"]
        for change in (
            {"precision": "fp32"},
            {},
            {"residual": "bf16"},
            {"checkpointing": "mlp"},
            {"checkpointing": "block"},
        )
    ]
    assert all(less < 0.95 * more for more, less in pairwise(held))


@pytest.mark.parametrize(
    ("needed", "limit"),
    [
        (lambda n: 10 + 3 * n, 100),
        (lambda n: 10 + 3 * n, 12),
        (lambda n: 10 + 3 * n + (50 if n > 5 else 0), 100),
        (lambda n: 5 * n + (0 if n < 200 else 100), 1337),
        (lambda n: 1000 + 0.5 * n, 1200),
        (lambda n: 1e9 * n, 1e8),
        (lambda n: 7 * n, 7),
    ],
)
def test_largest_is_the_last_that_fits(needed, limit):
    truth = max((n for n in range(1, 5000) if needed(n) <= limit), default=0)
    assert _largest(needed, limit, 32, needed(32) / 32) == truth


def test_largest_batch_fits_and_one_more_does_not():
    gpu = Gpu("small", 1.2, 100, 10, 1)
    plan = make_plan(SETTINGS, gpu)
    largest = plan.largest_batch
    assert largest > 4
    limit = gpu.memory_gib * 2**30
    for batch, fits in ((largest, True), (largest + 1, False)):
        one = make_plan(replace(SETTINGS, batch=batch), gpu)
        assert (one.memory_bytes <= limit) == one.fits == fits
    assert make_plan(SETTINGS, replace(gpu, memory_gib=0.5)).largest_batch == 0


# ---- time ---------------------------------------------------------------------------------


def test_roofline_by_hand():
    calls = (
        call("product", 100, 7),  # operations, and a pass beside them
        call("attention", 30, 50),  # bound by bytes
        call("attention", 60, 50),  # bound by operations
        call("pass", 0, 11),
    )
    time = StepTime.of(trace_of(*calls, parameters=2), UNIT, accumulate=3)
    assert (time.products, time.attention, time.passes) == pytest.approx((300, 330, 54))
    # Weight, gradient and two moments read, all but the gradient written, the norm's reading.
    assert time.optimizer == pytest.approx(2 * (16 + 12 + 4))
    assert time.total == pytest.approx(300 + 330 + 54 + 64)


def test_hours():
    plan = make_plan(replace(SETTINGS, gpus=2), H200, efficiency=Efficiency(0.5, "said"), clips=1e6)
    assert plan.compute_ms == pytest.approx(2 * plan.floor.total)
    assert plan.step_ms == pytest.approx(plan.compute_ms + plan.exchange.exposed_ms)
    assert plan.clips_per_s == pytest.approx(8 / (plan.step_ms / 1e3))
    assert plan.hours == pytest.approx(1e6 / plan.clips_per_s / 3600)
    flops = 6 * published_macs(TINY) * plan.clips_per_s
    assert plan.model_flop_utilization == pytest.approx(flops / (2 * 989e12))
    assert make_plan(SETTINGS, H200).hours is None


@pytest.mark.parametrize(
    ("size", "decoder_ratio", "published"),
    [("base", 0.0, 35.48), ("base", 0.5, 25.87), ("base", 0.75, 21.06),
     ("giant", 0.0, 263.93), ("giant", 0.5, 241.61)],
)  # fmt: skip
def test_macs_are_the_published_ones(size, decoder_ratio, published):
    config = VideoMAEConfig.of(size, decoder_mask_ratio=decoder_ratio)
    assert published_macs(config) / 1e9 == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize(("size", "millions"), [("base", 86), ("large", 304), ("giant", 1011)])
def test_parameters(size, millions):
    found = parameters_of(VideoMAEConfig.of(size))
    assert round(found["encoder"] / 1e6) == pytest.approx(millions, abs=1)
    assert 0 < found["decoder"] < found["encoder"]


# ---- measured -----------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """A folder with a step of base measured on an H200, and one on another GPU."""
    row = {"op": "step base v1", "direction": "graph, fp32 residual", "clips": 2, "time_ms": 10.0}
    slow = row | {"direction": "launched, fp32 residual", "time_ms": 30.0}
    other = row | {"direction": "graph, bf16 residual", "time_ms": 5.0}
    ceilings = {"copy_gb_per_s": 4000.0, "matmul_tflop_per_s": 700.0, "matmul_dtype": "bfloat16"}
    for device, rows in (("NVIDIA H200", [slow, row, other]), ("NVIDIA A100-SXM4-80GB", [])):
        folder = tmp_path / device
        folder.mkdir()
        kept = {"environment": {"device": device}, "ceilings": ceilings, "rows": rows}
        (folder / "step_base_v1.json").write_text(json.dumps(kept))
    return tmp_path


def test_measured_rates_take_the_place_of_assumed_ones(results):
    rates = measured_rates(results, H200, "bf16")
    assert (rates.matmul_tflop_per_s, rates.copy_gb_per_s) == (700, 4000)
    assert rates.source.startswith("measured")
    assert measured_rates(results, H200, "fp32") is None
    assert measured_rates(results, find_gpu("h100"), "bf16") is None
    # An A100's are not an A10's.
    assert measured_rates(results, find_gpu("a10"), "bf16") is None


def test_the_share_reached_is_that_of_the_quickest_measured_step(results):
    rates = measured_rates(results, H200, "bf16")
    wanted = Settings(VideoMAEConfig.of("small"), 3)
    found = measured_efficiency(results, H200, rates, wanted)
    base = Settings(VideoMAEConfig.of("base"), 2)
    assert found.measured
    assert found.share == pytest.approx(StepTime.of(base.trace(), rates).total / 10.0)
    assert "step_base_v1.json" in found.source
    for settings in (replace(wanted, precision="fp32"),):
        assert not measured_efficiency(results, H200, rates, settings).measured
    assert not measured_efficiency(results, find_gpu("b200"), rates, wanted).measured


def test_a_file_that_holds_no_results_is_named(results):
    (results / "NVIDIA H200" / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"other\.json is not a result file"):
        measured_rates(results, H200, "bf16")


# ---- what it says -------------------------------------------------------------------------


def test_the_text_holds_what_the_plan_does():
    plan = make_plan(replace(SETTINGS, gpus=2), H200, clips=1e12)
    assert plan.hours > 100
    text = describe(plan) + "\n"
    for words in (
        "2 x H200",
        f"{plan.trace.num_parameters / 1e6:.1f} M",
        f"{plan.memory_bytes / 2**30:,.2f} GiB",
        f"{plan.largest_batch:,} clips",
        f"{plan.step_ms:,.1f} ms",
        f"{plan.hours:,.1f} h",
        f" {2 * plan.hours:,.0f}\n",
        "not yet measured",
        "fits",
    ):
        assert words in text, words
    assert all(len(line) <= 100 for line in text.splitlines())
    nothing = describe(make_plan(SETTINGS, replace(H200, memory_gib=0.1)))
    assert "DOES NOT FIT" in nothing
    assert "not even one clip fits" in nothing
    assert "the run" not in nothing


def test_errors():
    with pytest.raises(ValueError, match=r"gpu must be one of .*h200.*, got 'h300'"):
        find_gpu("h300")
    assert find_gpu("NVIDIA-H200") is GPUS["h200"]
    for change, words in (
        ({"batch": 0}, "batch must be at least 1"),
        ({"gpus": 0}, "gpus must be at least 1"),
        ({"residual": "bf16", "precision": "fp32"}, "goes with precision bf16"),
        ({"config": VideoMAEConfig.of("tiny", decoder_depth=0)}, "has no decoder"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(SETTINGS, **change)


def test_every_gpu_of_the_table_is_sensible():
    for gpu in GPUS.values():
        rates = Rates.assumed(gpu, "bf16")
        assert rates.matmul_tflop_per_s < gpu.bf16_tflop_per_s
        assert rates.attention_tflop_per_s < rates.matmul_tflop_per_s
        assert rates.copy_gb_per_s < gpu.bandwidth_gb_per_s
        # Operations a byte: what tells a slip of a factor of ten.
        assert 50 < 1e3 * gpu.bf16_tflop_per_s / gpu.bandwidth_gb_per_s < 500
        assert math.isfinite(gpu.fp32_tflop_per_s)
