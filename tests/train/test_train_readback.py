"""Figures that are read some steps late: rows, bad steps and what else hangs on them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vmae_fast.data import DataError
from vmae_fast.train import ConfigError, RunError, pretrain
from vmae_fast.train.inputs import Inputs
from vmae_fast.train.loop import Pretraining
from vmae_fast.train.metrics import read_metrics
from vmae_fast.train.readback import LAG, Readback
from vmae_fast.train.step import TrainStep

TIMES = ("clips_per_s", "data_wait")


def weights(path):
    return load_file(path / "model.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def rows_of(path):
    """A run's rows without what differs from run to run."""
    rows = read_metrics(Path(path) / "metrics.jsonl")
    return [{name: row[name] for name in row if name not in TIMES} for row in rows]


def nan_at(monkeypatch, *steps):
    """Let the loss of a run's steps, counted from 0, be NaN; returns the steps launched."""
    forward_backward = TrainStep.forward_backward
    launched = []

    def poisoned(self, video, keys, share=None, number=0):
        share = float("nan") if len(launched) in steps else share
        launched.append(len(launched))
        forward_backward(self, video, keys, share, number)

    monkeypatch.setattr(TrainStep, "forward_backward", poisoned)
    return launched


def test_values_come_late_in_order_and_as_they_were():
    ring = Readback(lag=2)
    values = torch.zeros(2)
    came = []
    for step in range(5):
        values.copy_(torch.tensor([step, 2.0 * step]))
        ring.put(f"step {step}", values)
        came.append(list(ring.take()))
    assert came == [[], [], *[[(f"step {step}", [step, 2.0 * step])] for step in range(3)]]
    assert [record for record, _ in ring.take(everything=True)] == ["step 3", "step 4"]
    ring.put("step 5", values)
    ring.clear()
    assert not list(ring.take(everything=True))


def test_the_lag_changes_no_row(config, tmp_path, monkeypatch):
    config.run.log_every, config.run.save_every, config.run.val_every = 2, 5, 3
    rows = []
    config.loading.cache = True
    for lag in (1, LAG):
        monkeypatch.setattr(Readback.__init__, "__defaults__", (lag,))
        config.run.out = str(tmp_path / f"lag{lag}")
        pretrain(config)
        rows.append(rows_of(config.run.out))
    assert rows[1] == rows[0]
    figures = [(row["step"], "val_loss" in row) for row in rows[0]]
    assert figures == [(0, False), (2, False), (3, True), (4, False), (6, False), (6, True),
                       (8, False), (8, True)]  # fmt: skip


def test_a_loss_that_is_not_finite_stops_with_evidence(config, monkeypatch):
    config.run.save_every = 1
    config.run.keep = 8
    nan_at(monkeypatch, 5)
    with pytest.raises(RunError, match=r"step 5: loss nan.*not finite"):
        pretrain(config)
    run = Path(config.run.out)
    evidence = run / "nonfinite-step-00000005"
    # Weights from before the update, the clips that went in, and a state to go on from.
    assert_same_weights(weights(evidence), weights(run / "checkpoints" / "step-00000005"))
    clips = (evidence / "clips.txt").read_text().splitlines()
    assert len(clips) == 8
    assert all(Path(clip).is_file() for clip in clips)
    assert torch.load(evidence / "trainer.pt")["step"] == 5


def test_a_bad_step_is_undone_though_later_ones_were_launched(config, monkeypatch, tmp_path):
    config.optim.ema_decay, config.optim.clip_grad, config.optim.steps = 0.9, 0.5, 12
    config.run.val_every, config.run.save_every = 100, 5
    paths = []
    load = Pretraining._load

    def noted(self, batches, report):
        given = load(self, batches, report)
        paths.append(list(report.paths))
        return given

    monkeypatch.setattr(Pretraining, "_load", noted)
    whole = pretrain(config)
    before, clips = whole.path / "checkpoints" / "step-00000005", paths[5]

    config.run.out, config.run.save_every = str(tmp_path / "bad"), 100
    launched = nan_at(monkeypatch, 5)
    with pytest.raises(RunError, match=r"step 5: loss nan"):
        pretrain(config)
    assert len(launched) == 5 + 1 + LAG
    evidence = Path(config.run.out) / "nonfinite-step-00000005"
    for folder in ("", "ema"):
        assert_same_weights(weights(evidence / folder), weights(before / folder))
    states = [torch.load(path / "trainer.pt") for path in (before, evidence)]
    assert states[0]["step"] == states[1]["step"]
    good, kept = (list(state["optimizer"]["state"].values()) for state in states)
    for a, b in zip(good, kept, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert (evidence / "clips.txt").read_text().splitlines() == clips
    # Of the features before the first step, and of the five that count.
    assert rows_of(config.run.out) == rows_of(whole.path)[: 1 + 5]


def skipped_by_step(result):
    return [row.get("skipped", 0) for row in rows_of(result.path) if "loss" in row]


def test_some_bad_steps_may_be_skipped(config, monkeypatch, capsys):
    config.run.save_every, config.run.keep, config.run.val_every = 1, 8, 100
    config.run.skip_nonfinite, config.optim.ema_decay = 2, 0.5
    nan_at(monkeypatch, 3, 4, 6)
    result = pretrain(config)
    assert result.steps == 8
    assert skipped_by_step(result) == [0, 0, 0, 1, 2, 2, 3, 3]
    folders = {k: result.path / "checkpoints" / f"step-{k:08d}" for k in range(1, 9)}
    for skipped in (4, 5, 7):
        for part in ("", "ema"):
            before, after = (weights(folders[k] / part) for k in (skipped - 1, skipped))
            assert_same_weights(before, after)
    moved = weights(folders[6]), weights(folders[5])
    assert any(not torch.equal(moved[0][name], moved[1][name]) for name in moved[0])
    state = torch.load(folders[8] / "trainer.pt")
    assert state["skipped"] == 3
    assert {float(kept["step"]) for kept in state["optimizer"]["state"].values()} == {8 - 3}
    said = capsys.readouterr().err
    assert "step 5: loss nan" in said
    assert "(2 in a row of at most 2, 2 in all)" in said


def test_more_bad_steps_in_a_row_than_may_be_skipped_end_the_run(config, monkeypatch):
    config.run.save_every, config.run.keep, config.run.val_every = 1, 8, 100
    config.run.skip_nonfinite, config.optim.steps = 2, 12
    launched = nan_at(monkeypatch, 1, 3, 4, 5)
    with pytest.raises(RunError, match=r"step 5: .* not finite, as 2 times in a row before"):
        pretrain(config)
    assert len(launched) < 12
    run = Path(config.run.out)
    evidence = run / "nonfinite-step-00000005"
    assert_same_weights(weights(evidence), weights(run / "checkpoints" / "step-00000003"))
    assert len((evidence / "clips.txt").read_text().splitlines()) == 3 * 8


def test_skipped_steps_are_counted_on_after_a_resume(config, monkeypatch):
    config.run.save_every, config.run.skip_nonfinite = 4, 1
    with monkeypatch.context() as patched:
        nan_at(patched, 1)
        pretrain(config)
    config.optim.steps, config.run.resume = 12, True
    nan_at(monkeypatch, 1)
    result = pretrain(config)
    assert skipped_by_step(result) == [0, *[1] * 8, *[2] * 3]


def test_steps_before_a_failure_keep_their_rows(config, monkeypatch):
    """Whatever ends a run: what was done is in the metrics."""
    batches = Inputs.train_batches

    def failing(self, *args):
        for number, batch in enumerate(batches(self, *args)):
            if number == 3:
                raise DataError("no more")
            yield batch

    monkeypatch.setattr(Inputs, "train_batches", failing)
    with pytest.raises(DataError, match="no more"):
        pretrain(config)
    assert [row["step"] for row in rows_of(config.run.out)] == [0, 1, 2, 3]


def test_the_residual_stream_and_checkpointing_reach_the_model(config):
    config.run.precision, config.run.residual = "bf16", "bf16"
    config.run.checkpointing = "mlp"
    from vmae_fast.train.distributed import Ranks
    from vmae_fast.train.setup import Setup

    model = Setup(config, Ranks(0, 1, torch.device("cpu"))).model
    assert (model.residual_dtype, model.checkpointing) == (torch.bfloat16, "mlp")
    config.run.precision, config.run.overwrite = "auto", True
    with pytest.raises(ConfigError, match=r"--residual bf16 goes with --precision bf16; auto"):
        pretrain(config)
    config.run.residual, config.run.cuda_graph = "fp32", "on"
    with pytest.raises(ConfigError, match="--cuda-graph on: needs a CUDA device, the run is on cp"):
        pretrain(config)


def test_what_cannot_be_recorded_says_why(monkeypatch):
    from vmae_fast import VideoMAE
    from vmae_fast.train.distributed import Ranks
    from vmae_fast.train.graph import why_not

    model = VideoMAE("tiny", frames=4, image_size=32)
    monkeypatch.delenv("VMAE_FAST_DEBUG", raising=False)
    gpu = torch.device("cuda", 0)
    assert why_not(model, Ranks(0, 1, gpu)) is None
    assert "2 processes" in why_not(model, Ranks(0, 2, gpu))
    monkeypatch.setenv("VMAE_FAST_DEBUG", "1")
    assert "VMAE_FAST_DEBUG" in why_not(model, Ranks(0, 1, gpu))
