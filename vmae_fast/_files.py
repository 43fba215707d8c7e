"""Writing files so that a reader never sees half of one, and checksums to know them again."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

# The checksums of a folder's files, in the form of ``sha256sum``, which can check them too.
CHECKSUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
# Files hashed at a time: hashing is bound by one core each.
_HASHED_AT_ONCE = 4
# Bytes free on a disk below which a write that failed is taken to have filled it.
_FULL = 1 << 20


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it there once the block has ended well.

    On an error (a full disk included) the temporary file is removed and ``path`` is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        # mkstemp makes private files; what is published has the usual permissions.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; rename it there once the block has ended well.

    An existing folder at ``path`` is replaced; on an error it is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            # A folder cannot be renamed onto a full one: the old one steps aside first.
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            path.replace(aside)
            try:
                temporary.replace(path)
            except BaseException:
                aside.replace(path)
                raise
            shutil.rmtree(aside)
        else:
            temporary.replace(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what torch and safetensors raise when a write fails into an OSError that names it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        # safetensors' own class, and RuntimeError from torch's writer: neither is importable or
        # specific enough to be named here. torch's does not say that a disk is full.
        full = shutil.disk_usage(path.parent).free < _FULL
        reason = os.strerror(errno.ENOSPC) if full else str(error)
        raise OSError(f"could not write {path}: {reason}") from error


def sha256_of(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        whole = hashlib.sha256()
        while part := file.read(1 << 20):
            whole.update(part)
    return whole.hexdigest()


def write_checksums(folder: Path) -> None:
    """Write ``SHA256SUMS`` of all other files in a folder and those below it."""
    names = _files_below(folder)
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        sums = list(pool.map(lambda name: sha256_of(folder / name), names))
    (folder / CHECKSUMS).write_text(
        "".join(f"{checksum}  {name}\n" for checksum, name in zip(sums, names, strict=True))
    )


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder by its ``SHA256SUMS``; None where all is as it was written.

    A folder without them is taken as it is.
    """
    listed = folder / CHECKSUMS
    if not listed.exists():
        return None
    lines = listed.read_text(errors="replace").splitlines()
    matches = [_LINE.fullmatch(line) for line in lines]
    known = {match[2]: match[1] for match in matches if match}
    if not known or len(known) < len(lines):
        return f"{CHECKSUMS} is damaged"
    lost = sorted(name for name in known if not (folder / name).is_file())
    if lost:
        return f"{lost[0]} is missing"
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        sums = pool.map(lambda name: _sum_or_error(folder / name), known)
        for (name, expected), found in zip(known.items(), sums, strict=True):
            if found != expected:
                cannot = (
                    "cannot be read" if found.startswith("error") else "is not what was written"
                )
                return f"{name} {cannot}"
    return None


def _sum_or_error(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        return f"error: {error}"


def _files_below(folder: Path) -> list[str]:
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name != CHECKSUMS)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
