"""Pixels as they are seen: decoded frames into uint8 arrays, upright and with square pixels."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .clip import Frames, PictureError, check_channels
from .tone import TRANSFERS, tone_map

_FORMATS: Final = {1: "gray", 3: "rgb24", 4: "rgba"}
_DEEP: Final = {1: "rgb48le", 3: "rgb48le", 4: "rgba64le"}

# Pixel aspects outside of these are taken for mistakes (the widest in a standard is 24:11), and
# those within 1% of square for what cropping and rounding leave behind.
_WIDEST_PIXEL: Final = 4
_NEARLY_SQUARE: Final = 0.01

# The first line stays as it is. Of estdif's searches for edges the quickest, which takes half the
# time of its defaults.
_TOP_FIELD: Final = "mode=frame:parity=tff:deint=all:rslope=1:redge=0:interp=2p"

# Twice 8K. Damaged headers give sizes up to 16383 x 16383, whose clips fill the memory.
MOST_PIXELS: Final = 8192 * 8192

# swscale's number of BT.601.
_BT601: Final = 5


class Converter:
    """Turns decoded frames into arrays ``(H, W, channels)`` of one size, ready to be stacked.

    - Colour: swscale's conversion to full-range RGB, by the matrix and range that the frame
      declares (BT.601 and limited where it declares none), as PyAV's ``to_ndarray`` has it. More
      than 8 bits are rounded to 8. Grey is the luma that the file stores, stretched to 0..255;
      from RGB it is the luma of BT.601. Alpha is the file's, or 255.
    - High dynamic range (PQ and HLG) is tone mapped, see ``tone.py``.
    - Interlaced frames are deinterlaced, one frame out for each in: the lines of the top field
      stay, the others are interpolated along edges between them (FFmpeg's ``estdif``).
      No other frame is looked at, so that a frame is the same wherever decoding started.
    - Pixels that are not square: the width is scaled by their aspect, in the same step.
    - A rotation or mirroring that the file asks players for is applied, in quarter turns.
    - A frame of another size is scaled to the first size.

    Args:
        channels: 1, 3 or 4.
        size: ``(H, W)`` of the frames as they are stored; None takes the first frame's.
        pixel_aspect: width of a pixel by its height.

    Raises:
        ValueError: another number of channels.
        PictureError: on a call, a picture of more than 8192 x 8192 pixels.
    """

    def __init__(
        self,
        channels: int = 3,
        size: tuple[int, int] | None = None,
        pixel_aspect: Fraction = Fraction(1),
    ) -> None:
        from av.video.reformatter import VideoReformatter

        self.channels = check_channels(channels)
        self._aspect = pixel_aspect
        self._size = size and shown_size(*size, pixel_aspect)
        # One for all frames: it keeps the scaler's tables, which a frame's own would build anew.
        self._reformat = VideoReformatter().reformat

    def __call__(self, frame: Any) -> Frames:
        """Convert one frame."""
        if self._size is None:
            self._size = shown_size(frame.height, frame.width, self._aspect)
        height, width = self._size
        if max(height * width, frame.height * frame.width) > MOST_PIXELS:
            raise PictureError(f"a picture of {width} x {height} pixels; the header is damaged")
        if frame.interlaced_frame:
            frame = deinterlace(frame)
        transfer = TRANSFERS.get(getattr(frame, "color_trc", 0))
        picture: Frames
        if transfer is None:
            # Luma is what it is in any matrix: told the same one twice, swscale lets it be.
            same = {"src_colorspace": _BT601, "dst_colorspace": _BT601}
            more = same if self.channels == 1 else {}
            picture = self._scaled(frame, _FORMATS[self.channels], self.channels, np.uint8, more)
        else:
            deep = self._scaled(frame, _DEEP[self.channels], max(self.channels, 3), np.uint16, {})
            picture = tone_map(deep, transfer, frame.color_primaries, self.channels)
        return _upright(picture, frame)

    def _scaled(
        self, frame: Any, name: str, values: int, dtype: type, more: dict[str, int]
    ) -> npt.NDArray[Any]:
        assert self._size is not None
        height, width = self._size
        done = self._reformat(
            frame, width=width, height=height, format=name, **more, **_one_thread()
        )
        plane = done.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        used = rows[:height, : values * width * np.dtype(dtype).itemsize]
        return used.view(np.dtype(dtype).newbyteorder("<")).reshape(height, width, values)


def shown_size(height: int, width: int, pixel_aspect: Fraction) -> tuple[int, int]:
    """``(H, W)`` with square pixels: the width is scaled, unless the aspect is absurd or near 1."""
    within = Fraction(1, _WIDEST_PIXEL) <= pixel_aspect <= _WIDEST_PIXEL
    if not within or abs(pixel_aspect - 1) < _NEARLY_SQUARE:
        return height, width
    return height, max(round(width * pixel_aspect), 1)


def deinterlace(frame: Any) -> Any:
    """The frame that shows the moment of an interlaced frame's top field."""
    import av
    from av.filter import Graph

    if frame.height < 4:  # too few lines to interpolate between
        return frame
    # A graph for each frame: what it has seen before cannot show in what comes out.
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=frame.time_base or Fraction(1, av.time_base),
    )
    filtered = graph.add("estdif", _TOP_FIELD)
    sink = graph.add("buffersink")
    source.link_to(filtered)
    filtered.link_to(sink)
    graph.configure()
    graph.push(frame)
    graph.push(None)  # it holds a frame back until the next
    return graph.pull()


def display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """``(a, b, c, d)`` of how a frame is to be shown: ``(x, y) -> (a x + c y, b x + d y)``.

    As signs, y down; ``(1, 0, 0, 1)`` where nothing is asked for, or more than quarter turns.
    """
    from av.sidedata.sidedata import Type

    try:
        data = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # side data of a kind that this version of PyAV does not know
        return _TURNS.get(frame.rotation % 360, _AS_IT_IS)
    if data is None:
        return _AS_IT_IS
    matrix = np.frombuffer(bytes(data), np.int32)
    a, b, c, d = (int(np.sign(matrix[k])) for k in (0, 1, 3, 4))
    straight = bool(a and d) and not (b or c)
    turned = bool(b and c) and not (a or d)
    return (a, b, c, d) if straight or turned else _AS_IT_IS


_AS_IT_IS: Final = (1, 0, 0, 1)
# By the angle that PyAV gives, counter-clockwise.
_TURNS: Final = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}


def _upright(picture: Frames, frame: Any) -> Frames:
    a, b, c, d = display_matrix(frame)
    if b:
        picture, a, d = picture.swapaxes(0, 1), c, b
    if a < 0:
        picture = picture[:, ::-1]
    return picture[::-1] if d < 0 else picture


@cache
def _one_thread() -> dict[str, int]:
    """The argument that keeps conversion on this thread, where this version of PyAV has it."""
    from av.video.reformatter import VideoReformatter

    return {"threads": 1} if "threads" in (VideoReformatter.reformat.__doc__ or "") else {}
