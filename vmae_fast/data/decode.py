"""Reading frames out of video files: the one place for a decoder.

Another decoder (hardware, another library, frame folders) is a class with the two methods of
``Decoder``; ``ClipDataset(decoder=...)`` takes it. ``av`` is imported when a file is opened, so
this module imports without a video library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from .sampling import clip_indices

Frames = npt.NDArray[np.uint8]

# Containers that store no presentation times. With B-frames, what FFmpeg reports for them is
# the storage order, which is off by the reordering delay; only counting from the start is exact.
_CONTAINERS_WITHOUT_TIMES: Final = ("avi",)

_CLOCK: Final = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")  # hours:minutes:seconds.fraction
_NO_FRAME: Final = "no frame could be decoded"


class DecodeError(RuntimeError):
    """A file cannot be decoded.

    Attributes:
        path: the file.
        reason: why, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot decode {self.path!r}: {self.reason}"


class Decoder(Protocol):
    """What ``ClipDataset`` needs of a decoder. It is pickled to each worker process."""

    def read_clip(self, path: str, frames: int, stride: int, u: float) -> Frames:
        """Decode one clip: the frames ``clip_indices(n, frames, stride, u)`` of the n there are.

        Returns:
            uint8 RGB ``(frames, H, W, 3)``.

        Raises:
            DecodeError: the file cannot be read.
            ValueError: ``frames``, ``stride`` or ``u`` is out of its range.
        """
        ...

    def read_all(self, path: str) -> Frames:
        """Decode every frame: uint8 RGB ``(n, H, W, 3)``, n >= 1; raises ``DecodeError``."""
        ...


class PyAVDecoder:
    """Decodes with PyAV (FFmpeg) on the calling thread, at any rate, size and length.

    A clip is read by seeking to the keyframe at or before its first frame and decoding on from
    there, or from the start of the file where the container cannot be sought exactly. In a file
    of constant frame rate the clip is exact: the frames of a straight decode at
    ``clip_indices(n, ...)``. With a variable rate its first frame is the one shown at the time
    where a constant rate would have it; from there on frames are counted as they come.

    The number of frames is the container's; without one it is duration times rate (an estimate,
    replaced by a count where it points behind the end), and without those the packets are
    counted. Only frames that are kept are converted to RGB. A rotation that the file asks players
    for (phones) is applied. A picture that changes size on the way is scaled to its first size.

    Holds no state and no open file between calls, so it can be forked and pickled.
    """

    def read_clip(self, path: str, frames: int, stride: int, u: float) -> Frames:
        """See ``Decoder.read_clip``."""
        clip_indices(1, frames, stride, u)  # raise for a wrong argument before blaming a file
        with _opened(path) as video:
            num_frames = _declared_frames(video)
            if num_frames is not None:
                indices = clip_indices(num_frames, frames, stride, u)
                offsets = [index - indices[0] for index in indices]
                clip, _ = _take(_frames_from(video, indices[0]), offsets, video.size)
                if clip is not None:
                    return clip
            else:
                num_frames = sum(packet.size > 0 for packet in video.container.demux(video.stream))
        return _read_counting(path, num_frames, frames, stride, u)

    def read_all(self, path: str) -> Frames:
        """See ``Decoder.read_all``."""
        with _opened(path) as video:
            convert = _Converter(video.size)
            kept = [convert(frame) for frame in video.container.decode(video.stream)]
            if not kept:
                raise DecodeError(path, _NO_FRAME)
            return np.stack(kept)


@dataclass(frozen=True)
class _OpenVideo:
    container: Any  # av.container.InputContainer
    stream: Any  # av.video.stream.VideoStream
    size: tuple[int, int] | None  # (H, W) by the header; None where it does not say


@contextmanager
def _opened(path: str) -> Iterator[_OpenVideo]:
    """Open the first real video stream; whatever FFmpeg raises inside becomes a DecodeError."""
    import av

    try:
        # Absolute, because FFmpeg takes what precedes a colon in a relative path for a protocol.
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            stream = next((s for s in container.streams.video if not _is_cover(s)), None)
            if stream is None:
                raise DecodeError(path, "no video stream")
            codec = stream.codec_context
            if codec is None:
                raise DecodeError(path, "no decoder for its codec")
            # Workers are processes, one a core: threads inside them would only compete.
            codec.thread_count = 1
            size = (codec.height, codec.width) if codec.height and codec.width else None
            yield _OpenVideo(container, stream, size)
    except (av.error.FFmpegError, OSError, UnicodeError) as error:
        raise DecodeError(path, getattr(error, "strerror", None) or str(error)) from error


def _is_cover(stream: Any) -> bool:
    """Whether a video stream is the cover picture of an audio file."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _declared_frames(video: _OpenVideo) -> int | None:
    """Frames by the container's word: its count, else duration times rate; None without both."""
    stream = video.stream
    if stream.frames > 0:
        return int(stream.frames)
    seconds = _declared_seconds(video)
    if seconds is None or not stream.average_rate:
        return None
    return max(round(seconds * Fraction(stream.average_rate)), 1)


def _declared_seconds(video: _OpenVideo) -> Fraction | None:
    import av

    stream = video.stream
    if stream.duration is not None and stream.duration > 0:
        return Fraction(stream.duration * stream.time_base)
    start = (stream.start_time or 0) * stream.time_base
    # Matroska keeps the end of each stream in a tag; the container's own end may be the sound's.
    tag = _CLOCK.fullmatch(stream.metadata.get("DURATION", ""))
    if tag:
        end = 3600 * int(tag[1]) + 60 * int(tag[2]) + Fraction(tag[3])
    elif video.container.duration:
        end = Fraction(video.container.duration, av.time_base)
    else:
        return None
    return end - start if end > start else None


def _frames_from(video: _OpenVideo, start: int) -> Iterator[Any]:
    """Decoded frames from the one numbered ``start`` on; none where seeking cannot be trusted."""
    container, stream = video.container, video.stream
    if start == 0:
        yield from container.decode(stream)
        return
    rate = stream.average_rate
    reordered = stream.codec_context.has_b_frames
    if not rate or (reordered and container.format.name in _CONTAINERS_WITHOUT_TIMES):
        return
    ticks = 1 / (rate * stream.time_base)  # one frame, in units of the stream's time stamps
    target = (stream.start_time or 0) + start * ticks
    container.seek(round(target), stream=stream, backward=True)
    # Time stamps are rounded (to 1 ms in Matroska): the wanted frame is the one within half a
    # frame of its time.
    earliest, latest = target - ticks / 2, target + ticks / 2
    first = True
    for frame in container.decode(stream):
        if frame.pts is None or (first and frame.pts > latest):
            return  # no times, or the seek landed behind the frame
        first = False
        if frame.pts >= earliest:
            yield frame


def _read_counting(path: str, num_frames: int, frames: int, stride: int, u: float) -> Frames:
    """Decode from the start of the file, counting; ``num_frames`` is the best guess so far."""
    for _ in range(2):
        indices = clip_indices(max(num_frames, 1), frames, stride, u)
        with _opened(path) as video:
            clip, num_frames = _take(video.container.decode(video.stream), indices, video.size)
        if clip is not None:
            return clip
        # The guess put the start behind the end; that pass has counted the frames there are.
    raise DecodeError(path, _NO_FRAME)


def _take(
    decoded: Iterable[Any], wanted: list[int], size: tuple[int, int] | None
) -> tuple[Frames | None, int]:
    """Convert the frames at the positions ``wanted`` (never decreasing) of a frame sequence.

    Returns:
        ``(clip, seen)``: the clip holds its last frame where the sequence ends early, and is None
        where the first wanted frame never came; ``seen`` frames were decoded.
    """
    convert = _Converter(size)
    kept: list[Frames] = []
    seen = 0
    for frame in decoded:
        if seen == wanted[len(kept)]:
            kept += [convert(frame)] * wanted.count(seen)
            if len(kept) == len(wanted):
                return np.stack(kept), seen + 1
        seen += 1
    if not kept:
        return None, seen
    return np.stack(kept + kept[-1:] * (len(wanted) - len(kept))), seen


class _Converter:
    """Turns decoded frames into RGB arrays ``(H, W, 3)`` of one size, ready to be stacked."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        from av.video.reformatter import VideoReformatter

        self._size = size
        # One for all frames: it keeps the scaler's tables, which a frame's own would build anew.
        self._reformat = VideoReformatter().reformat

    def __call__(self, frame: Any) -> Frames:
        if self._size is None:
            self._size = (frame.height, frame.width)
        height, width = self._size
        rgb = self._reformat(frame, width=width, height=height, format="rgb24", **_one_thread())
        plane = rgb.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        picture = rows[:height, : 3 * width].reshape(height, width, 3)
        # The angle is counter-clockwise, as rot90's turns are; other angles are left alone.
        turns, rest = divmod(getattr(frame, "rotation", 0), 90)
        return np.rot90(picture, turns) if turns and not rest else picture


@cache
def _one_thread() -> dict[str, int]:
    """The argument that keeps conversion on this thread, where this version of PyAV has it."""
    from av.video.reformatter import VideoReformatter

    return {"threads": 1} if "threads" in (VideoReformatter.reformat.__doc__ or "") else {}
