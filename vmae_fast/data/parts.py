"""Several clips of one file in an epoch: each starts in a part of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from .clip import DecodeError
from .listing import VideoFile
from .probe import probe

# A clip for as long a stretch of video as a clip of Kinetics is.
SECONDS_PER_CLIP: Final = 10.0
# The same where there is no clock, as in a folder of frames: at 30 a second.
FRAMES_PER_CLIP: Final = 300
# More threads than cores: opening a file is mostly waiting for the disk.
_THREADS: Final = 16


def parts_of(file: VideoFile, count: int) -> list[VideoFile]:
    """``count`` entries of a file, whose clips start in equal parts of all its starts.

    Raises:
        ValueError: ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if count == 1:
        return [file]
    return [replace(file, part=(k, count)) for k in range(count)]


def clips_by_duration(files: Sequence[VideoFile], *, show: bool = False) -> list[int]:
    """How many clips of each file an epoch should have: one for every ``SECONDS_PER_CLIP``.

    Args:
        files: their headers are read, side by side. A file that cannot be read counts for one
            clip, and is reported when its turn comes.
        show: a progress bar on a terminal.
    """
    from tqdm import tqdm

    with ThreadPoolExecutor(min(_THREADS, 2 * (os.cpu_count() or 1))) as pool:
        counts = pool.map(_clips_of, files)
        quiet = not (show and sys.stderr.isatty())
        return list(
            tqdm(counts, "reading durations", len(files), unit="file", disable=quiet, leave=False)
        )


def _clips_of(file: VideoFile) -> int:
    try:
        info = probe(file.path)
    except DecodeError:
        return 1
    frames = info.frames
    if frames is None and info.seconds is not None and info.fps:
        frames = round(info.seconds * info.fps)
    used = frames if file.count is None or frames is None else min(frames, file.count)
    if info.seconds is not None:
        share = used / frames if frames and used is not None else 1.0
        return max(round(info.seconds * share / SECONDS_PER_CLIP), 1)
    return max(round((used or 1) / FRAMES_PER_CLIP), 1)
