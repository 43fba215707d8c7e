"""The benchmarks themselves: peers compute what the ops do, figures are kept and rendered."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_suite
import pytest
import report
import test_tokens
import timing
import token_peers
import torch
from benchmark_figures import without_count_or_share
from helpers import PARITY_RTOL, relative_error
from targets import CUDA_TARGETS, TARGETS, TOKEN_TARGETS, Target
from token_batch import Batch, Size

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL = Size("small", 3, 48, 20, 12, torch.float32, CPU)


def gathered(batch):
    return token_peers.torch_gather(batch.tokens, batch.mask.visible_idx)


def indexed(batch):
    return token_peers.indexed(batch.tokens, batch.mask.visible_idx)


def concatenated(batch):
    return token_peers.concatenated(*test_tokens.decoder_parts(batch))


@pytest.mark.parametrize(
    ("op", "peer", "leaves"),
    [
        ("tubelet_embed", test_tokens.on_pixels(token_peers.conv3d_then_gather), "weight bias"),
        ("tubelet_embed", test_tokens.on_pixels(token_peers.unfold_then_linear), "weight bias"),
        ("gather_tokens", gathered, "tokens"),
        ("gather_tokens", indexed, "tokens"),
        ("decoder_tokens", concatenated, "visible mask_token"),
        ("masked_mse", test_tokens.eager_loss, "pred"),
        ("linear_masked_mse", test_tokens.head_then_loss, "decoded head_weight head_bias"),
    ],
)
def test_a_peer_computes_what_the_op_does(op, peer, leaves):
    batch = Batch(SMALL, seed=1)
    ours, theirs = getattr(test_tokens, op)(batch), peer(batch)
    upstream = torch.randn_like(ours)
    wanted = [getattr(batch, leaf) for leaf in leaves.split()]
    pairs = zip(
        [ours, *torch.autograd.grad(ours, wanted, upstream)],
        [theirs, *torch.autograd.grad(theirs, wanted, upstream)],
        strict=True,
    )
    for got, expected in pairs:
        assert got.shape == expected.shape
        assert relative_error(got, expected) < PARITY_RTOL[torch.float32]


def test_batches_differ_by_seed_and_are_never_zeros():
    first, second = Batch(SMALL, seed=0), Batch(SMALL, seed=1)
    assert not torch.equal(first.mask.visible_idx, second.mask.visible_idx)
    assert first.video.float().std() > 10
    assert first.pred is first.pred
    with pytest.raises(AttributeError, match="a batch has no 'prad'"):
        _ = first.prad


def test_times_are_of_one_call_and_go_round_the_sets():
    seen = []
    ways = {
        "long": lambda one: lambda: (seen.append(one), time.sleep(0.02)),
        "short": lambda one: lambda: time.sleep(0.002),
    }
    times = timing.time_ways(ways, [1, 2, 3], CPU)
    assert 20 <= times["long"].time_ms < 60
    assert 2 <= times["short"].time_ms < 20
    assert times["long"].how == "perf_counter"
    assert seen[:6] == [1, 2, 3, 1, 2, 3]


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        first = torch.ones(1 << 20)
        del first
        return torch.ones(3 << 20) + 1

    assert timing.peak_memory_bytes(call, CPU) == pytest.approx(2 * 4 * (3 << 20), rel=1e-3)


def test_the_token_benchmarks_run_and_every_target_has_its_row(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks/test_tokens.py", "--benchmark-only"]
    command += ["--benchmark-json", str(tmp_path / "pytest-benchmark.json")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "-q", "-p", "no:cacheprovider", "--results", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    files = [json.loads(file.read_text()) for file in tmp_path.glob("cpu/*.json")]
    rows = {(row["op"], row["direction"]): row for figures in files for row in figures["rows"]}
    for key, targets in TOKEN_TARGETS.items():
        for target in targets:
            assert isinstance(target.judge(rows[key])["met"], bool)
    assert "linear_masked_mse | forward and backward" in report.render(tmp_path)
    told = json.loads((tmp_path / "pytest-benchmark.json").read_text())["benchmarks"]
    assert len(told) == len(files)
    for figures in [*files, *(one["extra_info"] for one in told)]:
        assert not without_count_or_share(figures)
        assert all("percent_of_matmul" in row for row in figures["rows"] if "flops" in row)


def test_a_bound_is_met_at_its_value():
    at_most, at_least = Target("time_ms", "at_most", 0.1), Target("speedup.eager", "at_least", 10)
    row = {"time_ms": 0.1, "speedup": {"eager": 9.99}}
    assert at_most.judge(row) == {"target": "time_ms <= 0.1", "measured": 0.1, "met": True}
    assert not at_least.judge(row)["met"]
    assert not at_most.judge({"time_ms": 0.101})["met"]


# ---- the page -----------------------------------------------------------------------------


def result(**row):
    """A result file of tubelet_embed's backward pass on the targets' device."""
    figures = {
        "op": "tubelet_embed", "direction": "backward", "time_ms": 0.1234, "how": "graph",
        "copy_of_as_many_bytes_ms": 0.0091,
        "gb_per_s": 321.0, "percent_of_copy": 7.5, "tflop_per_s": 196.0, "percent_of_matmul": 25.0,
        "peers": {"conv3d": {"time_ms": 1.75, "how": "events", "why": "waits"}},
        "speedup": {"conv3d": 14.2},
        "targets": [{"target": "time_ms <= 0.12", "measured": 0.1234, "met": False}],
    }  # fmt: skip
    environment = {"date": "2026-01-02", "commit": "abc", "torch": "2.11", "device": "NVIDIA H200"}
    return {"environment": environment, "what": "base", "rows": [figures | row]}


def write_result(folder, figures, name="tubelet_embed"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(figures))


def test_results_page_is_up_to_date():
    assert report.main(["--check"]) == 0, "run python benchmarks/report.py"


def test_figures_are_rendered_and_what_is_missing_is_not_yet_measured(tmp_path):
    write_result(tmp_path / "nvidia-h200", result())
    page = report.render(tmp_path)
    (line,) = [line for line in page.splitlines() if line.startswith("| tubelet_embed | backward")]
    for part in ("| 0.123 | 0.0091 |", "321 (7.5%)", "196 (25%)", "conv3d 1.75 ms (e) (14.2x)"):
        assert part in line
    assert "time_ms <= 0.12: 0.123, **missed**" in line
    assert "| masked_mse | forward | time_ms <= 0.22;" in page
    assert page.count("| not yet measured") == len(TARGETS) - 1
    assert page.count("| not yet measured, off by default |") == len(CUDA_TARGETS)


def test_another_device_does_not_count_as_measured(tmp_path):
    figures = result()
    figures["environment"]["device"] = "AMD EPYC"
    write_result(tmp_path / "cpu", figures)
    assert report.render(tmp_path).count("| not yet measured") == len(TARGETS)


def test_a_stale_page_is_noticed(tmp_path, capsys):
    results, page, readme = (tmp_path / name for name in ("results", "RESULTS.md", "README.md"))
    readme.write_text((ROOT / "README.md").read_text())
    write_result(results / "cpu", {**result(), "rows": []})
    assert report.main(["--check"], results, page, readme) == 1
    assert report.main([], results, page, readme) == 0
    assert report.main(["--check"], results, page, readme) == 0
    write_result(results / "cpu", result(time_ms=0.5))
    assert report.main(["--check"], results, page, readme) == 1
    assert "run python benchmarks/report.py" in capsys.readouterr().err


# ---- the GPU suite ------------------------------------------------------------------------


def pytest_command(tests, out):
    command = gpu_suite.command_of("tests", out)
    assert command[-3:] == ["-m", "gpu", "tests"]
    return [*command[:-3], str(tests)]


def test_without_a_gpu_the_suite_says_so(tmp_path):
    script = str(ROOT / "benchmarks" / "gpu_suite.py")
    done = subprocess.run(
        [sys.executable, script, "--out", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert "no GPU" in done.stdout


def test_a_failing_part_is_counted_and_named(tmp_path):
    tests = tmp_path / "tests"
    (tests / "video").mkdir(parents=True)
    (tests / "test_a.py").write_text(
        "import pytest\ndef test_good(): pass\n"
        "def test_bad():\n    raise ValueError('first line\\nsecond')\n"
        "def test_left_out(): pytest.skip('not here')\n"
    )
    (tests / "video" / "conftest.py").write_text("import no_such_decoder")
    (tests / "video" / "test_b.py").write_text("def test_never_seen(): pass")
    (tests / "test_c.py").write_text("import vmae_fast.no_such_module")
    outcome = gpu_suite.run_part("tests", pytest_command(tests, tmp_path), tmp_path, 60)
    assert (outcome.passed, outcome.skipped, outcome.ok) == (1, 1, False)
    (failure,) = outcome.failures
    assert failure.endswith("test_bad: ValueError: first line")
    assert list(outcome.missing) == ["no_such_decoder"]
    (broken,) = outcome.not_collected
    assert "vmae_fast.no_such_module" in broken
    lines = gpu_suite.summary([outcome], [])
    assert "1 passed, 1 failed, 1 skipped, 1 files broken, 1 without no_such_decoder" in lines[0]
    assert "test_bad" in (tmp_path / "tests.log").read_text()


@pytest.mark.parametrize("deaf", [False, True], ids=["listens", "is killed"])
def test_a_part_past_its_limit_still_reports(tmp_path, monkeypatch, deaf):
    monkeypatch.setattr(gpu_suite, "GRACE_S", 5 - 4 * deaf)
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)" if deaf else "pass"
    (tmp_path / "test_slow.py").write_text(
        "import signal, time\ndef test_good(): pass\n"
        f"def test_slow():\n    {ignore}\n    time.sleep(60)\n"
    )
    command = pytest_command(tmp_path / "test_slow.py", tmp_path)
    outcome = gpu_suite.run_part("tests", command, tmp_path, 5)
    assert (outcome.status, outcome.passed, outcome.ok) == (None, 1, False)
    assert outcome.seconds < 20
    assert "time limit" in outcome.line()
    (failure,) = outcome.failures
    assert failure.endswith("test_slow.py::test_slow: still running at the time limit")


def test_a_missing_package_alone_fails_nothing():
    good = gpu_suite.Outcome("tests", status=1, passed=3, missing={"av": ["tests.data"]})
    assert good.ok
    assert not gpu_suite.Outcome("tests", status=5).ok
    assert not gpu_suite.Outcome("build", status=1).ok
    left_out = gpu_suite.Outcome("step", gpu_suite.SKIPPED)
    assert left_out.ok
    assert left_out.line() == "step        skipped, 0 s"


def test_the_table_fits_and_shows_this_run_only(tmp_path):
    write_result(tmp_path / "nvidia-h200", result())
    measured = gpu_suite.figures(tmp_path, since=0)
    assert measured[0].startswith("tubelet_embed backward: 0.123 ms (graph), 321 (7.5%) GB/s")
    assert measured[1].strip() == "time_ms <= 0.12: 0.123, missed"
    assert gpu_suite.figures(tmp_path, since=time.time() + 60) == []
    failures = [f"test_{i}: broken" for i in range(500)]
    outcome = gpu_suite.Outcome("tests", 1, failures=failures)
    assert len(gpu_suite.summary([outcome] * 3, measured * 100)) == gpu_suite.MOST_LINES
