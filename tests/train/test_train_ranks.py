"""Runs of several real processes (gloo, CPU) against runs of one, and of other numbers."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from helpers import relative_error

from vmae_fast import VideoMAE
from vmae_fast.train import pretrain, to_toml
from vmae_fast.train.metrics import read_metrics

ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
STEPS = 20
# Those of the processes' sums against one sum: rounding of fp32 alone.
GRADIENT_RTOL = 1e-6
WEIGHT_RTOL = 1e-5


@pytest.fixture
def config(config):
    """Twenty steps at a small rate; clips whose masks and crops differ."""
    config.optim.steps, config.optim.lr, config.optim.warmup_steps = STEPS, 2e-5, 0
    config.optim.micro_batch, config.data.repeats = 2, 2
    config.run.save_every, config.run.val_every, config.run.log_every = 10, 100, 5
    return config


def launch(config, processes, *, restarts=0, script=None, flags=(), **changes):
    """Start a run under torchrun."""
    for name, value in changes.items():
        group = next(g for g in vars(config).values() if hasattr(g, name))
        setattr(group, name, value)
    file = Path(config.run.out).with_suffix(".toml")
    file.write_text(to_toml(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                f"--max-restarts={restarts}", "--monitor-interval=0.1"]  # fmt: skip
    run = [str(script)] if script else ["-m", "vmae_fast.cli", "pretrain", "--config"]
    return subprocess.Popen(
        [sys.executable, *launcher, *run, str(file), *flags],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def weights(out, step=STEPS):
    return VideoMAE.from_pretrained(Path(out) / "checkpoints" / f"step-{step:08d}").state_dict()


def assert_close(found, expected, start):
    """Within rounding of each other, after having moved by much more."""
    for name, tensor in expected.items():
        error = relative_error(found[name], tensor)
        assert error < WEIGHT_RTOL, name
    moved = sum(float((expected[n] - start[n]).square().sum()) for n in expected)
    apart = sum(float((found[n] - expected[n]).square().sum()) for n in expected)
    assert apart < 1e-4 * moved


# ---- gradients ----------------------------------------------------------------------------

GRADIENTS = textwrap.dedent("""
    import sys, torch
    from vmae_fast.train import load_config
    from vmae_fast.train.distributed import process_group
    from vmae_fast.train.loop import Pretraining
    from vmae_fast.train.pace import Report
    from vmae_fast.train.stop import StopRequest

    config = load_config(sys.argv[1])
    base = config.run.out
    with process_group("cpu") as ranks:
        for parallel, parts, masks in (
            ("ddp", 1, "tube"), ("fsdp", 1, "tube"), ("ddp", 2, "tube"), ("fsdp", 2, "tube"),
            ("ddp", 2, "random"), ("fsdp", 2, "random"),
        ):
            config.run.parallel = parallel
            config.optim.micro_batch = 8 // ranks.world_size // parts
            config.run.out = f"{base}-{parallel}-{parts}-{masks}"
            # Of random masks of the decoder the number of scored tokens differs from clip to clip.
            random = masks == "random"
            config.model.mask_kind = "random" if random else None
            config.model.decoder_mask_ratio = 0.5 if random else None
            run = Pretraining(config, ranks, StopRequest())
            report = Report(0)
            batches = run.setup.inputs.train_batches(run.schedule, 0)
            run.model.train()
            loaded = [run._load(batches, report) for _ in range(run.schedule.accumulate)]
            shares = [None] * len(loaded)
            if random:
                shares = run.train_step.shares([keys for _, keys in loaded])
            for number, ((video, keys), share) in enumerate(zip(loaded, shares)):
                run.train_step.forward_backward(video, keys, share, number)
            found = {
                name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                for name, p in run.model.named_parameters()
            }
            everyone = ranks.gather(report.paths)
            if ranks.is_main:
                torch.save(found, f"{config.run.out}.pt")
                open(f"{config.run.out}.txt", "w").write(chr(10).join(sum(everyone, [])))
""")


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_are_those_of_one_process(config, tmp_path, processes):
    """With the whole batch: the same clips, the same masks, the same weights."""
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    config.data.repeats = 1
    bases = {count: tmp_path / f"by{count}" for count in (1, processes)}
    for count, base in bases.items():
        finish(launch(config, count, script=script, out=str(base)))
    endings = [path.name.removeprefix("by1") for path in sorted(tmp_path.glob("by1-*.pt"))]
    assert len(endings) == 6
    for ending in endings:
        one, several = (torch.load(f"{base}{ending}") for base in bases.values())
        clips = [Path(f"{base}{ending}").with_suffix(".txt").read_text() for base in bases.values()]
        assert clips[1] == clips[0]
        total = sum(float(tensor.square().sum()) for tensor in one.values()) ** 0.5
        for name, tensor in one.items():
            error = float((several[name] - tensor).norm())
            assert error < GRADIENT_RTOL * total, (ending, name)
            # A gradient that is zero for all would tell nothing.
            assert float(tensor.norm()) > 100 * error, (ending, name)


# ---- whole runs ---------------------------------------------------------------------------


@pytest.fixture
def one(config, tmp_path):
    """The run by one process: its weights before, and after so many steps."""

    def run(steps=STEPS):
        config.optim.steps, config.run.out = steps, str(tmp_path / "one")
        pretrain(config)
        return untrained(config), weights(config.run.out, steps)

    return run


def untrained(config):
    torch.manual_seed(config.run.seed)
    return config.model.build(None).state_dict()


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_saved_by_four_gone_on_by_two_and_by_one(config, one, tmp_path, parallel):
    start, expected = one()
    finish(launch(config, 4, out=str(tmp_path / "four"), parallel=parallel))
    assert_close(weights(tmp_path / "four"), expected, start)
    shards = list((tmp_path / "four" / "checkpoints" / "step-00000010").glob("shard-*"))
    assert len(shards) == (4 if parallel == "fsdp" else 0)
    for processes in (1, 2):
        out = tmp_path / f"by{processes}"
        shutil.copytree(tmp_path / "four", out)
        shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
        config.run.out = str(out)
        if processes == 1:
            config.run.resume = True
            assert pretrain(config).steps == STEPS
            config.run.resume = False
        else:
            output = finish(launch(config, 2, flags=["--resume"]))
            assert "going on after step 10" in output
        assert_close(weights(out), expected, start)
    # And from one that is whole to one that is sharded.
    if parallel == "fsdp":
        out = tmp_path / "sharded"
        shutil.copytree(tmp_path / "one", out)
        shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
        finish(launch(config, 2, out=str(out), flags=["--resume"]))
        assert_close(weights(out), expected, start)
        assert len(list((out / "checkpoints" / f"step-{STEPS:08d}").glob("shard-*"))) == 2


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_one_of_two_killed(config, one, tmp_path, parallel):
    """torchrun starts both again, and the run ends as an unbroken one, and as one process's."""
    start, expected = one(30)
    common = {"parallel": parallel, "save_every": 4, "log_every": 1}
    process = launch(config, 2, restarts=2, out=str(tmp_path / "killed"), **common)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    wait_for_step(metrics, 10, process)
    os.kill(child_of(process.pid, rank=1), signal.SIGKILL)
    output = finish(process)
    assert "going on after step" in output
    finish(launch(config, 2, out=str(tmp_path / "whole"), **common))
    killed, whole = weights(tmp_path / "killed", 30), weights(tmp_path / "whole", 30)
    assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())
    assert_close(whole, expected, start)
    rows = [row["step"] for row in read_metrics(metrics) if "loss" in row]
    assert rows == list(range(1, 31))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["all", "one of them"])
def test_four_stop_together(config, tmp_path, parallel, number):
    """After the same step, save it once, and go on as if they had not stopped.

    Under DDP but for the rounding of one step: it sums its first gradients by other buckets than
    those after, and so, where more than two are added, in another order.
    """
    start = untrained(config)
    common = {"parallel": parallel, "save_every": 1000, "log_every": 1, "steps": 60}
    process = launch(config, 4, out=str(tmp_path / "stopped"), **common)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    wait_for_step(metrics, 5, process)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.kill(child_of(process.pid, rank=2), number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output.count(f"stopped by {signal.Signals(number).name}") == 1
    (checkpoint,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert 5 <= step < 60
    assert f"going on after step {step}\n" in finish(launch(config, 4, flags=["--auto-resume"]))
    finish(launch(config, 4, out=str(tmp_path / "whole")))
    stopped, whole = weights(tmp_path / "stopped", 60), weights(tmp_path / "whole", 60)
    same = [torch.equal(stopped[name], tensor) for name, tensor in whole.items()]
    assert all(same) or parallel == "ddp"
    assert_close(stopped, whole, start)
    rows = [row["step"] for row in read_metrics(metrics) if "loss" in row]
    assert rows == list(range(1, 61))


def wait_for_step(metrics, step, process):
    end = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_metrics(metrics)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def child_of(launcher, rank):
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("no such process")
