"""Reading clips out of video files: the one place for a decoder.

Another decoder (hardware, another library) is a class with the two methods of ``Decoder``;
``ClipDataset(decoder=...)`` takes it. ``av`` is imported when a file is opened, so this module
imports without a video library.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

from .clip import NO_FRAME, Clip, DecodeError, Decoder, behind_end, check_channels
from .container import (
    ClockError,
    OpenVideo,
    SeekError,
    count_packets,
    declared_frames,
    declared_seconds,
    decoded,
    first_time,
    measured_seconds,
    opened,
    run_up,
)
from .frames import FrameFolderDecoder
from .sparse import sparse_clip
from .taking import Taker, Wanted, late_by

__all__ = ["Clip", "DecodeError", "Decoder", "PathDecoder", "PyAVDecoder", "make_decoder"]


class PyAVDecoder:
    """Decodes with PyAV (FFmpeg) on the calling thread, at any rate, size and length.

    A clip is read by seeking to a keyframe at or before its first frame and decoding on from
    there, or from the start of the file where seeking cannot be trusted: raw streams, missing
    time stamps, AVI with B-frames, frames marked as damaged after a seek. It is made of the
    frames of a straight decode, whatever the file.

    **By stride.** In a file of constant frame rate the clip is exact: the frames of a straight
    decode at ``clip_indices(n, ...)``. With a variable rate its first frame is the one shown at
    the time where a constant rate would have it; from there on frames are counted as they come.
    The number of frames is the container's; without one it is duration times rate (an estimate,
    replaced by a count where it points behind the end), and without those the packets are
    counted. A clip whose file ends early holds its last frame.

    **By time** (``fps``). Right with a variable rate too. Where time stamps are missing or do not
    increase, frame i is shown at i / (average rate). A part (``first``, ``count``) is turned
    into seconds by the average rate, exact where the rate is constant.

    Damaged packets are passed over. Only frames that are kept are converted, see ``Converter``
    for colours, high dynamic range, interlaced video, pixel aspect and rotation.

    Holds no state and no open file between calls, so it can be forked and pickled.

    Args:
        channels: 3 for RGB, 1 for grey, 4 for RGB and alpha (255 where a file has none).
        skip_nonref: leave out frames that no other is made from and that the clip does not hold,
            in H.264 whose time stamps tell which they are (see ``sparse_clip``); everything else
            is decoded as ever. Clips are the same to the bit. In a damaged file they may be of
            other frames: a straight decode counts those that come out, this one goes by times.

    Raises:
        ValueError: another number of channels.
    """

    def __init__(self, channels: int = 3, *, skip_nonref: bool = False) -> None:
        self.channels = check_channels(channels)
        self.skip_nonref = skip_nonref

    def read_clip(
        self,
        path: str,
        frames: int,
        stride: int,
        u: float,
        *,
        fps: float | None = None,
        first: int | None = None,
        count: int | None = None,
    ) -> Clip:
        """See ``Decoder.read_clip``."""
        # Raises for a wrong argument before a file is blamed.
        wanted = Wanted(frames, stride, u, fps, first, count)
        if self.skip_nonref:
            clip = sparse_clip(path, wanted, self.channels)
            if clip is not None:
                return clip
        if fps is not None:
            try:
                return _read_by_time(path, wanted, self.channels)
            except ClockError:
                with opened(path) as video:
                    num_frames = declared_frames(video)
                return _read_counting(path, wanted, self.channels, num_frames)
        with opened(path) as video:
            num_frames, timed = declared_frames(video), video.timed
            clip = _seek_and_take(video, wanted, self.channels, num_frames)
        if num_frames is None and timed:
            num_frames = _counted_packets(path)
            with opened(path) as video:
                clip = _seek_and_take(video, wanted, self.channels, num_frames)
        return clip or _read_counting(path, wanted, self.channels, num_frames)

    def read_all(self, path: str) -> Clip:
        """See ``Decoder.read_all``."""
        with opened(path) as video:
            taker = Taker(video, self.channels)
            for number, frame in enumerate(decoded(video)):
                taker.look(frame)
                taker.keep(frame, number)
            if not taker.pictures:
                raise DecodeError(path, NO_FRAME)
            return taker.clip(len(taker.pictures), video.rate)


class PathDecoder:
    """Decodes whatever a path is: a folder of pictures, or a video file.

    Args:
        channels: of ``FrameFolderDecoder`` and ``PyAVDecoder``.
        skip_nonref: of ``PyAVDecoder``.
        files: what reads video files; a ``PyAVDecoder`` unless given.

    Raises:
        ValueError: a number of channels other than 1, 3 and 4.
    """

    def __init__(
        self, channels: int = 3, *, skip_nonref: bool = False, files: Decoder | None = None
    ) -> None:
        self._folders = FrameFolderDecoder(channels)
        self._files = files or PyAVDecoder(channels, skip_nonref=skip_nonref)

    def _of(self, path: str) -> Decoder:
        return self._folders if os.path.isdir(path) else self._files

    def read_clip(
        self,
        path: str,
        frames: int,
        stride: int,
        u: float,
        *,
        fps: float | None = None,
        first: int | None = None,
        count: int | None = None,
    ) -> Clip:
        """See ``Decoder.read_clip``."""
        return self._of(path).read_clip(path, frames, stride, u, fps=fps, first=first, count=count)

    def read_all(self, path: str) -> Clip:
        """See ``Decoder.read_all``."""
        return self._of(path).read_all(path)


def make_decoder(name: str = "pyav", channels: int = 3, *, skip_nonref: bool = False) -> Decoder:
    """The decoder called "pyav" or "torchcodec", for whatever a path is.

    Args:
        name: what reads video files.
        channels: of the clips.
        skip_nonref: of ``PyAVDecoder``; leave it off with "torchcodec".

    Raises:
        DataError: torchcodec is asked for and cannot be used.
        ValueError: another name or number of channels.
    """
    if name not in ("pyav", "torchcodec"):
        raise ValueError(f"decoder must be pyav or torchcodec, got {name!r}")
    if name == "pyav":
        return PathDecoder(channels, skip_nonref=skip_nonref)
    from .with_torchcodec import TorchCodecDecoder

    return PathDecoder(channels, files=TorchCodecDecoder(channels))


def _seek_and_take(
    video: OpenVideo, wanted: Wanted, channels: int, num_frames: int | None
) -> Clip | None:
    """The clip in a file of that many frames; None where it takes counting from the start."""
    indices = None if num_frames is None else wanted.indices(num_frames)
    if indices is None:
        return None
    taker = Taker(video, channels)
    try:
        frames = _from_number(video, taker, indices[0])
        _take(frames, taker, indices, indices[0])
    except SeekError:
        return None
    return taker.clip(len(indices), video.rate) if taker.pictures else None


def _from_number(video: OpenVideo, taker: Taker, number: int) -> Iterator[Any]:
    """Frames from that one on, by its time; raises ``SeekError``, at once or on the way."""
    if number == 0:
        return decoded(video)
    ticks = video.frame_ticks
    if not ticks:
        raise SeekError
    taker.origin = first_time(video)
    # Time stamps are rounded (to 1 ms in Matroska): the wanted frame is the one within half a
    # frame of its time.
    target = taker.origin + number * ticks
    return _shown_from(run_up(video, taker.origin, target + ticks / 2), target - ticks / 2)


def _shown_from(frames: Iterator[Any], earliest: Fraction) -> Iterator[Any]:
    for frame in frames:
        if frame.pts is None:
            raise SeekError
        if frame.pts >= earliest:
            yield frame
            break
    yield from frames


def _take(frames: Iterable[Any], taker: Taker, indices: list[int], number: int) -> int:
    """Keep the frames ``indices`` (never decreasing); the first frame is number ``number``.

    Returns the number of the frame after the last one looked at.
    """
    for frame in frames:
        taker.look(frame)
        if number == indices[len(taker.pictures)]:
            taker.keep(frame, number, indices.count(number))
            if len(taker.pictures) == len(indices):
                return number + 1
        number += 1
    return number


def _read_counting(path: str, wanted: Wanted, channels: int, num_frames: int | None) -> Clip:
    """Decode from the start of the file, counting; ``num_frames`` is the best guess so far."""
    if num_frames is None:
        num_frames = _counted_packets(path)
    for _ in range(2):
        with opened(path) as video:
            if wanted.fps is not None and not video.rate:
                raise DecodeError(
                    path, "no time stamps and no frame rate; use a stride in place of fps"
                )
            taker = Taker(video, channels)
            # Without a frame to take, the pass only counts.
            indices = wanted.indices(num_frames, video.rate) or [-1]
            num_frames = _take(decoded(video), taker, indices, 0)
            if taker.pictures:
                return taker.clip(wanted.frames, video.rate, clock=wanted.fps is None)
        # The guess put the start behind the end; that pass has counted the frames there are.
    if wanted.indices(num_frames, Fraction(1)) is None and num_frames:
        raise behind_end(path, wanted.first or 0, num_frames)
    raise DecodeError(path, NO_FRAME)


def _counted_packets(path: str) -> int:
    with opened(path) as video:
        return count_packets(video)


def _read_by_time(path: str, wanted: Wanted, channels: int) -> Clip:
    """The clip by the frames' own times; raises ``ClockError`` where they are no clock."""
    with opened(path) as video:
        seconds, timed = declared_seconds(video), video.timed
        clip = None
        if seconds is not None:
            clip, seconds = _seek_and_show(video, wanted, channels, seconds)
    if seconds is None and timed:
        with opened(path) as video:
            seconds = measured_seconds(video)
        if seconds is not None:
            with opened(path) as video:
                clip, seconds = _seek_and_show(video, wanted, channels, seconds)
    if seconds is None:
        raise ClockError
    if clip is not None:
        return clip
    num_frames = 0
    for _ in range(2):
        with opened(path) as video:
            taker = Taker(video, channels)
            # Without a time to show, the pass only measures.
            times = wanted.times(seconds, video.rate)
            seconds = _show(decoded(video), taker, times)
            if taker.pictures:
                return taker.clip(wanted.frames, video.rate)
            num_frames = round(seconds * (video.rate or 0))
    if not seconds:
        raise DecodeError(path, NO_FRAME)
    raise behind_end(path, wanted.first or 0, num_frames)


def _seek_and_show(
    video: OpenVideo, wanted: Wanted, channels: int, seconds: Fraction
) -> tuple[Clip | None, Fraction]:
    """The clip in a file of that length, and the length by what was seen of it.

    No clip where it takes reading from the start.
    """
    times = wanted.times(seconds, video.rate)
    if times is None:
        return None, seconds
    taker = Taker(video, channels)
    try:
        if times[0] == 0:
            frames = decoded(video)
        else:
            taker.origin = first_time(video)
            latest = taker.origin + times[0] / video.stream.time_base + late_by(video)
            frames = run_up(video, taker.origin, latest)
        seconds = _show(frames, taker, times)
    except SeekError:
        return None, seconds
    return (taker.clip(wanted.frames, video.rate) if taker.pictures else None), seconds


def _show(frames: Iterable[Any], taker: Taker, times: list[Fraction] | None) -> Fraction:
    """Keep what is shown at each of ``times``, in seconds from the first frame of the file.

    Nothing is kept where the first of them lies behind the end of the last frame; then, and
    without times, the frames are only measured.

    Returns:
        When the last frame looked at ends.

    Raises:
        ClockError: a time stamp is missing or does not increase.
    """
    video = taker.video
    unit, slack = video.stream.time_base, late_by(video)
    stamps: list[Fraction] = []
    shown, kept = None, 0
    for frame in frames:
        taker.look(frame)
        if not taker.ordered or taker.origin is None:
            raise ClockError
        if shown is None:
            stamps = [taker.origin + time / unit + slack for time in times or ()]
        else:
            due = 0
            while kept + due < len(stamps) and stamps[kept + due] < frame.pts:
                due += 1
            if due:
                taker.keep(shown, 0, due)
                kept += due
        shown = frame
        if stamps and kept == len(stamps):
            break
    if shown is None:
        return Fraction(0)
    end = shown.pts + max(Fraction(shown.duration or 0), video.frame_ticks or Fraction(0))
    left = len(stamps) - kept
    if left and (kept or stamps[0] <= end + slack):
        taker.keep(shown, 0, left)
    assert taker.origin is not None
    return (end - taker.origin) * unit
