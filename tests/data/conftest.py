"""Video files whose frames say which frame they are."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

av = pytest.importorskip("av")


def draw_frame(number, height, width):
    """A frame with ``number`` (0 to 255) in its upper half, as eight black or white bars."""
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(8):
        left, right = bit * width // 8, (bit + 1) * width // 8
        frame[: height // 2, left:right] = 235 if number >> bit & 1 else 20
    x = np.arange(width)
    frame[height // 2 :, :, 0] = (3 * x + 7 * number) % 256
    frame[height // 2 :, :, 1] = 128 + 100 * np.sin(x / 5 + number / 3)
    frame[height // 2 :, :, 2] = (number * 11) % 256
    return frame


def read_numbers(frames):
    """The numbers that decoded frames ``(n, H, W, 3)`` show."""
    _, height, width, _ = frames.shape
    numbers = np.zeros(len(frames), int)
    for bit in range(8):
        left, right = bit * width // 8, (bit + 1) * width // 8
        inner = frames[:, 2 : height // 2 - 2, left + 2 : right - 2]
        numbers |= (inner.mean((1, 2, 3)) > 127).astype(int) << bit
    return numbers.tolist()


def write_video(
    path,
    *,
    count=100,
    codec="libx264",
    rate=24,
    size=(48, 64),
    pix_fmt="yuv420p",
    gop=None,
    b_frames=None,
    options=None,
    times=None,
    container_options=None,
    file=None,
    format=None,
):
    """Write ``count`` numbered frames; ``times`` gives their time stamps in frame durations."""
    height, width = size
    target = file if file is not None else str(path)
    with av.open(target, "w", format=format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.options = options or {}
        stream.codec_context.thread_count = 1
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        if gop is not None:
            stream.codec_context.gop_size = gop
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(draw_frame(number, height, width), format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path):
    """Write a second of silence and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for start in range(0, 16000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def straight_decode(path):
    """Every frame of a file, by PyAV's own conversion: the reference for any clip of it."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def write_frames(path, frames, *, codec="ffv1", rate=25, options=None, aspect=None, matrix=None):
    """Write ``av.VideoFrame``s as they are, all of one format and size."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = frames[0].width, frames[0].height
        stream.pix_fmt, stream.options = frames[0].format.name, options or {}
        codec_context = stream.codec_context
        codec_context.thread_count = 1
        if aspect is not None:
            codec_context.sample_aspect_ratio = Fraction(aspect)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for name in ("colorspace", "color_range", "color_trc", "color_primaries"):
            setattr(codec_context, name, getattr(frames[0], name))
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def flat_frame(format, values, *, size=(16, 32), **tags):
    """A frame of one colour: ``values`` fills each plane, as 8 or 16 bits."""
    height, width = size
    frame = av.VideoFrame(width, height, format)
    dtype = np.uint16 if max(c.bits for c in frame.format.components) > 8 else np.uint8
    for plane, value in zip(frame.planes, values, strict=True):
        count = plane.buffer_size // np.dtype(dtype).itemsize
        plane.update(np.full(count, value, dtype).tobytes())
    for name, value in tags.items():
        setattr(frame, name, value)
    return frame


def remux(source, target, *, change=None, keep=None, options=None):
    """Copy packets into another file: those that ``keep(n)`` says, after ``change(n, packet)``."""
    with av.open(str(source)) as video, av.open(str(target), "w", options=options or {}) as out:
        stream = out.add_stream_from_template(video.streams.video[0])
        for number, packet in enumerate(video.demux(video=0)):
            if packet.dts is None or (keep is not None and not keep(number)):
                continue
            if change is not None:
                change(number, packet)
            packet.stream = stream
            out.mux(packet)
    return target


@pytest.fixture(scope="session")
def clips():
    """The helpers of this file."""
    return SimpleNamespace(
        write_video=write_video,
        write_audio=write_audio,
        read_numbers=read_numbers,
        straight_decode=straight_decode,
        write_frames=write_frames,
        flat_frame=flat_frame,
        draw_frame=draw_frame,
        remux=remux,
    )
