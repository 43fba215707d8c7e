"""What a run's log says a step takes of memory; the figures themselves: tests/plan."""

import os
import re
import subprocess
import sys
import textwrap

import torch

from vmae_fast import VideoMAE, VideoMAEConfig
from vmae_fast.plan.trace import trace_step
from vmae_fast.train import to_toml
from vmae_fast.train.memory import memory_report

LOW = torch.bfloat16
BATCH = 512
CONFIG = VideoMAEConfig(
    frames=8, image_size=32, patch_size=8, width=64, depth=3, heads=2, mlp_dim=176,
    decoder_width=32, decoder_depth=2, decoder_heads=1, decoder_mlp_dim=70, mask_ratio=0.75,
)  # fmt: skip


def kept_mib(model, autocast_dtype):
    """What the report says is kept, a whole number of MiB."""
    line = memory_report(model, BATCH, autocast_dtype, averaged=False)
    found = re.search(rf"([0-9,]+) MiB kept for the backward pass of {BATCH} clips$", line)
    return int(found[1].replace(",", ""))


def test_each_option_saves():
    model = VideoMAE(CONFIG)
    found = {}
    for model.checkpointing in ("none", "mlp", "block"):
        for model.residual_dtype in (None, LOW):
            found[model.checkpointing, model.residual_dtype] = kept_mib(model, LOW)
    for one, less in (("none", "mlp"), ("mlp", "block")):
        for dtype in (None, LOW):
            assert found[less, dtype] < 0.8 * found[one, dtype]
    for what in ("none", "mlp", "block"):
        assert found[what, LOW] < 0.95 * found[what, None]
    model.residual_dtype = None
    assert found["block", None] < kept_mib(model, None)


def test_the_report():
    model = VideoMAE("base", image_size=64)
    state = torch.get_rng_state()
    line = memory_report(model, 2, None, averaged=True)
    assert torch.equal(torch.get_rng_state(), state)
    weights = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    kept = trace_step(model.config, 2, backward=False).kept_bytes / 2**20
    assert line.startswith("memory: ")
    assert f"{weights:,.0f} MiB weights, {weights:,.0f} MiB gradients" in line
    assert f"{2 * weights:,.0f} MiB AdamW, {weights:,.0f} MiB averaged weights" in line
    assert line.endswith(f", {kept:,.0f} MiB kept for the backward pass of 2 clips")
    assert f"memory: {5 * weights + kept:,.0f} MiB = " in line
    assert "averaged" not in memory_report(model, 2, None, averaged=False)


def test_the_report_of_a_sharded_model():
    model = VideoMAE("base", image_size=64)
    mib = sum(p.numel() for p in model.parameters()) * 4 / 2**20

    def figures(**more):
        line = memory_report(model, 2, LOW, averaged=False, processes=4, **more)
        return {name: int(size.replace(",", "")) for size, name in
                re.findall(r"([0-9,]+) MiB ([a-zA-Z ]+?)(?:,|$)", line)}  # fmt: skip

    whole, parts, several = figures(), figures(sharded=True), figures(sharded=True, accumulate=2)
    for name, times in (("weights", 1), ("gradients", 1), ("AdamW", 2)):
        assert abs(whole[name] - times * mib) <= 1
        assert abs(parts[name] - times * mib / 4) <= 1
    assert abs(several["gradients"] - 1.25 * mib) <= 1
    assert abs(whole["exchange of gradients"] - mib) <= 1
    # Two blocks of 7.1 M values, and what is outside of blocks.
    assert 2 * 7.1 * 2 < parts["gathered weights"] < mib / 4
    kept = "kept for the backward pass of 2 clips"
    line = memory_report(model, 2, LOW, averaged=False, processes=4, sharded=True)
    assert line.endswith(kept)
    assert "= a part of 4 of the model: " in line


OUT_OF_MEMORY = textwrap.dedent("""
    import sys, torch
    from vmae_fast.plan import Settings
    from vmae_fast.train import load_config, out_of_memory, pretrain
    from vmae_fast.train.inputs import RunError
    from vmae_fast.train.step import TrainStep

    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.5 GiB")

    def needed(settings):
        # As of a model that is too large for one: nothing else saves enough.
        seen.append((settings.parallel, settings.gpus, settings.checkpointing))
        return 10 if settings.parallel == "fsdp" else 100

    seen = []
    TrainStep.forward_backward = full
    out_of_memory.needed_bytes = needed
    out_of_memory.memory_of = lambda device: out_of_memory.Memory(50, 50)
    try:
        pretrain(load_config(sys.argv[1]))
    except RunError as error:
        assert {entry[1] for entry in seen} == {2}
        print("SAID", str(error).replace(chr(10), " "), flush=True)
""")


def test_several_processes_are_told_to_share_the_model(config, tmp_path):
    """By two real processes, with a planner to which nothing else saves enough."""
    script = tmp_path / "full.py"
    script.write_text(OUT_OF_MEMORY)
    config.loading.workers, config.run.out = 0, str(tmp_path / "run")
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script), str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if "SAID" in line]
    assert len(said) == 2, done.stdout + done.stderr
    for line in said:
        # Tried in this order: a smaller batch, checkpointing, then parts of the model.
        assert "By the plan --micro-batch 4 --parallel fsdp fits" in line, line
        assert "start again with --micro-batch 4 --parallel fsdp --overwrite" in line
