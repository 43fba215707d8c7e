"""Clips decoded without the frames that no other frame is made from.

In H.264 a frame says whether others are predicted from it; most B-frames are not. Those that a clip
does not hold need not be decoded. Which they are must be known before they are decoded, from the
time stamps of the packets, where everywhere else frames are told apart as they come out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Final

from .clip import Clip
from .container import (
    ClockError,
    OpenVideo,
    SeekError,
    check_seekable,
    declared_frames,
    declared_seconds,
    first_time,
    opened,
    packets,
)
from .taking import Taker, Wanted, late_by

# Decoders that leave out what is no reference and nothing else. In H.265 a frame that is none for
# its own layer may be one for the layers above.
_EXACT: Final = ("h264",)

# Frames to go back, one after the other, where a seek lands behind the clip's first frame.
_STEPS_BACK: Final = (0, 4, 16, 64)

Choose = Callable[[list[int]], list[int]]


def sparse_clip(path: str, wanted: Wanted, channels: int) -> Clip | None:
    """The clip of ``PyAVDecoder.read_clip``, with fewer frames decoded on the way.

    Returns:
        None where packets do not tell which frames the clip holds, or where one of them did not
        come out as expected: other codecs than H.264, missing, repeated or disordered time stamps,
        by stride also a rate that is not constant, damage, and clips that reach the end of what
        the file says it has.

    Raises:
        DecodeError: the file cannot be read.
    """
    with opened(path) as video:
        if video.stream.codec_context.name not in _EXACT:
            return None
        taker = Taker(video, channels)
        try:
            check_seekable(video)
            if wanted.fps is None:
                _take_numbers(video, taker, wanted)
            else:
                _take_times(video, taker, wanted)
        except (SeekError, ClockError):
            return None
        return taker.clip(wanted.frames, video.rate)


def _take_numbers(video: OpenVideo, taker: Taker, wanted: Wanted) -> None:
    num_frames, ticks = declared_frames(video), video.frame_ticks
    indices = None if num_frames is None else wanted.indices(num_frames)
    if indices is None or ticks is None:
        raise SeekError
    origin = taker.origin = first_time(video)
    number = indices[0]
    half = ticks / 2
    first, last = (origin + index * ticks + half for index in (number, indices[-1]))

    def choose(stamps: list[int]) -> list[int]:
        # The wanted frame is within half a frame of its time. What lies behind the last one is not
        # read in full.
        stamps = [stamp for stamp in stamps if first - ticks <= stamp <= last]
        due = (origin + (number + k) * ticks for k in range(len(stamps)))
        if any(abs(stamp - time) > half for stamp, time in zip(stamps, due, strict=True)):
            raise SeekError
        if indices[-1] - number >= len(stamps):
            raise SeekError
        return [stamps[index - number] for index in indices]

    _take(video, taker, first, last, choose, iter(sorted(set(indices))))


def _take_times(video: OpenVideo, taker: Taker, wanted: Wanted) -> None:
    seconds = declared_seconds(video)
    times = None if seconds is None else wanted.times(seconds, video.rate)
    if times is None:
        raise SeekError
    origin = taker.origin = first_time(video)
    dues = [origin + time / video.stream.time_base + late_by(video) for time in times]

    def choose(stamps: list[int]) -> list[int]:
        if dues[0] > stamps[-1]:  # it may be behind the end of the file
            raise SeekError
        return [stamps[bisect_right(stamps, due) - 1] for due in dues]

    _take(video, taker, dues[0], dues[-1], choose, iter([0] * len(dues)))


def _take(
    video: OpenVideo,
    taker: Taker,
    latest: Fraction,
    last: Fraction,
    choose: Choose,
    numbers: Iterator[int],
) -> None:
    """Keep the frames that ``choose`` picks of the time stamps from ``latest`` or before on."""
    run = _run_up(video, latest, last)
    # Frames that come before a keyframe on screen but after it in the file cannot be decoded.
    chosen = Counter(choose(sorted(p.pts for p in run if p.pts >= run[0].pts)))
    for frame in _decoded(video, run, set(chosen)):
        if frame.is_corrupt:
            raise SeekError
        times = chosen.pop(frame.pts, 0)
        if times:
            taker.look(frame)
            taker.keep(frame, next(numbers), times)
    if chosen or not taker.ordered:
        raise SeekError


def _run_up(video: OpenVideo, latest: Fraction, last: Fraction) -> list[Any]:
    """Packets from a keyframe shown at ``latest`` or before, to the last shown by ``last``."""
    import av

    ticks = video.frame_ticks or 0
    for back in _STEPS_BACK:
        target = math.floor(latest - back * ticks)
        try:
            video.container.seek(target, stream=video.stream, backward=True)
        except av.error.FFmpegError as error:
            raise SeekError from error
        run = _until(video, last)
        if run and run[0].pts <= latest:
            return run
    raise SeekError


def _until(video: OpenVideo, last: Fraction) -> list[Any]:
    """Packets from the next keyframe on to the last that can hold a frame shown by ``last``."""
    run: list[Any] = []
    seen: set[int] = set()
    for packet in packets(video):
        if not packet.size or (not run and not packet.is_keyframe):
            continue
        in_order = packet.dts is not None and (not run or packet.dts > run[-1].dts)
        told = packet.pts is not None and packet.pts not in seen
        if not (in_order and told) or packet.is_corrupt or packet.is_discard:
            raise SeekError
        # None is shown before it is decoded, so no later one is shown by then either.
        if packet.dts > last:
            break
        if packet.pts < packet.dts:
            raise SeekError
        seen.add(packet.pts)
        run.append(packet)
    return run


def _decoded(video: OpenVideo, run: list[Any], chosen: set[int]) -> Iterator[Any]:
    """Frames of the packets up to the last of ``chosen``, without those that none is made from."""
    import av

    codec = video.stream.codec_context
    left = set(chosen)
    try:
        for packet in run:
            codec.skip_frame = "DEFAULT" if packet.pts in chosen else "NONREF"
            yield from codec.decode(packet)
            left.discard(packet.pts)
            if not left:
                break
        # What it holds back to put into order is shown before what was not decoded, or unwanted.
        yield from codec.decode(None)
    except av.error.FFmpegError as error:
        raise SeekError from error
