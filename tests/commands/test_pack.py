"""vmae-fast pack as a user types it: stopped, killed, out of space, and what is made of it."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmae_fast import cli
from vmae_fast.data import read_source, synthetic_videos

SMALL = ["--model", "tiny", "--frames", "4", "--image-size", "32"]
# Of 24 frames 12 are kept, in two segments; a few samples fill a shard.
FLAGS = ["--stride", "2", "--segment-frames", "8", "--overlap", "3", "--shard-mb", "0.03"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = synthetic_videos(tmp_path_factory.mktemp("videos"), count=12, size=40, frames=24)
    (folder / "left/broken ü, by comma.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def packed(videos, tmp_path_factory):
    """Packed without a break."""
    out = tmp_path_factory.mktemp("packed") / "with space"
    assert cli.main(["pack", str(videos), str(out), *FLAGS, "--workers", "1"]) == 0
    return out


def contents(folder):
    """Bytes of every file below a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(videos, out, *flags, **more):
    command = [sys.executable, "-m", "vmae_fast.cli", "pack", str(videos), str(out), *FLAGS, *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def wait_for(process, seen, seconds=60):
    end = time.monotonic() + seconds
    while not seen():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def test_what_is_said_and_written(videos, packed, capsys):
    # The same again finds all done.
    assert cli.main(["pack", str(videos), str(packed), *FLAGS]) == 0
    said = capsys.readouterr().out
    for part in (
        "folder: 13 video files; labels from 8 class sub-folders",
        "by comma.mp4: Invalid data",
        "packed 12 of 13 files, 1 bad",
        "as 24 segments in",
        f"vmae-fast pretrain --data {packed} --stride 2",
    ):
        assert part in said
    bad = (packed / "bad_files.txt").read_text(encoding="utf-8")
    path, _, reason = bad.rstrip("\n").partition("\t")
    assert path == str(videos / "left/broken ü, by comma.mp4")
    assert "Invalid data" in reason
    assert {path.suffix for path in packed.iterdir()} == {".tar", ".json", ".txt"}
    assert len(list(packed.glob("shard-*.tar"))) > 2


def test_another_packing_is_refused_and_overwrite_starts_anew(videos, packed, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["pack", str(videos), str(out), *FLAGS]) == 0
    before = contents(out)
    (out / "mine.txt").write_text("kept")
    assert cli.main(["pack", str(videos), str(out), *FLAGS, "--crf", "30"]) == 1
    assert "crf 23, not 30" in capsys.readouterr().err
    assert cli.main(["pack", str(videos / "up"), str(out), *FLAGS]) == 1
    assert "other videos (13 in" in capsys.readouterr().err
    assert contents(out) == before | {"mine.txt": b"kept"}
    assert cli.main(["pack", str(videos / "up"), str(out), *FLAGS, "--overwrite"]) == 0
    assert (out / "mine.txt").read_text() == "kept"
    assert not (out / "bad_files.txt").exists()
    assert len(read_source(out).files) < len(before)
    assert cli.main(["pack", str(videos), str(videos), *FLAGS]) == 1
    assert "is not empty and holds no packed data" in capsys.readouterr().err


def test_nothing_good_is_an_error(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_text("no video")
    assert cli.main(["pack", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    assert "no file could be packed, of 1" in capsys.readouterr().err
    assert contents(tmp_path / "out").keys() == {"bad_files.txt"}


@pytest.mark.parametrize("flags", [["--stride", "0"], ["--crf", "60"], ["--shard-mb", "0"],
                                   ["--short-side", "33"], ["--overlap", "70"]])  # fmt: skip
def test_wrong_settings(flags, videos, tmp_path, capsys):
    assert cli.main(["pack", str(videos), str(tmp_path / "out"), *flags]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_killed_at_any_time_it_ends_in_the_same_bytes(videos, packed, tmp_path):
    out = tmp_path / "out"
    state = out / ".pack"
    moments = [
        lambda: len(list(state.glob("[0-9]*.json"))) >= 2,
        lambda: (out / "shard-000002.tar").exists(),
    ]
    for moment in moments:
        process = start(videos, out, "--workers", "2")
        wait_for(process, moment)
        process.kill()
        process.communicate()
        assert not (out / "index.json").exists()
    with pytest.raises(ValueError, match="run the same vmae-fast pack again"):
        read_source(out)
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    process = start(videos, out, "--workers", "2")
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "packed 12 of 13 files, 1 bad" in said
    assert contents(out) == contents(packed)
    # What was there is not made again.
    assert (out / "shard-000000.tar").stat().st_mtime_ns == made["shard-000000.tar"]


def test_ctrl_c_says_how_to_go_on(videos, packed, tmp_path):
    out = tmp_path / "out"
    process = start(videos, out, "--workers", "1", start_new_session=True)
    wait_for(process, lambda: list((out / ".pack").glob("[0-9]*.json")))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command, without --overwrite, goes on" in errors
    assert "Traceback" not in errors
    assert cli.main(["pack", str(videos), str(out), *FLAGS]) == 0
    assert contents(out) == contents(packed)


def test_a_full_disk_is_one_clear_error(videos, packed, tmp_path):
    """Parts of files fit below the limit, and shards do not."""
    out = tmp_path / "out"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000))

    process = start(videos, out, "--workers", "1", preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "File too large" in errors
    assert "goes on" in errors
    assert "Traceback" not in errors
    assert list((out / ".pack").glob("*.data"))
    assert not list(out.glob("*.tar"))
    assert cli.main(["pack", str(videos), str(out), *FLAGS]) == 0
    assert contents(out) == contents(packed)


def test_check_and_preview(packed, tmp_path, capsys):
    arguments = [str(packed), *SMALL, "--stride", "2", "--out", str(tmp_path / "report")]
    assert cli.main(["check", *arguments, "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "packed: 24 segments of 12 videos in" in said
    assert "shards, every 2nd frame" in said
    assert "files: 24, 24 good, 0 bad" in said
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert {row["fps"] for row in rows} == {"12.0"}
    good = read_source(tmp_path / "report-good.txt").files
    assert [(f.label, f.taken_every, f.source) for f in good] == [
        (f.label, f.taken_every, f.source) for f in read_source(packed).files
    ]
    picture = str(tmp_path / "p.png")
    assert cli.main(["preview", str(packed), *SMALL, "--stride", "4", "--out", picture]) == 0
    assert cli.main(["check", str(packed), *SMALL, "--stride", "3"]) == 1
    assert "must be a multiple of 2" in capsys.readouterr().err


def test_training_and_videos_held_out_whole(packed, tmp_path, capsys):
    run = [
        "pretrain", "--data", str(packed), *SMALL, "--stride", "2", "--batch-size", "4", "--val",
        "0.25", "--workers", "0", "--device", "cpu", "--save-every", "2", "--out",
    ]  # fmt: skip
    assert cli.main([*run, str(tmp_path / "whole"), "--steps", "4"]) == 0
    said = capsys.readouterr()
    assert "packed: 24 segments of 12 videos" in said.out + said.err
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().split("\n")
            if line]  # fmt: skip
    assert rows[-1]["step"] == 4
    video, drawn = read_source(packed).files[0].path, str(tmp_path / "drawn")
    arguments = [str(tmp_path / "whole"), video, "--stride", "1", "--out", drawn]
    assert cli.main(["reconstruct", *arguments]) == 0
    assert (tmp_path / "drawn.png").is_file()
    from vmae_fast.data import split_by_source

    files = read_source(packed).files
    train, held_out = split_by_source(files, 0.25, 0)
    sources = [{files[k].source for k in side} for side in (train, held_out)]
    assert not sources[0] & sources[1]
    assert len(sources[0]) == 9
    assert sorted(train + held_out) == list(range(24))


def test_webdataset_reads_it(packed):
    webdataset = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted(packed.glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    files = read_source(packed).files
    assert [f"{s['__key__']}.mp4" for s in samples] == [Path(f.path).name for f in files]
    for sample, file in zip(samples, files, strict=True):
        about = json.loads(sample["json"])
        assert about["label"] == file.label == file.source.split("/")[-2]
        assert file.source.endswith(about["source"])
        assert sample["mp4"][4:8] == b"ftyp"
    assert {json.loads(s["json"])["first_frame"] for s in samples} == {0, 10}
