"""What a beginner gets wrong, typed as a user types it: one message that says what to do next."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from vmae_fast import VideoMAE, cli
from vmae_fast.data import synthetic_videos

TINY = [
    "--model", "tiny", "--frames", "4", "--image-size", "32", "--stride", "2", "--batch-size", "4",
    "--steps", "2", "--warmup-steps", "0", "--lr", "1e-3", "--workers", "0", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a bit of everything, most of it no use."""
    here = tmp_path_factory.mktemp("place")
    made = synthetic_videos(here / "made", count=4, size=40, frames=24)
    shutil.copytree(made, here / "videos")
    shutil.copy(next(made.rglob("*.mp4")), here / "clip.mp4")
    for folder in ("empty", "notes", "broken", "bert", "weightless"):
        (here / folder).mkdir()
    (here / "notes/notes.txt").write_text("no video\n")
    for number in range(3):
        (here / f"broken/{number}.mp4").write_bytes(bytes(range(200)) * 20)
    shutil.copy(here / "broken/0.mp4", here / "broken.mp4")
    (here / "list.txt").write_text("".join(f"gone/{number}.mp4\n" for number in range(4)))
    (here / "typo.toml").write_text("[optim]\nbatch_sise = 3\n")
    (here / "half.toml").write_text("[optim\n")
    tiny = VideoMAE("tiny", frames=4, image_size=32)
    tiny.save_pretrained(here / "model")
    VideoMAE("tiny", frames=4, image_size=32, decoder_depth=0, num_classes=3).save_pretrained(
        here / "classifier"
    )
    shutil.copy(here / "model/model.safetensors", here / "bert/model.safetensors")
    (here / "bert/config.json").write_text(json.dumps({"model_type": "bert"}))
    (here / "text.pth").write_text("hello")
    torch.save([1, 2], here / "list.pth")
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, here / "other.pth")
    return here


@pytest.fixture
def message(place, capsys, monkeypatch):
    """The one message of a command that fails, run in that folder."""
    monkeypatch.chdir(place)

    def run(*args, status=1):
        try:
            came = cli.main([str(arg) for arg in args])
        except SystemExit as exit_:
            came = exit_.code
        text = capsys.readouterr().err
        assert came == status, text
        assert "Traceback" not in text
        return text[text.index("vmae-fast: ") :].strip() if status == 1 else text

    return run


MISTAKES = [
    (["pretrain", *TINY, "--data", "nowhere"], ["does not exist", "name a folder of videos"]),
    (["pretrain", *TINY, "--data", "empty"], ["looked for files ending in mp4", "name another"]),
    (["pretrain", *TINY, "--data", "notes"], ["looked for files ending in mp4", "1 other file"]),
    (["pretrain", *TINY, "--data", "list.txt", "--data-root", "no"], ["no' is not a folder"]),
    (["pretrain", *TINY, "--data", "videos", "--out", "notes"], ["notes.txt", "name a new folder"]),
    (["pretrain", *TINY, "--data", "videos", "--out", "clip.mp4"], ["is a file; name a folder"]),
    (["pretrain", *TINY, "--data", "videos", "--out", "/proc/x"], ["cannot be made", "write to"]),
    (["pretrain", "--resume", "--out", "nowhere"], ["no run at nowhere", "leave --resume out"]),
    (["pretrain", "--resume", "--out", "notes"], ["no complete checkpoint", "--overwrite"]),
    (["pretrain", "--resume"], ["--resume needs --out"]),
    (["pretrain", "--resume", "--overwrite", "--out", "x"], ["choose one"]),
    (["pretrain", "--config", "tny"], ["did you mean 'tiny'", "recipes are tiny, v1-base"]),
    (["pretrain", "--config", "no.toml"], ["no config file at no.toml", "recipes are tiny"]),
    (["pretrain", "--config", "typo.toml"], ["did you mean 'batch_size'"]),
    (["pretrain", "--config", "half.toml"], ["half.toml is not TOML", "line 1"]),
    (["pretrain", "--config"], ["--config needs a value"]),
    (["pretrain", "--model", "bsae"], ["did you mean 'base'"]),
    (["pretrain", *TINY, "--image-size", "33"], ["32 or 40 would do"]),
    (["pretrain", *TINY, "--frames", "5"], ["4 or 6 would do"]),
    (["pretrain", *TINY, "--data", "videos", "--batch-size", "6", "--micro-batch", "4"],
     ["must divide the 6 clips", "1, 2, 3, 6 do"]),
    (["pretrain", *TINY, "--batch-size", "6", "--repeats", "4"], ["not a multiple of repeats"]),
    (["pretrain", *TINY, "--device", "gpu"], ["torch knows no such device", "cuda"]),
    (["pretrain", "--data", "videos", "--init", "nowhere"], ["give a checkpoint's folder"]),
    (["pretrain", "--data", "videos", "--init", "bert"], ["--init bert: ", "'bert'", "inspect"]),
    (["pretrain", "--data", "videos", "--init", "weightless"], ["is it a checkpoint folder?"]),
    (["pretrain", "--data", "videos", "--init", "text.pth"], ["text.pth", "a text file"]),
    (["pretrain", "--data", "videos", "--init", "list.pth"], ["list.pth holds a list"]),
    (["pretrain", "--data", "videos", "--init", "other.pth"], ["other.pth", "VideoMAE checkpoint"]),
    (["pretrain", "--data", "videos", "--init", "clip.mp4"], ["it is not a torch checkpoint"]),
    (["pretrain", "--data", "videos", "--init", "classifier"], ["no decoder", "vmae-fast inspect"]),
    (["pretrain", "--data", "videos", "--init", "model", "--model", "base"], ["leave --model out"]),
    (["reconstruct", "clip.mp4", "model"], ["the checkpoint comes first", "model clip.mp4"]),
    (["reconstruct", "model", "no.mp4"], ["no video at no.mp4"]),
    (["reconstruct", "model", "broken.mp4"], ["broken.mp4", "give another video"]),
    (["reconstruct", "model", "empty"], ["empty", "give another video"]),
    (["reconstruct", "nowhere", "clip.mp4"], ["give a checkpoint's folder"]),
    (["reconstruct", "classifier", "clip.mp4"], ["no decoder", "a checkpoint of pretraining"]),
    (["inspect", "nowhere"], ["no checkpoint at nowhere"]),
    (["convert", "model", "classifier"], ["classifier exists; --overwrite"]),
    (["plan", "--gpu", "h300"], ["gpu must be one of", "h200"]),
    (["plan", "--config", "tny"], ["did you mean 'tiny'"]),
]  # fmt: skip


@pytest.mark.parametrize(("args", "parts"), MISTAKES, ids=lambda value: " ".join(value)[-60:])
def test_one_message_says_what_next(args, parts, message, place):
    before = sorted(place.iterdir())
    text = message(*args)
    assert len(text.splitlines()) == 1
    for part in parts:
        assert part in text
    # Nothing is left behind for what was never begun.
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("data", ["list.txt", "broken", "broken.mp4"])
def test_files_that_cannot_be_read_are_named(data, message, tmp_path):
    text = message("pretrain", *TINY, "--data", data, "--out", tmp_path / "out", "--val", "0")
    assert "could not be read" in text
    assert "mp4" in text


def test_a_run_is_not_overwritten_by_chance(message, tmp_path):
    out = tmp_path / "run"
    run = ["pretrain", *TINY, "--data", "videos", "--out", out]
    message(*run, status=0)
    text = message(*run)
    assert "--resume goes on with it, --overwrite deletes it" in text


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["pretrain", "--batch-sise", "4"], "--batch-size"),
        (["pretrain", "--precision", "fp16"], "bf16"),
        (["pretrain", "--steps", "ten"], "--steps"),
        (["pretrain", "--lr"], "--lr"),
        (["reconstruct", "model"], "VIDEO"),
        (["convert", "model"], "OUT"),
        (["inspect"], "CHECKPOINT"),
        (["trian"], "did you mean 'pretrain'"),
    ],
)
def test_wrong_usage_is_status_2(args, part, message):
    assert part in message(*args, status=2)


# ---- devices ------------------------------------------------------------------------------


def test_no_gpu(message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = message("pretrain", *TINY, "--device", "cuda")
    assert "sees no GPU here (vmae-fast env says why); --device cpu does without" in text


def test_fewer_gpus(message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    text = message("pretrain", *TINY, "--device", "cuda:3")
    assert "the last of 2 GPUs is cuda:1" in text


# ---- disks --------------------------------------------------------------------------------


def test_no_permission_to_write(message, monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    text = message("pretrain", *TINY, "--data", "videos", "--out", tmp_path / "run")
    assert "may not be written to; name another folder" in text


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (errno.ENOSPC, "make room on that disk"),
        (errno.EACCES, "change who may read and write there"),
        (errno.ENOENT, "check the path"),
    ],
)
def test_errors_of_the_system(number, part, message, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("vmae_fast.commands.env.run", fail)
    text = message("env")
    assert "some/file" in text
    assert part in text


def vmae_fast(*args, cwd, env=None, limit=""):
    """Start the command in a process of its own."""
    words = " ".join([*map(str, args)])
    command = f"{limit} exec {sys.executable} -m vmae_fast.cli {words}"
    return subprocess.Popen(
        ["bash", "-c", command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **(env or {})},
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -f as bash on Linux has it")
def test_a_disk_that_is_full_before_the_first_checkpoint(place):
    """A limit on the size of files stands for it: the weights are larger."""
    args = ["pretrain", *TINY, "--data", "videos", "--out", "full"]
    started = vmae_fast(*args, cwd=place, limit="ulimit -f 400;")
    _, text = started.communicate(timeout=300)
    shutil.rmtree(place / "full")
    assert started.returncode == 1
    assert "Traceback" not in text
    assert "the checkpoint of step 2 could not be written" in text
    assert "There is none before it; make room, and start again with --overwrite" in text


# ---- packages -----------------------------------------------------------------------------

WITHOUT = """
import sys
sys.modules[{module!r}] = None
from vmae_fast import cli
sys.exit(cli.main({args!r}))
"""


@pytest.mark.parametrize(
    ("module", "package"),
    [("torch", "torch"), ("av", "av"), ("matplotlib", "matplotlib"), ("PIL", "pillow"),
     ("safetensors", "safetensors"), ("tyro", "tyro")],
)  # fmt: skip
def test_a_missing_package_is_named_before_the_run(module, package, place):
    args = ["pretrain", *TINY, "--data", "videos", "--out", "unwritten"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(module=module, args=args)],
        cwd=place, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        f"vmae-fast: the package {package} is not installed; pip install {package}"
    ]
    assert not (place / "unwritten").exists()


def test_a_broken_package_is_named(message, monkeypatch):
    def fail(_):
        raise ImportError("libavcodec.so.62: cannot open shared object file", name="av")

    monkeypatch.setattr("vmae_fast.commands.env.run", fail)
    text = message("env")
    assert "av cannot be imported (libavcodec.so.62" in text
    assert "pip install --force-reinstall av" in text


def test_our_own_import_errors_are_not_hidden(monkeypatch):
    def fail(_):
        raise ImportError("cannot import name 'x'", name="vmae_fast.models")

    monkeypatch.setattr("vmae_fast.commands.env.run", fail)
    with pytest.raises(ImportError):
        cli.main(["env"])


# ---- Ctrl-C and pipes ---------------------------------------------------------------------


def wait_for(condition, process, seconds=120):
    for _ in range(seconds * 20):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    raise AssertionError("it never came")


def test_ctrl_c_while_demonstration_videos_are_made(tmp_path):
    started = vmae_fast("pretrain", cwd=tmp_path, env={"VMAE_FAST_CACHE": str(tmp_path / "cache")})
    wait_for(lambda: any((tmp_path / "cache").rglob("*.mp4")), started)
    started.send_signal(signal.SIGINT)
    _, text = started.communicate(timeout=60)
    assert started.returncode == 130
    assert text.strip() == "vmae-fast: interrupted; checkpoints written before are kept"
    # No half-made set that the next run would take for a whole one, and no run.
    assert not list((tmp_path / "cache").glob("synthetic-*"))
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_while_files_are_listed(message, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vmae_fast.train.inputs.read_source", interrupted)
    assert "interrupted" in message("pretrain", *TINY, "--data", "videos", status=130)


def test_a_reader_that_has_enough(tmp_path):
    """`vmae-fast pretrain --help-all | head -1`."""
    command = f"{sys.executable} -u -m vmae_fast.cli pretrain --help-all | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("usage:")
    assert done.stderr == ""
