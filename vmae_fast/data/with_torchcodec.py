"""Clips by torchcodec, which decodes with the FFmpeg libraries of the system.

``torchcodec`` is imported when a decoder is made.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from .clip import Clip, check_channels
from .container import (
    ClockError,
    OpenVideo,
    SeekError,
    check_seekable,
    declared_frames,
    declared_seconds,
    decoded,
    opened,
)
from .convert import MOST_PIXELS, display_matrix, shown_size
from .decode import PyAVDecoder
from .listing import DataError
from .shards import read_member
from .taking import Wanted, late_by
from .tone import TRANSFERS

# Which say their range by their name; torchcodec overlooks what else a file says of it.
_PIXEL_FORMATS: Final = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")

# Where its seeks were seen to end at the right frame, which in MPEG-TS they do not. Playlists are
# PyAV's, which is told to fetch nothing.
_CONTAINERS: Final = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")

# Not told, BT.709, BT.601 (both of its names), BT.2020: numbers of H.273.
_MATRICES: Final = (1, 2, 5, 6, 9)
_FULL_RANGE: Final = 2

_NOT_FOUND: Final = re.compile(r"(lib\S+): cannot open shared object file")
_OF_CUDA: Final = ("libnv", "libcu", "libtorch_cuda", "libc10_cuda")

_AS_IT_IS: Final = (1, 0, 0, 1)


class DecoderMissing(DataError):
    """torchcodec cannot be used; the message says what to install."""


class TorchCodecDecoder:
    """Decodes with torchcodec on the calling thread, and hands to PyAV what that cannot do.

    The clips are those of ``PyAVDecoder``: the same frames at the same times. Colours may differ
    by a level or two between the two builds of FFmpeg, and what they make of damage by more. PyAV
    opens each file first and decodes its first frame, and reads the whole clip where that shows
    more than plain 8-bit video: high dynamic range, more bits, alpha, interlacing, pixels that
    are not square, a rotation; where the number of channels is not 3; where seeking or time
    stamps cannot be trusted, or the two libraries do not agree on the number of frames or the
    start; and where torchcodec fails, so that what is wrong with a file is said in the same words.

    Holds no state and no open file between calls, so it can be forked and pickled.

    Args:
        channels: of ``PyAVDecoder``; with other numbers than 3 that reads everything.

    Raises:
        ValueError: a number of channels other than 1, 3 and 4.
        DecoderMissing: torchcodec is not installed, or does not find FFmpeg's libraries.
    """

    def __init__(self, channels: int = 3) -> None:
        self.channels = check_channels(channels)
        self._pyav = PyAVDecoder(channels)
        about_torchcodec()

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
        wanted = Wanted(frames, stride, u, fps, first, count)
        clip = None
        if self.channels == 3 and (plan := _plan(path, wanted)):
            clip = _read(path, plan)
        if clip is not None:
            return clip
        return self._pyav.read_clip(path, frames, stride, u, fps=fps, first=first, count=count)

    def read_all(self, path: str) -> Clip:
        """See ``Decoder.read_all``; read by PyAV."""
        return self._pyav.read_all(path)


def about_torchcodec() -> str:
    """Its version and FFmpeg's; raises ``DecoderMissing`` where it cannot decode videos."""
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except ModuleNotFoundError as error:
        raise DecoderMissing(
            "torchcodec is not installed; pip install torchcodec, or use --decoder pyav"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise DecoderMissing(_why_not_loaded(error)) from error
    return f"{torchcodec.__version__} (FFmpeg {torchcodec.ffmpeg_major_version})"


def _why_not_loaded(error: BaseException) -> str:
    """One line of what torchcodec says on pages: the traceback of each FFmpeg that it tries."""
    told = f"{error}\n{error.__cause__}"
    missing = list(dict.fromkeys(_NOT_FOUND.findall(told)))
    what = f"({told.strip().splitlines()[0]}); reinstall it"
    if any(name.startswith(_OF_CUDA) for name in missing):
        what = "without CUDA; pip install torchcodec==0.13.0, the last for such a torch"
    elif missing:
        what = f"without FFmpeg's libraries (one of {', '.join(missing)}); apt-get install ffmpeg"
    return f"torchcodec cannot be loaded {what}, or use --decoder pyav"


@dataclass(frozen=True)
class _Plan:
    """What torchcodec is to read, and what PyAV saw of the file.

    Attributes:
        stream: index of the stream among all.
        num_frames: that the file has by PyAV.
        origin: time stamp of the first frame.
        unit: of time stamps, in seconds.
        ticks: one frame, in this unit.
        indices: of the frames wanted; None by time.
        dues: time stamps at which what is wanted is shown; by stride those of a constant rate.
    """

    stream: int
    num_frames: int
    origin: int
    unit: Fraction
    ticks: Fraction
    indices: list[int] | None
    dues: list[Fraction]

    def fits(self, stamp: int, due: Fraction) -> bool:
        """Whether a frame is the one that is due, as far as its time tells."""
        if self.indices is not None:
            return abs(stamp - due) <= self.ticks / 2
        return stamp <= due <= stamp + 2 * self.ticks


def _plan(path: str, wanted: Wanted) -> _Plan | None:
    """What to read of a file; None where it is PyAV's."""
    with opened(path) as video:
        frame = next(decoded(video), None)
        if frame is None or frame.pts is None or not _is_plain(video, frame):
            return None
        indices = times = None
        try:
            ticks = check_seekable(video)
            num_frames, seconds = declared_frames(video), declared_seconds(video)
            if num_frames is None or seconds is None:
                return None
            if wanted.fps is None:
                indices = wanted.indices(num_frames)
            else:
                times = wanted.times(seconds, video.rate)
        except (SeekError, ClockError):
            return None
        unit = Fraction(video.stream.time_base)
        if indices:
            dues = [frame.pts + index * ticks for index in indices]
        elif times:
            dues = [frame.pts + time / unit + late_by(video) for time in times]
        else:
            return None
        return _Plan(video.stream.index, num_frames, frame.pts, unit, ticks, indices, dues)


def _is_plain(video: OpenVideo, frame: Any) -> bool:
    return (
        video.container.format.name in _CONTAINERS
        and frame.format.name in _PIXEL_FORMATS
        and (frame.color_range == _FULL_RANGE) <= frame.format.name.startswith("yuvj")
        and frame.colorspace in _MATRICES
        and not frame.interlaced_frame
        and getattr(frame, "color_trc", 0) not in TRANSFERS
        and display_matrix(frame) == _AS_IT_IS
        and video.size == (frame.height, frame.width)
        and shown_size(*video.size, video.pixel_aspect) == video.size
        and frame.height * frame.width <= MOST_PIXELS
    )


def _read(path: str, plan: _Plan) -> Clip | None:
    """The frames; None where torchcodec fails or sees another file than PyAV did."""
    from torchcodec.decoders import VideoDecoder

    try:
        member = read_member(path)
        decoder = VideoDecoder(
            os.path.abspath(path) if member is None else member,
            stream_index=plan.stream,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            device="cpu",
        )
        about: Any = decoder.metadata
        begin, end = about.begin_stream_seconds, about.end_stream_seconds
        if about.num_frames != plan.num_frames or round(begin / plan.unit) != plan.origin:
            return None
        if plan.indices is not None:
            batch = decoder.get_frames_at(plan.indices)
        else:
            # Behind the last frame's end it shows none.
            latest = end - float(plan.unit) / 2
            seconds = [min(float(due * plan.unit), latest) for due in plan.dues]
            batch = decoder.get_frames_played_at(seconds)
    except (RuntimeError, ValueError, IndexError, OSError):
        return None
    stamps = [round(pts / plan.unit) for pts in batch.pts_seconds.tolist()]
    if not all(map(plan.fits, stamps, plan.dues)):
        return None
    times = tuple(float((stamp - plan.origin) * plan.unit) for stamp in stamps)
    return Clip(batch.data.numpy(), times)
