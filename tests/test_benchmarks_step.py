"""The benchmarks of whole steps, at toy sizes: contenders, counts, rows, targets, pictures."""

import dataclasses
import json
import re

import gpu_suite
import peers
import pytest
import report
import rows
import step_cases
import test_step_cpu as steps_cpu
import test_step_gpu as steps
import torch
from plain_videomae import PlainOutput
from step_cases import CASES, LAUNCHES, StepCase, contender
from targets import STEP_TARGETS
from timing import Timing

from vmae_fast import VideoMAE, VideoMAEConfig
from vmae_fast.models.config import SIZES as ALL_SIZES
from vmae_fast.plan import published_macs

CPU = torch.device("cpu")
SIZES = tuple(ALL_SIZES)
TOY = {
    "frames": 4, "image_size": 32, "patch_size": 8,
    "width": 32, "depth": 2, "heads": 2, "mlp_dim": 48,
    "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "decoder_mlp_dim": 40,
}  # fmt: skip


class Rounds:
    """A stand-in for pytest-benchmark's fixture."""

    def pedantic(self, target, args, setup, rounds):
        for _ in range(rounds):
            setup()
            target(*args)


class Replayed:
    """A stand-in for CUDA graphs: what is recorded runs again, after what prepares it."""

    def __init__(self, device):
        self.recorded = 0

    def __call__(self, function, prepare=lambda: None):
        self.recorded += 1

        def replay():
            prepare()
            function()

        return replay


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling takes a minute here and is tested on a GPU."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: (compiled.append(model), model)[1])
    return compiled


# Full width, few tokens: giant's tubelets and MLPs are its own.
GIANT = {"size": "giant", "frames": 4, "image_size": 56, "depth": 1, "decoder_depth": 1}


@pytest.mark.parametrize(
    ("name", "settings"),
    [("plain", TOY), ("huggingface_eager", TOY), ("huggingface", TOY), ("huggingface", GIANT)],
)
def test_contenders_compute_the_same_loss(name, settings, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, inputs = peers.made("ours", "cpu", 2, **settings)
    theirs, their_inputs = peers.made(name, "cpu", 2, **settings)
    with torch.no_grad():
        if name == "plain":
            theirs.held.load_state_dict(ours.state_dict())
        else:
            ours.save_pretrained(tmp_path, dialect="huggingface")
            if settings is GIANT:
                config = theirs.config
                assert (config.patch_size, config.intermediate_size) == (14, 6144)
                assert config.decoder_intermediate_size == 2234
            built, attention = theirs, peers.PEERS[name][0]
            theirs = transformers.VideoMAEForPreTraining.from_pretrained(
                tmp_path, attn_implementation=attention
            )
            shapes = ({n: p.shape for n, p in m.named_parameters()} for m in (built, theirs))
            assert next(shapes) == next(shapes)
            assert built.config._attn_implementation == attention
        loss, their_loss = ours(**inputs).loss, theirs(**their_inputs).loss
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [("huggingface", 0), ("huggingface_compiled", 1), ("huggingface_compiled_blocks", 3)],
)
def test_peers_are_compiled_whole_or_by_block(name, compiled, uncompiled):
    pytest.importorskip("transformers")
    model, inputs = peers.made(name, "cpu", 2, **TOY)
    assert len(uncompiled) == compiled
    # One of the blocks, or all of it.
    theirs = {module for module in model.modules() if module._compiled_call_impl is not None}
    assert {type(module).__name__ for module in theirs} <= {"VideoMAELayer", type(model).__name__}
    assert (model in theirs) == (name == "huggingface_compiled")
    assert model(**inputs).loss.isfinite()


def test_hugging_face_is_no_peer_of_decoder_masking():
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="no decoder masking"):
        peers.made("huggingface", "cpu", 2, **TOY, decoder_mask_ratio=0.5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_less_is_kept_for_the_backward_pass_than_in_the_plain_model(precision):
    ours, plain = (peers.saved_bytes(name, precision, clips=2, **TOY) for name in ("ours", "plain"))
    assert 0 < ours < plain


def test_what_is_kept_counts_once_and_without_parameters(monkeypatch):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(5, 7))

        def forward(self, video, mask):
            # Kept: the video and the weight, which do not count, and x, three times.
            x = video * self.weight
            return PlainOutput(x.square().sum() + x.square().sum() + x[:2].sin().sum())

    inputs = {"video": torch.ones(5, 7), "mask": VideoMAE("tiny").masking(torch.arange(1))}
    monkeypatch.setattr(peers, "made", lambda *_: (Model(), inputs))
    assert peers.saved_bytes("ours", "fp32", clips=1) == 5 * 7 * 4


@pytest.mark.parametrize("masks", steps_cpu.SMALL)
def test_a_small_step_on_a_cpu_is_measured_against_its_peers(masks, monkeypatch):
    pytest.importorskip("transformers")
    best = {"matmul_tflop_per_s": 0.2, "matmul_dtype": "float32"}
    monkeypatch.setattr(steps_cpu, "ceilings", lambda _: best)
    config = VideoMAEConfig.of("tiny", **TOY, **steps_cpu.SETTINGS[masks])
    contenders = steps_cpu.SMALL[masks]
    found = steps_cpu.measure(Rounds(), config, contenders, "fp32")
    gflop = 6 * published_macs(config) * peers.CLIPS / 1e9
    assert found["gflop"] == pytest.approx(gflop, rel=1e-3)
    for called in contenders.values():
        rate = gflop / found[f"{called}_s"]
        assert found[f"{called}_gflop_per_s"] == pytest.approx(rate, rel=1e-2)
        assert found[f"{called}_peak_tensors_mib"] >= 0
    share = 100 * found["ours_gflop_per_s"] / 200
    assert found["ours_percent_of_matmul"] == pytest.approx(share, rel=1e-2)
    other = "huggingface_sdpa" if masks == "v1" else "plain"
    speedup = found["speedup" if masks == "v1" else "speedup_over_plain"]
    assert speedup == pytest.approx(found[f"{other}_s"] / found["ours_s"], rel=0.05)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("residual", step_cases.RESIDUALS)
def test_a_step_trains(launch, residual, uncompiled):
    case = StepCase("toy", "tiny", 3, settings=TOY)
    captures = []

    def capture(device):
        captures.append(Replayed(device))
        return captures[-1]

    models = []
    original = VideoMAE.__init__

    def noting(model, *given, **more):
        models.append(model)
        original(model, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoMAE, "__init__", noting)
        step = step_cases.training_step(case, launch, residual, 3, CPU, capture)
    (model,) = models
    assert model.residual_dtype == step_cases.RESIDUALS[residual]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [step()[0].item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    assert [c.recorded for c in captures] == ([2] if launch == "graph" else [])
    assert bool(uncompiled) == (launch == "compiled")


def test_every_case_gives_rows_that_its_targets_can_judge(tmp_path, monkeypatch, uncompiled):
    """All cases as tiny ones; a GPU's memory and ceiling put in."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(rows, "device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(steps, "CPU_ROUNDS", 1)
    monkeypatch.setattr(steps, "device_name", lambda: "NVIDIA H200")
    best = {"matmul_tflop_per_s": 790.0, "matmul_dtype": "bfloat16"}
    monkeypatch.setattr(steps, "ceilings", lambda _: best)
    bytes_of, measured_held = iter(range(2**30, 2**40, 2**28)), steps.held
    monkeypatch.setattr(
        steps, "held", lambda make, device: (measured_held(make, device)[0], next(bytes_of))
    )
    judged = {}
    environment = {"date": "2026-01-02", "commit": "abc", "torch": "2", "device": "NVIDIA H200"}
    for case in CASES:
        # Large ones stay "large", so that they are not timed beside each other.
        size = "tiny" if case.size == "base" else case.size
        small = dataclasses.replace(case, size=size, clips=2, settings=TOY | case.settings)
        figures = steps.measure(small, CPU, Replayed)
        assert len(figures["rows"]) == 2 * len(case.launches)
        for row in figures["rows"]:
            judged[row["op"], row["direction"]] = row
            of_product, of_peak = row["percent_of_matmul"], row["percent_of_published_peak"]
            assert of_product / of_peak == pytest.approx(989 / 790, rel=2e-3)
            assert set(case.peers) <= set(row["speedup"])
            assert row["run_flops"] != row["flops"]
        file = tmp_path / "nvidia-h200" / f"{case.name.replace(' ', '_')}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"environment": environment, **figures}))
    for key, targets in STEP_TARGETS.items():
        assert [type(one["met"]) for one in judged[key]["targets"]] == [bool] * len(targets)
    base = judged["step base v1", contender("graph", "fp32")]
    assert set(base["peers"]) == {"launched", "compiled", *CASES[0].peers}
    assert {f"step {size} {masks}" for size in SIZES[1:] for masks in ("v1", "v2")} <= {
        op for op, _ in judged
    }
    v1 = [case for case in CASES if not case.config.decoder_mask_ratio and case.clips > 8]
    assert [len(case.peers) for case in v1] == [3] * len(SIZES[1:])
    assert base["speedup"]["launched"] == pytest.approx(
        base["peers"]["launched"]["time_ms"] / base["time_ms"], rel=2e-3
    )
    page = report.render(tmp_path)
    assert "| step base v1 | graph, bf16 residual | 2 |" in page
    assert page.count("clips_per_s >= 1900") == 2
    lines = gpu_suite.figures(tmp_path, since=0)
    (line,) = [one for one in lines if one.startswith("step large v1 graph, bf16 residual: ")]
    assert re.search(r"\), [0-9.]+ clips/s, .*%\) TFLOP/s, [0-9.]+ GiB; .*\(.*x\)", line)
    assert not [one for one in lines if "GB/s" in one]
    # All of them with their targets, and what a run of them says besides.
    assert len(lines) < gpu_suite.MOST_LINES // 2


def test_a_peer_that_does_not_fit_is_left_out_and_named(monkeypatch):
    def held(make, device):
        if make.__defaults__ == ("huggingface_eager",):
            raise torch.OutOfMemoryError("no room\nmuch more")
        return print, 2**30

    monkeypatch.setattr(steps, "held", held)
    monkeypatch.setattr(steps, "ceilings", lambda _: {})
    monkeypatch.setattr(
        steps, "time_steps", lambda made, _: dict.fromkeys(made, Timing(10.0, "events"))
    )
    names = ("huggingface_eager", "huggingface")
    case = StepCase("toy", "large", 4, ("launched",), names, TOY)
    figures = steps.measure(case, CPU, Replayed)
    for row in figures["rows"]:
        assert (row["clips"], set(row["peers"])) == (4, {"huggingface"})
        assert row["left_out"] == {"huggingface_eager": "no room"}
    assert figures["what"].endswith("needed by huggingface_eager")
    # Held beside ours: then all of them take fewer clips.
    with pytest.raises(torch.OutOfMemoryError):
        steps.run(dataclasses.replace(case, size="tiny"), 4, CPU, Replayed)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    tried = []

    def run(case, clips, device, capture):
        tried.append(clips)
        if clips > 3:
            raise torch.OutOfMemoryError("no room")
        one = (Timing(10.0, "events"), 2**30)
        return {contender("launched", residual): one for residual in step_cases.RESIDUALS}, {}

    monkeypatch.setattr(steps, "run", run)
    case = StepCase("toy", "tiny", 12, ("launched",))
    figures = steps.measure(case, CPU, Replayed)
    assert tried == [12, 6, 3]
    (row, _) = figures["rows"]
    assert (row["clips"], row["clips_per_s"]) == (3, 300)
    assert row["flops"] == pytest.approx(6 * 3 * published_macs(case.config), rel=1e-3)


def test_a_timeline_lists_what_takes_longest_first(monkeypatch):
    monkeypatch.setattr(steps, "MOST_KERNELS", 5)
    figures = steps.timeline(StepCase("toy", "tiny", 2, settings=TOY), CPU)
    *kernels, others = figures["kernels"]
    assert len(kernels) == 5
    assert [k["ms"] for k in kernels] == sorted((k["ms"] for k in kernels), reverse=True)
    assert others["name"] == "all others"
    assert sum(k["percent"] for k in figures["kernels"]) == pytest.approx(100, abs=0.1)
