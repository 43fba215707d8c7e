"""The benchmark of mask ratios, at a toy size: counts, columns, words, picture."""

import json

import plot
import pytest
import report
import test_mask_ratio as ratios
import torch
from torch.utils.flop_counter import FlopCounterMode

# As the benchmark's, with 6 x 6 positions in 2 rows: no ratio hides as many as another.
TOY = {
    "frames": 4, "image_size": 48, "patch_size": 8,
    "width": 32, "depth": 2, "heads": 2, "mlp_dim": 48,
    "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "decoder_mlp_dim": 40,
}  # fmt: skip
CLIPS = 2


@pytest.fixture(scope="module")
def figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ratios, "ROUNDS", 2)
        best = {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": 0.1, "matmul_dtype": "float32"}
        patch.setattr(ratios, "ceilings", lambda _: best)
        found, cheapest = ratios.measure(ratios.Setting("tiny", CLIPS, torch.float32, TOY))
    cheapest()
    return found


def encoder_gflop(visible):
    """Forward and backward of the toy's encoder, written out: 2 operations a multiply-add."""
    tokens, width, hidden, depth, values = CLIPS * visible, 32, 48, 2, 3 * 2 * 8 * 8
    linears = depth * tokens * (4 * width * width + 2 * width * hidden)
    # 2 products of attention forward, 5 backward, where logits are computed again.
    attention = depth * CLIPS * visible**2 * width
    # The video has no gradient: the embedding's backward pass is its weight's only.
    embedding = tokens * values * width
    return 2 * (3 * linears + 7 * attention + 2 * embedding) / 1e9


def test_operations_are_those_of_a_formula(figures):
    for row in figures["ratios"]:
        assert row["encoder_gflop"] == pytest.approx(encoder_gflop(row["visible"]), rel=1e-3)


def test_the_less_is_seen_the_less_is_done(figures):
    rows = figures["ratios"]
    assert [row["ratio"] for row in rows] == list(ratios.RATIOS)
    # Of 36 positions as many are hidden in both rows: 5, 18, 27, 32, 34.
    assert [row["visible"] for row in rows] == [72, 62, 36, 18, 8, 4]
    assert [row["step_visible"] for row in rows] == [70, 62, 36, 18, 8, 4]
    for name in ("encoder_gflop", "step_gflop", "step_papers_gflop"):
        counts = [row[name] for row in rows]
        assert counts == sorted(counts, reverse=True)
        assert len(set(counts)) == len(counts)
    for row in rows:
        assert row["step_peak_mib"] > 0
        rate = row["step_gflop"] / row["step_ms"]
        assert row["step_tflop_per_s"] == pytest.approx(rate, rel=2e-3)
        assert row["step_percent_of_matmul"] == pytest.approx(1000 * rate, rel=2e-3)
        assert row["step_speedup"] == pytest.approx(rows[0]["step_ms"] / row["step_ms"], rel=2e-3)


def test_gradients_are_those_of_a_step(figures):
    """What is timed as a step, and as the encoder of it, gives every parameter its gradient."""
    setting = ratios.Setting("tiny", CLIPS, torch.float32, TOY)
    torch.manual_seed(0)
    model = ratios.VideoMAE(setting.config(0.75))
    video = torch.randint(0, 256, (CLIPS, 3, 4, 48, 48), dtype=torch.uint8)
    keys = torch.arange(CLIPS)
    mask = setting.config(0.75).masking(keys)
    with FlopCounterMode(display=False) as counter:
        found = ratios.step(setting, model, setting.config(0.75).masking, video, keys)
    # Counted without data where it is recorded.
    (row,) = [row for row in figures["ratios"] if row["ratio"] == 0.75]
    assert row["step_gflop"] == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-3)
    model(video, mask).loss.backward()
    for (name, parameter), gradient in zip(model.named_parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, msg=name)
    model.zero_grad()
    (tokens := model.encoder(video, mask.visible_idx)).sum().backward()
    assert tokens.shape[1] == setting.config(0.75).masking.num_visible
    found = ratios.encode(setting, model, mask.visible_idx, video)
    for (name, parameter), gradient in zip(model.encoder.named_parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, msg=name)


def test_what_does_not_fit_is_halved_and_said(monkeypatch):
    tried = []

    def run(setting):
        tried.append(setting.clips)
        if setting.clips > 1:
            raise torch.OutOfMemoryError("no room")
        some = dict.fromkeys(ratios.RATIOS, 1.0)
        return some, some, some, "graph", print

    monkeypatch.setattr(ratios, "run", run)
    monkeypatch.setattr(ratios, "ceilings", lambda _: {})
    found, _ = ratios.measure(ratios.Setting("tiny", 4, torch.float32, TOY))
    assert tried == [4, 2, 1]
    assert "1 clip of 4x48x48 (4 do not fit)" in found["what"]
    assert "hides 2 of 72 tokens" in found["what"]


def test_page_and_picture(figures, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "cpu" / "mask_ratio.json"
    file.parent.mkdir()
    environment = {"date": "2026-01-02", "commit": "abc", "torch": "2", "device": "a CPU"}
    file.write_text(json.dumps({"environment": environment, **figures}))
    assert plot.main(tmp_path) == [file.with_suffix(".png")]
    assert file.with_suffix(".png").stat().st_size > 10_000
    page = report.render(tmp_path)
    assert "/cpu/mask_ratio.png)" in page
    (line,) = [one for one in page.splitlines() if one.startswith("| 0.95 | 4 | 4 |")]
    assert line.count("|") == len(figures["ratios"][0]) + 1
