"""Measuring the CUDA C++ kernels: rows beside Triton's, and the parts of the GPU suite."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import attention_cases
import gpu_suite
import gpu_test_order
import pytest
import report
import rows
import test_attention
import test_tokens
import tools
import torch
from targets import CUDA, CUDA_TARGETS

from vmae_fast.ops import _extension

ROOT = Path(__file__).resolve().parents[1]

# ---- rows -----------------------------------------------------------------------------------


def test_every_cuda_target_is_of_a_row_and_can_be_judged():
    names = {f"{case.name}{CUDA}" for case in attention_cases.TWINS}
    assert {op for op, _ in CUDA_TARGETS} == {*names, f"masked_mse{CUDA}"}
    row = {"time_ms": 0.02, "percent_of_copy": 75, "speedup": {"triton": 1.15}}
    for targets in CUDA_TARGETS.values():
        assert all(target.judge(row)["met"] for target in targets)
        assert any(target.words() == "speedup.triton >= 1.15" for target in targets)
    slow = {"time_ms": 0.06, "percent_of_copy": 74.9, "speedup": {"triton": 1.14}}
    for targets in CUDA_TARGETS.values():
        assert not any(target.judge(slow)["met"] for target in targets)


def test_a_cuda_row_stands_beside_its_twin():
    case = attention_cases.ENCODER.small()
    asked = {"": "auto", " triton": "triton", " cuda": "cuda"}
    measured = test_attention.measure(case, asked, False)
    by_name = {(row["op"], row["direction"]): row for row in measured}
    for direction in ("forward", "backward"):
        mine = by_name[f"{case.name}{CUDA}", direction]
        twin = by_name[f"{case.name} triton", direction]
        assert mine["peers"]["triton"]["time_ms"] == twin["time_ms"]
        assert mine["speedup"]["triton"] == twin["time_ms"] / mine["time_ms"]
        # The best are of others' kernels.
        assert mine["speedup"]["best"] in {mine["speedup"][name] for name in twin["peers"]}
        assert "triton" not in twin["peers"]
        assert report.title(mine) == f"{case.name}{CUDA}"
        assert mine["kernel"] == "CUDA C++"
    told = gpu_suite.told(measured)
    assert {row["op"] for row in told} == {case.name, f"{case.name}{CUDA}"}
    assert {row["direction"] for row in told} == {"forward", "backward"}
    shown = gpu_suite.quickest_peers(by_name[f"{case.name}{CUDA}", "backward"])
    assert "triton" in shown["peers"]
    assert len(shown["peers"]) <= gpu_suite.MOST_PEERS + 1


def test_both_passes_run_by_the_backend_of_the_row(monkeypatch):
    monkeypatch.setattr(test_attention, "CUDA", True)
    asked = []
    monkeypatch.setattr(test_attention, "by_backend", lambda way, name: asked.append(name) or way)
    for name in ("attention 160x12x64 cuda", "attention 160x12x64 triton", "eager", "a"):
        test_attention.way_of(name, None, rows.backward, attention_cases.ENCODER)
    assert asked == ["cuda", "triton"]


@pytest.fixture
def fake_extension(monkeypatch):
    """An extension that does nothing, taken to run here."""
    names = ("short_attention", "short_attention_backward", "masked_mse")
    fake = SimpleNamespace(**{name: lambda *given: None for name in names})
    for module in (test_attention, test_tokens):
        monkeypatch.setattr(module, "without_cuda_kernels", lambda: "")
        monkeypatch.setattr(module, "by_backend", lambda way, name: way)
    monkeypatch.setattr(test_tokens.ops, "backend", lambda name: rows.extension_calls())
    with _extension.use(fake):
        yield fake


def test_a_case_that_the_kernel_does_not_take_has_no_row(fake_extension, monkeypatch):
    case = attention_cases.ENCODER
    monkeypatch.setattr(test_attention, "DTYPE", torch.float32)
    small = case.small()
    assert test_attention.why_no_cuda(small) == "it does not take the case, forward and backward"

    def way(batch):
        return lambda: _extension.extension().short_attention(batch)

    monkeypatch.setattr(test_attention, "forward_and_backward", lambda *given: way)
    assert test_attention.why_no_cuda(small) == "it does not take the case, backward"

    def both(batch):
        extension = _extension.extension()
        return lambda: (extension.short_attention(), extension.short_attention_backward())

    monkeypatch.setattr(test_attention, "forward_and_backward", lambda *given: both)
    assert test_attention.why_no_cuda(small) == ""
    kernels, left_out = test_attention.kernels_for(attention_cases.DECODERS[0])
    assert (list(kernels), left_out) == (["", " triton"], {})


def test_the_loss_has_a_row_for_each_twin(fake_extension, monkeypatch):
    def masked_mse(batch):
        fake = _extension.extension()
        return fake.masked_mse() or batch.pred.square().mean()

    assert test_tokens.why_no_cuda(test_tokens.gather_tokens) == "it does not take these arguments"
    assert test_tokens.why_no_cuda(masked_mse) == ""
    peers = {"eager": lambda batch: batch.pred.square().mean()}
    ours, mine = test_tokens.measure_twins(masked_mse, rows.forward, peers, 1000)
    assert (ours["op"], mine["op"]) == ("masked_mse", "masked_mse cuda")
    assert set(ours["peers"]) == {"eager"}
    assert set(mine["peers"]) == set(mine["speedup"]) == {"eager", "triton"}
    assert ours["left_out"] == {}


def test_calls_into_the_extension_are_seen_and_left_as_they_were(fake_extension):
    before = dict(vars(fake_extension))
    fake_extension.masked_mse = before["masked_mse"] = lambda *given, **more: (given, more)
    with rows.extension_calls() as called:
        assert fake_extension.masked_mse(1, x=2) == ((1,), {"x": 2})
    assert called == ["masked_mse"]
    assert vars(fake_extension) == before


# ---- the suite ------------------------------------------------------------------------------


def run_suite(monkeypatch, tmp_path, *options, seconds=0.0):
    """The suite with parts that do nothing but take their time: name, limit and variables."""
    ran, now = [], [1000.0]
    found = {"compute_capability": "9.0"}
    monkeypatch.delenv("VMAE_FAST_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(gpu_suite, "find_environment", lambda out: found)
    monkeypatch.setattr(gpu_suite, "extension_built", lambda out: "extension for 90a")
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: now[0])

    def run_part(part, command, out, limit_s, variables):
        ran.append((part, limit_s, variables, command))
        now[0] += seconds * limit_s
        return gpu_suite.Outcome(part, 0, passed=1)

    monkeypatch.setattr(gpu_suite, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path), *options])
    return gpu_suite.main(), ran


def test_the_parts_share_the_time(monkeypatch, tmp_path, capsys):
    status, ran = run_suite(monkeypatch, tmp_path, seconds=1.0)
    assert status == 0
    assert [part for part, *_ in ran] == ["build", "tests", "sanitize", "benchmarks"]
    limits = {part: limit_s for part, limit_s, *_ in ran}
    # Where every part takes all it may.
    assert limits["build"] > 180
    assert limits["tests"] > 110
    assert limits["sanitize"] > 55
    assert limits["benchmarks"] > 150
    assert sum(limits.values()) <= 570
    assert ran[0][2] == {"VMAE_FAST_CUDA_ARCHS": "90a"}
    assert ran[1][2] == {}
    lines = capsys.readouterr().out.splitlines()
    assert "    extension for 90a" in lines
    assert any(line.startswith("ncu         skipped") for line in lines)
    for part in ("step", "profile", "ncu"):
        assert any(f"--no-build --only {part} runs it alone" in line for line in lines)
    # The sanitizers know when they have to be done.
    command = ran[2][3]
    assert float(command[command.index("--limit-s") + 1]) < limits["sanitize"]


def test_counters_are_read_where_time_is_left_or_asked_for(monkeypatch, tmp_path):
    _, ran = run_suite(monkeypatch, tmp_path, seconds=0.5)
    assert [part for part, *_ in ran] == [part for part in gpu_suite.PARTS if part != "step"]
    _, ran = run_suite(monkeypatch, tmp_path, "--only", "ncu", "--budget-s", "40")
    assert [part for part, *_ in ran] == ["ncu"]
    _, ran = run_suite(monkeypatch, tmp_path, "--no-build", "--only", "build", "tests", "sanitize")
    assert [part for part, *_ in ran] == ["tests", "sanitize"]


def test_whole_steps_are_timed_where_there_is_time_or_asked_for(monkeypatch, tmp_path):
    _, ran = run_suite(monkeypatch, tmp_path, "--budget-s", "2400", seconds=1.0)
    assert [part for part, *_ in ran] == list(gpu_suite.PARTS[:-2])
    limits = {part: limit_s for part, limit_s, *_ in ran}
    assert limits["step"] >= gpu_suite.LEAST_S["step"]
    assert limits["benchmarks"] > 250
    status, ran = run_suite(monkeypatch, tmp_path, "--no-build", "--only", "step")
    assert [part for part, *_ in ran] == ["step"]
    assert (status, ran[0][1]) == (0, 560)


def test_steps_are_a_part_and_come_first_of_all_with_blocks(tmp_path):
    command = gpu_suite.command_of("benchmarks", tmp_path)
    ignored = f"--ignore={gpu_suite.STEP}"
    assert ignored in command
    assert gpu_suite.command_of("profile", tmp_path)[1].endswith("profile_step.py")
    assert gpu_suite.STEP in gpu_suite.command_of("step", tmp_path)
    done = subprocess.run(
        [*(one for one in command if one not in ("-v", ignored)), "--collect-only", "-q"], cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    names = [line for line in done.stdout.splitlines() if line.startswith("benchmarks/")]
    files = [name.split("::")[0] for name in names]
    ordered = list(dict.fromkeys(files))
    # What is the same on every device is counted without one.
    assert "benchmarks/test_flops_tables.py" not in files
    assert ordered[:3] == [
        gpu_suite.STEP, "benchmarks/test_block.py", "benchmarks/test_attention.py"
    ]  # fmt: skip
    assert (
        "benchmarks/test_tokens.py" in files[: files.index("benchmarks/test_attention_curves.py")]
    )
    # Beside a Triton twin: before the rest of the attention benchmarks.
    twin = names.index("benchmarks/test_tokens.py::test_masked_mse")
    assert "benchmarks/test_attention.py" in files[twin:]


def test_the_build_is_for_this_gpu_unless_it_is_said(monkeypatch):
    monkeypatch.delenv("VMAE_FAST_CUDA_ARCHS", raising=False)
    for capability, expected in (("9.0", "90a"), ("8.6", "86"), ("10.0", "100")):
        variables = gpu_suite.variables_of("build", {"compute_capability": capability})
        assert variables == {"VMAE_FAST_CUDA_ARCHS": expected}
    monkeypatch.setenv("VMAE_FAST_CUDA_ARCHS", "80")
    assert gpu_suite.variables_of("build", {"compute_capability": "9.0"}) == {}


def test_what_a_part_says_is_in_the_table(tmp_path):
    code = "import sys; print('NOTE memcheck: 2 errors'); print('else'); sys.exit(1)"
    outcome = gpu_suite.run_part("sanitize", [sys.executable, "-c", code], tmp_path, 60)
    assert gpu_suite.summary([outcome], [])[1] == "    memcheck: 2 errors"
    assert not outcome.ok
    outcome.status = tools.SKIPPED
    assert outcome.ok
    assert outcome.line().startswith("sanitize    skipped, ")


def test_tests_of_cuda_kernels_come_first_and_compiling_late():
    names = [
        "tests/ops/test_a.py::test_a",
        "tests/gpu/test_gpu_attention.py::test_compiled[joint]",
        "tests/gpu/test_gpu_attention.py::test_b",
        "tests/gpu/test_gpu_large.py::test_c",
        "tests/gpu/test_gpu_cuda.py::test_d",
    ]
    items = [SimpleNamespace(nodeid=name, name=name.split("::")[1]) for name in names]
    gpu_test_order.pytest_collection_modifyitems(items)
    assert [item.name for item in items] == [
        "test_d", "test_b", "test_c", "test_compiled[joint]", "test_a"
    ]  # fmt: skip


def test_pytest_loads_the_order(tmp_path):
    """Of files as they are called here, without what they hold."""
    (tmp_path / "gpu").mkdir()
    for name in ("gpu/test_gpu_attention.py", "gpu/test_gpu_cuda.py", "test_a.py"):
        (tmp_path / name).write_text(f"def test_one(): print({name!r})")
    command = gpu_suite.command_of("tests", tmp_path)[:-3]
    outcome = gpu_suite.run_part("tests", [*command, str(tmp_path)], tmp_path, 60)
    assert outcome.passed == 3
    log = (tmp_path / "tests.log").read_text()
    places = [log.index(name) for name in ("test_gpu_cuda.py::", "test_gpu_attention.py::")]
    assert places == sorted(places)
    assert places[1] < log.index("test_a.py::")


def test_figures_of_the_counters_are_no_rows(tmp_path):
    file = tmp_path / "gpu" / "kernel_counters.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"environment": {}, "what": "x", "kernels": [], "metrics": []}))
    assert gpu_suite.figures(tmp_path, since=0) == ["kernel_counters: see the file"]
