"""The folder that a packing is written to: whose it is, what it holds, and its lists."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from vmae_fast._files import atomic_file

from .listing import DataError, VideoFile
from .tars import INDEX, STATE, read_index

BAD_FILES: Final = "bad_files.txt"
_STATE_FILE: Final = "state.json"


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Make a folder and hold it for this process, where the system has such locks."""
    if out.exists() and not out.is_dir():
        raise DataError(f"out={str(out)!r} is a file; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        yield
        return
    import fcntl

    handle = os.open(out, os.O_RDONLY)
    try:
        # Some network file systems have no locks.
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"another process is packing into {str(out)!r}; wait until it has ended"
                ) from error
        yield
    finally:
        os.close(handle)


def prepare(out: Path, state: dict[str, Any], overwrite: bool) -> None:
    """Make ``out`` ready to begin or to go on; raises ``DataError`` where it holds another."""
    found, cleared = _found(out), False
    if found is not None and overwrite:
        _clear(out)
        found, cleared = None, True
    if found is not None:
        _compare(out, found, state)
        return
    if not cleared and out.exists() and any(out.iterdir()):
        raise DataError(
            f"out={str(out)!r} is not empty and holds no packed data; name a new folder"
        )
    (out / STATE).mkdir(parents=True, exist_ok=True)
    write_json(out / STATE / _STATE_FILE, state)


def _found(out: Path) -> dict[str, Any] | None:
    """The index or the state in a folder; None without either."""
    index = read_index(out)
    if index is not None:
        return index
    try:
        state = json.loads((out / STATE / _STATE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        # Killed before the state was there: nothing else is either.
        return {} if (out / STATE).is_dir() else None
    except ValueError as error:
        raise DataError(f"{str(out / STATE)!r} is damaged ({error}); give --overwrite") from error
    assert isinstance(state, dict)
    return state


def _compare(out: Path, found: dict[str, Any], state: dict[str, Any]) -> None:
    if not found:
        write_json(out / STATE / _STATE_FILE, state)
        return
    before, now = found["settings"], state["settings"]
    changed = [
        f"{name} {before.get(name)}, not {now[name]}"
        for name in now
        if before.get(name) != now[name]
    ]
    if found.get("entries_sha256") != state["entries_sha256"]:
        changed.append(
            f"other videos ({found.get('entries')} in {found.get('root')!r}, not "
            f"{state['entries']} in {state['root']!r})"
        )
    if changed:
        raise DataError(
            f"out={str(out)!r} holds another packing: {'; '.join(changed)}; name another folder, "
            "or start anew with --overwrite"
        )


def _clear(out: Path) -> None:
    """Remove what packing has written, the index first, and nothing else."""
    for path in (out / INDEX, out / BAD_FILES, *out.glob("shard-*.tar")):
        path.unlink(missing_ok=True)
    shutil.rmtree(out / STATE, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write it whole, or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_bad(path: Path, files: list[VideoFile], bad: list[list[Any]]) -> None:
    """A line for each bad file: path, tab, reason; none is there where all are good."""
    if not bad:
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as temporary:
        lines = (f"{_one_line(files[number].path)}\t{_one_line(why)}\n" for number, why in bad)
        temporary.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def _one_line(text: str) -> str:
    return " ".join(text.splitlines()).replace("\t", " ")
