"""Profiling a run: which steps, what is written, and that the run stays the same."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from vmae_fast import cli, profiling
from vmae_fast.train import load_config, pretrain, profile, setup
from vmae_fast.train.loop import Pretraining
from vmae_fast.train.profile import ProfiledSteps, Recorder, Row, Trace, first_rows, steady_steps

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("first", "total", "steps"),
    [
        (0, 100, range(6, 9)),
        (40, 100, range(46, 49)),
        (0, 9, range(6, 9)),
        (0, 8, range(5, 8)),
        (0, 2, range(2)),
        (5, 5, range(0)),
    ],
)
def test_steady_steps_are_recorded(first, total, steps):
    assert steady_steps(first, total) == steps


def test_pretrain_profile_from_the_command_line(videos, tmp_path, capsys, monkeypatch):
    """Ten steps, of which the seventh to the ninth are recorded, beside the same run without."""
    monkeypatch.setattr("vmae_fast.commands.pretrain._pictures", lambda *_: [])
    out = tmp_path / "run"
    arguments = [
        "pretrain", "--data", str(videos), "--model", "tiny", "--frames", "4", "--image-size", "32",
        "--stride", "2", "--batch-size", "2", "--micro-batch", "1", "--steps", "10",
        "--warmup-steps", "1", "--lr", "1e-3", "--workers", "0", "--device", "cpu",
        "--val", "0.125", "--val-every", "9", "--save-every", "9", "--out", str(out), "--profile",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out

    config = load_config(out / "config.toml")
    assert not config.run.profile
    config.run.out = str(tmp_path / "other")
    other = pretrain(config)
    assert other.profile == ()
    assert not (other.path / "profile").exists()
    weights = load_file(out / "checkpoints/step-00000010/model.safetensors")
    expected = load_file(other.checkpoint / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)

    folder = out / "profile"
    assert sorted(file.name for file in folder.iterdir()) == ["summary.txt", "trace.json.gz"]
    wrote = said.partition("wrote\n")[2]
    assert f"profile trace    {folder / 'trace.json.gz'}" in wrote
    assert f"profile summary  {folder / 'summary.txt'}" in wrote
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        trace = Trace(json.load(file)["traceEvents"], 3)
    calls = {row.name: row.calls for kind in ("phase", "block", "op") for row in trace.ranges(kind)}
    # Two micro-batches a step; validation and a checkpoint after the ninth step.
    assert (calls["step"], calls["update"], calls["validate"], calls["save"]) == (3, 3, 1, 1)
    assert calls["wait for clips"] == calls["backward"] == 6
    assert calls["encoder.blocks.0 backward"] == 6
    assert calls["vmae_fast::attention_backward"] > 6
    assert calls["read figures"] >= 3
    summary = (folder / "summary.txt").read_text()
    assert summary.startswith("steps 7 to 9 of a run on cpu\n")
    for part in ("aten::mm", "encoder.blocks.0", "vmae_fast::attention", "wait for clips"):
        assert part in summary
    assert "not steady" not in summary


def test_a_short_run_says_so(config, capsys):
    config.run.profile, config.optim.steps, config.optim.warmup_steps = True, 2, 0
    result = pretrain(config)
    trace, summary = result.profile
    assert trace.is_file()
    note = "not steady yet (that takes 6 steps)"
    assert f"--profile: steps 1 to 2, {note}\n" in capsys.readouterr().err
    assert summary.read_text().startswith(f"steps 1 to 2 of a run on cpu, {note}\n")
    assert not profiling.enabled()


def run_of(config, start, total, main):
    said = []
    fake = SimpleNamespace(
        setup=SimpleNamespace(start_step=start, folder=SimpleNamespace(path=Path("run"))),
        schedule=SimpleNamespace(total_steps=total),
        config=config,
        ranks=SimpleNamespace(is_main=main, device=CPU),
        metrics=SimpleNamespace(say=said.append),
    )
    return Pretraining._profile(fake).steps, said


def test_the_main_process_records_and_says_where_nothing_is_left(config):
    config.run.profile = True
    assert run_of(config, 0, 100, True) == (range(6, 9), [])
    assert not run_of(config, 0, 100, False)[0]
    steps, said = run_of(config, 8, 8, True)
    assert (len(steps), said) == (0, ["--profile: no step is left to record"])
    config.run.profile = False
    assert not run_of(config, 0, 100, True)[0]


@pytest.mark.parametrize(
    ("profiled", "asked", "got"),
    [(False, "auto", "auto"), (True, "auto", "off"), (True, "on", "on"), (True, "off", "off")],
)
def test_profiled_steps_are_launched(config, monkeypatch, profiled, asked, got):
    class Seen(Exception):
        pass

    def choose(setting, *_):
        raise Seen(setting)

    monkeypatch.setattr(setup, "choose_capture", choose)
    config.run.profile, config.run.cuda_graph = profiled, asked
    with pytest.raises(Seen, match=f"^{got}$"):
        pretrain(config)


# ---- a loop of one's own ------------------------------------------------------------------


def loop(steps, total, folder):
    """What a run does, with a step of a single op."""
    with ProfiledSteps(steps, CPU, folder) as profiled:
        for step in range(total):
            profiled.at(step)
            with profiling.span("step"):
                torch.ones(step + 1).cumsum(0)
        profiled.finish(total)
    assert not profiling.enabled()
    return profiled.written


def test_only_the_asked_steps_are_recorded(tmp_path):
    assert loop(range(0), 5, tmp_path) == ()
    trace, summary = loop(range(2, 4), 5, tmp_path)
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "aten::cumsum" for event in events) == 2
    assert summary.read_text().startswith("steps 3 to 4 of a run on cpu")
    # As a request to stop does.
    _, summary = loop(range(2, 9), 5, tmp_path)
    assert summary.read_text().startswith("steps 3 to 5 of a run on cpu")


def test_a_profile_that_cannot_be_written_is_one_line(tmp_path):
    folder, said = tmp_path / "file", []
    folder.touch()
    with ProfiledSteps(range(1), CPU, folder, say=said.append) as profiled:
        for step in range(2):
            profiled.at(step)
            torch.ones(3).sum()
    (line,) = said
    assert line.startswith("--profile: the profile could not be written: ")
    assert profiled.written == ()


def test_an_error_drops_the_recording(tmp_path):
    profiled = ProfiledSteps(range(3), CPU, tmp_path)

    def broken():
        with profiled:
            profiled.at(0)
            assert profiling.enabled()
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert not profiling.enabled()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("outside", ["0", "1"])
def test_on_a_gpu_nsight_s_tools_are_told(monkeypatch, outside):
    done = []

    class Profile:
        def __init__(self, activities):
            done.append([str(one).rpartition(".")[2] for one in activities])

        def start(self):
            done.append("profile")

        def stop(self):
            done.append("end of profile")

        def export_chrome_trace(self, file):
            with open(file, "w") as into:
                into.write('{"traceEvents": []}')

    monkeypatch.setenv("VMAE_FAST_NVTX", outside)
    monkeypatch.setattr(profile, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: done.append("mark"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: done.append("end of mark"))
    recorder = Recorder(torch.device("cuda"))
    recorder.start()
    assert recorder.stop() == []
    activities = ["CPU"] if outside == "1" else ["CPU", "CUDA"]
    assert done == [
        activities, "wait", "profile", "mark", "wait", "end of mark", "end of profile"
    ]  # fmt: skip


# ---- tables -------------------------------------------------------------------------------


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def gpu_trace():
    """Two kernels and a copy of 300 us in all; the device idles for 40 and for 10."""
    return [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "forward", 0, 60),
        event("user_annotation", "encoder.blocks.0", 5, 30),
        event("user_annotation", "backward", 70, 30),
        event("user_annotation", "Optimizer.step#AdamW.step", 70, 30),
        event("cuda_runtime", "cudaLaunchKernel", 10, 5, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 40, 5, correlation=2),
        # As autograd's thread does.
        event("cuda_runtime", "cudaMemcpyAsync", 80, 5, tid=2, correlation=3),
        event("kernel", "gemm", 100, 150, tid=7, correlation=1),
        event("kernel", "gemm", 290, 50, tid=7, correlation=2),
        event("gpu_memcpy", "Memcpy DtoD", 350, 100, tid=8, correlation=3),
        event("cpu_op", "aten::mm", 8, 20),
    ]


def test_kernels_are_counted_where_they_were_launched():
    trace = Trace(gpu_trace(), 2)
    assert trace.on_device
    assert trace.kernels() == [
        Row("gemm", 2, 0.2, pytest.approx(200 / 3)),
        Row("Memcpy DtoD", 1, 0.1, pytest.approx(100 / 3)),
    ]
    assert trace.ranges("phase") == [
        Row("forward", 1, 0.2, pytest.approx(200 / 3)),
        Row("backward", 1, 0.1, pytest.approx(100 / 3)),
    ]
    assert trace.ranges("block") == [Row("encoder.blocks.0", 1, 0.15, pytest.approx(50))]
    assert trace.ranges("op") == []


def test_gaps_are_where_nothing_runs():
    trace = Trace(gpu_trace(), 2)
    assert trace.window_ms() == pytest.approx(0.35)
    assert trace.gaps() == [
        (pytest.approx(0.04), "gemm", "gemm"),
        (pytest.approx(0.01), "gemm", "Memcpy DtoD"),
    ]
    summary = trace.summary("a title")
    assert "a title\ncalls and ms are of 2 step(s) together: 0.350 ms, 0.175 a step\n" in summary
    assert "idle for 0.050 ms, 14.3%, in 2 gaps\n  0.040 ms between gemm and gemm\n" in summary
    # A second stream fills the gap.
    filled = Trace([*gpu_trace(), event("kernel", "other", 240, 60, tid=9, correlation=4)])
    assert filled.gaps() == [(pytest.approx(0.01), "gemm", "Memcpy DtoD")]
    # One that outlasts those after it.
    covered = Trace([*gpu_trace(), event("kernel", "other", 90, 400, tid=9, correlation=4)])
    assert covered.gaps() == []


def test_without_a_gpu_operators_count_less_what_they_call():
    events = [
        event("cpu_op", "aten::linear", 0, 100),
        event("cpu_op", "aten::t", 10, 20),
        event("cpu_op", "aten::mm", 40, 50),
        event("cpu_op", "aten::copy_", 45, 10),
        event("cpu_op", "aten::t", 100, 5),
        # Beside them, on a thread of its own.
        event("cpu_op", "aten::mm", 20, 7, tid=2),
        event("user_annotation", "forward", 0, 42),
    ]
    trace = Trace(events)
    own = {row.name: (row.calls, row.ms) for row in trace.kernels()}
    assert own == {
        "aten::linear": (1, pytest.approx(0.03)),
        "aten::t": (2, pytest.approx(0.025)),
        "aten::mm": (2, pytest.approx(0.047)),
        "aten::copy_": (1, pytest.approx(0.01)),
    }
    assert trace.kernels()[0].name == "aten::mm"
    assert trace.ranges("phase") == [Row("forward", 1, 0.042, pytest.approx(40))]
    assert "no GPU was recorded" in trace.summary("")


def test_what_is_not_listed_is_summed_up():
    rows = [Row("a", 1, 4.0, 40.0), Row("b", 2, 3.5, 35.0), Row("c", 3, 2.5, 25.0)]
    assert first_rows(rows, 1) == [rows[0], Row("all others", 5, 6.0, 60.0)]
    assert first_rows(rows, 3) == rows


def test_an_empty_trace_has_a_summary():
    assert "0.000 ms" in Trace([]).summary("nothing")
