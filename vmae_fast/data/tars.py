"""Tars of videos as data: what ``pack`` has written, and WebDataset tars of anybody."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from .listing import VIDEO_SUFFIXES, DataError, Listing, VideoFile, ordinal
from .shards import TAR_SUFFIX, Members, members_of, read_member, split_member

INDEX: Final = "index.json"
# Where a packing that is under way keeps what it needs to go on.
STATE: Final = ".pack"
# Says what wrote an index or a sample, and in which form.
_FAMILY: Final = "vmae-fast pack"
FORMAT: Final = f"{_FAMILY} 1"
# Columns of the index's samples.
COLUMNS: Final = ("key", "source", "first_frame", "frames")
VIDEO_MEMBER: Final = ".mp4"

# A sample's text is a label or a few fields; what is longer is something else.
_MOST_TEXT: Final = 1 << 20


def is_tar(path: Path) -> bool:
    """Whether a path is a file named as a tar."""
    return path.suffix.lower() == TAR_SUFFIX and path.is_file()


def is_packed(folder: Path) -> bool:
    """Whether a folder is what ``pack`` writes, finished or not.

    Raises:
        DataError: the packing has not ended.
    """
    if read_index(folder) is not None:
        return True
    if (folder / STATE).is_dir():
        raise DataError(
            f"{str(folder)!r} is being packed, or the packing was stopped: it has no {INDEX} yet; "
            "run the same vmae-fast pack again, which goes on where it was"
        )
    return False


def list_packed(folder: Path) -> Listing:
    """The samples of a folder that ``pack`` has written, by its index."""
    index = read_index(folder)
    assert index is not None
    stride = index["settings"]["stride"]
    rows = [(shard["name"], row) for shard in index["shards"] for row in shard["samples"]]
    files = [
        VideoFile(
            f"{folder / shard}/{key}{VIDEO_MEMBER}",
            index["sources"][number][1],
            taken_every=stride,
            source=_source(index, number),
        )
        for shard, (key, number, _, _) in rows
    ]
    if not files:
        raise DataError(f"{str(folder / INDEX)!r} lists no sample; pack again with --overwrite")
    return Listing(
        files,
        f"packed: {len(files)} segments of {len({row[1] for _, row in rows})} "
        f"videos in {len(index['shards'])} shards, every {ordinal(stride)} frame",
    )


def list_tars(tars: Iterable[Path], found: str) -> Listing | None:
    """The videos in tars, in the tars' order; None where there is none.

    A label is what the member ``.cls`` of the same key says, or "label" in its ``.json``.

    Args:
        tars: the files.
        found: what they are, for the log.
    """
    files: list[VideoFile] = []
    damaged: list[str] = []
    count = 0
    for tar in tars:
        count += 1
        try:
            members = members_of(str(tar))
        except OSError as error:
            damaged.append(f"{tar.name}: {error.strerror or error}")
            continue
        if members.damage:
            damaged.append(f"{tar.name}: {members.damage}")
        files += _videos(str(tar), members)
    if not files:
        return None
    said = [f"{found}: {len(files)} videos in {count} tar{'' if count == 1 else 's'}"]
    if any(file.label is not None for file in files):
        said.append("labels from .cls or .json")
    strides = sorted({file.taken_every for file in files} - {1})
    if strides:
        said.append("packed with every " + " or ".join(ordinal(s) for s in strides) + " frame")
    if damaged:
        said.append(f"what is left of {len(damaged)} damaged: {'; '.join(damaged[:3])}")
    return Listing(files, "; ".join(said))


def described(file: VideoFile) -> VideoFile:
    """A member of a tar with what is known of how it was packed; any other file as it is.

    By the index beside the tar, else by the sample's own ``.json``.
    """
    parts = split_member(file.path)
    if parts is None:
        return file
    tar, name = parts
    return _by_index(file, tar, name) or _by_members(file, tar, _key(name))


def _by_index(file: VideoFile, tar: str, name: str) -> VideoFile | None:
    folder, base = os.path.split(os.path.abspath(tar))
    try:
        status = os.stat(os.path.join(folder, INDEX))
        known = _indexed(folder, (status.st_size, status.st_mtime_ns))
    except (OSError, DataError):
        return None
    about = known.get((base, name))
    if about is None:
        return None
    label = about.label if file.label is None else file.label
    return replace(file, label=label, taken_every=about.taken_every, source=about.source)


@lru_cache(maxsize=4)
def _indexed(folder: str, stamp: tuple[int, int]) -> dict[tuple[str, str], VideoFile]:
    """The packed samples of a folder, by shard and name in it; none where it is not packed."""
    if read_index(Path(folder)) is None:
        return {}
    found = {}
    for file in list_packed(Path(folder)).files:
        tar, name = split_member(file.path) or ("", "")
        found[os.path.basename(tar), name] = file
    return found


def _by_members(file: VideoFile, tar: str, key: str) -> VideoFile:
    """What the members of the same key say of a video."""
    fields = _json_of(tar, key)
    label = file.label
    if label is None:
        label = _text(tar, f"{key}.cls").strip() or None
    if label is None and fields.get("label") not in (None, ""):
        label = str(fields["label"])
    stride, source = fields.get("stride"), fields.get("source")
    if fields.get("format") == FORMAT and isinstance(stride, int) and stride > 0:
        return replace(file, label=label, taken_every=stride, source=str(source))
    return replace(file, label=label)


def _videos(tar: str, members: Members) -> list[VideoFile]:
    names = [
        name
        for name in members.names_in_order()
        if posixpath.splitext(name)[1].lower() in VIDEO_SUFFIXES
        and not posixpath.basename(name).startswith(".")
    ]
    return [described(VideoFile(f"{tar}/{name}")) for name in names]


def _key(name: str) -> str:
    """What the members of a sample have in common: the name up to its first dot."""
    folder, _, base = name.rpartition("/")
    key = base.partition(".")[0]
    return f"{folder}/{key}" if folder else key


def _json_of(tar: str, key: str) -> dict[str, Any]:
    try:
        fields = json.loads(_text(tar, f"{key}.json") or "{}")
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _text(tar: str, name: str) -> str:
    """A short member of a sample; "" where there is none."""
    try:
        place = members_of(tar).find(name)
        data = read_member(f"{tar}/{name}") if place and place[1] < _MOST_TEXT else b""
    except OSError:
        return ""
    return (data or b"").decode("utf-8", "replace")


def _source(index: dict[str, Any], number: int) -> str:
    return posixpath.join(index["root"], index["sources"][number][0])


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a packed folder; None where there is none, or one of something else.

    Raises:
        DataError: it cannot be read, or is of another version.
    """
    path = folder / INDEX
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r} ({error}); pack again") from error
    try:
        index = json.loads(text)
    except ValueError as error:
        if _FAMILY not in text[: 2 * len(FORMAT) + len(_FAMILY)]:
            return None
        raise DataError(
            f"{str(path)!r} is damaged; pack again with --overwrite, or name a single shard"
        ) from error
    if not isinstance(index, dict) or not str(index.get("format")).startswith(_FAMILY):
        return None
    if index["format"] != FORMAT:
        raise DataError(
            f"{str(path)!r} is of the form {index['format']!r}, and this version reads {FORMAT!r}: "
            "use the version that wrote it, or pack again with --overwrite"
        )
    return index
