"""Clips by torchcodec are those of PyAV; what it cannot do is PyAV's.

Tests that decode by it are skipped where it is not installed or finds no FFmpeg libraries of the
system: it is in no extra of the tests.
"""

import builtins
import multiprocessing
import pickle
import subprocess
import sys
import tarfile
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")

from vmae_fast.commands import env  # noqa: E402
from vmae_fast.data import (  # noqa: E402
    ClipDataset,
    ClipRequest,
    DataError,
    DecodeError,
    PyAVDecoder,
    VideoFile,
    make_decoder,
    with_torchcodec,
)
from vmae_fast.data.with_torchcodec import (  # noqa: E402
    DecoderMissing,
    TorchCodecDecoder,
    about_torchcodec,
)
from vmae_fast.train import ConfigError  # noqa: E402
from vmae_fast.train.config import PretrainConfig  # noqa: E402

try:
    about_torchcodec()
    REASON = ""
except DecoderMissing as error:
    REASON = str(error)
needs_torchcodec = pytest.mark.skipif(bool(REASON), reason=REASON)

PYAV = PyAVDecoder()
# Levels by which colours may differ between two builds of FFmpeg.
CLOSE = 2
# (frames, stride, u, further arguments)
BY_STRIDE = [
    (16, 4, 0.0, {}),
    (16, 4, 0.4, {}),
    (16, 4, 0.999, {}),
    (40, 4, 0.5, {}),
    (1, 1, 0.7, {}),
    (6, 3, 0.4, {"first": 21, "count": 30}),
]
BY_TIME = [
    (8, 1, 0.3, {"fps": 3.7}),
    (8, 1, 0.999, {"fps": 24}),
    (40, 1, 0.6, {"fps": 11}),
    (6, 1, 0.5, {"fps": 60, "first": 30, "count": 9}),
]


@pytest.fixture
def by_torchcodec(monkeypatch):
    """Whether torchcodec gave each clip."""
    found = []

    def noting(path, wanted):
        plan = planned(path, wanted)
        found.append(plan is not None)
        return plan

    def reading(path, plan):
        clip = read(path, plan)
        found[-1] = clip is not None
        return clip

    planned, read = with_torchcodec._plan, with_torchcodec._read
    monkeypatch.setattr(with_torchcodec, "_plan", noting)
    monkeypatch.setattr(with_torchcodec, "_read", reading)
    return found


def assert_same(path, wanted=(*BY_STRIDE, *BY_TIME), **settings):
    decoder, pyav = TorchCodecDecoder(**settings), PyAVDecoder(**settings)
    for frames, stride, u, more in wanted:
        given = decoder.read_clip(str(path), frames, stride, u, **more)
        expected = pyav.read_clip(str(path), frames, stride, u, **more)
        assert given.times_s == expected.times_s
        assert given.frames.dtype == np.uint8
        far = np.abs(given.frames.astype(int) - expected.frames)
        assert far.max() <= CLOSE


@needs_torchcodec
@pytest.mark.parametrize("x264", ["bframes=3", "open-gop=1:bframes=4:b-adapt=2", "bframes=0"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_clips_are_pyavs(suffix, x264, tmp_path, clips, by_torchcodec):
    path = clips.write_video(
        tmp_path / f"a video{suffix}",
        rate=Fraction(30000, 1001),
        gop=24,
        options={"x264-params": x264},
    )
    assert_same(path)
    assert by_torchcodec == [True] * len(BY_STRIDE + BY_TIME)
    clip = TorchCodecDecoder().read_clip(str(path), 16, 4, 0.4)
    straight = clips.straight_decode(path)
    first = 14  # 0.4 of the 37 starts
    assert np.abs(clip.frames.astype(int) - straight[first : first + 61 : 4]).max() <= CLOSE


@needs_torchcodec
@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("mpeg4", "yuv420p", ".mp4"),
        ("libvpx-vp9", "yuv420p", ".webm"),
        ("mjpeg", "yuvj422p", ".mkv"),
        ("libx264", "yuv444p", ".mp4"),
        ("libx264", "yuvj420p", ".mp4"),
    ],
)
def test_other_codecs(codec, pix_fmt, suffix, tmp_path, clips, by_torchcodec):
    path = clips.write_video(tmp_path / f"video{suffix}", codec=codec, pix_fmt=pix_fmt, gop=20)
    assert_same(path, (BY_STRIDE[1], BY_TIME[0]))
    assert by_torchcodec == [True, True]


@needs_torchcodec
@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({"colorspace": 1, "color_range": 1}, True),
        ({"colorspace": 5, "color_range": 1}, True),
        ({"colorspace": 9, "color_range": 1}, True),
        ({"colorspace": 1, "color_range": 2}, False),
        ({"colorspace": 7, "color_range": 1}, False),
    ],
)
def test_colours_as_the_file_tells(settings, ours, tmp_path, clips, by_torchcodec):
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(12):
        frame = clips.flat_frame("yuv420p", (0, 0, 0), size=(16, 32), **settings)
        for plane in frame.planes:
            plane.update(rng.integers(16, 235, plane.buffer_size).astype(np.uint8).tobytes())
        frames.append(frame)
    assert_same(clips.write_frames(tmp_path / "video.mkv", frames), [(4, 2, 0.3, {})])
    assert by_torchcodec == [ours]


@needs_torchcodec
def test_what_it_cannot_do_is_pyavs(tmp_path, clips, by_torchcodec):
    """High dynamic range, interlacing, pixels, rotation, more bits, alpha, raw streams, MPEG-TS."""
    plain = [clips.flat_frame("yuv420p", (90, 100, 150)) for _ in range(8)]
    deep = [
        clips.flat_frame("yuv420p10le", (500, 400, 600), color_trc=16, color_primaries=9)
        for _ in range(8)
    ]
    alpha = [clips.flat_frame("yuva420p", (90, 100, 150, 50)) for _ in range(8)]
    interlaced = tmp_path / "interlaced.mp4"
    clips.write_video(interlaced, options={"x264-params": "tff=1"}, count=12)
    turned = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    files = [
        clips.write_frames(tmp_path / "hdr.mkv", deep),
        clips.write_frames(tmp_path / "alpha.mkv", alpha),
        clips.write_frames(tmp_path / "wide.mp4", plain, codec="mpeg4", aspect="4/3"),
        clips.write_frames(tmp_path / "turned.mp4", plain, codec="mpeg4", matrix=turned),
        interlaced,
        clips.write_video(tmp_path / "raw.h264", count=12),
        clips.write_video(tmp_path / "stream.ts", count=12),
        clips.write_video(tmp_path / "uneven.mp4", times=[k * k for k in range(12)], count=12),
    ]
    for path in files:
        by_torchcodec.clear()
        assert_same(path, [(4, 2, 0.3, {})])
        assert by_torchcodec == [False], path
    for channels in (1, 4):
        by_torchcodec.clear()
        assert_same(files[1], [(4, 2, 0.3, {})], channels=channels)
        assert by_torchcodec == []


@needs_torchcodec
def test_bad_files_are_errors_in_the_same_words(tmp_path, clips):
    whole = clips.write_video(tmp_path / "whole.mp4")
    cut, empty = tmp_path / "cut.mp4", tmp_path / "empty.mp4"
    cut.write_bytes(whole.read_bytes()[:900])
    empty.write_bytes(b"")
    decoder = TorchCodecDecoder()
    for path in (cut, empty, tmp_path / "none.mp4", tmp_path):
        reasons = []
        for reader in (PYAV, decoder):
            with pytest.raises(DecodeError) as raised:
                reader.read_clip(str(path), 4, 1, 0.5)
            reasons.append(raised.value.reason)
        assert reasons[0] == reasons[1]
    with pytest.raises(DecodeError, match="the part to use begins at frame 100"):
        decoder.read_clip(str(whole), 4, 1, 0.5, first=100)
    with pytest.raises(ValueError, match="stride"):
        decoder.read_clip(str(tmp_path / "none.mp4"), 4, 0, 0.5)


@needs_torchcodec
def test_damaged_files_give_what_pyav_gives(tmp_path, clips):
    path = clips.write_video(tmp_path / "video.mkv", gop=20)
    data = bytearray(path.read_bytes())
    for start in range(2000, len(data) - 200, 1500):
        data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    for clip in BY_STRIDE[:3]:
        frames, stride, u, more = clip
        given = TorchCodecDecoder().read_clip(str(path), frames, stride, u, **more)
        assert given.frames.shape == (frames, 48, 64, 3)


@needs_torchcodec
def test_it_is_pickled_and_forked_after_use(tmp_path, clips):
    path = str(clips.write_video(tmp_path / "video.mp4"))
    decoder = make_decoder("torchcodec")
    here = decoder.read_clip(path, 8, 2, 0.3)
    again = pickle.loads(pickle.dumps(decoder)).read_clip(path, 8, 2, 0.3)
    np.testing.assert_array_equal(here.frames, again.frames)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        there = pool.apply_async(decoder.read_clip, (path, 8, 2, 0.3)).get(timeout=60)
    np.testing.assert_array_equal(here.frames, there.frames)
    assert len(decoder.read_all(path).frames) == 100


@needs_torchcodec
def test_a_data_set_by_it(tmp_path, clips):
    files = [VideoFile(str(clips.write_video(tmp_path / "video.mp4")))]
    settings = {"frames": 4, "stride": 3, "image_size": (32, 32), "seed": 3}
    given, expected = (
        ClipDataset(files, decoder=make_decoder(name), **settings)[ClipRequest(0, 0)]
        for name in ("torchcodec", "pyav")
    )
    assert given.times_s == expected.times_s
    far = given.crops[0].int() - expected.crops[0].int()
    assert far.abs().max() <= CLOSE


@needs_torchcodec
def test_members_of_tar_files(tmp_path, clips, by_torchcodec):
    clips.write_video(tmp_path / "video.mp4", gop=20)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "video.mp4", "name.mp4")
    assert_same(tmp_path / "shard.tar" / "name.mp4")
    assert by_torchcodec == [True] * len(BY_STRIDE + BY_TIME)
    with pytest.raises(DecodeError, match="no such member"):
        TorchCodecDecoder().read_clip(str(tmp_path / "shard.tar" / "none.mp4"), 4, 1, 0.5)


@needs_torchcodec
def test_env_shows_it(capsys):
    assert env.run([]) == 0
    assert about_torchcodec() in capsys.readouterr().out


def test_env_says_that_it_is_not_there(capsys, monkeypatch):
    known = env._version
    monkeypatch.setattr(
        env, "_version", lambda name: "not installed" if name == "torchcodec" else known(name)
    )
    assert env.run([]) == 0
    assert "torchcodec       not installed" in capsys.readouterr().out


def refuse(monkeypatch, error):
    """Let importing torchcodec fail."""
    real = builtins.__import__
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)

    def importing(name, *given, **more):
        if name.partition(".")[0] == "torchcodec":
            raise error
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_a_missing_package_is_named(monkeypatch):
    refuse(monkeypatch, ModuleNotFoundError("No module named 'torchcodec'", name="torchcodec"))
    with pytest.raises(DataError, match="pip install torchcodec, or use --decoder pyav") as raised:
        make_decoder("torchcodec")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("library", "advice"),
    [("libavutil.so.60", "apt-get install ffmpeg"), ("libnvrtc.so.13", "torchcodec==0.13.0")],
)
def test_missing_libraries_are_named(library, advice, monkeypatch):
    cause = OSError(f"{library}: cannot open shared object file: No such file or directory")
    error = RuntimeError(f"Could not load libtorchcodec. Likely causes:\n\n{cause}\n[end]\n")
    refuse(monkeypatch, error)
    with pytest.raises(DataError, match=advice) as raised:
        make_decoder("torchcodec")
    assert "\n" not in str(raised.value)
    refuse(monkeypatch, RuntimeError("operator is not there\nat all"))
    with pytest.raises(DataError, match=r"\(operator is not there\); reinstall it, or use"):
        make_decoder("torchcodec")


def test_settings_choose_the_decoder():
    with pytest.raises(ValueError, match="decoder must be pyav or torchcodec, got 'decord'"):
        make_decoder("decord")
    config = PretrainConfig()
    config.loading.skip_nonref = True
    config.check()
    config.loading.decoder = "torchcodec"
    with pytest.raises(ConfigError, match="skip_nonref is for --decoder pyav"):
        config.check()


def test_pyav_does_not_import_it():
    code = "import sys, vmae_fast.data as d; d.make_decoder(); print('torchcodec' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
