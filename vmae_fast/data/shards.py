"""Videos inside tar files: ``shard-000003.tar/holiday-0005.mp4`` is a member of the tar before it.

Members are read where they lie; nothing is unpacked, and no file stays open between calls.
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

TAR_SUFFIX: Final = ".tar"
_BLOCK: Final = 512


@dataclass(frozen=True)
class Members:
    """What a tar holds, as arrays: a process that has seen a million members has room for them.

    Attributes:
        stamp: size and time of change of the tar when it was read.
        names: as bytes, ascending.
        places: int64 ``(n, 2)``, offset and size in bytes of each.
        damage: why the rest of the tar cannot be read; "" where all was.
    """

    stamp: tuple[int, int]
    names: npt.NDArray[np.bytes_]
    places: npt.NDArray[np.int64] = field(repr=False)
    damage: str

    def find(self, name: str) -> tuple[int, int] | None:
        """Offset and size of a member; None where there is none of this name."""
        wanted = os.fsencode(name)
        at = int(np.searchsorted(self.names, wanted))
        if at == len(self.names) or self.names[at] != wanted:
            return None
        offset, size = self.places[at].tolist()
        return offset, size

    def names_in_order(self) -> list[str]:
        """All names, in the order in which they lie in the tar."""
        order = np.argsort(self.places[:, 0], kind="stable")
        return [os.fsdecode(self.names[k]) for k in order]


def split_member(path: str) -> tuple[str, str] | None:
    """The tar and the member's name, of a path into a tar; None for any other path.

    A folder whose name ends in ``.tar`` is a folder.
    """
    end = path.lower().find(f"{TAR_SUFFIX}/")
    while end >= 0:
        end += len(TAR_SUFFIX)
        if not os.path.isdir(path[:end]):
            return path[:end], path[end + 1 :]
        end = path.lower().find(f"{TAR_SUFFIX}/", end)
    return None


def members_of(tar: str) -> Members:
    """What a tar holds; read once in a process, and again when the file has changed.

    Of several members of one name the last counts, as in unpacking. One that is cut off, and all
    behind damage, are left out.

    Raises:
        OSError: the file cannot be read, or is no file.
    """
    status = os.stat(tar)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a file")
    stamp = status.st_size, status.st_mtime_ns
    known = _known.get(tar)
    if known is None or known.stamp != stamp:
        known = _known[tar] = _read(tar, stamp)
    return known


_known: dict[str, Members] = {}


def _read(tar: str, stamp: tuple[int, int]) -> Members:
    places: dict[bytes, tuple[int, int]] = {}
    damage, end = "", 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                end = member.offset_data + member.size
                name = posixpath.normpath(member.name).lstrip("/")
                # A name that leads out of the tar would be another file's path.
                if not member.isreg() or member.issparse() or name.split("/")[0] == "..":
                    continue
                if end <= stamp[0]:
                    places[os.fsencode(name)] = member.offset_data, member.size
            end = archive.offset
        damage = _damage_at(tar, end, stamp[0])
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        damage = "cut off" if end > stamp[0] else f"no tar, or damaged ({error})"
    names = sorted(places)
    return Members(
        stamp,
        np.array(names, np.bytes_),
        np.array([places[name] for name in names], np.int64).reshape(-1, 2),
        damage,
    )


def _damage_at(tar: str, end: int, size: int) -> str:
    """What stands where tarfile stopped, if it is no end: it passes over a header that is none."""
    if end > size:
        return "cut off"
    with open(tar, "rb") as file:
        file.seek(end)
        return "damaged in the middle" if file.read(_BLOCK).strip(b"\0") else ""


def member_size(path: str) -> int | None:
    """Bytes of a member; None for a path that is not into a tar; raises ``OSError``."""
    parts = split_member(path)
    return None if parts is None else _place(*parts)[1]


def read_member(path: str) -> bytes | None:
    """A member's bytes; None for a path that is not into a tar; raises ``OSError``."""
    with opened_member(path) as file:
        return None if file is None else file.read()


@contextmanager
def opened_member(path: str) -> Iterator[MemberFile | None]:
    """A member as a file; None for a path that is not into a tar.

    Raises:
        OSError: the tar cannot be read, or has no such member.
    """
    parts = split_member(path)
    if parts is None:
        yield None
        return
    offset, size = _place(*parts)
    handle = os.open(parts[0], os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        yield MemberFile(handle, offset, size, parts[1])
    finally:
        os.close(handle)


def _place(tar: str, name: str) -> tuple[int, int]:
    members = members_of(tar)
    place = members.find(name)
    if place is None:
        why = f" ({members.damage})" if members.damage else ""
        raise OSError(f"no such member in the tar{why}")
    return place


class MemberFile(io.RawIOBase):
    """A stretch of an open file, as a file.

    A clip's decoder reads what it needs of it. With the whole member read ahead into memory,
    a clip of 0.6 MB took 7% more CPU time; by FFmpeg's own protocol for this, as much as so.
    """

    def __init__(self, handle: int, offset: int, size: int, name: str) -> None:
        self._handle, self._offset, self._size = handle, offset, size
        self._at = 0
        # FFmpeg looks at its ending where the bytes do not say what it is.
        self.name = name

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read starts."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; see ``io.IOBase.seek``."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Up to ``size`` bytes, all that are left without one."""
        left = max(self._size - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        data = b""
        os.lseek(self._handle, self._offset + self._at, os.SEEK_SET)
        # One read gives 2 GiB at the most, and less where the tar was cut off meanwhile.
        while len(data) < wanted:
            part = os.read(self._handle, wanted - len(data))
            if not part:
                break
            data += part
            self._at += len(part)
        return data
