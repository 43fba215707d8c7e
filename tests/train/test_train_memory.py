"""What a step takes of memory, as worked out, against what the allocator hands out."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vmae_fast import VideoMAE, VideoMAEConfig
from vmae_fast.train.memory import activation_bytes, memory_report

LOW = torch.bfloat16
CONFIG = VideoMAEConfig(
    frames=8, image_size=32, patch_size=8, width=64, depth=3, heads=2, mlp_dim=176,
    decoder_width=32, decoder_depth=2, decoder_heads=1, decoder_mlp_dim=70, mask_ratio=0.75,
)  # fmt: skip
BATCH = 4


def allocated_bytes(model, autocast_dtype):
    """What tensors take after a forward pass, above what they took before."""
    video = torch.randint(0, 256, (BATCH, 3, 8, 32, 32), dtype=torch.uint8)
    keys = torch.arange(BATCH)
    autocast = torch.autocast("cpu", autocast_dtype or LOW, enabled=autocast_dtype is not None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, autocast:
        loss = model(video, model.masking(keys)).loss
    assert loss.requires_grad
    events = seen.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("checkpointing", ["none", "mlp", "block"])
@pytest.mark.parametrize(
    ("autocast_dtype", "residual_dtype"), [(None, None), (LOW, None), (LOW, LOW)], ids=str
)
def test_activations_are_what_is_allocated(checkpointing, autocast_dtype, residual_dtype):
    model = VideoMAE(CONFIG, decoder_mask_ratio=0.5, init_values=0.1, drop_path=0.2)
    model.checkpointing, model.residual_dtype = checkpointing, residual_dtype
    state = torch.get_rng_state()
    expected = activation_bytes(model, BATCH, autocast_dtype)
    assert torch.equal(torch.get_rng_state(), state)
    allocated_bytes(model, autocast_dtype)
    assert allocated_bytes(model, autocast_dtype) == pytest.approx(expected, rel=0.02)


def test_each_option_saves():
    model = VideoMAE(CONFIG)
    found = {}
    for model.checkpointing in ("none", "mlp", "block"):
        for model.residual_dtype in (None, LOW):
            found[model.checkpointing, model.residual_dtype] = activation_bytes(model, BATCH, LOW)
    for one, less in (("none", "mlp"), ("mlp", "block")):
        for dtype in (None, LOW):
            assert found[less, dtype] < 0.8 * found[one, dtype]
    for what in ("none", "mlp", "block"):
        assert found[what, LOW] < 0.95 * found[what, None]


def test_the_report():
    model = VideoMAE("base", image_size=64)
    line = memory_report(model, 2, None, averaged=True)
    weights = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    assert line.startswith("memory: ")
    assert f"{weights:,.0f} MiB weights, {weights:,.0f} MiB gradients" in line
    assert f"{2 * weights:,.0f} MiB AdamW, {weights:,.0f} MiB averaged weights" in line
    assert line.endswith("MiB kept for the backward pass of 2 clips")
    total = 5 * weights + activation_bytes(model, 2, None) / 2**20
    assert f"memory: {total:,.0f} MiB = " in line
    assert "averaged" not in memory_report(model, 2, None, averaged=False)
