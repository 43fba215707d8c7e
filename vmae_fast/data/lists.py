"""Text lists as data: our own form and those that other trainers' lists come in."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .folders import PICTURE_SUFFIXES, is_frame_folder
from .listing import VIDEO_SUFFIXES, DataError, Listing, VideoFile

_PATH_HEADERS: Final = ("path", "video", "video_path", "file", "file_name", "filename", "filepath")
_LABEL_HEADERS: Final = ("label", "class", "category", "target")
# A path and the whole numbers behind it, divided by white space.
_SPACED: Final = re.compile(r"(\S.*?)((?:\s+-?\d+)+)\s*")
# Rows looked at to tell two forms apart that differ only in what their numbers mean.
_LOOKED_AT: Final = 50


@dataclass(frozen=True)
class _Row:
    number: int  # of the line, from 1
    text: str


def read_list(path: Path, root: Path) -> Listing:
    """The videos that a list names; see :func:`~vmae_fast.data.sources.read_source`.

    Args:
        path: the list, UTF-8 text.
        root: where relative paths start.

    Raises:
        DataError: it is no text, names no video, or a line does not have the form of the first.
    """
    rows = _rows(path)
    header = bool(rows) and _is_header(_csv_fields(path, rows[0], _divider(rows[0])))
    if header:
        rows = rows[1:]
    if not rows:
        raise DataError(f"list {str(path)!r} names no video; write one path, or path,label, a line")
    numbers = 0 if header else _numbers_behind(rows[0], root)
    if numbers:
        read, how = _spaced_reader(path, rows, numbers, root)
    else:
        read, how = _divided_reader(path, rows, root)
    files = [read(row) for row in rows]
    where = "its own folder" if root == path.parent else str(root)
    return Listing(files, f"list of {len(files)}, {how}; relative paths start at {where}")


def _rows(path: Path) -> list[_Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {str(path)!r} as a list of videos ({error}); a list is UTF-8 text with "
            "one path, or path,label, a line"
        ) from error
    lines = enumerate(text.splitlines(), start=1)
    return [
        _Row(n, line) for n, line in lines if line.strip() and not line.lstrip().startswith("#")
    ]


def _is_header(fields: list[str]) -> bool:
    one, *more = (field.lower() for field in fields)
    return one in _PATH_HEADERS and (not more or (len(more) == 1 and more[0] in _LABEL_HEADERS))


# ---- path[,label] -------------------------------------------------------------------------


def _divided_reader(
    path: Path, rows: list[_Row], root: Path
) -> tuple[Callable[[_Row], VideoFile], str]:
    divider = _divider(rows[0])
    called = "path,label" if divider == "," else "path<tab>label"

    def read(row: _Row) -> VideoFile:
        fields = _csv_fields(path, row, divider)
        if len(fields) > 2 or not fields[0]:
            raise DataError(
                f"{path}, line {row.number}: expected path or {called}, got {len(fields)} fields "
                f"{fields}; put a path that holds a comma in double quotes"
            )
        label = fields[1] if len(fields) == 2 and fields[1] else None
        return VideoFile(_resolve(fields[0], root), label)

    labelled = any(len(_csv_fields(path, row, divider)) == 2 for row in rows[:_LOOKED_AT])
    return read, called if labelled else "one path a line"


def _divider(row: _Row) -> str:
    return "\t" if "\t" in row.text else ","


def _csv_fields(path: Path, row: _Row, divider: str = ",") -> list[str]:
    try:
        (fields,) = csv.reader([row.text], delimiter=divider, skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise DataError(f"{path}, line {row.number}: {error} in {row.text!r}") from error
    return [field.strip() for field in fields]


# ---- path and numbers ---------------------------------------------------------------------


def _numbers_behind(row: _Row, root: Path) -> int:
    """How many numbers stand behind the path of a line; 0 where it is of the other form."""
    match = _SPACED.fullmatch(row.text)
    if not match or os.path.exists(_resolve(row.text.strip(), root)):
        return 0
    if not _is_video(match[1]) and ("," in row.text or '"' in row.text):
        return 0
    return min(len(match[2].split()), 3)


def _spaced_reader(
    path: Path, rows: list[_Row], numbers: int, root: Path
) -> tuple[Callable[[_Row], VideoFile], str]:
    forms = {1: "path label", 2: "path start total", 3: "path start total label"}
    form, whose = forms[numbers], "V1's form" if numbers == 1 else "V2's form"

    def split(row: _Row) -> tuple[str, list[int]]:
        fields = row.text.rsplit(maxsplit=numbers)
        if len(fields) <= numbers or not all(re.fullmatch(r"-?\d+", f) for f in fields[1:]):
            raise DataError(
                f"{path}, line {row.number}: expected `{form}` divided by spaces, as line "
                f"{rows[0].number} has it, got {row.text!r}"
            )
        return _resolve(fields[0].strip(), root), [int(f) for f in fields[1:]]

    if numbers == 2 and not _second_is_total([split(row) for row in rows[:_LOOKED_AT]]):
        form, whose = "path total label", "the form of V2's fine-tuning on frames"

    def read(row: _Row) -> VideoFile:
        file, values = split(row)
        named = dict(zip(form.split()[1:], values, strict=True))
        label = str(named["label"]) if "label" in named else None
        total = named.get("total", -1)
        # Of a video file as a whole, which V2 marks by a total of -1, start says nothing.
        if total <= 0 or (form == "path total label" and _is_video(file)):
            return VideoFile(file, label)
        return VideoFile(file, label, named.get("start"), total)

    return read, f"{whose} `{form}`"


def _second_is_total(rows: list[tuple[str, list[int]]]) -> bool:
    """Whether two numbers are start and total, rather than total and label."""
    for_start_total = for_total_label = 0
    for file, (one, two) in rows:
        if two < 0:
            return True
        if os.path.isdir(file) and is_frame_folder(Path(file)):
            pictures = sum(
                os.path.splitext(entry.name)[1].lower() in PICTURE_SUFFIXES
                for entry in os.scandir(file)
            )
            for_start_total += pictures == two
            for_total_label += pictures == one
    if for_start_total != for_total_label:
        return for_start_total > for_total_label
    # Nothing on disk tells: frames are counted from 0 or 1, and few videos have so few of them.
    return all(one in (0, 1) for _, (one, _) in rows)


def _is_video(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES


def _resolve(path: str, root: Path) -> str:
    return str(root / os.path.expanduser(path))
