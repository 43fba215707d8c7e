"""Videos made into short segments that are quick to decode a clip from."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any, Final

from .clip import NO_FRAME, DecodeError, Frames, behind_end
from .container import decoded, opened
from .convert import Converter, _one_thread
from .frames import FrameFolderDecoder
from .listing import DataError, VideoFile
from .tars import FORMAT, VIDEO_MEMBER

# H.264's entropy coding by CABAC takes half of the time that decoding takes, the deblocking filter
# a tenth; "fastdecode" leaves out both. B-frames take 15% more time for the same size. Of a clip of
# 16 frames of grainy 320x256 video at crf 23, one core's time and 10 s of it at stride 4: 6.3 ms,
# 646 KiB; with CABAC and deblocking 14.4 ms, 577 KiB (keyint 8, without B-frames).
_X264: Final = {"preset": "medium", "tune": "fastdecode"}
# BT.601 is what readers that do not look take small pictures for. Numbers of H.273, and of swscale.
_BT601, _BT709, _LIMITED, _SWS_BT601 = 6, 1, 1, 5
# Of what has no clock, as in a folder of frames.
_ASSUMED_RATE: Final = Fraction(30)
# Names in a tar of up to 100 bytes take no more than a header.
_STEM_BYTES: Final = 60
_MOST_RATE_PARTS: Final = 1 << 20

Pictures = Iterator[tuple[Frames, "Fraction | None"]]


@dataclass(frozen=True)
class PackSettings:
    """How videos are packed; see :func:`~vmae_fast.data.pack.pack`."""

    short_side: int = 256
    stride: int = 4
    segment_frames: int = 128
    overlap: int = 15
    keyint: int = 8
    crf: int = 23

    def check(self) -> None:
        """Raise ``DataError`` for a setting that is out of its range."""
        for name, least in (
            ("short_side", 16), ("stride", 1), ("segment_frames", 1), ("overlap", 0),
            ("keyint", 1), ("crf", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value < least:
                raise DataError(f"{name} must be at least {least}, got {value}")
        if self.short_side % 2:
            raise DataError(
                f"short_side must be even, as H.264's colours need it, got {self.short_side}"
            )
        if self.crf > 51:
            raise DataError(f"crf must be at most 51, got {self.crf}; lower is better and larger")
        if self.segment_frames <= 2 * self.overlap:
            raise DataError(
                f"segment_frames must be more than twice overlap={self.overlap}, got "
                f"{self.segment_frames}: else segments would repeat most of each other"
            )

    @property
    def least_new(self) -> int:
        """Frames that a last segment has beyond the one before it; fewer join that."""
        return max((self.segment_frames - self.overlap) // 2, 1)


@dataclass(frozen=True)
class Sample:
    """A segment: members ``KEY.mp4`` and ``KEY.json`` of a tar.

    Attributes:
        key: what their names have in common.
        first_frame: number of the source's frame that its first one is.
        frames: how many it has.
        video: the MP4 file.
        about: the JSON.
    """

    key: str
    first_frame: int
    frames: int
    video: bytes
    about: bytes


def source_pictures(file: VideoFile, stride: int) -> Pictures:
    """Every ``stride``-th picture of an entry, upright RGB ``(H, W, 3)``, with the frame rate.

    Those of a straight decode, as ``PathDecoder`` gives them; few are in memory at a time.

    Raises:
        DecodeError: it cannot be read.
    """
    if os.path.isdir(file.path):
        every = FrameFolderDecoder().every(file.path, stride, file.first, file.count)
        yield from ((picture, None) for picture in every)
        return
    first = file.first or 0
    end = None if file.count is None else first + file.count
    with opened(file.path) as video:
        convert = Converter(3, video.size, video.pixel_aspect)
        number = -1
        for number, frame in enumerate(islice(decoded(video), end)):
            if number >= first and (number - first) % stride == 0:
                yield convert(frame), video.rate
    if number < 0:
        raise DecodeError(file.path, NO_FRAME)
    if number < first:
        raise behind_end(file.path, first, number + 1)


def segments_of(
    file: VideoFile,
    number: int,
    source: str,
    settings: PackSettings,
    read: Callable[[VideoFile, int], Pictures] = source_pictures,
) -> Iterator[Sample]:
    """The samples of an entry.

    Args:
        file: the entry.
        number: of it in the data set.
        source: what its samples call it.
        settings: how.
        read: gives its pictures.

    Raises:
        DecodeError: it cannot be read, or its pictures cannot be encoded.
    """
    shrink = _Shrink(settings.short_side)
    rate: Fraction | None = None

    def small() -> Iterator[Any]:
        nonlocal rate
        for picture, frame_rate in read(file, settings.stride):
            rate = frame_rate
            yield shrink(picture)

    begin = file.first or 0
    for k, (start, frames) in enumerate(cut(small(), settings)):
        first = begin + start * settings.stride
        about = {
            "format": FORMAT,
            "source": source,
            "label": file.label,
            "first_frame": first,
            "frames": len(frames),
            "stride": settings.stride,
            "fps": None if rate is None else float(rate),
        }
        yield Sample(
            f"{number:06d}-{_stem(source)}-{k:04d}",
            first,
            len(frames),
            _encode(file.path, frames, rate or _ASSUMED_RATE, settings),
            json.dumps(about).encode(),
        )


def cut(frames: Iterable[Any], settings: PackSettings) -> Iterator[tuple[int, list[Any]]]:
    """Cut a video into segments: where each starts, and its frames.

    Each has ``segment_frames``, of which the first ``overlap`` are the last of the one before;
    the last one has from ``overlap + least_new`` to fewer than ``segment_frames + least_new``, or
    all that there are.
    """
    start, held = 0, []
    step = settings.segment_frames - settings.overlap
    for frame in frames:
        held.append(frame)
        # Only now is it known that what follows is no short tail.
        if len(held) == settings.segment_frames + settings.least_new:
            yield start, held[: settings.segment_frames]
            start, held = start + step, held[step:]
    if held:
        yield start, held


class _Shrink:
    """RGB pictures to yuv420p frames, all of the first one's size, shrunk to a short side."""

    def __init__(self, short_side: int) -> None:
        from av.video.reformatter import VideoReformatter

        self._short_side = short_side
        self._size: tuple[int, int] | None = None
        self._reformat = VideoReformatter().reformat

    def __call__(self, picture: Frames) -> Any:
        import av
        import numpy as np

        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        if self._size is None:
            self._size = small_size(frame.height, frame.width, self._short_side)
        small = self._reformat(
            frame,
            width=self._size[1],
            height=self._size[0],
            format="yuv420p",
            dst_colorspace=_SWS_BT601,
            dst_color_range=_LIMITED,
            interpolation="BICUBIC",
            **_one_thread(),
        )
        small.colorspace, small.color_range = _BT601, _LIMITED
        return small


def small_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """``(H, W)``, even, with at most that short side and nearly the same shape; never enlarged."""
    short = min(height, width)
    if short <= short_side:
        return max(height // 2 * 2, 2), max(width // 2 * 2, 2)

    def even(side: int) -> int:
        """The nearest even number, in integers."""
        return (side * short_side + short) // (2 * short) * 2

    return even(height), even(width)


def _encode(path: str, frames: list[Any], rate: Fraction, settings: PackSettings) -> bytes:
    """An MP4 file of H.264, the same bytes every time; raises ``DecodeError``."""
    import av

    file = io.BytesIO()
    keyint = settings.keyint
    # MB-tree is off because the same pictures then give the same bytes: with it 1 of 100 encodings
    # of 48x48 differed, without it none of 400.
    parameters = f"keyint={keyint}:min-keyint={keyint}:scenecut=0:bframes=0:no-mbtree=1:threads=1"
    rate = (rate / settings.stride).limit_denominator(_MOST_RATE_PARTS)
    try:
        with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("libx264", rate=rate)
            stream.height, stream.width = frames[0].height, frames[0].width
            stream.pix_fmt = "yuv420p"
            stream.options = {**_X264, "crf": str(settings.crf), "x264-params": parameters}
            codec = stream.codec_context
            codec.thread_count = 1
            codec.colorspace, codec.color_range = _BT601, _LIMITED
            codec.color_primaries = codec.color_trc = _BT709
            for number, frame in enumerate(frames):
                # The overlap is in two segments.
                frame.pts, frame.time_base = number, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        raise DecodeError(path, f"cannot be encoded as H.264: {error}") from error
    return file.getvalue()


def _stem(source: str) -> str:
    """A source's name as a part of a key: readable, without what a tar's keys may not have."""
    stem = os.path.splitext(os.path.basename(source))[0]
    plain = re.sub(r"[^\w-]+", "_", stem).strip("_")
    kept = plain.encode("utf-8", "ignore")[:_STEM_BYTES].decode("utf-8", "ignore")
    return kept or "video"


def member_names(key: str) -> tuple[str, str]:
    """Names of a sample's members."""
    return key + VIDEO_MEMBER, f"{key}.json"
