"""Runs as processes: signals, a full disk, two real ranks."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from safetensors.torch import load_file

from vmae_fast import VideoMAE
from vmae_fast.train import to_toml
from vmae_fast.train.metrics import read_metrics

# Two runs side by side on two cores must not spin for each other.
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def command(config, **changes):
    """The run's settings as a config file and the command to start it."""
    for name, value in changes.items():
        group = next(g for g in vars(config).values() if hasattr(g, name))
        setattr(group, name, value)
    file = Path(config.run.out).with_suffix(".toml")
    file.write_text(to_toml(config))
    return ["-m", "vmae_fast.cli", "pretrain", "--config", str(file)]


def start(arguments, **options):
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def wait_for_step(config, step, process, seconds=90):
    """Wait until so many steps are in the metrics."""
    file = Path(config.run.out) / "metrics.jsonl"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if file.exists() and any(row["step"] >= step for row in read_metrics(file)):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.kill()
    raise AssertionError("the run did not get there")


def child_of(launcher, rank):
    """The process of a rank, by its launcher's."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("no such process")


def weights(config, step):
    name = f"step-{step:08d}"
    return load_file(Path(config.run.out) / "checkpoints" / name / "model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops(config, number):
    process = start(command(config, steps=100_000, save_every=100_000, val_every=100_000))
    wait_for_step(config, 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"stopped by {signal.Signals(number).name}" in output
    assert f"--out {config.run.out} --resume" in output
    assert "Traceback" not in output
    (checkpoint,) = (Path(config.run.out) / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) >= 3
    VideoMAE.from_pretrained(checkpoint)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(config):
    arguments = command(config, steps=4, save_every=2, val_every=100_000)
    process = start(arguments)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    before = weights(config, 4)
    # No file may grow past 1 MB: the optimiser's state is larger.
    limited = start(
        [*command(config, steps=8), "--resume"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    output, _ = limited.communicate(timeout=90)
    assert limited.returncode == 1, output
    assert "the checkpoint of step 6 could not be written" in output
    assert "File too large" in output
    assert "Traceback" not in output
    after = weights(config, 4)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    checkpoints = Path(config.run.out) / "checkpoints"
    assert [p.name for p in sorted(checkpoints.iterdir())] == ["step-00000002", "step-00000004"]
    roomy = start([*command(config, steps=8), "--resume"])
    output, _ = roomy.communicate(timeout=90)
    assert roomy.returncode == 0, output


def test_two_ranks_equal_one(config, tmp_path):
    """Same clips, same masks, same bad files: two processes against one with the whole batch."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in sorted(Path(config.data.data).rglob("*.mp4")):
        (mixed / f"{path.parent.name}-{path.name}").symlink_to(path)
    for number in range(2):
        (mixed / f"bad{number}.mp4").write_bytes(b"not a video")
    config.data.data, config.loading.max_bad = str(mixed), 0.5
    common = {"steps": 3, "micro_batch": 2, "repeats": 2, "save_every": 3}
    # Where as many tokens are scored in every clip is in test_train_ranks.py.
    common |= {"mask_kind": "random", "decoder_mask_ratio": 0.5}
    process = start(command(config, **common))
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    one = weights(config, 3)
    rows = read_metrics(Path(config.run.out) / "metrics.jsonl")

    arguments = command(config, out=str(tmp_path / "two"))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    process = start([*launcher, *arguments])
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    for name, tensor in weights(config, 3).items():
        assert relative_error(tensor, one[name]) < 1e-4, name
    for a, b in zip(rows, read_metrics(tmp_path / "two" / "metrics.jsonl"), strict=True):
        for figure in ("loss", "grad_norm", "val_loss", "val_zero_prediction", "bad_files"):
            assert (figure in a) == (figure in b)
            if figure in a:
                assert b[figure] == pytest.approx(a[figure], rel=1e-4)
    listed = [(Path(config.run.out).parent / run / "bad_files.txt") for run in ("run", "two")]
    assert listed[1].read_text() == listed[0].read_text() != ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["all", "one of them"])
def test_two_ranks_stop_together(config, number):
    """After the same step, and save it once: what a scheduler sends to all or to one."""
    arguments = command(config, steps=100_000, save_every=100_000, val_every=100_000)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    process = start([*launcher, *arguments])
    wait_for_step(config, 2, process, seconds=120)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.kill(child_of(process.pid, rank=1), number)
    output, _ = process.communicate(timeout=120)
    (checkpoint,) = (Path(config.run.out) / "checkpoints").iterdir()
    VideoMAE.from_pretrained(checkpoint)
    assert output.count(f"stopped by {signal.Signals(number).name}") == 1
    assert output.count("vmae-fast:") == 0
