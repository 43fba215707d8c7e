"""Videos kept as folders of pictures, one a frame."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .clip import Clip, DecodeError, Frames, behind_end, check_channels, check_part
from .sampling import clip_indices

FRAME_SUFFIXES: Final = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".jp2",
)

_LAST_NUMBER: Final = re.compile(r"(.*?)(\d+)(\D*)", re.DOTALL)

# Of two groups of one size, these names are the pictures; the other is optical flow or depth.
_USUAL_NAMES: Final = ("img", "image", "frame", "rgb")

_MODES: Final = {1: "L", 3: "RGB", 4: "RGBA"}


def find_frames(folder: str | Path) -> list[Path]:
    """The pictures in a folder that make up a video, in order; none where there is no picture.

    They are the largest group of names that differ in their last number only (``img_00001.jpg``;
    ``2.png`` comes before ``10.png``), or, where no two do, all pictures by name. Everything else
    in the folder is left out: other files, hidden ones, folders in it, smaller groups. Of groups
    of one size, the one named like pictures (img, image, frame, rgb) wins, then the first by
    name. Only names are looked at.

    Raises:
        OSError: the folder cannot be read.
    """
    return [Path(folder, name) for name, _ in _numbered(folder)]


def _numbered(folder: str | Path) -> list[tuple[str, int]]:
    """Names and numbers of the frames in a folder; positions for numbers where names have none."""
    names = sorted(
        name
        for name in os.listdir(folder)
        if name.lower().endswith(FRAME_SUFFIXES) and not name.startswith(".")
    )
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        match = _LAST_NUMBER.fullmatch(stem)
        if match:
            key = (match[1], match[3] + suffix)
            groups.setdefault(key, []).append((int(match[2]), name))

    def rank(key: tuple[str, str]) -> tuple[int, bool, tuple[str, str]]:
        return -len(groups[key]), not key[0].lower().startswith(_USUAL_NAMES), key

    largest = groups[min(groups, key=rank)] if groups else []
    if len(largest) > 1 or len(largest) == len(names) > 0:
        return [(name, number) for number, name in sorted(largest)]
    return [(name, position) for position, name in enumerate(names)]


class FrameFolderDecoder:
    """Reads clips out of folders of pictures, with Pillow; only pictures of the clip are opened.

    ``find_frames`` says which pictures a folder's frames are. Rotation by EXIF is applied, 16-bit
    grey is scaled to 8 bits, transparency is dropped unless ``channels`` is 4, and pictures of
    other sizes are scaled to the size of the clip's first. Grey of colours is BT.601 luma.

    There is no clock: times are NaN, and a clip by ``fps`` is an error. ``first`` is the number in
    the name of the part's first frame (a position from 0 where names have no numbers), ``count``
    the numbers in the part. A number that no picture has is shown as the one before it.

    Args:
        channels: 3 for RGB, 1 for grey, 4 for RGB and alpha.

    Raises:
        ValueError: another number of channels.
    """

    def __init__(self, channels: int = 3) -> None:
        self.channels = check_channels(channels)

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
        clip_indices(1, frames, stride, u)  # raise for a wrong argument before blaming a folder
        check_part(first, count)
        if fps is not None:
            raise DecodeError(
                path, "a folder of pictures has no clock; use a stride in place of fps"
            )
        length, name_of = self._part(path, first, count)
        return self._read(path, [name_of(k) for k in clip_indices(length, frames, stride, u)])

    def read_all(self, path: str) -> Clip:
        """See ``Decoder.read_all``."""
        return self._read(path, [name for name, _ in self._list(path)])

    def every(
        self, path: str, stride: int, first: int | None = None, count: int | None = None
    ) -> Iterator[Frames]:
        """Every ``stride``-th picture ``(H, W, channels)`` of a part, one at a time.

        Raises:
            DecodeError: as ``read_clip``.
        """
        length, name_of = self._part(path, first, count)
        size: tuple[int, int] | None = None
        for position in range(0, length, stride):
            picture = self._open(path, name_of(position), size)
            size = size or (picture.shape[1], picture.shape[0])
            yield picture

    def _part(
        self, path: str, first: int | None, count: int | None
    ) -> tuple[int, Callable[[int], str]]:
        """Length of a part, and the name of the picture at a position in it."""
        names = self._list(path)
        if first is None and count is None:
            return len(names), lambda position: names[position][0]
        numbers = [number for _, number in names]
        first = numbers[0] if first is None else first
        left = numbers[-1] + 1 - first
        left = left if count is None else min(left, count)
        # A part that lies in a gap of the numbers has no frame of its own.
        if left < 1 or bisect_left(numbers, first) == bisect_left(numbers, first + left):
            raise behind_end(path, first, len(names))
        begin = first
        return left, lambda position: names[max(bisect_right(numbers, begin + position) - 1, 0)][0]

    def _list(self, path: str) -> list[tuple[str, int]]:
        try:
            names = _numbered(path)
        except OSError as error:
            raise DecodeError(path, error.strerror or str(error)) from error
        if not names:
            raise DecodeError(path, "no picture in this folder")
        return names

    def _read(self, path: str, names: list[str]) -> Clip:
        pictures: dict[str, Frames] = {}
        size: tuple[int, int] | None = None
        for name in names:
            if name not in pictures:
                pictures[name] = self._open(path, name, size)
                size = size or (pictures[name].shape[1], pictures[name].shape[0])
        return Clip(np.stack([pictures[name] for name in names]), (math.nan,) * len(names))

    def _open(self, path: str, name: str, size: tuple[int, int] | None) -> Frames:
        from PIL import Image, ImageOps

        try:
            with Image.open(os.path.join(path, name)) as image:
                upright = _eight_bits(ImageOps.exif_transpose(image)).convert(_MODES[self.channels])
                if size and upright.size != size:
                    upright = upright.resize(size, Image.Resampling.BILINEAR)
                return np.asarray(upright).reshape(upright.height, upright.width, self.channels)
        except Exception as error:  # on damaged pictures Pillow's readers raise errors of any kind
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DecodeError(path, f"cannot read {name}: {reason}") from error


def _eight_bits(image: Any) -> Any:
    """An image of 8 bits a channel; 16-bit grey is scaled, where Pillow would clip it."""
    from PIL import Image

    if not image.mode.startswith("I"):
        # Palettes may hold transparency of their own, which convert() asks to go by RGBA.
        return image.convert("RGBA") if image.mode == "P" else image
    deep: npt.NDArray[Any] = np.asarray(image).astype(np.int64).clip(0, 0xFFFF)
    return Image.fromarray(((deep + 128) // 257).astype(np.uint8))
