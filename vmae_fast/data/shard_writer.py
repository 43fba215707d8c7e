"""Puts shards together from the parts that each file was made into, in the files' order."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from vmae_fast._files import atomic_file

# A tar ends in two empty blocks.
_END: Final = b"\0" * 1024


class ShardWriter:
    """Shards of a packing, those of an earlier start included.

    A shard takes samples in order until the next would make it larger than ``limit``. It is
    written whole, then its row, and only then are the parts removed that it was made of: whenever
    that is stopped, what is missing can be made from what is there.

    Args:
        out: where shards go.
        parts: where parts and rows are.
        entries: files of the data set.
        limit: most bytes of a shard, unless a single sample has more.

    Attributes:
        shards: name, bytes, sha256 and samples of each that is written.
        bad: number and reason of each bad file, in order.
        seconds, source_bytes: of the others together.

    Raises:
        OSError: a shard cannot be written.
    """

    def __init__(self, out: Path, parts: Path, entries: int, limit: int) -> None:
        self._out, self._parts, self._entries, self._limit = out, parts, entries, limit
        self.shards: list[dict[str, Any]] = []
        self.bad: list[tuple[int, str]] = []
        self.seconds, self.source_bytes = 0.0, 0
        # The next file to be looked at; samples of it that are in shards already.
        self._next, self._skip = 0, 0
        self._records: dict[int, dict[str, Any]] = {}
        # Samples for the next shard: the file's number, offset in its part, size, row.
        self._waiting: list[tuple[int, int, int, list[Any]]] = []
        self._size = len(_END)
        self._totals: list[list[Any]] = []
        self._read_rows()
        self._read_records()

    def missing(self) -> list[int]:
        """Numbers of the files that have no part yet."""
        return [n for n in range(self._next, self._entries) if n not in self._records]

    def take(self, number: int, record: dict[str, Any]) -> None:
        """Note that a file's part is there, and write the shards that are full by it."""
        self._write_json(self._record_path(number), record)
        self._records[number] = record
        self._advance()

    def finish(self) -> None:
        """Write the last shard."""
        self._advance()
        assert self._next == self._entries
        if self._waiting:
            self._close(self._entries, 0)
        self._count(self._totals)
        self._totals = []

    def _read_rows(self) -> None:
        while (path := self._row_path(len(self.shards))).exists():
            row = json.loads(path.read_text(encoding="utf-8"))
            shard = self._out / row["shard"]["name"]
            if not shard.exists() or shard.stat().st_size != row["shard"]["bytes"]:
                break  # taken away or altered meanwhile: from here on it is made again
            self.shards.append(row["shard"])
            self._next, self._skip = row["next"]
            self._count(row["files"])

    def _read_records(self) -> None:
        for path in self._parts.glob("[0-9]*.json"):
            record = json.loads(path.read_text(encoding="utf-8"))
            data = self._data_path(int(path.stem))
            held = data.stat().st_size if data.exists() else 0
            if held == sum(size for *_, size in record["samples"]):
                self._records[int(path.stem)] = record

    def _count(self, totals: list[list[Any]]) -> None:
        for number, reason, seconds, size in totals:
            if reason:
                self.bad.append((number, reason))
            self.seconds += seconds
            self.source_bytes += size

    def _advance(self) -> None:
        """Look at files in order, as far as they are done."""
        while self._next in self._records:
            number, record = self._next, self._records.pop(self._next)
            offset = 0
            for k, (key, first, frames, size) in enumerate(record["samples"]):
                if k >= self._skip:
                    if self._waiting and self._size + size > self._limit:
                        self._close(number, k)
                    self._waiting.append((number, offset, size, [key, number, first, frames]))
                    self._size += size
                offset += size
            self._next, self._skip = number + 1, 0
            self._totals.append(
                [number, record["reason"], record["seconds"], record["source_bytes"]]
            )

    def _close(self, number: int, sample: int) -> None:
        """Write a shard of what waits; the next begins with that sample of that file."""
        name = f"shard-{len(self.shards):06d}.tar"
        digest = hashlib.sha256()
        with atomic_file(self._out / name) as temporary, temporary.open("wb") as tar:
            for source, offset, size, _ in self._waiting:
                with self._data_path(source).open("rb") as data:
                    data.seek(offset)
                    content = data.read(size)
                digest.update(content)
                tar.write(content)
            digest.update(_END)
            tar.write(_END)
        shard = {
            "name": name,
            "bytes": self._size,
            "sha256": digest.hexdigest(),
            "samples": [row for *_, row in self._waiting],
        }
        row = {"shard": shard, "next": [number, sample], "files": self._totals}
        self._write_json(self._row_path(len(self.shards)), row)
        self._count(self._totals)
        self.shards.append(shard)
        for done, *_ in [*self._totals, *self._waiting]:
            if done < number:
                self._data_path(done).unlink(missing_ok=True)
                self._record_path(done).unlink(missing_ok=True)
        self._totals, self._waiting, self._size = [], [], len(_END)

    def _record_path(self, number: int) -> Path:
        return self._parts / f"{number:06d}.json"

    def _data_path(self, number: int) -> Path:
        return self._parts / f"{number:06d}.data"

    def _row_path(self, number: int) -> Path:
        return self._parts / f"shard-{number:06d}.json"

    @staticmethod
    def _write_json(path: Path, content: dict[str, Any]) -> None:
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
