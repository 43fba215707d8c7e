"""vmae-fast pack."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from ._arguments import parse

if TYPE_CHECKING:
    from vmae_fast.data.pack import PackReport

# Bad files that are printed; the list has all.
_PRINTED = 20


@dataclass
class PackArgs:
    """What is packed, and how."""

    videos: Positional[str]
    """Folder, list or file, as --data of pretrain."""
    out: Positional[str]
    """Folder for the shards, index.json and bad_files.txt."""
    data_root: str | None = None
    """Where relative paths in a list start. None: the list's own folder."""
    short_side: int = 256
    """Short side of the pictures, in pixels; smaller ones stay as they are. Colours are RGB: what
    is transparent is lost."""
    stride: int = 4
    """Every how many-th frame is kept. Train with this --stride, or a multiple of it."""
    segment_frames: int = 128
    """Kept frames in a segment. Training takes one clip of each in an epoch."""
    overlap: int = 15
    """Of them, frames that the segment before ends with: with one fewer than a clip has, no clip
    is lost where segments meet."""
    keyint: int = 8
    """Kept frames from keyframe to keyframe: fewer decode quicker, and are larger."""
    crf: int = 23
    """Quality: lower is better and larger; 18 is hard to tell from the source."""
    shard_mb: float = 256
    """Most MiB of a shard. Small enough to write anew after a stop, large enough to be few."""
    workers: int | None = None
    """Processes. None: one for each core."""
    overwrite: bool = False
    """Start anew where OUT holds another packing."""


def run(args: list[str]) -> int:
    """Pack a data set, or go on with it; the exit status.

    Raises:
        DataError: settings or data that cannot be used.
        OSError: what is written does not fit.
    """
    from vmae_fast.data import read_source
    from vmae_fast.data.pack import pack

    options = _options(args)
    listing = read_source(options.videos, options.data_root)
    print(f"data: {options.videos}: {listing.how}", flush=True)
    from tqdm import tqdm

    try:
        with tqdm(total=len(listing.files), unit="file", disable=not sys.stderr.isatty()) as bar:
            report = pack(
                listing,
                options.out,
                short_side=options.short_side,
                stride=options.stride,
                segment_frames=options.segment_frames,
                overlap=options.overlap,
                keyint=options.keyint,
                crf=options.crf,
                shard_mb=options.shard_mb,
                workers=_cores() if options.workers is None else options.workers,
                overwrite=options.overwrite,
                progress=bar.update,
            )
    except (KeyboardInterrupt, OSError):
        print(
            "what was packed so far is kept; the same command, without --overwrite, goes on",
            file=sys.stderr,
        )
        raise
    print("\n".join(_describe(report, options)))
    return 0


def _options(args: list[str]) -> PackArgs:
    return parse(
        PackArgs,
        prog="vmae-fast pack",
        description=(
            "Rewrite a data set once, into tars (WebDataset) of short videos that are quick to "
            "read: pretrain --data OUT. Stopped at any time, the same command goes on."
        ),
        args=args,
        usual=("videos", "out", "short_side", "stride", "crf", "workers"),
        examples=(
            "vmae-fast pack /my/videos /my/packed",
            "vmae-fast pretrain --data /my/packed --stride 4",
        ),
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _describe(report: PackReport, options: PackArgs) -> list[str]:
    lines = [f"bad: {path}: {reason}" for path, reason in report.bad[:_PRINTED]]
    if len(report.bad) > _PRINTED:
        lines.append(f"bad: and {len(report.bad) - _PRINTED} more")
    if report.bad:
        lines.append(f"bad files are listed in {Path(report.out) / 'bad_files.txt'}")
    good = report.files - len(report.bad)
    hours = max(report.hours, 1e-9)
    lines.append(
        f"packed {good} of {report.files} files, {len(report.bad)} bad, {_length(report.hours)} of "
        f"video, as {report.segments} segments in {report.shards} shards: "
        f"{_mib(report.size_bytes)} MiB, {_mib(report.size_bytes / hours)} MiB an hour (the files "
        f"had {_mib(report.source_bytes / hours)})"
    )
    lines.append(
        f"train on it with: vmae-fast pretrain --data {report.out} --stride {options.stride}"
    )
    return lines


def _length(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / (1 << 20):,.1f}"
