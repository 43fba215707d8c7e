"""Running the kernels under NVIDIA's tools: what is run, and how their output is read."""

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import counters
import pytest
import report
import rows
import sanitize
import tools
import torch

from vmae_fast.ops import _extension

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


# ---- sanitizers -----------------------------------------------------------------------------

CLEAN = """\
3 calls
========= COMPUTE-SANITIZER
ran cuda: a
ran cuda: b
ran triton: c
"""
OUT_OF_BOUNDS = """\
========= Invalid __global__ read of size 4 bytes
=========     at void vmae_fast::(anonymous namespace)::attend<(int)64, float>(int *)+0x70 in a.cu:1
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x70 of size 400 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernel [0x1234] in libcuda.so.1
=========
========= Misaligned __shared__ write of size 16 bytes
=========     at 0x70 in _gather_kernel
=========     by thread (1,0,0) in block (0,0,0)
=========
"""
RACES = """\
========= Error: Race reported between Write access at vmae_fast::attend(float *)+0x550 in a.cu:7
=========     and Read access at vmae_fast::attend(float *)+0x580 in a.cu:9 [65536 hazards]
=========
========= Warning: Race reported between Write access at _tiled_kernel+0x150 in tiled.py:7
=========     and Write access at _tiled_kernel+0x180 in tiled.py:7 [64 hazards]
=========
"""


def test_a_clean_log():
    found = sanitize.parse("memcheck", CLEAN + "========= ERROR SUMMARY: 0 errors\n")
    assert found.ok
    assert found.line() == "memcheck: 0 errors, 0 warnings in 3 of 3 calls"
    log = CLEAN + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert sanitize.parse("racecheck", log).ok
    # The one's summary is not the other's.
    assert not sanitize.parse("memcheck", log).finished


def test_errors_are_counted_by_kernel():
    log = CLEAN + OUT_OF_BOUNDS + "========= ERROR SUMMARY: 7 errors\n"
    found = sanitize.parse("memcheck", log)
    assert (found.errors, found.warnings, found.ok) == (7, 0, False)
    assert dict(found.places) == {"attend": 1, "_gather_kernel": 1}
    assert "7 errors, 0 warnings in 3 of 3 calls; attend 1x; _gather_kernel 1x" in found.line()


def test_races_and_warnings():
    log = CLEAN + RACES + "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    found = sanitize.parse("racecheck", log)
    assert (found.errors, found.warnings, found.ok) == (1, 1, False)
    assert dict(found.places) == {"attend": 1, "_tiled_kernel": 1}


def test_a_tool_that_was_stopped_counts_what_it_saw():
    log = CLEAN.replace("ran triton: c\n", "") + RACES
    found = sanitize.parse("racecheck", log)
    assert (found.errors, found.warnings, found.finished, found.ok) == (1, 1, False, False)
    assert "in 2 of 3 calls; ended after cuda: b; no summary" in found.line()


@pytest.mark.parametrize("log", ["", "========= Error: Device not supported\n", "3 calls\n"])
def test_a_tool_that_did_not_get_going_is_not_ok(log):
    found = sanitize.parse("memcheck", log + "========= ERROR SUMMARY: 0 errors\n")
    assert not found.ok
    assert "ended before the first" in found.line()


def test_the_sanitizer_is_skipped_without_a_gpu(tmp_path):
    for name in ("sanitize.py", "counters.py"):
        done = subprocess.run(
            [sys.executable, ROOT / "benchmarks" / name, "--out", tmp_path],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == tools.SKIPPED
        assert tools.notes_in(done.stdout) == ["skipped: no GPU that torch can use"]


def interpreted(code):
    """Lines that some code prints where Triton's kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "",
             "PYTHONPATH": str(ROOT / "benchmarks")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_sanitizer_sees_every_triton_kernel():
    launched = interpreted("""
        import sanitize, torch
        from vmae_fast.kernels import _launch
        # Named and not run: what they compute is no matter here.
        _launch.launch = lambda kernel, *rest, **options: print("launched", kernel.__name__)
        for name, call in sanitize.calls(torch.device("cpu"), cuda=False):
            call()
    """)
    sources = [file.read_text() for file in (ROOT / "kernels").glob("*.py")]
    written = {name for text in sources for name in re.findall(r"@jit\ndef (\w+_kernel)\(", text)}
    assert len(written) > 15
    assert {line.split()[1] for line in launched if line.startswith("launched ")} == written


def test_the_sanitizer_sees_every_cuda_kernel():
    """That every call of them gets to the extension, which does nothing here."""
    asked = []

    def noting(name):
        return lambda *given, **more: asked.append(name)

    fake = SimpleNamespace(
        about=lambda: {"architectures": "", "cuda": 0, "emulated": True},
        View=lambda *given: given,
        short_attention_fits=lambda *given: True,
        **{name: noting(name) for name in rows.CUDA_FUNCTIONS},
    )
    seen = set()
    with _extension.use(fake):
        for name, call in sanitize.calls(CPU, cuda=True):
            if name.startswith("cuda: "):
                asked.clear()
                call()
                passes = {"masked_mse"} if "masked_mse" in name else set(rows.CUDA_FUNCTIONS[:2])
                assert set(asked) == passes, name
                seen |= set(asked)
    assert seen == set(rows.CUDA_FUNCTIONS)


def test_cuda_calls_come_first_and_have_names_of_their_own():
    names = [name for name, _ in sanitize.calls(CPU, cuda=True)]
    assert len(set(names)) == len(names)
    assert names == sorted(names, key=lambda name: not name.startswith("cuda: "))


# ---- tools ----------------------------------------------------------------------------------


def test_tools_of_the_toolkit_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tools.find_tool("compute-nothing") == ""
    tool = tmp_path / "bin" / "compute-nothing"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert tools.find_tool("compute-nothing") == str(tool)


def test_what_runs_past_its_limit_is_stopped_and_read(tmp_path):
    log = tmp_path / "log"
    begun = time.monotonic()
    code = """
        import os, time
        try:
            print("NOTE one", os.environ["WORD"])
            time.sleep(60)
        except KeyboardInterrupt:
            print("NOTE stopped")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    status, said = tools.run_limited(command, log, 4, WORD="word")
    assert (status, tools.notes_in(said)) == (None, ["one word", "stopped"])
    assert time.monotonic() - begun < 30
    assert tools.run_limited(["sh", "-c", "exit 3"], log, 30)[0] == 3


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("void vmae_fast::(anonymous namespace)::run<(int)64>(const float *)", "run"),
        ("void at::native::<unnamed>::fill<float>(int)", "fill"),
        ("_gather_kernel", "_gather_kernel"),
        ("kernel(int *)+0x70 in file.cu:10", "kernel"),
    ],
)
def test_kernels_are_named_shortly(signature, name):
    assert tools.short_name(signature) == name


# ---- counters -------------------------------------------------------------------------------

COLUMNS = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
NAMES = {figure: names[0] for figure, (_, names) in counters.METRICS.items()}


def ncu_csv(*launches):
    """What ncu writes of kernels, each a name and its figures."""
    lines = ["==PROF== Connected to process 1", COLUMNS]
    for number, (kernel, figures) in enumerate(launches):
        lines += [
            f'"{number}","1","{kernel}","{NAMES[figure]}","unit","{value}"'
            for figure, value in figures.items()
        ]
    return "\n".join([*lines, "==PROF== Disconnected from process 1"])


def test_counters_of_each_kernel_of_each_call():
    marker = ("at::cuda::(anonymous namespace)::spin_kernel(long)", {"time_us": "900"})
    one = {"time_us": "12,345.60", "dram_percent": "71.5", "tensor_percent": "n/a"}
    text = ncu_csv(
        ("before(int)", one),
        marker, ("void vmae_fast::attend<64>(Args)", one),
        marker, ("first(int)", {"dram_percent": "5"}), ("second(int)", {"read_mb": "2500000"}),
        marker, ("of_a_call_that_was_cut(int)", one),
    )  # fmt: skip
    got = counters.parse(text, ["a", "b"], NAMES)
    assert [(row["call"], row["kernel"]) for row in got] == [
        ("a", "attend"), ("b", "first"), ("b", "second")
    ]  # fmt: skip
    assert (round(got[0]["time_us"], 6), got[0]["dram_percent"]) == (12.3456, 71.5)
    assert got[0]["tensor_percent"] is None
    assert got[2]["read_mb"] == 2.5
    assert counters.parse("==ERROR== no permission", ["a"], NAMES) == []
    assert counters.line_of(got[0]).endswith("attend: time_us 12.3, dram_percent 71.5, "
                                             "tensor_percent ?")  # fmt: skip


def test_metrics_are_those_that_the_gpu_has():
    assert counters.chosen_metrics("") == NAMES
    listed = """\
        Device NVIDIA H200 (GH100)
        -------------------------- ----- ------------------
        Metric Name                Type  Metric Unit
        gpu__dram_throughput       Thro  %   breakdown
        sm__inst_executed_pipe_tensor_op_hmma   Counter  inst
    """
    chosen = counters.chosen_metrics(textwrap.dedent(listed))
    assert chosen["dram_percent"] == "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
    assert chosen["tensor_percent"].startswith("sm__inst_executed_pipe_tensor_op_hmma.avg.pct")
    assert chosen["time_us"] == NAMES["time_us"]


FAKE_NCU = """\
import sys
if "--query-metrics" in sys.argv:
    sys.exit()
print("call attention cuda forward", flush=True)
table = sys.argv[sys.argv.index("--log-file") + 1]
assert sys.argv[-1] == "--calls"
open(table, "w").write(TABLE)
"""


def test_counters_are_kept_and_rendered(tmp_path, capsys):
    table = ncu_csv(("spin_kernel(long)", {}), ("spin_kernel(long)", {"time_us": "1"}),
                    ("attend(int)", {"time_us": "14600", "dram_percent": "88.12345"}))  # fmt: skip
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!{sys.executable}\nTABLE = {table!r}\n{FAKE_NCU}")
    ncu.chmod(0o755)
    assert counters.measure(str(ncu), tmp_path, 30) == 0
    (note,) = tools.notes_in(capsys.readouterr().out)
    assert note.startswith("attention cuda forward, attend: time_us 14.6, dram_percent 88.1")
    page = report.render(tmp_path / "results")
    assert "| attention cuda forward | attend | 14.6 | 88.12 |" in page
    assert f"| dram_percent | {NAMES['dram_percent']} |" in page


def test_counters_that_cannot_be_read_are_an_error(tmp_path, capsys):
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!{sys.executable}\nTABLE = '==ERROR== ERR_NVGPUCTRPERM'\n{FAKE_NCU}")
    ncu.chmod(0o755)
    assert counters.measure(str(ncu), tmp_path, 30) == 1
    assert "ERR_NVGPUCTRPERM" in capsys.readouterr().out
