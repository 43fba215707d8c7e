"""What a run's log says a step takes of memory; the figures themselves: tests/plan."""

import re

import torch

from vmae_fast import VideoMAE, VideoMAEConfig
from vmae_fast.plan.trace import trace_step
from vmae_fast.train.memory import memory_report

LOW = torch.bfloat16
BATCH = 512
CONFIG = VideoMAEConfig(
    frames=8, image_size=32, patch_size=8, width=64, depth=3, heads=2, mlp_dim=176,
    decoder_width=32, decoder_depth=2, decoder_heads=1, decoder_mlp_dim=70, mask_ratio=0.75,
)  # fmt: skip


def kept_mib(model, autocast_dtype):
    """What the report says is kept, a whole number of MiB."""
    line = memory_report(model, BATCH, autocast_dtype, averaged=False)
    found = re.search(rf"([0-9,]+) MiB kept for the backward pass of {BATCH} clips$", line)
    return int(found[1].replace(",", ""))


def test_each_option_saves():
    model = VideoMAE(CONFIG)
    found = {}
    for model.checkpointing in ("none", "mlp", "block"):
        for model.residual_dtype in (None, LOW):
            found[model.checkpointing, model.residual_dtype] = kept_mib(model, LOW)
    for one, less in (("none", "mlp"), ("mlp", "block")):
        for dtype in (None, LOW):
            assert found[less, dtype] < 0.8 * found[one, dtype]
    for what in ("none", "mlp", "block"):
        assert found[what, LOW] < 0.95 * found[what, None]
    model.residual_dtype = None
    assert found["block", None] < kept_mib(model, None)


def test_the_report():
    model = VideoMAE("base", image_size=64)
    state = torch.get_rng_state()
    line = memory_report(model, 2, None, averaged=True)
    assert torch.equal(torch.get_rng_state(), state)
    weights = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    kept = trace_step(model.config, 2, backward=False).kept_bytes / 2**20
    assert line.startswith("memory: ")
    assert f"{weights:,.0f} MiB weights, {weights:,.0f} MiB gradients" in line
    assert f"{2 * weights:,.0f} MiB AdamW, {weights:,.0f} MiB averaged weights" in line
    assert line.endswith(f", {kept:,.0f} MiB kept for the backward pass of 2 clips")
    assert f"memory: {5 * weights + kept:,.0f} MiB = " in line
    assert "averaged" not in memory_report(model, 2, None, averaged=False)
