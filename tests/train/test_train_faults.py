"""Whole runs over files that crash, hang or are damaged: each costs its clip, and no run ends."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from crashing import CrashingDecoder
from mutating import mutate, write_sources
from safetensors.torch import load_file

from vmae_fast.data import DecodeError, split_validation
from vmae_fast.train import DataSettings, pretrain
from vmae_fast.train.distributed import alone
from vmae_fast.train.inputs import Inputs
from vmae_fast.train.run_folder import RunFolder


def weights(result, step=None):
    name = result.checkpoint.name if step is None else f"step-{step:08d}"
    return load_file(result.path / "checkpoints" / name / "model.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def decoder(monkeypatch):
    """Let runs read their files by a decoder with faults; call with its arguments."""

    def use(**options):
        def make(*_, **__):
            return CrashingDecoder(**options)

        monkeypatch.setattr("vmae_fast.train.inputs.make_decoder", make)

    return use


@pytest.fixture
def faulty(videos, tmp_path, config):
    """Let the run have a set of 16 with three faulty files; call with how their names begin."""

    def make(fault):
        folder = tmp_path / f"set-{fault}"
        folder.mkdir()
        for number, path in enumerate(sorted(videos.rglob("*.mp4"))):
            name = fault if number in (3, 8, 12) else "video"
            (folder / f"{name}{number:02}.mp4").symlink_to(path)
        config.data.data = str(folder)
        # They come first by name. One of them is to be held out.
        first = {0, 1, 2}
        config.run.seed = next(
            seed for seed in range(100)
            if len(first & set(split_validation(16, config.loading.val, seed)[1])) == 1
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize(("fault", "workers"), [("segfault", 1), ("crash", 2), ("hang", 2)])
def test_a_file_that_takes_its_worker_down_is_as_if_unreadable(
    config, faulty, decoder, tmp_path, fault, workers
):
    """Bitwise, in training and in validation; and a resumed run does not open it again."""
    faulty(fault)
    log = tmp_path / "log"
    log.mkdir()
    config.data.repeats, config.loading.max_bad, config.run.keep = 2, 0.5, 10
    config.loading.workers, config.loading.decode_timeout = workers, 1.5
    config.run.out = str(tmp_path / "lost")
    decoder(log=log)
    lost = pretrain(config)
    opened = os.listdir(log)
    assert {name.partition("-")[2][: len(fault)] for name in opened} == {fault}

    config.run.out = str(tmp_path / "unreadable")
    decoder(instead="unreadable")
    unreadable = pretrain(config)
    for step in (4, 8):
        assert_same(weights(lost, step), weights(unreadable, step))
    assert lost.val_loss == unreadable.val_loss
    reasons, expected = (RunFolder(run.path).read_bad_files() for run in (lost, unreadable))
    assert reasons.keys() == expected.keys()
    assert len(reasons) == 3
    how = {
        "segfault": "its decoder crashed (SIGSEGV)",
        "crash": "its decoder crashed (SIGKILL)",
        "hang": "its decoder hung for 1.5 s",
    }
    assert set(reasons.values()) == {how[fault]}

    # As after a kill between the two checkpoints.
    shutil.rmtree(lost.path / "checkpoints/step-00000008")
    config.run.out, config.run.resume = str(tmp_path / "lost"), True
    decoder(log=log)
    resumed = pretrain(config)
    assert_same(weights(resumed), weights(unreadable))
    assert sorted(os.listdir(log)) == sorted(opened)
    assert RunFolder(resumed.path).read_bad_files() == reasons


def test_other_bad_files_are_opened_again_after_a_resume(config, faulty, decoder, tmp_path):
    """They may have come back."""
    faulty("unreadable")
    config.loading.max_bad, config.optim.steps = 0.5, 4
    config.loading.workers = 1
    decoder()
    first = pretrain(config)
    log = tmp_path / "log"
    log.mkdir()
    decoder(log=log)
    config.run.resume, config.optim.steps = True, 8
    pretrain(config)
    assert len(RunFolder(first.path).read_bad_files()) == 3
    assert {name.partition("-")[2][:10] for name in os.listdir(log)} == {"unreadable"}


def reason_of(dataset, request):
    """Of a file that cannot be read, by its path; nothing for one that can."""
    try:
        dataset.read(request)
    except DecodeError as error:
        return {error.path: error.reason}
    return {}


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_files_end_no_run(config, sources, tmp_path, count):
    """Every one is read once, by stride or by time; those that cannot be are listed, with why."""
    folder = tmp_path / "damaged"
    written = mutate(sources, folder, count)
    # As many sound ones, so that ten in a row are not bad by chance.
    for number in range(count):
        source = sources[number % len(sources)]
        (folder / f"sound{number:04}{source.suffix}").symlink_to(source)
    half = count // 2
    lists = [tmp_path / "stride.txt", tmp_path / "time.txt"]
    names = sorted(os.listdir(folder))
    for number, file in enumerate(lists):
        part = [name for name in names if int(name.strip("sound")[:4]) // half == number]
        file.write_text("".join(f"damaged/{name}\n" for name in part))
    config.mixture = [
        DataSettings(data=str(lists[0]), stride=2), DataSettings(data=str(lists[1]), sample_fps=8.0)
    ]  # fmt: skip
    config.loading.workers, config.loading.val, config.loading.max_bad = 2, 0.0, 0.99
    config.loading.decode_timeout = 30.0
    config.optim.steps, config.optim.warmup_steps = 2 * count // 8, 0
    config.run.save_every = config.run.val_every = 10_000
    result = pretrain(config)
    assert result.steps == 2 * count // 8

    listed = RunFolder(result.path).read_bad_files()
    print(f"{count} damaged files, {len(listed)} of them listed: {Counter(listed.values())}")
    assert all(reason and len(reason) < 100 for reason in listed.values())
    assert not [reason for reason in listed.values() if "hung" in reason]
    # One by one, by another data set of the same draws.
    inputs = Inputs(config, config.model.build(None).config, alone())
    inputs.pass_over(listed)
    dataset, bad = inputs.dataset(train=True), {}
    for request in inputs.epoch().requests(0, 2 * count):
        bad |= reason_of(dataset, request)
    assert listed == bad
    assert not [path for path in listed if "sound" in path]
    assert 0.25 * count < len(listed) < 0.6 * count
    assert {Path(path) for path in listed} < set(written)
    # Nothing of a kind is bad for another cause, such as a decoder that is not there.
    kinds = {path.name.split("-", 2)[2] for path in written if "renamed" not in path.name}
    assert len({Path(path).name.split("-", 2)[2] for path in listed}) > 0.5 * len(kinds)


def test_one_video_is_enough(config, videos, tmp_path):
    """It is never held out, and is trained on again and again."""
    only = sorted(videos.rglob("*.mp4"))[0]
    config.data.data, config.loading.workers = str(only), 1
    config.optim.steps, config.optim.warmup_steps = 2, 0
    result = pretrain(config)
    assert result.steps == 2
    assert result.val_loss is None


ODD_NAMES = [
    "with space", "tab\tin it", "two\nlines", "ünïcödé 视频", '"quoted"', "back\\slash",
    os.fsdecode(b"not utf-8 \xff"), "line\u2028separator",
]  # fmt: skip


def test_odd_names_of_bad_files_are_listed_a_line_each_and_known_again(
    config, videos, tmp_path, decoder
):
    """Such files crash their decoder here: a resumed run must know them by name."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number, path in enumerate(sorted(videos.rglob("*.mp4"))):
        (folder / f"video{number}.mp4").symlink_to(path)
        if number < len(ODD_NAMES):
            (folder / f"exit {ODD_NAMES[number]}.mp4").symlink_to(path)
    config.data.data, config.loading.val, config.loading.max_bad = str(folder), 0.0, 0.9
    config.loading.workers, config.run.save_every, config.run.log_every = 1, 3, 1
    log = tmp_path / "log"
    log.mkdir()
    decoder(log=log)
    config.optim.steps = 3
    first = pretrain(config)
    opened = os.listdir(log)
    lines = (first.path / "bad_files.txt").read_text().split("\n")
    assert len(lines) == len(ODD_NAMES) + 1
    names = {os.path.basename(path) for path in RunFolder(first.path).read_bad_files()}
    assert names == {f"exit {name}.mp4" for name in ODD_NAMES}
    assert {name.partition("-")[2] for name in opened} == names
    # As they are where that can be.
    assert f"{folder}/exit ünïcödé 视频.mp4\tits decoder crashed (exit status 7)" in lines
    config.optim.steps, config.run.resume = 6, True
    assert pretrain(config).steps == 6
    assert sorted(os.listdir(log)) == sorted(opened)
