"""The benchmarks of attention: peers, counts, targets, curves and their picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import attention_peers
import gpu_suite
import plot
import pytest
import report
import rows
import test_attention
import test_attention_curves as curves
import torch
from attention_cases import DIVIDED, ENCODER, TWINS, AttentionBatch, Case
from helpers import PARITY_RTOL, relative_error
from targets import ATTENTION_TARGETS, BLOCK_TARGETS, CUDA_TARGETS, TARGETS
from torch.utils import deterministic as determinism
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL = {
    "joint": Case(3, 13, 2, 32),
    "cross": Case(2, 17, 3, 20, queries=5),
    "time": Case(2, 3 * 7, 2, 32, axis="time", rows=3),
    "space": Case(2, 3 * 7, 2, 32, axis="space", rows=3),
}


def batch_of(case, seed=1):
    return AttentionBatch(case, seed, torch.float32, CPU)


def leaves_of(batch):
    return [getattr(batch, leaf) for leaf in batch.case.leaves]


@pytest.mark.parametrize("name", ["sdpa_flash", attention_peers.DETERMINISTIC, "eager"])
@pytest.mark.parametrize("kind", SMALL)
def test_a_peer_computes_what_the_op_does(kind, name):
    batch = batch_of(SMALL[kind])
    peer = attention_peers.peers_of(batch.case)[name]
    ours, theirs = test_attention.attend(batch), peer(batch)
    upstream = torch.randn_like(ours)
    pairs = zip(
        [ours, *torch.autograd.grad(ours, leaves_of(batch), upstream)],
        [theirs, *torch.autograd.grad(theirs, leaves_of(batch), upstream)],
        strict=True,
    )
    for got, expected in pairs:
        assert got.shape == expected.shape
        assert relative_error(got, expected) < PARITY_RTOL[torch.float32]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_flex_compiles_computes_what_the_op_does():
    batch = batch_of(SMALL["joint"])
    ours = test_attention.attend(batch)
    # It has no backward pass on a CPU.
    theirs = attention_peers.flex_on_packed(batch.qkv.detach(), batch.case.heads)
    assert relative_error(ours, theirs) < PARITY_RTOL[torch.float32]


def test_batches_differ_by_seed():
    first, second = batch_of(SMALL["cross"], seed=0), batch_of(SMALL["cross"], seed=1)
    assert not torch.equal(first.kv, second.kv)
    assert first.q.std() > 0.5


def test_the_flag_for_determinism_is_set_and_put_back():
    assert not torch.are_deterministic_algorithms_enabled()
    with attention_peers.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not determinism.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert determinism.fill_uninitialized_memory


def test_only_the_deterministic_peer_runs_under_the_flag_in_both_passes():
    batch, seen = batch_of(SMALL["joint"]), []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return x.clone()

        @staticmethod
        def backward(_, grad):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return grad

    def peer(one):
        return Watched.apply(one.qkv)

    for name, flag in ((attention_peers.DETERMINISTIC, True), ("sdpa_flash", False)):
        seen.clear()
        test_attention.way_of(name, peer, rows.backward, batch.case)(batch)()
        assert seen == [flag, flag]


def test_a_peer_that_is_refused_is_left_out_with_the_reason():
    def fails(batch):
        raise NotImplementedError("no such hardware\nsecond line")

    def fails_backward(batch):
        x = batch.qkv * 1
        x.register_hook(lambda grad: fails(batch))
        return x

    peers = attention_peers.peers_of(SMALL["joint"])
    peers |= {"fails": fails, "fails backward": fails_backward}
    kept, left_out = test_attention.sorted_out(peers, batch_of(SMALL["joint"]))
    assert {"sdpa_flash", "eager", attention_peers.DETERMINISTIC} <= set(kept)
    assert left_out["fails"] == left_out["fails backward"] == "no such hardware"
    assert "No viable backend" in left_out["sdpa_cudnn"]
    assert set(kept) | set(left_out) == set(peers)
    assert not set(kept) & set(left_out)


def test_the_reason_is_what_sdpa_warned_of():
    warned = [
        "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:900.)",
        "Head dim is not a multiple of 8. (Triggered internally at sdp_utils.cpp:100.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at x.)",
    ]
    reason = test_attention.reason_of(RuntimeError("No available kernel. Aborting."), warned)
    assert reason == "No available kernel. Aborting.; Head dim is not a multiple of 8."
    assert test_attention.reason_of(ValueError(""), warned) == "ValueError"


def test_the_best_is_the_quickest_of_its_kind():
    speedup = {"sdpa_flash": 2.0, "sdpa_cudnn": 1.5, "eager": 3.0, "flex": 1.2}
    best = test_attention.over_the_best(speedup)
    assert best == {"best": 1.2, "best_sdpa": 1.5, "best_deterministic": 1.2}
    assert test_attention.over_the_best({"eager": 3.0}) == {"best": 3.0, "best_deterministic": 3.0}


# ---- what is counted ----------------------------------------------------------------------


def test_bytes_and_operations_of_the_encoder_by_hand():
    rows_, width = 64 * 160, 12 * 64
    assert ENCODER.forward_bytes(2) == 2 * rows_ * (3 * width + width) + 4 * rows_ * 12
    assert ENCODER.backward_bytes(2) == 2 * rows_ * (5 * width + 3 * width) + 4 * rows_ * 12
    assert ENCODER.flops(2) == 4 * 64 * 160**2 * width


def test_bytes_of_cross_attention_by_hand():
    case = Case(2, 17, 3, 20, queries=5)
    assert case.forward_bytes(2) == 2 * 2 * 60 * (5 + 17 + 17 + 5) + 4 * 2 * 5 * 3
    assert case.backward_bytes(2) == 2 * 2 * 60 * (3 * 5 + 2 * 17 + 5 + 2 * 17) + 4 * 2 * 5 * 3


def test_along_time_the_output_is_not_read_backward():
    time, _, space = DIVIDED
    output_bytes = 2 * 64 * 1568 * 768
    assert time.backward_bytes(2) == space.backward_bytes(2) - output_bytes


@pytest.mark.parametrize("kind", SMALL)
def test_operations_are_those_that_the_ops_count(kind):
    batch = batch_of(SMALL[kind])
    with FlopCounterMode(display=False) as counter:
        out = test_attention.attend(batch)
    assert counter.get_total_flops() == batch.case.flops(2)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), leaves_of(batch))
    assert counter.get_total_flops() == batch.case.flops(5)


# ---- rows and targets ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Folder and output of a run of these benchmarks, with one of the others named before them."""
    folder = tmp_path_factory.mktemp("results")
    names = ["test_tokens.py::test_gather_tokens", "test_attention.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *[f"benchmarks/{name}" for name in names], "-v",
         "--benchmark-only", "-p", "no:cacheprovider", "--results", str(folder)],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


def test_what_is_worth_most_is_measured_first(measured):
    _, output = measured
    assert output.index(f"[{ENCODER.name}] PASSED") < output.index("test_gather_tokens PASSED")


def test_every_target_has_its_row_and_its_figure(measured):
    folder, _ = measured
    found = {}
    for file in folder.glob("cpu/*attention*.json"):
        for row in json.loads(file.read_text())["rows"]:
            found[row["op"], row["direction"]] = row
    # Rows are named after sizes, which are smaller on a CPU: the GPU's name stands in for them.
    small = {
        case.name + word: case.small().name + word
        for case in test_attention.CASES
        for word in test_attention.kernels_for(case)[0]
    }
    twins = {case.small().name + word for case in TWINS for word in ("", " triton")}
    for (op, direction), targets in ATTENTION_TARGETS.items():
        row = found[small[op], direction]
        assert row["kernel"] == "op"
        for target in targets:
            assert isinstance(target.judge(row)["met"], bool)
    for name in small.values():
        for direction in ("forward", "backward", "forward and backward"):
            refused = {"sdpa_cudnn", "sdpa_efficient"} | ({"cuda"} if name in twins else set())
            assert found[name, direction]["left_out"].keys() == refused
    page = report.render(folder)
    line = f"| {ENCODER.small().name} (op) | backward |"
    assert line in page
    assert "x), without sdpa_cudnn, without sdpa_efficient, without cuda |" in page
    assert "x), without sdpa_cudnn, without sdpa_efficient |" in page
    lines = gpu_suite.figures(folder, since=0)
    start = f"{ENCODER.small().name} (op) forward: "
    (encoder,) = [line for line in lines if line.startswith(start)]
    assert "; without sdpa_cudnn, without sdpa_efficient, without cuda, " in encoder
    # All of them, their targets, those of the other ops and of the CUDA C++ kernels with theirs
    # fit, and leave lines for what failed.
    others = len(TARGETS) + len(CUDA_TARGETS) + len(BLOCK_TARGETS)
    assert len(lines) + others < gpu_suite.MOST_LINES - 20


# ---- curves -------------------------------------------------------------------------------


def test_pairs_of_sixteen_rows():
    assert curves.pairs_of(curves.joint, 16) == 3136**2
    assert curves.pairs_of(curves.divided, 16) == 664_832
    assert curves.pairs_of(curves.space, 16) == 614_656


def test_all_three_attentions_are_measured_alike(monkeypatch):
    monkeypatch.setattr(curves, "POSITIONS", 9)
    by_name = {one["attention"]: one for one in curves.measure(4)}
    for contender in (curves.joint, curves.divided, curves.space):
        one = by_name[contender.__name__]
        # Two products forward and five backward, of two operations a value.
        operations = 14 * curves.pairs_of(contender, 4) * curves.HEADS * curves.HEAD_WIDTH
        assert one["gflop"] == pytest.approx(operations / 1e9)
        assert min(one["forward_ms"], one["backward_ms"], one["peak_mib"]) > 0
        assert (one["t"], one["tokens"]) == (4, 36)


def test_a_slope_is_the_exponent():
    rows_ = [{"tokens": n, "a": 3 * n**2, "b": 5 * n if n < 9 else None} for n in (2, 4, 8, 16)]
    assert curves.slope(rows_, "a") == pytest.approx(2)
    assert curves.slope(rows_, "b") == pytest.approx(1)


def test_eager_is_left_out_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(curves, "TOKENS", (256, 512))
    needed = curves.MATRICES_OF_EAGER * curves.HEADS * 256**2 * 4
    monkeypatch.setattr(curves, "free_bytes", lambda: needed + 1)
    (first, second), left_out = curves.memory_over_tokens()
    assert first["eager_mib"] > first["ours_mib"] > 0
    assert second["eager_mib"] is None
    assert left_out.startswith("512 tokens: ")


def curves_file(folder):
    """A small result file of the curves."""
    over_rows = [
        {"t": t, "attention": name, "tokens": t * 196, "pairs_m": pairs, "gflop": 1.0,
         "forward_ms": t * factor, "backward_ms": 2 * t * factor, "peak_mib": t}
        for t in (4, 8)
        for name, pairs, factor in (("joint", 2.5, 3.0), ("divided", 0.3, 1.0), ("space", 0.2, 0.5))
    ]  # fmt: skip
    over_tokens = [
        {"tokens": 784, "ours_mib": 6.0, "eager_mib": 22.0},
        {"tokens": 1568, "ours_mib": 12.0, "eager_mib": None},
    ]
    environment = {"date": "2026-01-02", "commit": "abc", "torch": "2.11", "device": "AMD EPYC"}
    figures = {
        "environment": environment, "what": "attention alone, fp32", "ours_memory_slope": 1.0,
        "eager_memory_slope": 2.0, "over_rows": over_rows, "over_tokens": over_tokens,
    }  # fmt: skip
    file = folder / "cpu" / "attention_curves.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(figures))
    return file


def test_the_picture_is_drawn_and_linked(tmp_path):
    pytest.importorskip("matplotlib")
    file = curves_file(tmp_path / "results")
    page = report.render(tmp_path / "results")
    assert "| 1,568 | 12 | - |" in page
    assert "![" not in page
    (picture,) = plot.main(tmp_path / "results")
    assert picture == file.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 20_000
    page = report.render(tmp_path / "results")
    assert "![attention_curves](results/cpu/attention_curves.png)" in page


def test_the_panels_show_what_the_file_holds(tmp_path):
    plot_attention = pytest.importorskip("plot_attention", exc_type=ModuleNotFoundError)
    kept = json.loads(curves_file(tmp_path).read_text())
    _, (time, memory, growth) = plot_attention.plt.subplots(1, 3)
    plot_attention.draw_time(time, kept["over_rows"])
    plot_attention.draw_memory(memory, kept["over_rows"])
    plot_attention.draw_growth(growth, kept)
    plot_attention.plt.close()
    lines = {line.get_label(): line.get_xydata().tolist() for line in time.get_lines()}
    assert lines["joint, backward"] == [[4, 24], [8, 48]]
    assert lines["divided, forward"] == [[4, 4], [8, 8]]
    assert lines["space, backward"] == [[4, 4], [8, 8]]
    assert len(memory.get_lines()) == 3
    (ours, eager) = growth.get_lines()
    assert ours.get_xydata().tolist() == [[784, 6], [1568, 12]]
    # Where eager was left out there is no point.
    assert eager.get_xydata().tolist() == [[784, 22]]
    assert "2.00" in eager.get_label()
    for panel in (time, memory, growth):
        assert panel.get_xlabel()
        assert panel.get_ylabel()
