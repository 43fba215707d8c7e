"""What a clip is to hold, and the frames that are kept for it as they come by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

import numpy as np

from .clip import Clip, Frames, check_part
from .container import ClockError, OpenVideo
from .convert import Converter
from .sampling import clip_indices, clip_times

# A time that is this near to a frame's, as a share of a time stamp's unit, is the frame's.
ROUNDING: Final = Fraction(1, 1000)


@dataclass(frozen=True)
class Wanted:
    """The arguments of ``read_clip``, checked."""

    frames: int
    stride: int
    u: float
    fps: float | None
    first: int | None
    count: int | None

    def __post_init__(self) -> None:
        clip_indices(1, self.frames, self.stride if self.fps is None else 1, self.u)
        if self.fps is not None:
            clip_times(1.0, self.frames, self.fps, self.u)
        check_part(self.first, self.count)

    def indices(self, num_frames: int, rate: Fraction | None = None) -> list[int] | None:
        """The frames of the clip among the ``num_frames`` of the file; None: none from ``first``.

        With ``fps``, frame i is shown at ``i / rate``.
        """
        first = self.first or 0
        left = min(num_frames - first, self.count or num_frames)
        if left < 1:
            return None
        if self.fps is None:
            return [first + k for k in clip_indices(left, self.frames, self.stride, self.u)]
        assert rate is not None
        times = clip_times(float(left / rate), self.frames, self.fps, self.u)
        return [first + min(int(time * rate + ROUNDING), left - 1) for time in times]

    def times(self, seconds: Fraction, rate: Fraction | None) -> list[Fraction] | None:
        """Times of the clip in a file of that length; None where it has none from ``first`` on."""
        assert self.fps is not None
        begin, left = Fraction(0), seconds
        if self.first or self.count is not None:
            if not rate:
                raise ClockError
            begin = (self.first or 0) / rate
            left = seconds - begin
            if self.count is not None:
                left = min(left, self.count / rate)
        if left <= 0:
            return None
        times = clip_times(float(left), self.frames, self.fps, self.u)
        return [begin + Fraction(time) for time in times]


@dataclass
class Taker:
    """Looks at frames as they come, and keeps the wanted ones, converted.

    Attributes:
        pictures: the frames kept, one after the other.
        stamps: their time stamps.
        numbers: their numbers, each in the count that ``keep`` was given.
        origin: time stamp of the first frame of the file.
    """

    video: OpenVideo
    channels: int
    origin: int | None = None
    pictures: list[Frames] = field(default_factory=list)
    stamps: list[int | None] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._convert = Converter(self.channels, self.video.size, self.video.pixel_aspect)
        self._last: int | None = None
        self.ordered = True

    def look(self, frame: Any) -> None:
        """Note a frame's time stamp, kept or not."""
        if self.origin is None:
            self.origin = frame.pts
        if frame.pts is None or (self._last is not None and frame.pts <= self._last):
            self.ordered = False
        self._last = frame.pts

    def keep(self, frame: Any, number: int, times: int = 1) -> None:
        """Convert a frame and append it, ``times`` times."""
        self.pictures += [self._convert(frame)] * times
        self.stamps += [frame.pts] * times
        self.numbers += [number] * times

    def clip(self, frames: int, rate: Fraction | None, *, clock: bool = True) -> Clip:
        """What was kept, the last one held up to ``frames``; timed by the stamps if in order."""
        held = frames - len(self.pictures)
        pictures = self.pictures + self.pictures[-1:] * held
        if clock and self.ordered and self.origin is not None:
            unit = self.video.stream.time_base
            seconds = [
                float((stamp - self.origin) * unit) for stamp in self.stamps if stamp is not None
            ]
        elif rate:
            seconds = [float(number / rate) for number in self.numbers]
        else:
            seconds = [math.nan] * len(self.numbers)
        return Clip(np.stack(pictures), tuple(seconds + seconds[-1:] * held))


def late_by(video: OpenVideo) -> Fraction:
    """By how much a time stamp may be late because it was rounded, in its own unit."""
    ticks = video.frame_ticks
    if ticks is None or ticks.denominator == 1:
        return ROUNDING
    # Never so much that a frame would be shown well before its time.
    return min(Fraction(1, 2), ticks / 8) + ROUNDING
