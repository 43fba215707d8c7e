"""Rewrites a data set once, into WebDataset tars of short segments that are quick to read.

Each file of the data set is made into a part of its own, by whichever process is free; shards are
put together from the parts in the files' order. So what is in a shard depends neither on how many
processes there were nor on how often the work was stopped.

While it is under way, ``OUT/.pack`` holds ``state.json`` (what is packed, and how), for each file
that is done ``NUMBER.json`` and the bytes of its samples, ``NUMBER.data``, and for each shard that
is written ``shard-NUMBER.json``. The index is written last, and the folder then removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from vmae_fast._files import atomic_file

from .apart import CRASHED, run_apart
from .clip import DecodeError
from .listing import DataError, Listing, VideoFile, ordinal
from .pack_folder import BAD_FILES, alone_in, prepare, write_bad, write_json
from .segments import (
    PackSettings,
    Pictures,
    Sample,
    member_names,
    segments_of,
    source_pictures,
)
from .shard_writer import ShardWriter
from .shards import member_size
from .tars import COLUMNS, FORMAT, INDEX, STATE, read_index

_MIB: Final = 1 << 20


@dataclass(frozen=True)
class PackReport:
    """What became of a data set.

    Attributes:
        out: the packed folder.
        files: entries of the data set.
        bad: path and reason of those that could not be read.
        segments: samples written.
        frames: frames in them, those in two segments counted twice.
        shards: tars written.
        size_bytes: of the tars.
        source_bytes: of the entries that were packed.
        hours: of video that was packed; what has no clock counts 30 frames a second.
    """

    out: Path
    files: int
    bad: list[tuple[str, str]]
    segments: int
    frames: int
    shards: int
    size_bytes: int
    source_bytes: int
    hours: float


def pack(
    source: Listing | Sequence[VideoFile],
    out: str | Path,
    *,
    short_side: int = 256,
    stride: int = 4,
    segment_frames: int = 128,
    overlap: int = 15,
    keyint: int = 8,
    crf: int = 23,
    shard_mb: float = 256,
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    read: Callable[[VideoFile, int], Pictures] = source_pictures,
) -> PackReport:
    """Pack a data set, or go on where the same call was stopped.

    Args:
        source: what ``read_source`` gives.
        out: folder for ``shard-000000.tar`` and on, ``index.json`` and ``bad_files.txt``.
        short_side: of the pictures; smaller ones stay as they are.
        stride: every how many-th frame is kept.
        segment_frames: kept frames in a segment.
        overlap: of them, the ones that the segment before ends with. With 15, every clip of up
            to 16 kept frames lies in a segment whole.
        keyint: kept frames from one keyframe to the next.
        crf: libx264's measure of quality; lower is better and larger.
        shard_mb: most MiB of a shard.
        workers: processes, at least 1.
        overwrite: start anew where ``out`` holds another packing.
        progress: called with the number of files done since the last call.
        read: gives an entry's pictures, every so many-th; a module's function.

    Raises:
        DataError: a setting is out of its range, ``out`` holds something else or is another
            process's at the moment, or no file can be read.
        OSError: ``out`` cannot be written to; the same call goes on where this one was.
    """
    settings = PackSettings(short_side, stride, segment_frames, overlap, keyint, crf)
    settings.check()
    if not 0 < shard_mb < float("inf"):
        raise DataError(f"shard_mb must be above 0, got {shard_mb}")
    if workers < 1:
        raise DataError(f"workers must be at least 1, got {workers}")
    files = list(source.files if isinstance(source, Listing) else source)
    _check_files(files)
    folder = Path(out).expanduser()
    root, names = _named(files)
    state = _state_of(files, root, settings, shard_mb)
    with alone_in(folder):
        prepare(folder, state, overwrite)
        index = read_index(folder)
        if index is None:
            index = _pack(files, names, folder, settings, state, workers, progress, read)
        else:
            # Killed after the index was there.
            shutil.rmtree(folder / STATE, ignore_errors=True)
            if progress is not None:
                progress(len(files))
    return _report(folder, files, index)


def _check_files(files: list[VideoFile]) -> None:
    if not files:
        raise DataError("source names no video; at least 1 is needed")
    for file in files:
        if file.taken_every != 1:
            raise DataError(
                f"{file.path!r} was packed already, with every "
                f"{ordinal(file.taken_every)} frame; pack "
                "the videos that it was made of"
            )


def _named(files: list[VideoFile]) -> tuple[str, list[str]]:
    """The folder that all entries lie in, and their paths from there, with slashes."""
    paths = [os.path.abspath(file.path) for file in files]
    try:
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # drives of their own
        return "", [Path(path).as_posix() for path in paths]
    return root, [Path(os.path.relpath(path, root)).as_posix() for path in paths]


def _state_of(
    files: list[VideoFile], root: str, settings: PackSettings, shard_mb: float
) -> dict[str, Any]:
    """What decides every byte that is written, but for the videos themselves."""
    digest = hashlib.sha256()
    for file in files:
        entry = [os.path.abspath(file.path), file.label, file.first, file.count]
        digest.update(json.dumps(entry).encode())
    return {
        "format": FORMAT,
        "root": root,
        "settings": {**asdict(settings), "shard_mb": float(shard_mb)},
        "entries": len(files),
        "entries_sha256": digest.hexdigest(),
    }


def _pack(
    files: list[VideoFile],
    names: list[str],
    out: Path,
    settings: PackSettings,
    state: dict[str, Any],
    workers: int,
    progress: Callable[[int], None] | None,
    read: Callable[[VideoFile, int], Pictures],
) -> dict[str, Any]:
    parts = out / STATE
    for left in (*out.glob(".*.tmp"), *parts.glob(".*.tmp")):
        left.unlink(missing_ok=True)
    writer = ShardWriter(out, parts, len(files), int(state["settings"]["shard_mb"] * _MIB))
    left_over = writer.missing()
    if progress is not None:
        progress(len(files) - len(left_over))

    def note(numbers: list[int], records: list[dict[str, Any]]) -> None:
        for number, record in zip(numbers, records, strict=True):
            writer.take(number, record)
        if progress is not None:
            progress(len(numbers))

    if left_over:
        run_apart(
            ([number] for number in left_over),
            _work,
            workers=min(workers, len(left_over)),
            start=_start,
            arguments=(files, names, settings, parts, read),
            crashed=lambda number: _bad(CRASHED),
            note=note,
        )
    writer.finish()
    bad = [[number, reason] for number, reason in writer.bad]
    write_bad(out / BAD_FILES, files, bad)
    if len(bad) == len(files):
        shutil.rmtree(parts)
        raise DataError(
            f"no file could be packed, of {len(files)}; {out / BAD_FILES} says why of each"
        )
    index = {
        **state,
        "columns": COLUMNS,
        "hours": round(writer.seconds / 3600, 6),
        "source_bytes": writer.source_bytes,
        "bad": bad,
        "sources": [[name, file.label] for name, file in zip(names, files, strict=True)],
        "shards": writer.shards,
    }
    write_json(out / INDEX, index)
    shutil.rmtree(parts)
    return index


def _report(out: Path, files: list[VideoFile], index: dict[str, Any]) -> PackReport:
    samples = [row for shard in index["shards"] for row in shard["samples"]]
    return PackReport(
        out=out,
        files=len(files),
        bad=[(files[number].path, reason) for number, reason in index["bad"]],
        segments=len(samples),
        frames=sum(frames for *_, frames in samples),
        shards=len(index["shards"]),
        size_bytes=sum(shard["bytes"] for shard in index["shards"]),
        source_bytes=index["source_bytes"],
        hours=index["hours"],
    )


# ---- in the processes ---------------------------------------------------------------------

_Read = Callable[[VideoFile, int], Pictures]
_given: tuple[list[VideoFile], list[str], PackSettings, Path, _Read] | None = None


def _start(
    files: list[VideoFile], names: list[str], settings: PackSettings, parts: Path, read: _Read
) -> None:
    global _given
    _given = files, names, settings, parts, read


def _work(numbers: list[int]) -> list[dict[str, Any]]:
    return [_part(number) for number in numbers]


def _part(number: int) -> dict[str, Any]:
    """Write a file's samples, as they will stand in a tar; its record."""
    assert _given is not None
    files, names, settings, parts, read = _given
    file = files[number]
    rows: list[list[Any]] = []
    last: Sample | None = None
    try:
        with atomic_file(parts / f"{number:06d}.data") as temporary, temporary.open("wb") as data:
            for last in segments_of(file, number, names[number], settings, read):
                size = _write_sample(data, last)
                rows.append([last.key, last.first_frame, last.frames, size])
    except DecodeError as error:
        return _bad(error.reason)
    except OSError:  # of what is written; of what is read it would be a DecodeError
        raise
    except Exception as error:
        # What some library makes of a strange file costs that file, and not days of work.
        return _bad(f"{type(error).__name__}: {error}")
    assert last is not None
    kept = (last.first_frame - (file.first or 0)) // settings.stride + last.frames
    fps = json.loads(last.about)["fps"] or 30.0
    return {
        "reason": "",
        "samples": rows,
        "seconds": kept * settings.stride / fps,
        "source_bytes": _size_of(file.path),
    }


def _bad(reason: str) -> dict[str, Any]:
    return {"reason": reason, "samples": [], "seconds": 0.0, "source_bytes": 0}


def _write_sample(data: Any, sample: Sample) -> int:
    """Append a sample's members with their headers; how many bytes they take."""
    before = data.tell()
    for name, content in zip(member_names(sample.key), (sample.video, sample.about), strict=True):
        header = tarfile.TarInfo(name)
        header.size = len(content)
        data.write(header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))
        data.write(content + b"\0" * (-len(content) % tarfile.BLOCKSIZE))
    return int(data.tell() - before)


def _size_of(path: str) -> int:
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
    size = member_size(path)
    return os.path.getsize(path) if size is None else size
