"""The memory table at toy sizes: slopes, the plain model's tracing, the picture."""

import json

import memory_cases as cases
import plain_videomae
import plot
import plot_memory
import pytest
import test_memory_tables as tables
import torch
from torch._subclasses.fake_tensor import FakeTensor

from vmae_fast import VideoMAEConfig

TOY = {
    "frames": 8, "image_size": 32, "in_channels": 1, "patch_size": 8,
    "width": 128, "depth": 2, "heads": 2, "mlp_dim": 300,
    "decoder_width": 64, "decoder_depth": 2, "decoder_heads": 1, "decoder_mlp_dim": 140,
}  # fmt: skip


@pytest.mark.parametrize("name", ["ours", "plain"])
def test_what_is_counted_is_what_is_measured(name):
    row = tables.small_row(name, 0.5, clips=24, **TOY)
    assert row["kept_percent_off"] == pytest.approx(0, abs=2)
    assert row["peak_percent_off"] == pytest.approx(0, abs=tables.AIM_PERCENT)


def test_nothing_without_data_is_left_in_the_plain_model():
    plain_videomae.positions.cache_clear()
    config = VideoMAEConfig(**TOY)
    trace = cases.traced(config, 2, cases.plain(plain_videomae.sdpa))
    assert trace.kept_bytes > 0
    for width in (config.width, config.decoder_width):
        table = plain_videomae.positions(config.num_tokens, width, torch.device("cpu"))
        assert not isinstance(table, FakeTensor)
        assert table.abs().sum() > 0


def test_a_slope_that_is_not_constant_is_an_error():
    config = VideoMAEConfig(**TOY)
    peak, kept = cases.per_clip(config, "ours, bf16", (16, 32, 64))
    assert 0 < kept < peak
    # Below, mask tokens are not shared, and gradients alone are the peak.
    with pytest.raises(AssertionError, match="not constant"):
        cases.per_clip(config, "ours, bf16", (1, 2, 64))


def test_attention_written_out_keeps_what_autocast_on_a_gpu_does():
    """Softmax in fp32 and its narrow copy: 6 bytes a pair and head where a CPU's keeps 2."""
    qkv = torch.randn(2, 24, 3 * 16, requires_grad=True)
    expected = plain_videomae.written_out(qkv, 2)
    assert torch.equal(cases.written_out_on_a_gpu(qkv, 2), expected)
    config, kept = VideoMAEConfig(**TOY), {}
    for attend in (plain_videomae.written_out, cases.written_out_on_a_gpu):
        loss = cases.plain(attend)
        kept[attend] = cases.traced(config, 8, loss, autocast_dtype=torch.bfloat16).kept_bytes
    on_cpu, on_gpu = kept.values()
    seen = config.masking.num_visible
    tokens = seen + config.masking.num_decoded
    pairs = 8 * (config.depth * config.heads * seen**2 + config.decoder_depth * tokens**2)
    assert on_gpu - on_cpu == pytest.approx(4 * pairs, rel=0.02)


def test_rows_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "CLIPS", (16, 24))
    monkeypatch.setattr(cases, "SIZES", {"base": TOY | {"depth": 1, "decoder_depth": 1}})
    slopes = cases.per_clip(cases.config_of("base", "dual"), "ours, bf16", cases.CLIPS)
    rows = [cases.row_of("base", way) for way in plot_memory.COLOURS]
    row = next(row for row in rows if row["model"] == "ours, bf16")
    assert (row["peak_dual_mb"], row["kept_dual_mb"]) == tuple(one / 1e6 for one in slopes)
    assert row["published_ratio"] == pytest.approx(0.52, abs=0.005)
    assert 0 < row["kept_ratio"] < 1
    assert row["kept_saved_mb"] == pytest.approx(
        row["kept_encoder_only_mb"] * (1 - row["kept_ratio"])
    )
    monkeypatch.setattr(cases, "PUBLISHED_MB", {})
    assert cases.row_of("base", "ours, bf16")["published_ratio"] is None
    file = tmp_path / "published" / "memory_dual_masking.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"environment": {}, "what": "toys", "a_clip": rows}))
    (picture,) = plot.main(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
