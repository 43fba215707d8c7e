"""Which frames of a video make up a clip."""

from __future__ import annotations

import math
from typing import Final

# The start of a validation clip: the middle one of all the starts there are.
CENTER_START: Final = 0.5

# Steps that are this near to a whole number are one: durations come rounded to a microsecond.
_STEP_TOLERANCE: Final = 1e-3


def clip_span(frames: int, stride: int) -> int:
    """Number of source frames that a clip occupies: ``frames * stride``.

    VideoMAE V1's published sampler reserves ``frames * stride`` source frames, although only
    ``(frames - 1) * stride + 1`` of them lie between the first and the last one taken.

    Raises:
        ValueError: ``frames`` or ``stride`` is below 1.
    """
    if frames < 1 or stride < 1:
        raise ValueError(f"frames and stride must be at least 1, got {frames} and {stride}")
    return frames * stride


def clip_indices(num_frames: int, frames: int, stride: int, u: float) -> list[int]:
    """Frame indices of one clip: ``frames`` of them, ``stride`` apart, never decreasing.

    The start is uniform over the ``num_frames - frames * stride + 1`` starts at which the clip
    fits. A video shorter than that starts at 0 and holds the last position that the stride
    reaches, as VideoMAE V1 does: 30 frames at stride 4 give 0, 4, ..., 24, 28, 28, 28, ...

    Args:
        num_frames: frames in the video, at least 1.
        frames: frames in the clip, at least 1.
        stride: source frames from one clip frame to the next, at least 1.
        u: uniform number in [0, 1) that picks the start; ``CENTER_START`` is the middle one.

    Raises:
        ValueError: an argument is out of its range.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if not 0.0 <= u < 1.0:
        raise ValueError(f"u must be in [0, 1), got {u}")
    starts = max(num_frames - clip_span(frames, stride) + 1, 1)
    # For any float u below 1 the rounded product stays below `starts`, up to 2**53 of them.
    start = int(u * starts)
    last = start + (num_frames - 1 - start) // stride * stride
    return [min(start + step * stride, last) for step in range(frames)]


def clip_times(seconds: float, frames: int, fps: float, u: float) -> list[float]:
    """Times of one clip in seconds: ``frames`` of them, ``1 / fps`` apart, never decreasing.

    ``clip_indices`` with a clock in place of a count: the start is uniform over the
    ``seconds - frames / fps`` in which the clip fits. A video shorter than the clip starts at 0
    and holds the last time that the steps reach before its end.

    Args:
        seconds: length of the video, above 0.
        frames: frames in the clip, at least 1.
        fps: clip frames a second, above 0.
        u: uniform number in [0, 1) that picks the start; ``CENTER_START`` is the middle one.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 0.0 < seconds < math.inf:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    if not 0.0 < fps < math.inf:
        raise ValueError(f"fps must be above 0, got {fps}")
    if not 0.0 <= u < 1.0:
        raise ValueError(f"u must be in [0, 1), got {u}")
    start = u * max(seconds - frames / fps, 0.0)
    last = max(math.ceil((seconds - start) * fps - _STEP_TOLERANCE) - 1, 0)
    return [start + min(step, last) / fps for step in range(frames)]
