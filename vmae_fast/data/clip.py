"""What decoders give and what they raise; no video library is needed here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]

NO_FRAME = "no frame could be decoded"


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


class PictureError(Exception):
    """A picture is not one to be converted; the message says why. Becomes a ``DecodeError``."""


@dataclass(frozen=True)
class Clip:
    """Decoded frames, and when they are shown.

    Attributes:
        frames: uint8 ``(T, H, W, C)``.
        times_s: one a frame: when it is shown, in seconds from the first frame of the file. A
            frame that is held has its time again. NaN where the file has no clock.
    """

    frames: Frames
    times_s: tuple[float, ...]


class Decoder(Protocol):
    """What ``ClipDataset`` needs of a decoder. It is pickled to each worker process."""

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
        """Decode one clip.

        Args:
            path: the file.
            frames: frames in the clip, at least 1.
            stride: frames of the file from one to the next: the clip is the frames
                ``clip_indices(n, frames, stride, u)`` of the n there are. Unused with ``fps``.
            u: uniform number in [0, 1) that picks the start.
            fps: clip frames a second, in place of ``stride``: the clip is what is shown at
                ``clip_times(seconds, frames, fps, u)``. A frame is shown from its own time until
                the next one's.
            first: frame at which the part of the file to use begins; None: the first.
            count: frames in that part; None: all from ``first`` on. A part that reaches past the
                end of the file ends there.

        Returns:
            uint8 ``(frames, H, W, C)`` and the time of each.

        Raises:
            DecodeError: the file cannot be read, or has no frame from ``first`` on.
            ValueError: an argument is out of its range.
        """
        ...

    def read_all(self, path: str) -> Clip:
        """Decode every frame: uint8 ``(n, H, W, C)``, n >= 1; raises ``DecodeError``."""
        ...


def check_part(first: int | None, count: int | None) -> None:
    """Raise ``ValueError`` for a part of a file that cannot be one."""
    if first is not None and first < 0:
        raise ValueError(f"first must be at least 0, got {first}")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")


def check_channels(channels: int) -> int:
    """Return ``channels``; raises ``ValueError`` unless it is 1, 3 or 4."""
    if channels not in (1, 3, 4):
        raise ValueError(f"channels must be 1 (grey), 3 (RGB) or 4 (RGB and alpha), got {channels}")
    return channels


def behind_end(path: str, first: int, num_frames: int) -> DecodeError:
    """The error for a part that begins where the file has ended."""
    return DecodeError(
        path, f"the part to use begins at frame {first}, and the file has {num_frames} frames"
    )
