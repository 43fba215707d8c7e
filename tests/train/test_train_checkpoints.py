"""Checkpoints that were damaged, runs that go on by themselves, processes killed at any moment."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vmae_fast import cli
from vmae_fast._files import CHECKSUMS, find_damage, write_checksums
from vmae_fast.train import ConfigError, load_config, pretrain, to_toml
from vmae_fast.train.metrics import read_metrics
from vmae_fast.train.run_folder import RunFolder

ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def weights(run, step):
    return load_file(Path(run) / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    """One bit in the middle: the file is as long as it was and is read without complaint."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "weights cut off": (lambda step: truncate(step / "model.safetensors"), "model.safetensors is"),
    "weights altered": (lambda step: flip(step / "model.safetensors"), "model.safetensors is not"),
    "state altered": (lambda step: flip(step / "trainer.pt"), "trainer.pt is not what was written"),
    "settings empty": (lambda step: (step / "config.json").write_text(""), "config.json is not"),
    "state gone": (lambda step: (step / "trainer.pt").unlink(), "trainer.pt is missing"),
    "sums cut off": (lambda step: truncate(step / CHECKSUMS), "SHA256SUMS is damaged"),
    "sums empty": (lambda step: (step / CHECKSUMS).write_text(""), "SHA256SUMS is damaged"),
    "average altered": (lambda step: flip(step / "ema" / "model.safetensors"), "ema/model"),
}


# ---- checksums ----------------------------------------------------------------------------


def test_sums_are_those_of_sha256sum(tmp_path):
    folder = tmp_path / "a folder"
    (folder / "in").mkdir(parents=True)
    (folder / "ä b").write_bytes(os.urandom(3_000_000))
    (folder / "in" / "empty").write_bytes(b"")
    write_checksums(folder)
    assert find_damage(folder) is None
    checked = subprocess.run(
        ["sha256sum", "--check", CHECKSUMS], cwd=folder, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.splitlines() == ["in/empty: OK", "ä b: OK"]
    (folder / "in" / "empty").write_bytes(b"0")
    assert find_damage(folder) == "in/empty is not what was written"
    (folder / CHECKSUMS).unlink()
    assert find_damage(folder) is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory, videos):
    """A finished run of eight steps, saved at every second one."""
    config = load_config("tiny")
    config.model.frames, config.model.image_size = 4, 32
    config.data.data, config.data.stride = str(videos), 2
    config.loading.val, config.loading.workers, config.loading.cache = 0.125, 0, True
    config.optim.batch_size, config.optim.steps, config.optim.warmup_steps = 8, 8, 2
    config.optim.ema_decay = 0.5
    config.run.out = str(tmp_path_factory.mktemp("saved") / "run")
    config.run.save_every, config.run.val_every, config.run.log_every = 2, 100, 1
    config.run.device, config.run.keep, config.run.target = "cpu", 10, None
    pretrain(config)
    return config


@pytest.fixture
def copied(saved, tmp_path):
    """The run without its last checkpoint, in a place of its own."""
    shutil.copytree(saved.run.out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    return tmp_path / "run"


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(what, copied, saved, capfd):
    damage, reason = DAMAGE[what]
    newest = copied / "checkpoints" / "step-00000006"
    damage(newest)
    assert cli.main(["pretrain", "--out", str(copied), "--resume"]) == 0
    said = capfd.readouterr().err
    (warning,) = [line for line in said.splitlines() if line.startswith("warning")]
    assert f"{newest} is damaged ({reason}" in warning
    assert f"going on from {copied / 'checkpoints' / 'step-00000004'}" in warning
    assert "going on after step 4" in said
    assert same(weights(copied, 8), weights(saved.run.out, 8))
    # What was damaged is kept for a look at it, and no run takes it again.
    assert (copied / "checkpoints" / "damaged-step-00000006").is_dir()
    assert find_damage(newest) is None


def test_keep_counts_whole_checkpoints_only(copied):
    for step in (4, 6):
        flip(copied / "checkpoints" / f"step-{step:08d}" / "trainer.pt")
    assert cli.main(["pretrain", "--out", str(copied), "--resume", "--keep", "1"]) == 0
    names = sorted(path.name for path in (copied / "checkpoints").iterdir())
    assert names == ["damaged-step-00000004", "damaged-step-00000006", "step-00000008"]


@pytest.mark.parametrize("flag", ["--resume", "--auto-resume"])
def test_no_whole_checkpoint_is_an_error_that_lists_them(flag, copied, capsys):
    for step in (2, 4, 6):
        truncate(copied / "checkpoints" / f"step-{step:08d}" / "trainer.pt")
    before = sorted(copied.rglob("*"))
    assert cli.main(["pretrain", "--out", str(copied), flag]) == 1
    said = capsys.readouterr().err
    assert "no checkpoint is as it was written" in said
    assert said.count("trainer.pt is not what was written") == 3
    assert sorted(copied.rglob("*")) == before


def test_a_damaged_one_is_left_alone_where_the_settings_are_wrong(copied):
    flip(copied / "checkpoints" / "step-00000006" / "trainer.pt")
    assert cli.main(["pretrain", "--out", str(copied), "--resume", "--batch-size", "7",
                     "--micro-batch", "2"]) == 1  # fmt: skip
    assert (copied / "checkpoints" / "step-00000006").is_dir()


def test_set_aside_finds_a_name(tmp_path):
    run = RunFolder(tmp_path)
    names = []
    for _ in range(3):
        (run.checkpoints / "step-00000001").mkdir(parents=True)
        names.append(run.set_aside(run.checkpoints / "step-00000001").name)
    assert names == [f"damaged-step-00000001{end}" for end in ("", "-2", "-3")]


# ---- going on by itself -------------------------------------------------------------------


def test_auto_resume_starts_and_goes_on(config, saved):
    shutil.rmtree(config.run.out, ignore_errors=True)
    config.run.auto_resume = True
    whole = pretrain(config)
    assert whole.steps == 8
    config.optim.steps = 12
    went_on = pretrain(config)
    assert went_on.steps == 12
    rows = [row["step"] for row in read_metrics(went_on.path / "metrics.jsonl") if "loss" in row]
    assert rows == list(range(1, 13))


def test_auto_resume_by_flags_alone_keeps_the_settings(copied, saved, capfd):
    assert cli.main(["pretrain", "--out", str(copied), "--auto-resume"]) == 0
    assert "going on after step 6" in capfd.readouterr().err
    assert same(weights(copied, 8), weights(saved.run.out, 8))
    assert "auto_resume =" not in (copied / "config.toml").read_text()


def test_auto_resume_starts_anew_where_nothing_was_saved_yet(config):
    pretrain(config)
    out = Path(config.run.out)
    shutil.rmtree(out / "checkpoints")
    config.run.auto_resume = True
    assert pretrain(config).steps == 8


def test_auto_resume_deletes_nothing_that_is_no_run(config):
    out = Path(config.run.out)
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    config.run.auto_resume = True
    with pytest.raises(ConfigError, match=r"holds files that are no run's \(thesis.txt\)"):
        pretrain(config)
    assert (out / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_restart_by_torchrun_goes_on(overwrite, copied, saved, capfd, monkeypatch):
    """With the flags of the first start, which may have been to overwrite."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    flags = ["--config", str(copied / "config.toml"), *(["--overwrite"] if overwrite else [])]
    assert cli.main(["pretrain", "--out", str(copied), *flags]) == 0
    assert "going on after step 6" in capfd.readouterr().err
    assert same(weights(copied, 8), weights(saved.run.out, 8))


@pytest.mark.parametrize(
    "flags",
    [
        ["--auto-resume"],
        ["--auto-resume", "--overwrite", "--out", "x"],
        ["--timeout", "0"],
        ["--skip-nonfinite", "-1"],
    ],
)
def test_flags_that_cannot_be(flags, capsys):
    assert cli.main(["pretrain", *flags]) != 0
    assert flags[0].lstrip("-").replace("-", "_") in capsys.readouterr().err.replace("-", "_")


# ---- killed at any moment -----------------------------------------------------------------


# Of a run that is killed: more than it comes to between two kills, as a rule.
STEPS_A_KILL = 4


def killed_run(config, tmp_path, kills, seed):
    """Kill a run at random moments, then let it come to its end.

    Its checkpoints are whole after each, and the last weights those of an unbroken run. Returns
    the steps that were in its metrics at each.
    """
    draw, total = random.Random(seed), STEPS_A_KILL * kills
    out, moments = tmp_path / "killed", []
    for _ in range(kills):
        process = start(config, out, total, save_every=2)
        # Most after some steps, that is in a step or while saving; some before the first.
        goal = steps_of(out) + draw.randrange(1, 5) if draw.random() < 0.8 else total
        end = time.monotonic() + (60 if goal < total else draw.uniform(0.5, 6))
        while time.monotonic() < end and process.poll() is None and steps_of(out) < goal:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        moments.append(steps_of(out))
        for checkpoint in (out / "checkpoints").glob("step-*"):
            assert (checkpoint / CHECKSUMS).is_file()
            assert find_damage(checkpoint) is None
    half = out / "checkpoints" / ".step-00000099.abc.tmp"
    half.mkdir(parents=True, exist_ok=True)
    (half / "model.safetensors").write_bytes(b"half")
    finish(start(config, out, total, save_every=2))
    finish(start(config, tmp_path / "whole", total, save_every=total))
    assert same(weights(out, total), weights(tmp_path / "whole", total))
    rows = [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert rows == list(range(1, total + 1))
    assert not list((out / "checkpoints").glob(".*"))
    return moments


def start(config, out, steps, save_every):
    config.optim.steps, config.run.out = steps, str(out)
    config.run.save_every, config.run.val_every, config.run.log_every = save_every, 1000, 1
    file = out.with_suffix(".toml")
    file.write_text(to_toml(config))
    return subprocess.Popen(
        [sys.executable, "-m", "vmae_fast.cli", "pretrain", "--config", str(file), "--auto-resume"],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert "warning" not in said


def steps_of(out):
    rows = read_metrics(out / "metrics.jsonl")
    return max((row["step"] for row in rows), default=0)


def test_killed_five_times(config, tmp_path):
    moments = killed_run(config, tmp_path, kills=5, seed=0)
    assert max(moments) > 0


@pytest.mark.slow
def test_killed_fifty_times(config, tmp_path):
    moments = killed_run(config, tmp_path, kills=50, seed=1)
    # Not all of them after the end.
    assert sum(0 < step < 50 * STEPS_A_KILL for step in moments) > 25


# ---- no room ------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_room_for_the_part_of_one_process(config, tmp_path):
    """All of them say so and end; there is the checkpoint before, from which they go on."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    config.optim.steps, config.run.parallel, config.run.val_every = 4, "fsdp", 100
    file = tmp_path / "run.toml"

    def run(*flags, limit=resource.RLIM_INFINITY):
        file.write_text(to_toml(config))
        return subprocess.run(
            [sys.executable, *launcher, "-m", "vmae_fast.cli", "pretrain", "--config", str(file),
             *flags],
            env=ENVIRONMENT, capture_output=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )  # fmt: skip

    assert run().returncode == 0
    before = sorted((tmp_path / "run" / "checkpoints").rglob("*"))
    config.optim.steps = 8
    failed = run("--resume", limit=700_000)
    assert failed.returncode != 0
    assert failed.stderr.count("the checkpoint of step 8 could not be written") == 2
    assert failed.stderr.count("could not write to") == 2
    assert "File too large" in failed.stderr
    assert sorted((tmp_path / "run" / "checkpoints").rglob("*")) == before
    assert run("--resume").returncode == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000008").is_dir()
