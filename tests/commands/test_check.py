"""vmae-fast check as a user types it."""

import csv
import json

import pytest

from vmae_fast import cli
from vmae_fast.data import read_source, synthetic_videos

SMALL = ["--model", "tiny", "--frames", "4", "--image-size", "32", "--stride", "2"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = synthetic_videos(tmp_path_factory.mktemp("videos"), count=8, size=40, frames=24)
    (folder / "left/broken, by comma.mp4").write_text("no video")
    return folder


def test_report_and_list_of_good_files(videos, tmp_path, capsys):
    out = tmp_path / "report"
    arguments = [str(videos), *SMALL, "--out", str(out), "--step-time", "1e-4", "--workers", "2"]
    assert cli.main(["check", *arguments]) == 0
    said = capsys.readouterr().out
    for part in (
        "folder: 9 video files; labels from 8 class sub-folders",
        "files: 9, 8 good, 1 bad",
        "broken, by comma.mp4: Invalid data",
        "24 frames/s",
        "codecs: h264 (8)",
        "a step of 64 clips in 0.0001 s needs 640000.0 clips/s: it would wait 100% of the time",
    ):
        assert part in said
    assert json.loads((tmp_path / "report.json").read_text())["good"] == 8
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert len(rows) == 9
    assert sum(bool(row["reason"]) for row in rows) == 1
    good = read_source(tmp_path / "report-good.txt")
    listed = [file for file in read_source(videos).files if "broken" not in file.path]
    assert [(f.path, f.label) for f in good.files] == [(f.path, f.label) for f in listed]


def test_frame_ranges_stay_in_the_list(videos, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "frames").mkdir()
    for number in range(5, 25):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"frames/img_{number:05}.png")
    listing = tmp_path / "list.txt"
    listing.write_text(f"frames 7 12 3\n{next(videos.rglob('0*.mp4'))} 0 -1 1\n")
    assert cli.main(["check", str(listing), *SMALL, "--out", str(tmp_path / "r")]) == 0
    assert "2 good, 0 bad" in capsys.readouterr().out
    assert read_source(tmp_path / "r-good.txt").files == read_source(listing).files


def test_nothing_good_is_an_error(tmp_path, capsys):
    (tmp_path / "a.mp4").write_text("no video")
    assert cli.main(["check", str(tmp_path), *SMALL, "--out", str(tmp_path / "r")]) == 1
    captured = capsys.readouterr()
    assert "1, 0 good, 1 bad" in captured.out
    assert "no file can be trained on" in captured.err
    assert cli.main(["check", str(tmp_path), "--workers", "0"]) == 1
