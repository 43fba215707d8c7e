"""Clips of files as they come: every one is made of the frames of a straight decode."""

import socket
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

av = pytest.importorskip("av")

from vmae_fast.data import decode  # noqa: E402
from vmae_fast.data.container import decoded, opened  # noqa: E402
from vmae_fast.data.decode import DecodeError, PyAVDecoder  # noqa: E402
from vmae_fast.data.probe import probe  # noqa: E402

X264_OPEN = {"options": {"x264-params": "open-gop=1:bframes=3:scenecut=0"}}
X265_OPEN = {
    "codec": "libx265",
    "size": (64, 64),
    "options": {
        "x265-params": "open-gop=1:keyint=10:min-keyint=10:bframes=4:scenecut=0:log-level=none"
    },
}
MPEG2 = {"codec": "mpeg2video", "rate": 25, "b_frames": 2}
MPEG2_CLOSED = {**MPEG2, "options": {"flags": "+cgop", "sc_threshold": "1000000000"}}
X265_RAW = {"codec": "libx265", "size": (64, 64), "options": {"x265-params": "log-level=none"}}
AV1 = {
    "codec": "libsvtav1",
    "size": (64, 64),
    "options": {"preset": "12", "svtav1-params": "irefresh-type=1:keyint=10"},
}
VP9_HIDDEN = {
    "codec": "libvpx-vp9",
    "options": {"deadline": "good", "cpu-used": "5", "lag-in-frames": "16", "auto-alt-ref": "1"},
}
REFRESH = {"options": {"x264-params": "intra-refresh=1:keyint=10:bframes=0"}}

# Constant rate, times in order: the clip is exact. name: (suffix, arguments of write_video)
EXACT = {
    "h264-open-mkv": ("mkv", X264_OPEN),
    "h264-open-mp4": ("mp4", X264_OPEN),
    "h264-open-ts": ("ts", X264_OPEN),
    "h264-open-flv": ("flv", X264_OPEN),
    "hevc-open-mkv": ("mkv", X265_OPEN),
    "hevc-open-mp4": ("mp4", X265_OPEN),
    "hevc-open-ts": ("ts", X265_OPEN),
    "mpeg2-open-ts": ("ts", MPEG2),
    "mpeg2-open-mpg": ("mpg", MPEG2),
    "mpeg2-open-mkv": ("mkv", MPEG2),
    "mpeg2-closed-mpg": ("mpg", MPEG2_CLOSED),
    "mpeg2-closed-ts": ("ts", MPEG2_CLOSED),
    "mpeg2-mxf": ("mxf", MPEG2),
    "mpeg4-b-mp4": ("mp4", {"codec": "mpeg4", "rate": 25, "b_frames": 2}),
    "av1-mkv": ("mkv", AV1),
    "vp9-hidden-frames": ("webm", VP9_HIDDEN),
    "vp9-ivf": ("ivf", {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}}),
    "intra-refresh-mkv": ("mkv", REFRESH),
    "intra-refresh-ts": ("ts", REFRESH),
    "wmv": ("wmv", {"codec": "wmv2", "rate": 25}),
    "gif": ("gif", {"codec": "gif", "rate": 25, "pix_fmt": "rgb8", "count": 40}),
    "apng": ("apng", {"codec": "apng", "rate": 25, "pix_fmt": "rgb24", "format": "apng"}),
    "mjpeg-avi": ("avi", {"codec": "mjpeg", "rate": 25, "pix_fmt": "yuvj420p"}),
    "mpeg4-b-avi": ("avi", {"codec": "mpeg4", "rate": 25, "b_frames": 2}),
    "h264-b-avi": ("avi", {"b_frames": 3}),
    "huffyuv-avi": ("avi", {"codec": "huffyuv", "rate": 25, "pix_fmt": "yuv422p"}),
    "qtrle-mov": ("mov", {"codec": "qtrle", "rate": 25, "pix_fmt": "rgb24"}),
    "fragments": ("mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "first-fragment-in-header": ("mp4", {"container_options": {"movflags": "frag_keyframe"}}),
    "raw-h264": ("h264", {"format": "h264"}),
    "raw-hevc": ("hevc", {**X265_RAW, "format": "hevc"}),
    "raw-mpeg2": ("m2v", {**MPEG2, "format": "mpeg2video"}),
}
COUNT = 60
US = [0.0, 0.11, 0.23, 0.35, 0.5, 0.66, 0.81, 0.999]


@pytest.fixture(scope="module", params=EXACT, ids=list(EXACT))
def exact(request, tmp_path_factory, clips):
    suffix, arguments = EXACT[request.param]
    arguments = {"count": COUNT, "gop": 10, **arguments}
    if arguments.get("codec", "libx264") not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {arguments['codec']}")
    path = tmp_path_factory.mktemp("containers") / f"{request.param}.{suffix}"
    clips.write_video(path, **arguments)
    truth = clips.straight_decode(path)
    assert len(truth) == arguments["count"]
    assert len({frame.tobytes() for frame in truth}) == len(truth)
    return str(path), truth, arguments.get("rate", 24)


@pytest.mark.parametrize("u", US)
def test_stride_is_exact(exact, u):
    path, truth, rate = exact
    start = int(u * (len(truth) - 12 + 1))
    wanted = [start, start + 3, start + 6, start + 9]
    clip = PyAVDecoder().read_clip(path, 4, 3, u)
    np.testing.assert_array_equal(clip.frames, truth[wanted])
    # Containers count in units of up to 10 ms.
    np.testing.assert_allclose(clip.times_s, np.array(wanted) / rate, atol=0.006)


@pytest.mark.parametrize("u", US)
def test_times_are_exact(exact, u):
    path, truth, rate = exact
    start = u * (len(truth) / rate - 4 / 7)
    # In frames; a time near to a frame's own may fall on either side of it.
    times = [(start + k / 7) * rate for k in range(4)]
    clip = PyAVDecoder().read_clip(path, 4, 1, u, fps=7)
    for frame, time in zip(clip.frames, times, strict=True):
        shown = [truth[max(int(time + nudge), 0)] for nudge in (-0.1, 0.1)]
        assert any(np.array_equal(frame, each) for each in shown), time


def test_parts_are_exact(exact):
    path, truth, rate = exact
    decoder = PyAVDecoder()
    clip = decoder.read_clip(path, 4, 2, 0.999, first=13, count=15)
    np.testing.assert_array_equal(clip.frames, truth[[20, 22, 24, 26]])
    # Past the end of the part the last reachable position is held.
    clip = decoder.read_clip(path, 4, 4, 0.5, first=31, count=8)
    np.testing.assert_array_equal(clip.frames, truth[[31, 35, 35, 35]])
    clip = decoder.read_clip(path, 3, 4, 0.0, first=len(truth) - 6, count=100)
    np.testing.assert_array_equal(clip.frames, truth[[-6, -2, -2]])
    clip = decoder.read_clip(path, 4, 1, 0.0, fps=rate / 4, first=31, count=8)
    np.testing.assert_array_equal(clip.frames, truth[[31, 35, 35, 35]])
    clip = decoder.read_clip(path, 3, 1, 0.0, fps=rate / 4, first=len(truth) - 6, count=100)
    np.testing.assert_array_equal(clip.frames, truth[[-6, -2, -2]])
    np.testing.assert_allclose(clip.times_s[1:], (len(truth) - 2) / rate, atol=0.006)
    for fps in (None, 5.0):
        with pytest.raises(DecodeError, match="begins at frame 500"):
            decoder.read_clip(path, 4, 2, 0.5, first=500, fps=fps)


def frames_of(clip, truth):
    """The number of each clip frame in the straight decode, which must have it."""
    numbers = {frame.tobytes(): number for number, frame in enumerate(truth)}
    assert len(numbers) == len(truth)
    return [numbers[frame.tobytes()] for frame in clip.frames]


def shift(ticks):
    def change(_, packet):
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks

    return change


def swap(number, packet):
    if number % 4 == 1:
        packet.pts += 3 * 512


def gap(number, packet):
    if number >= 30:
        packet.pts, packet.dts = packet.pts + 512 * 5000, packet.dts + 512 * 5000


def damage(path):
    data = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(len(data) // 3, len(data) - 2000, 12):
        data[place] ^= 0xFF
    path.write_bytes(data)


NEGATIVE = {"avoid_negative_ts": "disabled"}
BROKEN = {
    "negative-start-mp4": ("mp4", {"change": shift(-15 * 512), "options": NEGATIVE}, True),
    "negative-start-ts": ("ts", {"change": shift(-15 * 512), "options": NEGATIVE}, True),
    "no-times-at-the-start-mkv": ("mkv", {"change": shift(-15 * 512), "options": NEGATIVE}, False),
    "times-not-in-order-mp4": ("mp4", {"change": swap}, False),
    "times-not-in-order-mkv": ("mkv", {"change": swap}, False),
    "times-not-in-order-ts": ("ts", {"change": swap}, False),
    "gap-mp4": ("mp4", {"change": gap}, False),
    "gap-mkv": ("mkv", {"change": gap}, False),
    "gap-ts": ("ts", {"change": gap}, False),
    "cut-before-keyframe-mp4": ("mp4", {"keep": lambda n: n >= 15}, False),
    "cut-before-keyframe-mkv": ("mkv", {"keep": lambda n: n >= 15}, False),
    "cut-before-keyframe-ts": ("ts", {"keep": lambda n: n >= 15}, False),
    "holes-mkv": ("mkv", {"keep": lambda n: n not in (23, 24, 25, 47)}, False),
    "holes-ts": ("ts", {"keep": lambda n: n not in (23, 24, 25, 47)}, False),
    "damaged-mkv": ("mkv", {}, False),
    "damaged-ts": ("ts", {}, False),
}


@pytest.fixture(scope="module", params=BROKEN, ids=list(BROKEN))
def broken(request, tmp_path_factory, clips):
    suffix, arguments, is_exact = BROKEN[request.param]
    folder = tmp_path_factory.mktemp("broken")
    # In a transport stream each keyframe brings the headers along; MP4's are at the front.
    whole = "ts" if suffix == "ts" and "keep" in arguments else "mp4"
    source = clips.write_video(folder / f"whole.{whole}", count=COUNT, gop=10, **X264_OPEN)
    path = folder / f"{request.param}.{suffix}"
    clips.remux(source, path, **arguments)
    if "damaged" in request.param:
        damage(path)
    return str(path), PyAVDecoder().read_all(str(path)), is_exact


@pytest.mark.parametrize("u", US)
def test_broken_times_still_give_a_run_of_good_frames(broken, u):
    path, whole, is_exact = broken
    truth = whole.frames
    clip = PyAVDecoder().read_clip(path, 4, 3, u)
    if len({frame.tobytes() for frame in truth}) < len(truth):
        # Damage has made frames alike: they cannot be told apart, but no other may show.
        assert {frame.tobytes() for frame in clip.frames} <= {frame.tobytes() for frame in truth}
        return
    numbers = frames_of(clip, truth)
    if is_exact:
        start = int(u * (len(truth) - 12 + 1))
        assert numbers == [start + 3 * k for k in range(4)]
    steps = [b - a for a, b in pairwise(numbers)]
    held = steps.index(0) if 0 in steps else len(steps)
    assert steps == [3] * held + [0] * (len(steps) - held)
    assert len(truth) - 1 - numbers[-1] < 3 or held == len(steps)
    assert all(a <= b for a, b in pairwise(clip.times_s))
    if "not-in-order" not in path and "holes" not in path:
        expected = [whole.times_s[number] for number in numbers]
        np.testing.assert_allclose(clip.times_s, expected, atol=2e-3)


@pytest.mark.parametrize("u", US)
def test_broken_times_give_good_frames_by_time(broken, u):
    path, whole, _ = broken
    truth, damaged = whole.frames, "damaged" in path
    clip = PyAVDecoder().read_clip(path, 4, 1, u, fps=7)
    for frame in clip.frames.astype(int):
        # What is made up for damaged pictures depends a little on what was decoded before.
        assert min(np.abs(frame - shown).mean() for shown in truth) < (2 if damaged else 1e-9)
    assert list(clip.times_s) == sorted(clip.times_s)


def test_a_seek_between_keyframes_starts_at_the_next(tmp_path, clips):
    # Its decoder makes pictures up where it lacks those that a picture was made from.
    path = clips.write_video(tmp_path / "a.mkv", count=COUNT, gop=20, rate=25, codec="mpeg4")
    truth = clips.straight_decode(path)
    with opened(str(path)) as video:
        keyframes = [p.pts for p in video.container.demux(video.stream) if p.is_keyframe and p.size]
        assert len(keyframes) >= 3
        video.container.seek(keyframes[1] + 120, stream=video.stream, any_frame=True)
        frame = next(decoded(video, from_keyframe=True))
        assert frame.pts == keyframes[2]
        shown = frame.to_ndarray(format="rgb24")
    np.testing.assert_array_equal(shown, truth[keyframes[2] // 40])


def test_a_transport_stream_of_long_gops_is_sought(tmp_path, clips, monkeypatch):
    options = {"x264-params": "scenecut=0"}
    path = clips.write_video(tmp_path / "a.ts", count=200, gop=50, b_frames=2, options=options)
    truth = clips.straight_decode(path)
    monkeypatch.setattr(decode, "_read_counting", None)
    for start in (99, 100, 149, 180):
        clip = PyAVDecoder().read_clip(str(path), 4, 2, (start + 0.5) / 193)
        np.testing.assert_array_equal(clip.frames, truth[start : start + 8 : 2])


@pytest.mark.parametrize("suffix", ["mkv", "webm"])
def test_files_without_a_duration_are_sought(suffix, tmp_path, clips, monkeypatch):
    """As browsers record them: written on, never gone back to."""
    more = {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}} if suffix == "webm" else {}
    path = tmp_path / f"live.{suffix}"
    clips.write_video(path, count=COUNT, gop=10, container_options={"live": "1"}, **more)
    truth = clips.straight_decode(path)
    monkeypatch.setattr(decode, "_read_counting", None)
    opens = []
    monkeypatch.setattr(decode, "opened", lambda path: opens.append(path) or opened(path))
    for start in (0, 17, 30, 51):
        clip = PyAVDecoder().read_clip(str(path), 4, 2, (start + 0.5) / 53)
        np.testing.assert_array_equal(clip.frames, truth[start : start + 8 : 2])
        clip = PyAVDecoder().read_clip(str(path), 4, 1, (start + 0.5) / 52, fps=12)
        np.testing.assert_array_equal(clip.frames, truth[start : start + 8 : 2])
    # The header, the packets, the clip.
    assert len(opens) == 3 * 8


def test_raw_dv(tmp_path, clips):
    """Its rate is said to be 60000 frames a second."""
    if "dvvideo" not in av.codecs_available:
        pytest.skip("this build of PyAV has no dvvideo")
    path = tmp_path / "a.dv"
    clips.write_video(path, count=9, codec="dvvideo", size=(576, 720), rate=25, format="dv")
    clip = PyAVDecoder().read_clip(str(path), 3, 3, 0.0)
    assert clips.read_numbers(clip.frames) == [0, 3, 6]
    assert clip.frames.shape == (3, 576, 768, 3)
    np.testing.assert_allclose(clip.times_s, [0, 3 / 25, 6 / 25])
    clip = PyAVDecoder().read_clip(str(path), 3, 1, 0.0, fps=25 / 4)
    assert clips.read_numbers(clip.frames) == [0, 4, 8]
    info = probe(str(path))
    assert (info.fps, info.frames, info.seconds) == (25, 9, pytest.approx(9 / 25))


class _Failing:
    """A container whose reading fails after some packets."""

    def __init__(self, container, error):
        self.container, self.error = container, error

    def demux(self, stream):
        for number, packet in enumerate(self.container.demux(stream)):
            if number == 12:
                raise self.error
            yield packet


@pytest.mark.parametrize("error", [IndexError(), av.error.InvalidDataError(1, "", "")])
def test_damage_that_stops_reading_is_the_end(error, tmp_path, clips):
    path = clips.write_video(tmp_path / "a.mkv", count=COUNT, gop=6)
    with opened(str(path)) as video:
        failing = replace(video, container=_Failing(video.container, error))
        frames = [frame.to_ndarray(format="rgb24") for frame in decoded(failing)]
    # Those that the decoder held back are among them.
    np.testing.assert_array_equal(frames, clips.straight_decode(path)[:12])


def test_times_out_of_order_count_at_the_average_rate(tmp_path, clips):
    source = clips.write_video(tmp_path / "whole.mp4", count=COUNT, gop=10)
    path = clips.remux(source, tmp_path / "swapped.mp4", change=swap)
    truth = clips.straight_decode(path)
    start = 0.4 * (COUNT / 24 - 5 / 8)
    clip = PyAVDecoder().read_clip(str(path), 5, 1, 0.4, fps=8)
    wanted = [int((start + k / 8) * 24) for k in range(5)]
    assert frames_of(clip, truth) == wanted
    np.testing.assert_allclose(clip.times_s, np.array(wanted) / 24)
    times = PyAVDecoder().read_all(str(path)).times_s
    np.testing.assert_allclose(times, np.arange(COUNT) / 24)


@pytest.mark.parametrize("suffix", ["ts", "mpg"])
def test_clock_that_starts_again_in_the_middle(suffix, tmp_path, clips):
    more = {"codec": "mpeg2video", "b_frames": 2} if suffix == "mpg" else {}
    part = clips.write_video(tmp_path / f"part.{suffix}", count=50, gop=10, rate=25, **more)
    path = tmp_path / f"twice.{suffix}"
    path.write_bytes(part.read_bytes() * 2)
    truth = PyAVDecoder().read_all(str(path)).frames
    good = {frame.tobytes() for frame in truth}
    for u in US:
        clip = PyAVDecoder().read_clip(str(path), 4, 3, u)
        assert {frame.tobytes() for frame in clip.frames} <= good
        steps = np.diff(clips.read_numbers(clip.frames)) % 50
        assert set(steps.tolist()) <= {3, 0}
        clip = PyAVDecoder().read_clip(str(path), 4, 3, u, fps=5)
        assert {frame.tobytes() for frame in clip.frames} <= good


def test_variable_rate_by_time(tmp_path, clips):
    """Frames 0 to 29 last three ticks of 1/60 s each, 30 to 59 one tick."""
    starts = [3 * k if k < 30 else 60 + k for k in range(COUNT)]
    decoder = PyAVDecoder()
    # A transport stream has no length of its own; FFmpeg's estimate gives the last frame 3 ticks.
    for suffix, length in (("mp4", 120), ("mkv", 120), ("ts", 122)):
        path = clips.write_video(
            tmp_path / f"vfr.{suffix}", count=COUNT, gop=10, rate=60, times=starts
        )
        for u in (0.0, 0.3, 0.61, 0.999):
            clip = decoder.read_clip(str(path), 6, 1, u, fps=10)
            ticks = [u * (length - 36) + 6 * k for k in range(6)]
            wanted = [int(np.searchsorted(starts, t + 1e-6, "right")) - 1 for t in ticks]
            assert clips.read_numbers(clip.frames) == wanted
            shown = np.array([starts[number] for number in wanted])
            np.testing.assert_allclose(clip.times_s, shown / 60, atol=6e-4)


def test_every_frame_once_at_the_files_own_rate(tmp_path, clips):
    """Times rounded to 1 ms must not show a frame twice and leave another out."""
    for rate in (24, "30000/1001", 60):
        path = clips.write_video(tmp_path / "own.mkv", count=COUNT, gop=10, rate=rate)
        fps = 30000 / 1001 if rate == "30000/1001" else rate
        clip = PyAVDecoder().read_clip(str(path), COUNT, 1, 0.0, fps=fps)
        assert clips.read_numbers(clip.frames) == list(range(COUNT))


def test_short_file_by_time_holds_the_last_reachable_time(tmp_path, clips):
    path = str(clips.write_video(tmp_path / "short.mp4", count=30, rate=24))
    clip = PyAVDecoder().read_clip(path, 16, 1, 0.9, fps=6)
    assert clips.read_numbers(clip.frames) == [0, 4, 8, 12, 16, 20, 24, 28] + [28] * 8
    assert clip.times_s[-1] == pytest.approx(28 / 24)


def test_a_duration_beyond_the_end_is_replaced_by_the_true_one(tmp_path, clips):
    whole = clips.write_video(
        tmp_path / "whole.mp4", count=200, gop=10, container_options={"movflags": "faststart"}
    )
    with av.open(str(whole)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.is_keyframe]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: places[10]])
    count = len(PyAVDecoder().read_all(str(cut)).frames)
    clip = PyAVDecoder().read_clip(str(cut), 4, 1, 0.999, fps=8)
    assert 20 < count < 150
    first = int(0.999 * (count - 12))
    assert clips.read_numbers(clip.frames) == [first, first + 3, first + 6, first + 9]


def test_rates_and_parts_out_of_range():
    decoder = PyAVDecoder()
    for wrong in ({"fps": 0.0}, {"fps": -1.0}, {"first": -1}, {"count": 0}):
        with pytest.raises(ValueError, match="must be"):
            decoder.read_clip("missing.mp4", 4, 2, 0.5, **wrong)


def test_cover_picture_is_not_a_video(tmp_path, clips):
    sound = clips.write_audio(tmp_path / "sound.m4a")
    cover = clips.write_video(
        tmp_path / "cover.jpg", count=1, codec="mjpeg", pix_fmt="yuvj420p", format="image2"
    )
    path = tmp_path / "song.mp4"
    from av.stream import Disposition

    with (
        av.open(str(sound)) as audio,
        av.open(str(cover)) as picture,
        av.open(str(path), "w") as out,
    ):
        streams = [
            out.add_stream_from_template(audio.streams.audio[0]),
            out.add_stream_from_template(picture.streams.video[0]),
        ]
        streams[1].disposition = Disposition.attached_pic
        for source, stream in zip((audio, picture), streams, strict=True):
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
    with pytest.raises(DecodeError, match="only a cover picture"):
        PyAVDecoder().read_clip(str(path), 4, 2, 0.5)


def test_a_playlist_fetches_nothing(tmp_path):
    path = tmp_path / "list.m3u8"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        path.write_text(
            "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
            f"http://127.0.0.1:{server.getsockname()[1]}/a.ts\n#EXT-X-ENDLIST\n"
        )
        with pytest.raises(DecodeError):
            PyAVDecoder().read_clip(str(path), 4, 2, 0.5)
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody has come


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv", "avi"])
def test_random_damage_gives_a_clip_or_a_reason(suffix, tmp_path, clips):
    codec = {"avi": "mpeg4"}.get(suffix, "libx264")
    whole = clips.write_video(tmp_path / f"whole.{suffix}", count=40, gop=8, rate=25, codec=codec)
    rng = np.random.default_rng(3)
    path = tmp_path / f"damaged.{suffix}"
    for case in range(24):
        data = bytearray(whole.read_bytes())
        if case % 3 == 0:
            data = data[: rng.integers(1, len(data))]
        elif case % 3 == 1:
            for place in rng.integers(0, len(data), 30):
                data[place] = rng.integers(256)
        else:
            start = rng.integers(len(data))
            del data[start : start + rng.integers(1, 4000)]
        path.write_bytes(data)
        for fps in (None, 5.0):
            with suppress(DecodeError):
                clip = PyAVDecoder().read_clip(str(path), 4, 2, rng.random(), fps=fps)
                assert len(clip.frames) == len(clip.times_s) == 4
