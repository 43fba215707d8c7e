"""Pixels as seen: known colours, square pixels, upright, deinterlaced, tone mapped."""

from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")

from vmae_fast.data import convert  # noqa: E402
from vmae_fast.data.convert import Converter, deinterlace, shown_size  # noqa: E402
from vmae_fast.data.decode import DecodeError, PyAVDecoder  # noqa: E402

BT709, BT601, BT2020 = 1, 5, 9  # matrices (and, of the first and last, primaries) in H.273
PQ, HLG = 16, 18
LIMITED, FULL = 1, 2
LOSSLESS = {"codec": "libx264", "options": {"qp": "0"}}


def rgb_of_yuv(y, u, v, matrix, full=False):
    """8-bit R'G'B' by the definition in BT.601, BT.709 or BT.2020."""
    red, blue = {BT601: (0.299, 0.114), BT709: (0.2126, 0.0722), BT2020: (0.2627, 0.0593)}[matrix]
    luma = y / 255 if full else (y - 16) / 219
    cb, cr = ((c - 128) / (255 if full else 224) for c in (u, v))
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    return np.clip(255 * np.array([r, g, b]), 0, 255)


def read(path, channels=3):
    return PyAVDecoder(channels).read_all(str(path)).frames


@pytest.mark.parametrize("colour", [(81, 90, 140), (145, 100, 60), (126, 128, 128), (180, 60, 150)])
@pytest.mark.parametrize("matrix", [BT601, BT709, BT2020])
@pytest.mark.parametrize("full", [False, True])
def test_declared_matrix_and_range(colour, matrix, full, tmp_path, clips):
    frame = clips.flat_frame(
        "yuv420p", colour, colorspace=matrix, color_range=FULL if full else LIMITED
    )
    path = clips.write_frames(tmp_path / "flat.mp4", [frame] * 2, **LOSSLESS)
    expected = rgb_of_yuv(*colour, matrix, full)
    # swscale works with 8-bit tables.
    assert np.abs(read(path) - expected).max() <= 3
    grey = colour[0] if full else (colour[0] - 16) * 255 / 219
    assert np.abs(read(path, 1) - np.clip(grey, 0, 255)).max() <= 1


def test_undeclared_is_bt601_limited_and_yuvj_is_full(clips):
    colour = (81, 90, 140)
    plain = Converter()(clips.flat_frame("yuv420p", colour))
    assert np.abs(plain - rgb_of_yuv(*colour, BT601)).max() <= 3
    full = clips.flat_frame("yuvj420p", colour)
    assert np.abs(Converter()(full) - rgb_of_yuv(*colour, BT601, full=True)).max() <= 3
    assert np.abs(Converter(1)(full) - 81.0).max() <= 1


@pytest.mark.parametrize("format", ["yuv420p10le", "yuv422p12le", "yuv444p16le", "p010le"])
def test_deep_pixels_are_rounded(format, clips):
    shift = {"yuv420p10le": 2, "yuv422p12le": 4}.get(format, 8)
    values = [value << shift for value in (81, 90, 140)]
    if format == "p010le":  # blue and red differences side by side
        frame = clips.flat_frame(format, [81 << 8, 128 << 8])
        expected = rgb_of_yuv(81, 128, 128, BT601)
    else:
        frame, expected = clips.flat_frame(format, values), rgb_of_yuv(81, 90, 140, BT601)
    assert np.abs(Converter()(frame) - expected).max() <= 3


@pytest.mark.parametrize(
    ("format", "value", "grey"), [("gray", 100, 100), ("gray16le", 40000, 156)]
)
def test_grey_files_are_repeated(format, value, grey, clips):
    frame = clips.flat_frame(format, [value])
    for channels in (1, 3, 4):
        shown = Converter(channels)(frame)
        assert shown.shape == (16, 32, channels)
        # swscale drops digits where others divide by 257.
        assert np.abs(shown[..., :3].astype(int) - grey).max() <= 1
        assert (shown[..., :1] == shown[..., :3]).all()
        assert channels < 4 or (shown[..., 3] == 255).all()


def test_grey_of_rgb_is_luma(clips):
    frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), (200, 100, 50), np.uint8), "rgb24")
    assert np.abs(Converter(1)(frame) - (0.299 * 200 + 0.587 * 100 + 0.114 * 50)).max() <= 1


@pytest.mark.parametrize(
    ("codec", "suffix", "format"),
    [
        ("ffv1", "mkv", "bgra"),
        ("ffv1", "mkv", "yuva420p"),
        ("qtrle", "mov", "argb"),
        ("png", "mov", "rgba"),
        ("prores_ks", "mov", "yuva444p10le"),
        ("libx264", "mp4", "yuv420p"),
    ],
)
def test_alpha(codec, suffix, format, tmp_path, clips):
    drawn = np.dstack([clips.draw_frame(90, 48, 64), np.arange(48 * 64).reshape(48, 64) // 12])
    frame = av.VideoFrame.from_ndarray(drawn.astype(np.uint8), "rgba").reformat(format=format)
    options = {"profile": "4444"} if codec == "prores_ks" else {}
    path = clips.write_frames(tmp_path / f"a.{suffix}", [frame], codec=codec, options=options)
    shown = read(path, 4)
    assert shown.shape == (1, 48, 64, 4)
    alpha = drawn[..., 3] if "a" in format else np.full((48, 64), 255)
    assert np.abs(shown[0, ..., 3] - alpha.astype(int)).max() <= 1
    assert clips.read_numbers(shown[..., :3]) == [90]
    assert read(path, 3).shape == (1, 48, 64, 3)


@pytest.mark.parametrize("channels", [0, 2, 5])
def test_other_numbers_of_channels(channels):
    with pytest.raises(ValueError, match=r"channels must be 1 .*, 3 .* or 4"):
        PyAVDecoder(channels)


def test_sizes_that_only_damage_can_give(tmp_path, clips, monkeypatch):
    path = str(clips.write_video(tmp_path / "a.mp4", count=9, size=(48, 64)))
    monkeypatch.setattr(convert, "MOST_PIXELS", 48 * 64)
    assert PyAVDecoder().read_all(path).frames.shape == (9, 48, 64, 3)
    monkeypatch.setattr(convert, "MOST_PIXELS", 48 * 64 - 1)
    for read_it in (PyAVDecoder().read_all, lambda path: PyAVDecoder().read_clip(path, 4, 2, 0.5)):
        with pytest.raises(DecodeError, match="a picture of 64 x 48 pixels"):
            read_it(path)


@pytest.mark.parametrize(
    ("aspect", "width"),
    [("4/3", 85), ("3/4", 48), ("16/11", 93), ("1", 64), ("200/201", 64), ("9/1", 64), ("1/9", 64)],
)
def test_pixels_are_made_square(aspect, width, tmp_path, clips):
    pictures = [clips.draw_frame(number, 48, 64) for number in (5, 200)]
    frames = [av.VideoFrame.from_ndarray(p, "rgb24").reformat(format="yuv444p") for p in pictures]
    path = clips.write_frames(tmp_path / "a.mkv", frames, aspect=aspect, **LOSSLESS)
    shown = read(path)
    assert shown.shape == (2, 48, width, 3)
    assert clips.read_numbers(shown) == [5, 200]
    if width == 64:
        np.testing.assert_array_equal(shown, clips.straight_decode(path))
    clip = PyAVDecoder().read_clip(str(path), 2, 1, 0.0)
    np.testing.assert_array_equal(clip.frames, shown)
    assert shown_size(48, 64, Fraction(aspect)) == (48, width)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("p", "q"), [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_display_matrix(turned, p, q, tmp_path, clips):
    frames = [av.VideoFrame.from_ndarray(clips.draw_frame(77, 48, 64), "rgb24")]
    frames = [frame.reformat(format="yuv444p") for frame in frames]
    one, end = 1 << 16, 1 << 30
    a, b, c, d = (0, p, q, 0) if turned else (p, 0, 0, q)
    matrix = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, end]
    path = clips.write_frames(tmp_path / "a.mp4", frames, matrix=matrix, **LOSSLESS)
    stored = clips.straight_decode(path)[0]
    shown = read(path)[0]
    # Pixel by pixel: (x, y) goes to (a x + c y, b x + d y), moved to where it is not negative.
    xs, ys = np.meshgrid(np.arange(64), np.arange(48))
    to_x, to_y = a * xs + c * ys, b * xs + d * ys
    expected = np.zeros(((64, 48) if turned else (48, 64)) + (3,), np.uint8)
    expected[to_y - to_y.min(), to_x - to_x.min()] = stored
    np.testing.assert_array_equal(shown, expected)


def test_pixel_aspect_is_of_the_stored_frame(tmp_path, clips):
    frame = av.VideoFrame.from_ndarray(clips.draw_frame(77, 48, 64), "rgb24")
    quarter = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    path = clips.write_frames(
        tmp_path / "a.mp4", [frame.reformat(format="yuv444p")], matrix=quarter, aspect=2, **LOSSLESS
    )
    assert read(path).shape == (1, 128, 48, 3)


def woven(clips, top, bottom, format="yuv420p"):
    """A frame whose even lines show one number and whose odd lines show another."""
    picture = clips.draw_frame(top, 48, 64)
    picture[1::2] = clips.draw_frame(bottom, 48, 64)[1::2]
    return av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=format)


INTERLACED = {
    "h264.mp4": {"codec": "libx264", "options": {"x264-params": "tff=1", "crf": "10"}},
    "h264-bff.mkv": {"codec": "libx264", "options": {"x264-params": "bff=1", "crf": "10"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"flags": "+ildct+ilme", "qscale": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"flags": "+ildct+ilme", "qscale": "2"}},
    "hevc.mkv": {
        "codec": "libx265",
        "options": {"x265-params": "interlace=tff:log-level=none", "crf": "10"},
    },
}


@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_files_show_one_field_a_frame(name, tmp_path, clips):
    frames = [woven(clips, 2 * k, 2 * k + 1) for k in range(40)]
    path = clips.write_frames(tmp_path / name, frames, **INTERLACED[name])
    combed = clips.read_numbers(clips.straight_decode(path)[:, ::2])
    assert combed == [2 * k for k in range(40)]
    shown = read(path)
    assert clips.read_numbers(shown) == [2 * k for k in range(40)]
    # Lines between the kept ones belong to the same field.
    assert clips.read_numbers(shown[:, 1::2]) == [2 * k for k in range(40)]
    # The same frames wherever decoding starts.
    for u in (0.0, 0.3, 0.61, 0.999):
        clip = PyAVDecoder().read_clip(str(path), 4, 3, u)
        start = int(u * (40 - 12 + 1))
        np.testing.assert_array_equal(clip.frames, shown[start : start + 12 : 3])


@pytest.mark.parametrize("format", ["yuv420p", "yuv422p10le", "yuv411p", "gray", "yuv444p"])
def test_deinterlacing_keeps_the_top_field(format, clips):
    frame = woven(clips, 9, 250, format)
    done = deinterlace(frame)
    assert (done.format.name, done.width, done.height) == (format, 64, 48)
    before, after = (f.reformat(format=format) for f in (frame, done))
    lines = [
        np.frombuffer(memoryview(f.planes[0]), np.uint8).reshape(48, -1) for f in (before, after)
    ]
    used = 128 if "10" in format else 64
    np.testing.assert_array_equal(lines[0][::2, :used], lines[1][::2, :used])
    # Nothing is remembered from the frame before.
    again = deinterlace(frame)
    deinterlace(woven(clips, 0, 255, format))
    np.testing.assert_array_equal(
        lines[1], np.frombuffer(memoryview(again.planes[0]), np.uint8).reshape(48, -1)
    )


def test_progressive_files_are_not_deinterlaced(tmp_path, clips):
    frames = [woven(clips, 3, 200)] * 3
    path = clips.write_frames(tmp_path / "a.mp4", frames, codec="libx264")
    np.testing.assert_array_equal(read(path), clips.straight_decode(path))


# ST 2084 in floating point, from its text.
def pq_signal(nits):
    power = (np.asarray(nits, float) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def pq_nits(signal):
    root = np.asarray(signal, float) ** (1 / 78.84375)
    return 10000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (
        1 / 0.1593017578125
    )


def hlg_signal(nits):
    """HLG signal of grey that a 1000 cd/m2 display shows at ``nits``."""
    scene = (np.asarray(nits, float) / 1000) ** (1 / 1.2)
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def hlg_nits(signal):
    scene = np.where(
        signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
    )
    return 1000 * scene**1.2


def rolled_off(nits):
    """BT.2390's curve from 1000 to 203 cd/m2, as light relative to the latter."""
    peak, white = pq_signal(1000), pq_signal(203)
    e1, top = pq_signal(np.minimum(nits, 1000)) / peak, white / peak
    knee = 1.5 * top - 0.5
    t = (e1 - knee) / (1 - knee)
    p = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee)
    p = p + (-2 * t**3 + 3 * t**2) * top
    return pq_nits(np.where(e1 < knee, e1, p) * peak) / 203


def hdr_frame(clips, signal, transfer, size=(4, 4)):
    """A 10-bit grey frame of that signal, 0 to 1."""
    return clips.flat_frame(
        "yuv420p10le",
        [round(64 + 876 * float(signal)), 512, 512],
        size=size,
        colorspace=BT2020,
        color_primaries=9,
        color_range=LIMITED,
        color_trc=transfer,
    )


@pytest.mark.parametrize(
    ("transfer", "signal", "light"), [(PQ, pq_signal, pq_nits), (HLG, hlg_signal, hlg_nits)]
)
def test_grey_follows_the_published_curve(transfer, signal, light, clips):
    convert = Converter()
    shown = []
    for nits in (0.0, 0.1, 1, 5, 20, 50, 90, 150, 203, 300, 500, 1000):
        pixel = convert(hdr_frame(clips, signal(nits), transfer))[0, 0].astype(int)
        assert np.ptp(pixel) == 0  # grey stays grey
        stored = light(np.round(876 * signal(nits)) / 876)  # 10 bits
        assert abs(pixel[0] - 255 * rolled_off(stored) ** (1 / 2.4)) < 1.2, nits
        shown.append(pixel[0])
    assert shown == sorted(set(shown))  # brighter stays brighter
    assert 220 <= shown[8] <= 240  # reference white: bright, not clipped
    assert (shown[0], shown[-1]) == (0, 255)


def test_below_the_knee_light_is_as_it_was():
    """By hand: knee at PQ 0.4952, 93.6 cd/m2; below it light is only divided by 203."""
    assert rolled_off(50) == pytest.approx(50 / 203)
    assert rolled_off(203) == pytest.approx(0.783, abs=2e-3)
    assert rolled_off(1000) == pytest.approx(1)


def test_hdr_beyond_the_peak_is_white(clips):
    pixel = Converter()(hdr_frame(clips, pq_signal(4000), PQ))[0, 0]
    assert pixel.tolist() == [255, 255, 255]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_hdr_channels(channels, clips):
    shown = Converter(channels)(hdr_frame(clips, pq_signal(50), PQ, size=(150, 30)))
    assert shown.shape == (150, 30, channels)
    expected = 255 * (50 / 203) ** (1 / 2.4)
    assert np.abs(shown[..., :3] - expected).max() < 2
    assert channels < 4 or (shown[..., 3] == 255).all()


def test_hdr_colours_change_primaries(clips):
    """BT.709 red at 40 cd/m2, written in BT.2020, is BT.709 red again."""
    light = 40 * np.array([0.6274, 0.0691, 0.0164])  # the first column of BT.2087's matrix
    red, green, blue = pq_signal(light)
    luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
    y = round(64 + 876 * luma)
    u, v = round(512 + 896 * (blue - luma) / 1.8814), round(512 + 896 * (red - luma) / 1.4746)
    tags = {"colorspace": BT2020, "color_primaries": 9, "color_range": LIMITED, "color_trc": PQ}
    pixel = Converter()(clips.flat_frame("yuv444p10le", [y, u, v], **tags))[0, 0].astype(int)
    # One step of 10 bits is a lot of light where there is little.
    assert abs(pixel[0] - 255 * (40 / 203) ** (1 / 2.4)) <= 3
    assert pixel[1:].max() <= 30


def test_hdr_file_and_sdr_left_alone(tmp_path, clips):
    options = {"x265-params": "log-level=none:lossless=1"}
    frame = hdr_frame(clips, pq_signal(203), PQ, size=(64, 64))
    path = clips.write_frames(tmp_path / "hdr.mkv", [frame] * 3, codec="libx265", options=options)
    assert np.abs(read(path).astype(int) - 231).max() <= 2
    plain = hdr_frame(clips, 0.5, 14, size=(64, 64))  # BT.2020 with the curve of SDR
    path = clips.write_frames(tmp_path / "sdr.mkv", [plain] * 3, codec="libx265", options=options)
    np.testing.assert_array_equal(read(path), clips.straight_decode(path))
    assert np.abs(read(path).astype(int) - 127).max() <= 2
