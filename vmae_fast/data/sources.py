"""What videos there are: a folder of files, a list of paths, or one file."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .rng import SPLIT, host_rng

VIDEO_SUFFIXES: Final = (".mp4", ".mkv", ".webm", ".avi", ".mov")

# The list form of VideoMAE's own repository: "path label", divided by a space.
_SPACED_ROW: Final = re.compile(r"(.+\.\w{2,4})((?:\s+\d+)+)")


class DataError(ValueError):
    """A data set that the user named cannot be used; the message says what to do next."""


@dataclass(frozen=True)
class VideoFile:
    """One video file on disk.

    Attributes:
        path: where it is, as it can be opened from the current folder.
        label: its class, where the list gave one. Pretraining does not read it.
    """

    path: str
    label: str | None = None


def list_videos(data: str | Path) -> list[VideoFile]:
    """List the videos that ``data`` names.

    Args:
        data: one of

            - a folder: every file below it, however deep, whose suffix is in ``VIDEO_SUFFIXES``
              (any case), sorted by path relative to the folder. Symbolic links are followed, each
              folder once; hidden files and folders are skipped;
            - a text list: one ``path`` or ``path,label`` a line, with CSV quoting for a path that
              holds a comma. Blank lines and lines that start with ``#`` are skipped, and so is a
              first line ``path`` or ``path,label``. Relative paths start at the list's own
              folder. A path that does not exist is kept, and is reported as a bad file when its
              turn comes;
            - a single video file: a list of one.

    Raises:
        DataError: there is no such file or folder, it holds no video, or a line of the list
            cannot be understood.
    """
    root = Path(data).expanduser()
    if root.is_dir():
        return _list_folder(root)
    if not root.exists():
        raise DataError(
            f"data={str(data)!r} does not exist; name a folder of videos, a text list of paths, "
            f"or a video file (current folder: {Path.cwd()})"
        )
    if root.suffix.lower() in VIDEO_SUFFIXES:
        return [VideoFile(str(root))]
    return _read_list(root)


def split_validation(num_files: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide file indices into training and validation ones by a seeded permutation.

    Args:
        num_files: length of the file list, at least 1.
        share: fraction held out, in [0, 1). 0 holds out nothing; otherwise, of two files or more,
            at least one is held out and at least one stays. A single file is never held out.
        seed: chooses which.

    Returns:
        ``(train, validation)``, both ascending.

    Raises:
        ValueError: ``num_files`` or ``share`` is out of its range.
    """
    if num_files < 1:
        raise ValueError(f"num_files must be at least 1, got {num_files}")
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share must be in [0, 1), got {share}")
    held_out = 0
    if share > 0.0:
        held_out = min(max(round(share * num_files), 1), num_files - 1)
    order: list[int] = host_rng(seed, stream=SPLIT).permutation(num_files).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def _list_folder(root: Path) -> list[VideoFile]:
    found: list[tuple[str, str]] = []
    others = 0
    for path in _walk(root):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            found.append((path.relative_to(root).as_posix(), str(path)))
        else:
            others += 1
    if not found:
        suffixes = ", ".join(suffix[1:] for suffix in VIDEO_SUFFIXES)
        raise DataError(
            f"no video in {str(root)!r}: looked for files ending in {suffixes} (any case) at any "
            f"depth and found {others} other file{'' if others == 1 else 's'}; name another "
            "folder, or a text list of paths for files with other endings"
        )
    return [VideoFile(path) for _, path in sorted(found)]


def _walk(root: Path) -> Iterator[Path]:
    """Every file below ``root`` that is not hidden; each folder is entered once."""

    def stop(error: OSError) -> None:
        raise DataError(
            f"cannot read folder {error.filename!r}: {error.strerror}; correct its permissions, "
            "or give a text list of the files to use"
        ) from error

    entered: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=stop):
        status = os.stat(folder)
        # A link back to a folder already listed would otherwise be walked for ever.
        if (status.st_dev, status.st_ino) in entered:
            subfolders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        # Sorted, so that the same one of two links to a folder wins on every machine.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                yield Path(folder, name)


def _read_list(path: Path) -> list[VideoFile]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {str(path)!r} as a list of videos ({error}); a list is UTF-8 text with "
            "one path, or path,label, a line"
        ) from error
    files: list[VideoFile] = []
    first = True
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = _read_fields(path, number, line)
        if not (first and [field.lower() for field in fields] in (["path"], ["path", "label"])):
            files.append(_video_of(path, number, fields))
        first = False
    if not files:
        raise DataError(f"list {str(path)!r} names no video; write one path, or path,label, a line")
    return files


def _read_fields(path: Path, number: int, line: str) -> list[str]:
    try:
        (fields,) = csv.reader([line], skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise DataError(f"{path}, line {number}: {error} in {line!r}") from error
    return [field.strip() for field in fields]


def _video_of(path: Path, number: int, fields: list[str]) -> VideoFile:
    if len(fields) > 2 or not fields[0]:
        raise DataError(
            f"{path}, line {number}: expected path or path,label, got {len(fields)} fields "
            f"{fields}; put a path that holds a comma in double quotes"
        )
    file = Path(os.path.expanduser(fields[0]))
    video = path.parent / file
    spaced = _SPACED_ROW.fullmatch(fields[0])
    if spaced and len(fields) == 1 and not video.exists():
        raise DataError(
            f"{path}, line {number}: {fields[0]!r} does not exist and looks like a path and a "
            f"label divided by a space; write {spaced[1]},{spaced[2].split()[-1]}"
        )
    label = fields[1] if len(fields) == 2 and fields[1] else None
    return VideoFile(str(video), label)
