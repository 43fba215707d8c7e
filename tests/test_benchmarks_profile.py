"""profile_step.py on a CPU: what it prints and writes, and of which step."""

import gzip
import json

import profile_step
import pytest
import torch

from vmae_fast.train.profile import Trace


def test_a_step_is_profiled(tmp_path, capsys, monkeypatch):
    cases = []
    made = profile_step.training_step

    def noting(case, *rest):
        cases.append((case, *rest))
        return made(case, *rest)

    monkeypatch.setattr(profile_step, "training_step", noting)
    monkeypatch.setattr(profile_step, "DEVICE", torch.device("cpu"))
    arguments = ["--size", "tiny", "--clips", "2", "--v2", "--residual", "fp32", "--steps", "2"]
    assert profile_step.main([*arguments, "--out", str(tmp_path)]) == 0
    ((case, launch, residual, clips, *_),) = cases
    assert case.config.decoder_mask_ratio == 0.5
    assert (case.size, launch, residual, clips) == ("tiny", "launched", "fp32", 2)

    said = capsys.readouterr().out
    summary = (tmp_path / "summary.txt").read_text()
    assert said.startswith(summary)
    assert said.endswith(f"wrote {tmp_path / 'trace.json.gz'} and {tmp_path / 'summary.txt'}\n")
    title = "tiny, V2 masks, 2 clips, launched, bf16 autocast, fp32 residual, on cpu\n"
    assert summary.startswith(title)
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        trace = Trace(json.load(file)["traceEvents"], 2)
    calls = {row.name: row.calls for kind in ("phase", "block", "op") for row in trace.ranges(kind)}
    # Those that warmed up are not in it.
    assert calls["step"] == calls["backward"] == calls["encoder.blocks.0 backward"] == 2
    assert calls["vmae_fast::linear_masked_mse"] == 2
    assert sum(row.percent for row in trace.kernels()) == pytest.approx(100)
    listed = {row.name: row for row in trace.ranges("phase")}
    # A step is all that there is, forward and backward pass are most of it.
    assert listed["step"].percent > 90
    assert listed["forward"].ms + listed["backward"].ms > listed["step"].ms / 2


def test_a_graph_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(profile_step, "DEVICE", torch.device("cpu"))
    with pytest.raises(SystemExit):
        profile_step.main(["--size", "tiny", "--graph"])
    assert "--graph needs a GPU" in capsys.readouterr().err
