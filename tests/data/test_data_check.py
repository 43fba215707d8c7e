"""Every file of a data set is read once: figures by hand, bad files, crashes."""

import os

import pytest
from crashing import CrashingDecoder

from vmae_fast.data import ClipDataset, VideoFile
from vmae_fast.data.check import CheckedFile, Report, check_files
from vmae_fast.data.probe import probe


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips):
    root = tmp_path_factory.mktemp("check")
    for number in range(6):
        clips.write_video(root / f"{number}.mp4", count=24 * (number + 1), gop=12)
    clips.write_video(root / "other.mkv", count=48, rate=12, size=(96, 64), codec="ffv1")
    (root / "text.mp4").write_text("no video")
    clips.write_audio(root / "sound.mp4")
    return root


def dataset_of(root, decoder=None):
    files = [VideoFile(str(path)) for path in sorted(root.iterdir())]
    return ClipDataset(files, frames=4, stride=2, image_size=(32, 32), decoder=decoder)


@pytest.mark.parametrize("workers", [1, 3])
def test_figures_are_those_of_the_files(folder, workers):
    counted = []
    report = check_files(dataset_of(folder), workers=workers, progress=counted.append)
    assert sum(counted) == 9
    assert [os.path.basename(file.path) for file in report.files] == sorted(os.listdir(folder))
    found = report.summary()
    assert (found["files"], found["good"]) == (9, 7)
    reasons = {os.path.basename(bad["path"]): bad["reason"] for bad in found["bad"]}
    assert set(reasons) == {"text.mp4", "sound.mp4"}
    assert "no video stream" in reasons["sound.mp4"]
    assert "Invalid data" in reasons["text.mp4"]
    # Of 24 to 144 frames at 24 a second, and 48 at 12.
    assert found["seconds"] == pytest.approx({"least": 1, "median": 4, "most": 6})
    assert found["hours"] == pytest.approx((1 + 2 + 3 + 4 + 5 + 6 + 4) / 3600)
    assert found["fps"] == pytest.approx({"least": 12, "median": 24, "most": 24})
    assert found["width"] == {"least": 64, "median": 64, "most": 64}
    assert found["height"] == {"least": 48, "median": 48, "most": 96}
    assert found["codec"] == {"h264": 6, "ffv1": 1}
    assert found["container"] == {"mp4": 6, "matroska": 1}
    paths = [file.path for file in report.files if not file.reason]
    assert found["size_bytes"] == sum(os.path.getsize(path) for path in paths)
    assert all(file.clip_s > 0 for file in report.files if not file.reason)


def test_a_decoder_that_crashes_costs_its_file_only(folder, tmp_path):
    for number, path in enumerate(sorted(folder.glob("?.mp4"))):
        (tmp_path / f"{number}.mp4").symlink_to(path)
        (tmp_path / f"crash{number % 2}.mp4").unlink(missing_ok=True)
        (tmp_path / f"crash{number % 2}.mp4").symlink_to(path)
    counted = []
    dataset = dataset_of(tmp_path, CrashingDecoder())
    report = check_files(dataset, workers=2, progress=counted.append)
    assert sum(counted) == len(report.files) == 8
    reasons = {os.path.basename(file.path): file.reason for file in report.files if file.reason}
    assert reasons == {"crash0.mp4": "its decoder crashed", "crash1.mp4": "its decoder crashed"}


def report_of(*times, workers=4):
    files = [CheckedFile(f"{k}.mp4", None, time, "") for k, time in enumerate(times)]
    return Report(files, workers, 1.0)


def test_loading_and_waiting_by_hand():
    report = report_of(0.01, 0.03)
    assert report.clip_s == pytest.approx(0.02)
    assert report.clips_per_s(4) == pytest.approx(200)
    # 64 clips load in 0.32 s: a step of 0.08 s waits three quarters of the time.
    assert report.waiting(0.08, 64, 4) == pytest.approx(0.75)
    assert report.waiting(0.4, 64, 4) == 0
    assert report.waiting(0.08, 64, 16) == pytest.approx(0)
    nothing = Report([CheckedFile("a", None, None, "bad")], 1, 1.0)
    assert nothing.clip_s is nothing.clips_per_s(2) is nothing.waiting(1, 1, 1) is None
    assert nothing.summary()["seconds"] is None


def test_bad_files_are_not_counted_in(folder):
    good, bad = (probe(str(folder / name)) for name in ("0.mp4", "5.mp4"))
    files = [CheckedFile("0.mp4", good, 0.1, ""), CheckedFile("5.mp4", bad, None, "no frame")]
    found = Report(files, 1, 1.0).summary()
    assert found["seconds"] == pytest.approx({"least": 1, "median": 1, "most": 1})
    assert found["codec"] == {"h264": 1}
    assert [row["reason"] for row in Report(files, 1, 1.0).rows()] == ["", "no frame"]


def test_wrong_number_of_workers(folder):
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        check_files(dataset_of(folder), workers=0)
