"""Clips decoded without the frames that no other is made from: the same, in less work."""

from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")

from vmae_fast.data import PyAVDecoder, container, sparse  # noqa: E402
from vmae_fast.data import decode as decoding  # noqa: E402

PLAIN, SPARSE = PyAVDecoder(), PyAVDecoder(skip_nonref=True)
# (frames, stride, u, further arguments)
CLIPS = [
    (16, 4, 0.0, {}),
    (16, 4, 0.37, {}),
    (16, 4, 0.999, {}),
    (5, 7, 0.6, {}),
    (1, 1, 0.5, {}),
    (8, 1, 0.8, {}),
    (40, 4, 0.5, {}),
    (6, 3, 0.4, {"first": 21, "count": 30}),
    (8, 1, 0.3, {"fps": 3.7}),
    (8, 1, 0.9, {"fps": 24}),
    (1, 1, 0.1, {"fps": 1}),
    (6, 1, 0.5, {"fps": 60, "first": 30, "count": 9}),
]
# x264's settings: references among B-frames, open groups of pictures, several references, none.
KINDS = {
    "pyramid": "bframes=3:b-pyramid=normal:ref=4",
    "strict": "bframes=3:b-adapt=0:b-pyramid=none:scenecut=0",
    "open": "open-gop=1:bframes=4:b-adapt=2",
    "many": "bframes=8:b-adapt=0",
    "none": "bframes=0",
}


def x264(kind):
    return {"x264-params": KINDS[kind]}


@pytest.fixture
def outcomes(monkeypatch):
    """Whether each clip was decoded sparsely."""
    found = []

    def noting(*given):
        clip = sparse.sparse_clip(*given)
        found.append(clip is not None)
        return clip

    monkeypatch.setattr(decoding, "sparse_clip", noting)
    return found


def assert_same(path, clips=CLIPS):
    for frames, stride, u, more in clips:
        wanted = PLAIN.read_clip(str(path), frames, stride, u, **more)
        given = SPARSE.read_clip(str(path), frames, stride, u, **more)
        np.testing.assert_array_equal(given.frames, wanted.frames)
        assert given.times_s == wanted.times_s


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_clips_are_those_of_a_straight_decode(kind, suffix, tmp_path, clips, outcomes):
    path = clips.write_video(
        tmp_path / f"video{suffix}", rate=Fraction(30000, 1001), gop=24, options=x264(kind)
    )
    assert_same(path)
    if suffix == ".mp4":
        # All but clips that reach behind the last frame.
        assert sum(outcomes) >= len(CLIPS) - 1


def test_fewer_frames_are_decoded(tmp_path, clips, monkeypatch):
    path = clips.write_video(tmp_path / "video.mp4", options=x264("strict"), gop=100)
    came_out = []
    monkeypatch.setattr(
        sparse, "_decoded", lambda *given, f=sparse._decoded: counted(f(*given), came_out)
    )
    monkeypatch.setattr(
        decoding, "run_up", lambda *given, f=container.run_up: counted(f(*given), came_out)
    )
    counts = {}
    for name, decoder in (("plain", PLAIN), ("sparse", SPARSE)):
        came_out.clear()
        clip = decoder.read_clip(str(path), 8, 4, 0.9)
        counts[name] = len(came_out)
        assert clips.read_numbers(clip.frames) == list(range(62, 92, 4))
    assert counts["plain"] == 91
    # Of every four frames three are B-frames that nothing refers to: what is left is those that
    # others are made from, and the clip.
    assert counts["sparse"] <= 23 + 1 + 8


def counted(frames, into):
    for frame in frames:
        into.append(frame.pts)
        yield frame


def test_real_grain_and_motion(tmp_path, outcomes):
    rng = np.random.default_rng(0)
    base = rng.normal(128, 40, (12, 15, 3)).repeat(16, 0).repeat(16, 1)
    with av.open(str(tmp_path / "video.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 160, 128, "yuv420p"
        stream.options = {"crf": "26", "threads": "1"}
        for k in range(120):
            moved = base[k // 4 : k // 4 + 128, k // 2 : k // 2 + 160]
            picture = (moved + rng.normal(0, 8, moved.shape)).clip(0, 255).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    assert_same(tmp_path / "video.mp4")
    assert sum(outcomes) >= len(CLIPS) - 1


def test_what_times_do_not_tell_is_decoded_in_full(tmp_path, clips, outcomes):
    times = [k + (k > 50) * (k - 50) for k in range(100)]
    uneven = clips.write_video(tmp_path / "uneven.mp4", times=times)
    by_stride = [clip for clip in CLIPS if "fps" not in clip[3]]
    assert_same(uneven, by_stride)
    assert not outcomes[1]
    others = {
        "codec.mp4": {"codec": "mpeg4", "b_frames": 2},
        "raw.h264": {},
        "storage_order.avi": {"options": x264("strict")},
    }
    for name, settings in others.items():
        outcomes.clear()
        assert_same(clips.write_video(tmp_path / name, **settings), by_stride)
        assert not any(outcomes)
    # By time, an uneven rate is no matter.
    outcomes.clear()
    assert_same(uneven, [clip for clip in CLIPS if clip[3].get("fps") == 3.7])
    assert outcomes == [True]


def test_packets_that_lie_are_found_out(tmp_path, clips, outcomes):
    source = clips.write_video(tmp_path / "video.mp4", options=x264("pyramid"), gop=30)

    def twice(number, packet):
        if number == 47:
            packet.pts -= 512

    lacking = clips.remux(source, tmp_path / "lacking.mkv", keep=lambda n: n not in (40, 41))
    repeated = clips.remux(source, tmp_path / "repeated.mp4", change=twice)
    for path in (lacking, repeated):
        outcomes.clear()
        assert_same(path, [(16, 4, 0.3, {}), (40, 1, 0.5, {"fps": 24})])
        assert not outcomes[0]
    assert outcomes == [False, False]


def test_a_damaged_frame_of_the_clip_is_decoded_as_ever(tmp_path, clips):
    path = clips.write_video(tmp_path / "video.mp4", options=x264("strict"), gop=50)
    with av.open(str(path)) as video:
        packets = [(p.pos, p.size) for p in video.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in packets[60:64]:
        data[position + 4 : position + size] = bytes(size - 4)
    path.write_bytes(data)
    clip = SPARSE.read_clip(str(path), 8, 1, 0.75)
    assert clip.frames.shape == (8, 48, 64, 3)
    assert_same(path, [(16, 1, 0.0, {})])


def test_damaged_frames_are_met_as_in_a_straight_decode(tmp_path, clips):
    """Where a frame on the way was made from what is damaged, the whole way is decoded."""
    source = clips.write_video(
        tmp_path / "whole.mp4", gop=24, size=(64, 96), options=x264("pyramid")
    )
    with av.open(str(source)) as video:
        ends = [(p.pos, p.pos + p.size) for p in video.demux(video=0) if p.size]
    rng, others = np.random.default_rng(0), 0
    for n in range(100):
        data = bytearray(source.read_bytes())
        # In what is in the frames; a file whose time stamps are damaged tells of other frames.
        for place in rng.integers(ends[0][0], ends[-1][1], 1 + n % 4):
            data[place] ^= 1 << int(rng.integers(8))
        path = tmp_path / f"{n}.mp4"
        path.write_bytes(data)
        clip = (8, 3, float(rng.random()))
        wanted, given = (decoder.read_clip(str(path), *clip) for decoder in (PLAIN, SPARSE))
        others += given.times_s != wanted.times_s or (given.frames != wanted.frames).any()
    # A frame that says by mistake that none is made from it, or when it is shown, is believed.
    assert others <= 3


def test_it_is_pickled_with_its_setting():
    import pickle

    assert pickle.loads(pickle.dumps(SPARSE)).skip_nonref
    assert not PyAVDecoder().skip_nonref
