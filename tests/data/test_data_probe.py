"""What probing tells of files of many kinds."""

import numpy as np
import pytest

av = pytest.importorskip("av")

from vmae_fast.data.decode import DecodeError, PathDecoder  # noqa: E402
from vmae_fast.data.probe import probe  # noqa: E402


def test_plain_file(tmp_path, clips):
    path = str(clips.write_video(tmp_path / "a.mp4", count=36, rate=24))
    info = probe(path)
    assert info.path == path
    assert "mp4" in info.container.split(",")
    assert (info.codec, info.pixel_format, info.bits) == ("h264", "yuv420p", 8)
    assert (info.width, info.height, info.fps, info.frames, info.seconds) == (64, 48, 24, 36, 1.5)
    assert info.size_bytes == (tmp_path / "a.mp4").stat().st_size
    assert (info.hdr, info.interlaced, info.rotation, info.notes) == ("", False, 0, ())


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "mov", "ts", "mpg", "flv", "h264"])
def test_counts_and_lengths(suffix, tmp_path, clips):
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4", "mpg": "mpeg2video"}.get(suffix, "libx264")
    path = str(clips.write_video(tmp_path / f"a.{suffix}", count=50, rate=25, gop=10, codec=codec))
    info = probe(path)
    assert (info.frames, info.fps) == (50, 25)
    assert info.seconds == pytest.approx(2, abs=2e-3)
    clip = PathDecoder().read_all(path)
    assert (info.height, info.width) == clip.frames.shape[1:3]
    assert len(clip.frames) == 50
    in_header = suffix in ("mp4", "mov", "avi")
    assert ("no frame count in the header" in info.notes) == (not in_header)
    counted = suffix in ("mpg", "h264")
    assert ("no duration in the header, counted" in info.notes) == counted
    assert ("no time stamps" in info.notes) == (suffix == "h264")


def test_variable_rate(tmp_path, clips):
    times = [3 * k if k < 30 else 60 + k for k in range(60)]
    path = clips.write_video(tmp_path / "a.mp4", count=60, rate=60, times=times)
    info = probe(str(path))
    assert info.notes == ("variable frame rate",)
    assert info.seconds == pytest.approx(2, abs=0.02)
    assert info.fps == pytest.approx(29.5, abs=0.6)


QUARTER = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
MIRROR = [-(1 << 16), 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30]


@pytest.mark.parametrize(
    ("arguments", "size", "rotation", "note"),
    [
        ({"aspect": "4/3"}, (85, 48), 0, "pixels 4:3"),
        ({"aspect": "9/1"}, (64, 48), 0, "pixels 9:1, ignored"),
        ({"matrix": QUARTER}, (48, 64), 90, None),
        ({"matrix": QUARTER, "aspect": "2/1"}, (48, 128), 90, "pixels 2:1"),
        ({"matrix": MIRROR}, (64, 48), 0, "mirrored"),
    ],
)
def test_shape_as_shown(arguments, size, rotation, note, tmp_path, clips):
    frame = av.VideoFrame.from_ndarray(clips.draw_frame(1, 48, 64), "rgb24")
    frame = frame.reformat(format="yuv420p")
    path = str(clips.write_frames(tmp_path / "a.mp4", [frame] * 2, codec="libx264", **arguments))
    info = probe(path)
    assert (info.width, info.height, info.rotation) == (*size, rotation)
    assert info.notes == ((note,) if note else ())
    assert PathDecoder().read_all(path).frames.shape == (2, info.height, info.width, 3)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG"), (14, "")])
def test_hdr(transfer, name, tmp_path, clips):
    frame = clips.flat_frame(
        "yuv420p10le", [500, 512, 512], size=(64, 64), color_trc=transfer, color_primaries=9
    )
    options = {"x265-params": "log-level=none"}
    path = clips.write_frames(tmp_path / "a.mp4", [frame] * 2, codec="libx265", options=options)
    info = probe(str(path))
    assert (info.hdr, info.bits, info.pixel_format) == (name, 10, "yuv420p10le")
    assert info.notes == (("10 bit", f"HDR ({name})") if name else ("10 bit",))


def test_interlaced(tmp_path, clips):
    frame = clips.flat_frame("yuv420p", [100, 128, 128], size=(48, 64))
    options = {"x264-params": "tff=1"}
    path = clips.write_frames(tmp_path / "a.mp4", [frame] * 2, codec="libx264", options=options)
    info = probe(str(path))
    assert info.interlaced
    assert info.notes == ("interlaced",)


@pytest.mark.parametrize("orientation", [1, 6])
def test_folder_of_frames(orientation, tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    for number in range(3):
        image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
        image.save(tmp_path / f"{number}.jpg", exif=exif)
    (tmp_path / "notes.txt").write_text("not counted")
    info = probe(str(tmp_path))
    height, width = PathDecoder().read_all(str(tmp_path)).frames.shape[1:3]
    assert (info.width, info.height) == (width, height)
    assert (info.container, info.codec, info.frames) == ("frames", "jpg", 3)
    assert (info.fps, info.seconds, info.notes) == (None, None, ("no clock",))
    assert (info.pixel_format, info.bits) == ("RGB", 8)
    assert info.size_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.jpg"))
    assert info.rotation == (90 if orientation == 6 else 0)


def test_reasons(tmp_path, clips):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1.png").write_text("not a picture")
    clips.write_audio(tmp_path / "audio.mp4")
    clips.write_video(tmp_path / "empty.mp4", count=0)
    for name, reason in {
        "text.mp4": "Invalid data",
        "folder": "no picture",
        "broken": r"cannot read 1\.png",
        "audio.mp4": "audio only",
        "missing.mp4": "No such file",
        "empty.mp4": ".",
    }.items():
        with pytest.raises(DecodeError, match=reason):
            probe(str(tmp_path / name))
