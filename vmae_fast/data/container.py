"""Video files opened: what their headers say, and frames from a point on that can be trusted."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any, Final

from .clip import DecodeError, PictureError
from .shards import opened_member

_MP4: Final = "mov,mp4,m4a,3gp,3g2,mj2"

# Containers that store no presentation times. With B-frames, what FFmpeg reports for them is
# the storage order, which is off by the reordering delay; only counting from the start is exact.
_WITHOUT_TIMES: Final = ("avi",)

# Program streams have times for some pictures only; what FFmpeg makes up for the others after a
# seek differs from what it makes up on the way from the start.
_NEVER_SOUGHT: Final = ("mpeg",)

# A rate above this is a clock's unit, not a rate (raw DV has 60000).
_HIGHEST_RATE: Final = 1000

# Headers may count a part of the frames only (the first fragment's); with duration times rate
# this far above the count, it is not believed.
_MISCOUNT: Final = Fraction(11, 10)

_CLOCK: Final = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")  # hours:minutes:seconds.fraction

# How often to seek, each time from farther back (1, 5, 21, 85, 341 frames), before counting from
# the start instead. Keyframes are seldom more than 300 frames apart.
_SEEKS: Final = 6
_FARTHER: Final = 4


class SeekError(Exception):
    """Frames after a seek are not what they would be in a decode from the start."""


class ClockError(Exception):
    """Time stamps are missing, or do not increase."""


@dataclass(frozen=True)
class OpenVideo:
    """An open file and its video stream.

    Attributes:
        container: av.container.InputContainer.
        stream: av.video.stream.VideoStream, decoded on the calling thread.
        size: ``(H, W)`` as stored, by the header; None where it does not say.
    """

    container: Any
    stream: Any
    size: tuple[int, int] | None

    @property
    def timed(self) -> bool:
        """Whether the container has time stamps at all; raw streams have none."""
        from av.format import Flags

        return not self.container.format.flags & Flags.no_timestamps.value

    @property
    def rate(self) -> Fraction | None:
        """Frames a second on average; by what the codec says where the container does not know."""
        stream = self.stream
        said = [stream.average_rate, stream.guessed_rate, stream.base_rate]
        for rate in said if self.timed else said[1:]:
            if rate and rate <= _HIGHEST_RATE:
                return Fraction(rate)
        return None

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel by its height; 1 where nothing is said."""
        return Fraction(self.stream.sample_aspect_ratio or 1)

    @property
    def frame_ticks(self) -> Fraction | None:
        """One frame at the average rate, in units of the stream's time stamps."""
        return 1 / (self.rate * self.stream.time_base) if self.rate else None


@contextmanager
def opened(path: str) -> Iterator[OpenVideo]:
    """Open the first real video stream; whatever FFmpeg raises inside becomes a DecodeError.

    Args:
        path: a file, or a member of a tar (see ``shards.py``).
    """
    import av

    try:
        with opened_member(path) as member:
            if member is None and not stat.S_ISREG(os.stat(path).st_mode):
                # A pipe would be waited for, and a device may never end.
                raise DecodeError(path, "not a file")
            # Absolute, because FFmpeg takes what precedes a colon in a relative path for a
            # protocol. Playlists may name other files; nothing is ever fetched.
            with av.open(
                os.path.abspath(path) if member is None else member,
                metadata_errors="replace",
                options={"protocol_whitelist": "file"},
            ) as container:
                yield _open_video(path, container)
    except (av.error.FFmpegError, OSError, UnicodeError, PictureError) as error:
        raise DecodeError(path, getattr(error, "strerror", None) or str(error)) from error


def _open_video(path: str, container: Any) -> OpenVideo:
    stream = _picture_stream(path, container)
    codec = stream.codec_context
    if codec is None:
        raise DecodeError(path, "no decoder for its codec")
    # Workers are processes, one a core: threads inside them would only compete.
    codec.thread_count = 1
    size = (codec.height, codec.width) if codec.height and codec.width else None
    return OpenVideo(container, stream, size)


def _picture_stream(path: str, container: Any) -> Any:
    from av.stream import Disposition

    streams = container.streams.video
    for stream in streams:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    if streams:
        raise DecodeError(path, "no video stream (only a cover picture)")
    if container.streams.audio:
        raise DecodeError(path, "no video stream (audio only)")
    raise DecodeError(path, "no video stream")


def declared_frames(video: OpenVideo) -> int | None:
    """Frames by the container's word: its count, else duration times rate; None without both."""
    seconds, rate = declared_seconds(video), video.rate
    estimate = max(round(seconds * rate), 1) if seconds and rate else None
    if video.stream.frames > 0:
        counted = max(int(video.stream.frames) - _cut_away(video), 1)
        return estimate if estimate and estimate > _MISCOUNT * counted + 1 else counted
    return estimate


def _cut_away(video: OpenVideo) -> int:
    """Frames that an MP4 file counts but that its edit list cuts off the start or the end."""
    entries = getattr(video.stream, "index_entries", ())
    if video.container.format.name != _MP4 or not len(entries):
        return 0
    kept_first, kept_last = 0, len(entries) - 1
    while kept_first < kept_last and entries[kept_first].is_discard:
        kept_first += 1
    while kept_last > kept_first and entries[kept_last].is_discard:
        kept_last -= 1
    return max(int(video.stream.frames) - (kept_last - kept_first + 1), 0)


def declared_seconds(video: OpenVideo) -> Fraction | None:
    """Length of the video stream by the header; None where it does not say, or only guesses."""
    import av

    stream = video.stream
    if not video.timed or video.container.format.name in _NEVER_SOUGHT:
        return None
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


def count_packets(video: OpenVideo) -> int:
    """Packets of the stream, near to its frames; the file is read to its end."""
    return sum(packet.size > 0 for packet in packets(video))


def measured_seconds(video: OpenVideo) -> Fraction | None:
    """Length of the stream by its packets' times; the file is read to its end."""
    times = [packet.pts for packet in packets(video) if packet.pts is not None]
    if not times:
        return None
    return (max(times) - min(times) + (video.frame_ticks or 0)) * video.stream.time_base or None


def decoded(video: OpenVideo, *, from_keyframe: bool = False) -> Iterator[Any]:
    """Frames from where the file stands on, as shown.

    A packet that cannot be decoded is passed over, as players do, and so is, with
    ``from_keyframe``, what precedes the first keyframe.
    """
    for packet in packets(video):
        if from_keyframe and packet.size and not packet.is_keyframe:
            continue
        from_keyframe = False
        yield from _decoded_packet(packet)


def _decoded_packet(packet: Any) -> list[Any]:
    import av

    try:
        frames: list[Any] = packet.decode()
    except av.error.FFmpegError:
        return []
    return frames


def packets(video: OpenVideo) -> Iterator[Any]:
    """The stream's packets; damage that stops the reading of a file is taken for its end."""
    import av

    try:
        yield from video.container.demux(video.stream)
    except (av.error.InvalidDataError, IndexError):
        # IndexError: PyAV fails at the end of a file in which streams appeared on the way.
        # What the decoder holds back still comes out.
        last = av.Packet()
        last.stream = video.stream
        yield last


def first_time(video: OpenVideo) -> int:
    """Time stamp of the first frame.

    Raises:
        SeekError: it has none, or there is no frame.
    """
    # The header's start is it, unless the file was cut out of another: then frames at its start
    # cannot be decoded.
    start = video.stream.start_time
    opening = next(packets(video), None)
    if opening is None:
        raise SeekError
    if start is None or not opening.is_keyframe or opening.pts != start:
        frames = [*_decoded_packet(opening), *islice(decoded(video), 1)]
        start = frames[0].pts if frames else None
    if start is None:
        raise SeekError
    return int(start)


def check_seekable(video: OpenVideo) -> Fraction:
    """Return ``video.frame_ticks``; raises ``SeekError`` where seeking cannot be trusted."""
    ticks, name = video.frame_ticks, video.container.format.name
    if not ticks or not video.timed or name in _NEVER_SOUGHT:
        raise SeekError
    if video.stream.codec_context.has_b_frames and name in _WITHOUT_TIMES:
        raise SeekError
    return ticks


def run_up(video: OpenVideo, origin: int, latest: Fraction) -> Iterator[Any]:
    """Frames from a keyframe that is shown at the time stamp ``latest`` or before.

    After a seek, decoders leave out the frames that follow a keyframe in storage but precede it
    on screen (open GOPs), some containers land between keyframes, and some land where they should
    not. So the first frame is looked at, and the seek repeated from farther back.

    Raises:
        SeekError: seeking cannot be trusted in this file, or not to this point.
    """
    import av

    stream = video.stream
    target, back = latest, check_seekable(video)
    for _ in range(_SEEKS):
        if target <= origin:
            break
        try:
            video.container.seek(math.floor(target), stream=stream, backward=True)
        except av.error.FFmpegError as error:
            raise SeekError from error
        frames = decoded(video, from_keyframe=True)
        first = next(frames, None)
        if first is not None:
            if first.pts is None:
                raise SeekError
            if first.pts <= latest:
                yield _sound(first)
                yield from map(_sound, frames)
                return
            target = min(target, Fraction(first.pts))
        target -= back
        back *= _FARTHER
    raise SeekError


def _sound(frame: Any) -> Any:
    """The frame, unless its decoder says that it lacked what the frame was made from."""
    if frame.is_corrupt:
        raise SeekError
    return frame
