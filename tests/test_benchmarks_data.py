"""The benchmark of loading video: its files, its ways, its figures and how they are shown."""

import json
import os
import sys
from types import SimpleNamespace

import pytest

av = pytest.importorskip("av")

import data_files  # noqa: E402
import data_loaders  # noqa: E402
import report  # noqa: E402
import report_data  # noqa: E402
import test_data as loading_test  # noqa: E402
import torch  # noqa: E402
from benchmark_figures import without_count_or_share  # noqa: E402
from data_loaders import DECODE, DECORD, Way  # noqa: E402
from targets import DATA_TARGETS  # noqa: E402

from vmae_fast.data import (  # noqa: E402
    PyAVDecoder,
    Sampling,
    VideoFile,
    crop_resize,
    host_rng,
    multi_scale_crop_box,
)
from vmae_fast.data.rng import CROP  # noqa: E402

FRAMES = 75
ENVIRONMENT = {"date": "2026-01-02", "commit": "abc", "torch": "2", "device": "AMD EPYC"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two short files."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("files")
        patch.setattr(data_files.tempfile, "gettempdir", lambda: str(folder))
        made = data_files.videos(30, 2, FRAMES)
        again = {path: path.stat().st_mtime_ns for path in made}
        # A second call makes nothing anew.
        assert data_files.videos(30, 2, FRAMES) == made
        assert {path: path.stat().st_mtime_ns for path in made} == again
    return [VideoFile(str(path)) for path in made]


def test_files_are_what_the_benchmark_says(files):
    for file in files:
        with av.open(file.path) as container:
            stream = container.streams.video[0]
            kinds = "".join("?IPB"[frame.pict_type] for frame in container.decode(stream))
            assert (stream.width, stream.height, stream.average_rate) == (320, 256, 30)
        assert len(kinds) == FRAMES
        assert [n for n, kind in enumerate(kinds) if kind == "I"][:2] == [0, 30]
        assert kinds.count("B") > FRAMES / 3
    low, high = data_files.KBIT_PER_S
    size_bytes = sum(data_files.Path(file.path).stat().st_size for file in files)
    kind = loading_test.about("GOP 30", size_bytes, len(files), FRAMES / 30)
    # In so short a file the keyframes count more.
    assert low < kind["kbit_a_second"] < 1.2 * high
    assert 2 * kind["mean_file_bytes"] == pytest.approx(size_bytes, abs=2)


def test_grain_is_new_in_every_frame():
    first, second = data_files.pictures(0, 2)
    far = first.astype(int) - second
    assert 0.8 * data_files.GRAIN < far.std() / 2**0.5 < 2 * data_files.GRAIN
    assert (first != next(data_files.pictures(1, 1))).any()


def test_every_way_makes_the_same_clip(files):
    found, left_out = data_loaders.ways(files)
    made = {way.name: way.call(1, 1) for way in found}
    ours = made.pop("ours")[0]
    assert ours.shape == (16, 224, 224, 3)
    repeats = made.pop("ours, 4 repeats")
    assert len(repeats) == 4
    torch.testing.assert_close(repeats[0], ours)
    assert any((repeats[0] != other).any() for other in repeats[1:])
    torch.testing.assert_close(made.pop("ours, skip_nonref")[0], ours)
    if "ours by torchcodec" in made:
        assert (made.pop("ours by torchcodec")[0].int() - ours.int()).abs().max() <= 3
    # From the keyframe before the first frame to the last frame.
    indices = data_loaders.drawn(data_loaders.dataset(files), 1, 1, FRAMES)
    assert made.pop(DECODE) == indices[-1] - indices[0] // 30 * 30 + 1
    if DECORD in made:
        theirs = data_loaders.as_uint8(made.pop(DECORD))
        far = (theirs.int() - ours.int()).abs().float()
        # Of another frame, or another box, it would be tens of levels.
        assert far.mean() < 2
    assert made == {}
    assert set(left_out) <= {"ours by torchcodec", DECORD}


def test_packed_ways_make_clips_of_packed_files(files, tmp_path):
    loading_test.pack(files, tmp_path / "packed", stride=4)
    packed = loading_test.read_source(tmp_path / "packed").files
    assert len(packed) == 2
    found = {way.name: way for way in data_loaders.packed_ways(packed)}
    # Every fourth of 75 frames, keyframes 8 apart, the clip from one of the first four on.
    assert 16 <= found[DECODE].call(0, 0) <= 19
    (ours,) = found["ours"].call(0, 0)
    repeats = found["ours, 4 repeats"].call(0, 0)
    torch.testing.assert_close(repeats[0], ours)
    # The clip and the box that are drawn, of the video that it was made of.
    sampled = data_loaders.dataset([file.sampled(Sampling(4)) for file in packed])
    numbers = [4 * number for number in data_loaders.drawn(sampled, 0, 0, 19)]
    rng = host_rng(0, stream=CROP, epoch=0, clip=0, repeat=0)
    box = multi_scale_crop_box(256, 320, (224, 224), rng)
    source = PyAVDecoder().read_all(files[0].path).frames[numbers]
    far = ours.int() - crop_resize(source, box, (224, 224)).int()
    # Encoded once more, the grain is not quite the same.
    assert far.abs().float().mean() < 4
    wrong = PyAVDecoder().read_all(files[0].path).frames[[max(n - 4, 0) for n in numbers]]
    other = ours.int() - crop_resize(wrong, box, (224, 224)).int()
    assert other.abs().float().mean() > 1.5 * far.abs().float().mean()


def test_ways_are_measured_in_turn_on_one_core():
    calls, cores = [], set()

    def call(name, epoch, index):
        calls.append((name, epoch, index))
        cores.add((frozenset(os.sched_getaffinity(0)), torch.get_num_threads()))

    found = {
        ("a", name): Way(name, 1, lambda e, i, name=name: call(name, e, i)) for name in ("x", "y")
    }
    before = os.sched_getaffinity(0), torch.get_num_threads()
    times = data_loaders.measure(found, files=2, rounds=2)
    assert [len(one) for one in times.values()] == [2, 2]
    one_round = [(name, index) for name in "xy" for index in range(2)]
    assert [(name, index) for name, _, index in calls] == 3 * one_round
    # The round that warms up has clips of its own.
    assert [epoch for _, epoch, _ in calls] == [2] * 4 + [0] * 4 + [1] * 4
    assert [(len(used), threads) for used, threads in cores] == [(1, 1)]
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before


def test_cpu_time_is_what_is_measured():
    def spin():
        until = data_loaders.time.process_time() + 0.02
        while data_loaders.time.process_time() < until:
            pass

    found = {
        ("a", "busy"): Way("busy", 1, lambda e, i: spin()),
        ("a", "idle"): Way("idle", 1, lambda e, i: data_loaders.time.sleep(0.02)),
    }
    times = data_loaders.measure(found, files=2, rounds=1)
    ((busy, _),), ((idle, idle_wall),) = times.values()
    assert busy >= 0.02 > 4 * idle
    assert idle_wall >= 0.02
    assert data_loaders.median_ratio([(2, 1), (9, 1), (3, 1)], [(1, 1), (3, 1), (2, 1)]) == 2


def test_rows_hold_ratios_and_targets():
    kinds = [{"files": kind, "mean_file_bytes": 1000} for kind in ("GOP 30", "packed GOP 30")]
    times = {
        ("GOP 30", DECODE): [(0.02, 0.03)] * 3,
        ("GOP 30", "ours"): [(0.03, 0.03)] * 3,
        ("GOP 30", DECORD): [(0.06, 0.07)] * 3,
        ("packed GOP 30", DECODE): [(0.008, 0.008)] * 3,
        ("packed GOP 30", "ours, 4 repeats"): [(0.016, 0.02)] * 3,
    }

    def row(kind, name, crops=1):
        way = Way(name, crops, print)
        return loading_test.row_of((kind, name), way, times, kinds)

    plain = row("GOP 30", "ours")
    assert plain["cpu_ms"] == pytest.approx(30)
    assert plain["over_decode"] == pytest.approx(1.5)
    assert plain["percent_of_decode"] == pytest.approx(66.7, rel=1e-3)
    assert plain["speedup_over_decord"] == pytest.approx(2)
    assert [one["met"] for one in plain["targets"]] == [False]
    packed = row("packed GOP 30", "ours, 4 repeats", 4)
    assert packed["cpu_ms"] == pytest.approx(4)
    assert packed["clips_per_s"] == pytest.approx(250)
    assert packed["over_decode"] == pytest.approx(2)
    # Four clips in 16 ms, where decord takes 240.
    assert packed["speedup_over_decord"] == pytest.approx(15)
    assert [one["met"] for one in packed["targets"]] == [True]
    assert not without_count_or_share({"ceilings": {}, "loaders": [plain, packed]})
    del times["GOP 30", DECORD]
    without = row("packed GOP 30", "ours, 4 repeats", 4)
    assert "speedup_over_decord" not in without
    assert without["targets"] == []


def test_a_small_run_and_its_section(files, tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "videos", lambda *_: [data_files.Path(f.path) for f in files])
    figures = loading_test.loading(2, 1, FRAMES, tmp_path)
    assert not without_count_or_share(figures)
    rows = {(row["files"], row["loader"]): row for row in figures["loaders"]}
    for key in DATA_TARGETS:
        assert key in rows
    assert all(row["clips_per_s"] > 0 and row["file_bytes"] > 0 for row in rows.values())
    file = tmp_path / "results" / "cpu" / "data_loading.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"environment": ENVIRONMENT, **figures}))
    page = report.render(tmp_path / "results")
    assert "### Loading video (`data_loading`)" in page
    assert page.count("Loading video") == 1
    for kind, name in rows:
        assert f"| {kind} | {name} |" in page
    assert page.count("over_decode <= 1.25:") == 2


def test_cores_are_rounded_up_and_told_by_kind():
    rows = [
        {"files": "GOP 30", "loader": "ours", "clips_per_s": 40.0},
        {"files": "GOP 30", "loader": "ours, 4 repeats", "clips_per_s": 100.0},
        {"files": "packed GOP 30", "loader": "ours", "clips_per_s": 2222.0},
    ]
    assert report_data.cores(40) == 56
    lines = report_data._cores(rows).splitlines()
    assert lines[0] == "| files | ours | ours, skip_nonref | ours, 4 repeats |"
    assert lines[2:] == ["| GOP 30 | 56 | - | 23 |", "| packed GOP 30 | 1 | - | - |"]


def test_what_is_left_out_says_why(files, monkeypatch):
    real = data_loaders.make_decoder

    def without(name="pyav", **more):
        if name == "torchcodec":
            raise data_loaders.DataError("torchcodec is not installed")
        return real(name, **more)

    monkeypatch.setattr(data_loaders, "make_decoder", without)
    monkeypatch.setitem(sys.modules, "decord", None)
    found, left_out = data_loaders.ways(files)
    assert [way.name for way in found] == [
        DECODE, "ours", "ours, 4 repeats", "ours, skip_nonref",
    ]  # fmt: skip
    assert left_out["ours by torchcodec"] == "torchcodec is not installed"
    assert "pip install decord" in left_out[DECORD]


def test_the_benchmark_refuses_files_of_other_rates(monkeypatch, tmp_path):
    kinds = [{"files": "GOP 30", "kbit_a_second": 97.0}]
    monkeypatch.setattr(loading_test, "loading", lambda *_: {"kinds": kinds})
    with pytest.raises(AssertionError, match="97"):
        loading_test.test_data(SimpleNamespace(extra_info={}), print, tmp_path)
