"""Folders as data: video files and frame folders at any nesting, and labels from their names."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .listing import VIDEO_SUFFIXES, DataError, Listing, VideoFile
from .tars import is_packed, is_tar, list_packed, list_tars

PICTURE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

# Sub-folders that are parts of one data set, as Hugging Face's loaders name them.
_TRAIN: Final = "train"
_HELD_BACK: Final = ("val", "valid", "validation", "dev", "test", "eval")
_METADATA: Final = ("metadata.csv", "metadata.jsonl")

# The last number of a name, read from behind.
_NUMBERED: Final = re.compile(r"(\D*)(\d+)(.*)")


def list_folder(folder: Path) -> Listing:
    """The videos below a folder; see :func:`~vmae_fast.data.sources.read_source`.

    Raises:
        DataError: it holds none, or a folder in it cannot be read.
    """
    if is_packed(folder):
        return list_packed(folder)
    root, left_out = _training_part(folder)
    found = _find(root)
    if not found.videos and not found.frame_folders:
        tars = list_tars([root / name for name in sorted(found.tars)], "folder of tars")
        if tars is not None:
            return Listing(tars.files, "; ".join([tars.how, *_only_train(left_out)]))
        suffixes = ", ".join(suffix[1:] for suffix in VIDEO_SUFFIXES)
        others = found.others
        raise DataError(
            f"no video in {str(root)!r}: looked for files ending in {suffixes} (any case), for "
            "tars of them and for folders of numbered pictures, at any depth, and found "
            f"{others} other file{'' if others == 1 else 's'}; name another folder, or a text list "
            "of paths for files with other endings"
        )
    names = sorted(found.videos + found.frame_folders)
    labels, whence = _labels(root, names)
    files = [VideoFile(_join(root, name), labels.get(name)) for name in names]
    return Listing(files, _describe(found, whence, left_out))


def is_frame_folder(folder: Path) -> bool:
    """Whether a folder holds numbered pictures and no video file."""
    names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
    return not any(map(_is_video, names)) and _is_sequence(names)


@dataclass
class _Found:
    videos: list[str]  # relative to the root, with slashes
    frame_folders: list[str]
    others: int
    tars: list[str]


def _find(root: Path) -> _Found:
    found = _Found([], [], 0, [])
    for folder, names in _walk(root):
        place = folder.relative_to(root)
        videos = [name for name in names if _is_video(name)]
        found.videos += [(place / name).as_posix() for name in videos]
        found.tars += [(place / name).as_posix() for name in names if is_tar(folder / name)]
        others = len(names) - len(videos)
        if not videos and _is_sequence(names):
            found.frame_folders.append(place.as_posix())
            others = 0
        found.others += others
    return found


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from ``root`` down with its files that are not hidden; each is entered once."""

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
        yield Path(folder), [name for name in names if not name.startswith(".")]


def _training_part(folder: Path) -> tuple[Path, list[str]]:
    """The sub-folder to train on where a folder holds the parts of a data set, and the others."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"cannot read folder {str(folder)!r}: {error.strerror}; correct its permissions"
        ) from error
    parts = sorted(entry.name for entry in entries if _leads_to(entry.is_dir))
    media = [
        entry.name
        for entry in entries
        if (_is_video(entry.name) or _is_picture(entry.name) or is_tar(Path(entry.path)))
        and _leads_to(entry.is_file)
    ]
    train = [name for name in parts if name.lower() == _TRAIN]
    others = [name for name in parts if name.lower() in _HELD_BACK]
    if not media and train and others and len(train) + len(others) == len(parts):
        return folder / train[0], others
    return folder, []


def _leads_to(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of that kind; a link that leads back to itself is of none."""
    try:
        return kind()
    except OSError:
        return False


def _labels(root: Path, names: list[str]) -> tuple[dict[str, str], str]:
    """Labels by relative name, and where they come from in words ("" without)."""
    for file in _METADATA:
        if (root / file).is_file():
            labels = _read_metadata(root / file)
            if labels:
                return labels, f"labels from {file}"
    folders = {name.split("/")[0] for name in names if name.count("/") == 1}
    if len(folders) > 1 and all(name.count("/") == 1 for name in names):
        return {
            name: name.split("/")[0] for name in names
        }, f"labels from {len(folders)} class sub-folders"
    return {}, ""


def _read_metadata(file: Path) -> dict[str, str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"cannot read {str(file)!r} ({error}); mend it or take it away: it gives the labels of "
            "the videos beside it, by columns file_name and label"
        ) from error
    return {
        str(row["file_name"]): str(row["label"])
        for row in rows
        if row.get("file_name") and row.get("label") not in (None, "")
    }


def _describe(found: _Found, whence: str, left_out: list[str]) -> str:
    kinds = [
        f"{count} {word}{'' if count == 1 else 's'}"
        for count, word in (
            (len(found.videos), "video file"), (len(found.frame_folders), "frame folder")
        )
        if count
    ]  # fmt: skip
    said = ["folder: " + " and ".join(kinds)]
    if whence:
        said.append(whence)
    if found.others:
        said.append(f"{found.others} other file{'' if found.others == 1 else 's'} passed over")
    return "; ".join([*said, *_only_train(left_out)])


def _only_train(left_out: list[str]) -> list[str]:
    if not left_out:
        return []
    return [f"its part train/ only; not {', '.join(f'{name}/' for name in left_out)}"]


def _join(root: Path, name: str) -> str:
    return str(root if name == "." else root / name)


def _is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def _is_sequence(names: list[str]) -> bool:
    """Whether at least two pictures have names that differ in their last number only."""
    groups: Counter[tuple[str, str]] = Counter()
    for name in names:
        stem, suffix = os.path.splitext(name)
        match = _NUMBERED.fullmatch(stem[::-1])
        if suffix.lower() in PICTURE_SUFFIXES and match:
            groups[match[1] + suffix, match[3]] += 1
    return max(groups.values(), default=0) >= 2
