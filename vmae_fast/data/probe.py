"""What a video is, by its headers and its first frame."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .clip import NO_FRAME, DecodeError
from .container import OpenVideo, count_packets, declared_frames, declared_seconds, decoded, opened
from .convert import display_matrix, shown_size
from .frames import find_frames
from .shards import member_size
from .tone import TRANSFERS


@dataclass(frozen=True)
class VideoInfo:
    """A video as its file describes it.

    Attributes:
        path: the file or folder.
        container: FFmpeg's name of the file format; "frames" for a folder of pictures.
        codec: FFmpeg's name; the pictures' suffix for a folder.
        width: as shown, with rotation and pixel aspect applied.
        height: as shown.
        fps: frames a second on average; None where there is no clock.
        frames: by the header, or counted where it does not say; None where neither is possible.
        seconds: length; None where there is no clock.
        size_bytes: of the file, or of the folder's frames together.
        pixel_format: FFmpeg's name, or Pillow's mode for a folder.
        bits: of a channel.
        hdr: "PQ", "HLG" or "".
        interlaced: whether the first frame is.
        rotation: degrees clockwise that the frames are turned to be shown: 0, 90, 180 or 270.
        notes: what else a user should know, in words.
    """

    path: str
    container: str
    codec: str
    width: int
    height: int
    fps: float | None
    frames: int | None
    seconds: float | None
    size_bytes: int
    pixel_format: str
    bits: int
    hdr: str
    interlaced: bool
    rotation: int
    notes: tuple[str, ...]


def probe(path: str) -> VideoInfo:
    """Describe a video file, one in a tar, or a folder of frames.

    Reads headers and the first frame; the packets too, without decoding them, where the headers
    have no count of frames or no duration.

    Raises:
        DecodeError: it cannot be read, or has no frame.
    """
    if os.path.isdir(path):
        return _probe_folder(path)
    notes: list[str] = []
    with opened(path) as video:
        frames, seconds = declared_frames(video), declared_seconds(video)
        rate = video.rate
        if not video.timed:
            notes.append("no time stamps")
        size_bytes = member_size(path)
        if size_bytes is None:
            size_bytes = os.path.getsize(path)
        frame = next(decoded(video), None)
        if frame is None:
            raise DecodeError(path, NO_FRAME)
        picture = _picture(video, frame, notes)
        about = (video.container.format.name, video.stream.codec_context.name)
        notes += _rate_notes(video)
        if not video.stream.frames:
            notes.insert(0, "no frame count in the header")
    if frames is None or seconds is None:
        with opened(path) as video:
            counted = count_packets(video)
        if frames is None:
            frames = counted
        if seconds is None:
            seconds = frames / rate if rate else None
            notes.append("no duration in the header, counted")
    return VideoInfo(
        path=path,
        container=about[0],
        codec=about[1],
        fps=float(rate) if rate else None,
        frames=frames,
        seconds=None if seconds is None else float(seconds),
        size_bytes=size_bytes,
        **picture,
        notes=tuple(notes),
    )


def _picture(video: OpenVideo, frame: Any, notes: list[str]) -> dict[str, Any]:
    """The fields that the first frame tells."""
    aspect = video.pixel_aspect
    height, width = shown_size(frame.height, frame.width, aspect)
    if aspect != 1:
        ignored = ", ignored" if (height, width) == (frame.height, frame.width) else ""
        notes.append(f"pixels {aspect.numerator}:{aspect.denominator}{ignored}")
    matrix = display_matrix(frame)
    rotation, mirrored = _ROTATIONS[matrix]
    if mirrored:
        notes.append("mirrored")
    bits = max(component.bits for component in frame.format.components)
    if bits != 8:
        notes.append(f"{bits} bit")
    hdr = TRANSFERS.get(getattr(frame, "color_trc", 0), "")
    if hdr:
        notes.append(f"HDR ({hdr})")
    if frame.interlaced_frame:
        notes.append("interlaced")
    return {
        "width": height if matrix[1] else width,
        "height": width if matrix[1] else height,
        "pixel_format": frame.format.name,
        "bits": bits,
        "hdr": hdr,
        "interlaced": bool(frame.interlaced_frame),
        "rotation": rotation,
    }


# By display_matrix: degrees clockwise, after a mirroring left to right if there is one.
_ROTATIONS = {
    (1, 0, 0, 1): (0, False),
    (0, 1, -1, 0): (90, False),
    (-1, 0, 0, -1): (180, False),
    (0, -1, 1, 0): (270, False),
    (-1, 0, 0, 1): (0, True),
    (0, -1, -1, 0): (90, True),
    (1, 0, 0, -1): (180, True),
    (0, 1, 1, 0): (270, True),
}


def _rate_notes(video: OpenVideo) -> list[str]:
    """Whether the average rate is far from the smallest step between frames."""
    stream = video.stream
    average, base = stream.average_rate, stream.base_rate
    if not video.rate:
        return ["no frame rate"]
    # The base rate is twice the frames' for codecs that count fields.
    if not base or not average or not video.timed:
        return []
    ratio = Fraction(base) / Fraction(average)
    if all(abs(ratio - whole) > 0.01 for whole in (1, 2)):
        return ["variable frame rate"]
    return []


def _probe_folder(path: str) -> VideoInfo:
    from PIL import Image

    try:
        frames = find_frames(path)
        size_bytes = sum(frame.stat().st_size for frame in frames)
    except OSError as error:
        raise DecodeError(path, error.strerror or str(error)) from error
    if not frames:
        raise DecodeError(path, "no picture in this folder")
    try:
        with Image.open(frames[0]) as image:
            width, height, mode = image.width, image.height, image.mode
            turn = image.getexif().get(0x0112, 1)
    except Exception as error:  # on damaged pictures Pillow's readers raise errors of any kind
        raise DecodeError(path, f"cannot read {frames[0].name}: {error}") from error
    rotation = {3: 180, 4: 180, 5: 270, 6: 90, 7: 90, 8: 270}.get(turn, 0)
    if rotation % 180:
        width, height = height, width
    bits = 16 if mode.startswith("I") else 8
    return VideoInfo(
        path=path,
        container="frames",
        codec=frames[0].suffix[1:].lower(),
        width=width,
        height=height,
        fps=None,
        frames=len(frames),
        seconds=None,
        size_bytes=size_bytes,
        pixel_format=mode,
        bits=bits,
        hdr="",
        interlaced=False,
        rotation=rotation,
        notes=("no clock", *(["16 bit"] if bits == 16 else [])),
    )
