"""Clips are the frames of a straight decode, whatever the container, codec, rate and length."""

import os
import pickle

import numpy as np
import pytest

av = pytest.importorskip("av")

from vmae_fast.data import DecodeError, PyAVDecoder, decode  # noqa: E402

VP9 = {"deadline": "realtime", "cpu-used": "8"}
US = [0.0, 0.2, 0.5, 0.73, 0.999]

# name: (suffix, keyword arguments of write_video). x264's own GOP is 250 frames, so these seek
# back to frame 0; gop=20 gives keyframes within the clip.
FILES = {
    "mp4-24-long-gop": ("mp4", {"rate": 24}),
    "mp4-2997-gop20": ("mp4", {"rate": "30000/1001", "gop": 20, "b_frames": 3}),
    "mp4-60-odd": ("mp4", {"rate": 60, "gop": 20, "size": (49, 67), "pix_fmt": "yuv444p"}),
    "mkv-25-gop20": ("mkv", {"rate": 25, "gop": 20, "b_frames": 3}),
    "mkv-2997-open-gop": (
        "mkv",
        {"rate": "30000/1001", "gop": 20, "options": {"x264-params": "open-gop=1"}},
    ),
    "mkv-60": ("mkv", {"rate": 60, "gop": 20}),
    "mov-30-gop20": ("mov", {"rate": 30, "gop": 20, "b_frames": 3}),
    "webm-vp9-30-odd": ("webm", {"rate": 30, "gop": 20, "codec": "libvpx-vp9", "options": VP9}),
    "webm-vp8-2997": (
        "webm",
        {"rate": "30000/1001", "gop": 20, "codec": "libvpx", "options": VP9, "size": (49, 65)},
    ),
    "avi-mpeg4-25-no-b": ("avi", {"rate": 25, "codec": "mpeg4", "gop": 20, "b_frames": 0}),
    "avi-mpeg4-25-b": ("avi", {"rate": 25, "codec": "mpeg4", "gop": 20, "b_frames": 2}),
    "avi-h264-24": ("avi", {"rate": 24, "gop": 20, "b_frames": 3}),
}
# Time stamps in storage order only: read from the start of the file.
NOT_SOUGHT = {"avi-mpeg4-25-b", "avi-h264-24"}


@pytest.fixture(scope="module", params=FILES, ids=list(FILES))
def sample(request, tmp_path_factory, clips):
    suffix, arguments = FILES[request.param]
    if arguments.get("codec", "libx264") not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {arguments['codec']}")
    path = tmp_path_factory.mktemp("decode") / f"{request.param}.{suffix}"
    clips.write_video(path, count=100, **arguments)
    return request.param, str(path), clips.straight_decode(path)


@pytest.mark.parametrize("u", US)
def test_clip_is_the_straight_decode_at_its_indices(sample, u, clips):
    _, path, truth = sample
    assert clips.read_numbers(truth) == list(range(100))
    start = int(u * (100 - 32 + 1))  # 8 frames, 4 apart, span 32: starts 0 to 68
    wanted = [start + 4 * k for k in range(8)]
    clip = PyAVDecoder().read_clip(path, 8, 4, u).frames
    assert clip.dtype == np.uint8
    assert clips.read_numbers(clip) == wanted
    np.testing.assert_array_equal(clip, truth[wanted])


def test_only_containers_without_times_are_read_from_the_start(sample, monkeypatch):
    name, path, _ = sample

    class ReadFromStartError(Exception):
        pass

    def refuse(*_):
        raise ReadFromStartError

    monkeypatch.setattr(decode, "_read_counting", refuse)
    if name in NOT_SOUGHT:
        with pytest.raises(ReadFromStartError):
            PyAVDecoder().read_clip(path, 8, 4, 0.7)
    else:
        PyAVDecoder().read_clip(path, 8, 4, 0.7)


def test_read_all_is_the_straight_decode(sample):
    _, path, truth = sample
    frames = PyAVDecoder().read_all(path).frames
    assert frames.flags.c_contiguous
    np.testing.assert_array_equal(frames, truth)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (1, [0] * 16),
        (5, [0, 4] + [4] * 14),
        (30, [0, 4, 8, 12, 16, 20, 24, 28] + [28] * 8),
        (61, list(range(0, 61, 4))),
        (63, list(range(0, 61, 4))),
    ],
)
def test_short_files_hold_the_last_reachable_position(suffix, count, wanted, tmp_path, clips):
    codec = "mpeg4" if suffix == "avi" else "libx264"
    path = clips.write_video(tmp_path / f"short.{suffix}", count=count, codec=codec)
    clip = PyAVDecoder().read_clip(str(path), 16, 4, 0.9).frames
    assert clips.read_numbers(clip) == wanted
    np.testing.assert_array_equal(clip, clips.straight_decode(path)[wanted])


class _Pipe:
    """A file that a muxer cannot seek in, so that it cannot write a duration at the end."""

    def __init__(self, path):
        self.file = open(path, "wb")  # noqa: SIM115

    def write(self, data):
        return self.file.write(data)


@pytest.mark.parametrize("format", ["matroska", "webm", "h264", "mpegts"])
@pytest.mark.parametrize("u", US)
def test_streams_without_a_frame_count(format, u, tmp_path, clips):
    path = tmp_path / "live"
    pipe = _Pipe(path)
    webm = {"codec": "libvpx-vp9", "options": VP9} if format == "webm" else {}
    clips.write_video(path, count=80, gop=20, file=pipe, format=format, **webm)
    pipe.file.close()
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    start = int(u * (80 - 32 + 1))
    clip = PyAVDecoder().read_clip(str(path), 8, 4, u).frames
    assert clips.read_numbers(clip) == [start + 4 * k for k in range(8)]


def test_longer_sound_does_not_move_the_end(tmp_path, clips):
    path = tmp_path / "sound.mkv"
    silent = clips.write_video(tmp_path / "v.mp4", count=48, gop=12)
    with av.open(str(silent)) as video, av.open(str(path), "w") as out:
        pictures = out.add_stream_from_template(video.streams.video[0])
        sound = out.add_stream("aac", rate=16000, layout="mono")
        for packet in video.demux(video=0):
            if packet.dts is not None:
                packet.stream = pictures
                out.mux(packet)
        for start in range(0, 16000 * 6, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, start
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    for u, start in ((0.2, 8), (0.5, 20), (0.999, 40)):  # span 8: starts 0 to 40
        clip = PyAVDecoder().read_clip(str(path), 4, 2, u).frames
        assert clips.read_numbers(clip) == [start, start + 2, start + 4, start + 6]


def test_a_count_beyond_the_end_is_replaced_by_the_true_one(tmp_path, clips):
    whole = clips.write_video(
        tmp_path / "whole.mp4", count=200, gop=10, container_options={"movflags": "faststart"}
    )
    with av.open(str(whole)) as container:
        ends = [packet.pos for packet in container.demux(video=0) if packet.is_keyframe]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: ends[10]])
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 200  # what the header still says
    true_count = len(PyAVDecoder().read_all(str(cut)).frames)
    assert 20 < true_count < 150
    start = int(0.99 * (true_count - 8 + 1))
    clip = PyAVDecoder().read_clip(str(cut), 4, 2, 0.99).frames
    assert clips.read_numbers(clip) == [start, start + 2, start + 4, start + 6]
    # A start inside, by the header's count of 200 (starts 0 to 192), and an end that comes early.
    start = true_count - 4
    clip = PyAVDecoder().read_clip(str(cut), 4, 2, (start + 0.5) / 193).frames
    assert clips.read_numbers(clip) == [start, start + 2, start + 2, start + 2]


def test_variable_rate_keeps_the_stride_in_frames(tmp_path, clips):
    times = [3 * k if k < 50 else 100 + k for k in range(100)]
    path = clips.write_video(tmp_path / "vfr.mp4", count=100, gop=20, rate=60, times=times)
    for u in US:
        numbers = clips.read_numbers(PyAVDecoder().read_clip(str(path), 8, 4, u).frames)
        assert set(np.diff(numbers)) <= {0, 4}
        assert numbers[0] + 4 <= numbers[-1] <= 99


def test_first_frame_not_at_time_zero(tmp_path, clips):
    times = [k + 37 for k in range(100)]
    for suffix in ("mp4", "mkv"):
        path = clips.write_video(tmp_path / f"late.{suffix}", count=100, gop=20, times=times)
        clip = PyAVDecoder().read_clip(str(path), 8, 4, 0.73).frames
        assert clips.read_numbers(clip) == [50 + 4 * k for k in range(8)]


def test_rotation_of_the_file_is_applied(tmp_path, clips):
    path = clips.write_video(tmp_path / "phone.mp4", count=12)
    data = bytearray(path.read_bytes())
    # The matrix of the track header, 40 bytes behind its version: 16.16 fixed point (a b u, c d v,
    # x y w), with (x, y) -> (a x + c y, b x + d y), y down. a=0 b=1 c=-1 d=0 sends right to down:
    # a quarter turn clockwise.
    at = data.index(b"tkhd") + 4 + 40
    identity = np.array([0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000], ">i4").tobytes()
    assert bytes(data[at : at + 36]) == identity
    turned = np.array([0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000], ">i4").tobytes()
    data[at : at + 36] = turned
    path.write_bytes(bytes(data))
    upright = clips.straight_decode(path)
    clockwise = upright[:, ::-1].swapaxes(1, 2)  # the left column, read upwards, becomes the top
    np.testing.assert_array_equal(PyAVDecoder().read_all(str(path)).frames, clockwise)
    clip = PyAVDecoder().read_clip(str(path), 4, 2, 0.0).frames
    np.testing.assert_array_equal(clip, clockwise[:8:2])


def test_size_change_is_scaled_to_the_first_size(tmp_path, clips):
    path = tmp_path / "two_sizes.h264"
    parts = [(48, 64), (96, 128)]
    data = b""
    for number, size in enumerate(parts):
        part = clips.write_video(tmp_path / f"{number}.h264", count=20, size=size, format="h264")
        data += part.read_bytes()
    path.write_bytes(data)
    frames = PyAVDecoder().read_all(str(path)).frames
    assert frames.shape == (40, 48, 64, 3)
    assert clips.read_numbers(frames) == list(range(20)) * 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.mp4", "No such file"),
        ("empty.mp4", "Invalid data"),
        ("text.mp4", "Invalid data"),
        ("truncated.mp4", "Invalid data"),
        ("audio.mp4", "no video stream (audio only)"),
        ("folder.mp4", "not a file"),
        ("no_packets.mp4", ""),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_unreadable_files(name, reason, whole, tmp_path, clips):
    path = tmp_path / name
    good = clips.write_video(tmp_path / "good.mp4", count=10).read_bytes()
    if name == "empty.mp4":
        path.touch()
    elif name == "text.mp4":
        path.write_text("not a video\n" * 100)
    elif name == "truncated.mp4":
        path.write_bytes(good[: len(good) // 2])
    elif name == "audio.mp4":
        clips.write_audio(path)
    elif name == "folder.mp4":
        path.mkdir()
    elif name == "no_packets.mp4":
        clips.write_video(path, count=0)
    decoder = PyAVDecoder()
    with pytest.raises(DecodeError) as caught:
        decoder.read_all(str(path)) if whole else decoder.read_clip(str(path), 4, 2, 0.5)
    assert caught.value.path == str(path)
    assert caught.value.reason
    assert reason in caught.value.reason


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_would_be_waited_for_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (str(tmp_path / "pipe.mp4"), "/dev/zero"):
        with pytest.raises(DecodeError, match="not a file"):
            PyAVDecoder().read_clip(path, 4, 2, 0.5)


def test_header_without_frames(tmp_path, clips):
    good = clips.write_video(tmp_path / "good.mkv", count=10).read_bytes()
    path = tmp_path / "header.mkv"
    path.write_bytes(good[: good.index(b"\x1f\x43\xb6\x75")])  # up to the first Cluster
    for read in (lambda d: d.read_all(str(path)), lambda d: d.read_clip(str(path), 4, 2, 0.5)):
        with pytest.raises(DecodeError, match=r"no frame could be decoded|End of file"):
            read(PyAVDecoder())


@pytest.mark.parametrize(
    "name", ["mit leerzeichen.mp4", "ビデオ-é.mp4", "file:colon.mp4", "100%d.mp4"]
)
def test_names(name, tmp_path, clips, monkeypatch):
    path = clips.write_video(tmp_path / "plain.mp4", count=9)
    path.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for spelling in (name, str(tmp_path / name)):
        clip = PyAVDecoder().read_clip(spelling, 4, 2, 0.0).frames
        assert clips.read_numbers(clip) == [0, 2, 4, 6]


def test_wrong_arguments_are_not_blamed_on_the_file():
    for arguments in ((0, 1, 0.5), (4, 0, 0.5), (4, 2, 1.0)):
        with pytest.raises(ValueError, match=r"frames|u must"):
            PyAVDecoder().read_clip("missing.mp4", *arguments)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts handles through /proc")
def test_no_file_stays_open(tmp_path, clips):
    good = clips.write_video(tmp_path / "good.mp4", count=40)
    audio = clips.write_audio(tmp_path / "audio.mp4")
    decoder = PyAVDecoder()
    decoder.read_clip(str(good), 4, 2, 0.5)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        decoder.read_clip(str(good), 4, 2, 0.5)
        with pytest.raises(DecodeError):
            decoder.read_clip(str(audio), 4, 2, 0.5)
    assert len(os.listdir("/proc/self/fd")) == before


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(DecodeError("a.mp4", "why")))
    assert (error.path, error.reason) == ("a.mp4", "why")
    assert "a.mp4" in str(error)
    assert "why" in str(error)
