"""Compare two result files, or two folders of them: every figure that both have, and regressions.

python benchmarks/compare.py A B [--threshold 5]

Files of folders are matched by their path within the folder, rows of ops by op and direction, rows
of other lists by the words in them and their first columns. Printed is B over A. Times, bytes and
memory are better where they are less; rates, percentages of a ceiling and speed-ups where they are
more. Figures of other kinds, the peers' own and the machine's are shown without a judgement.
Exit status: 1 if a figure of B is worse than A's by more than the threshold, 0 if none is, 2 if
there is nothing to compare.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from words import Figures, cell

THRESHOLD_PERCENT = 5.0
# Words in the names of figures that are better where they are less.
LESS = {"ms", "s", "us", "bytes", "mib", "gib", "peak"}
# How the names of figures begin that are not the library's: what it is compared with, and what the
# machine reaches.
OTHERS = ("peers", "ceilings", "copy_of_", "matmul", "huggingface", "plain", "eager", "before")
# Figures by contender, ours among them under its name.
BY_CONTENDER = ("peak_mib", "kept_mib")

# Of a file: not figures.
HEAD = ("environment", "what", "title")

Names = tuple[str, ...]


class BadInput(Exception):
    """There is nothing to compare, and why."""


@dataclass(frozen=True)
class Compared:
    """A figure that both files have: A's, B's, and which kind is better ("less", "more", "")."""

    name: str
    before: float
    after: float
    better: str

    @property
    def ratio(self) -> float:
        """B over A."""
        if self.before == 0:
            return 1.0 if self.after == 0 else math.copysign(math.inf, self.after)
        return self.after / self.before

    def verdict(self) -> str:
        """Which one is better, in words; "" where the kind does not say."""
        if not self.better:
            return ""
        if self.ratio == 1:
            return "the same"
        return f"{'B' if (self.ratio < 1) == (self.better == 'less') else 'A'} is better"

    def is_regression(self, threshold: float) -> bool:
        """Whether B is worse by more than a share of A; so is what is not a number."""
        if self.better == "less":
            return not self.ratio <= 1 + threshold
        return self.better == "more" and not self.ratio >= 1 - threshold


def kind_of(path: Names, op: str = "") -> str:
    """Whether "less" or "more" of a figure is better, "" where its name does not say.

    Args:
        path: names from the row down to the figure.
        op: of the row.
    """
    first, last = path[0], path[-1]
    if first.startswith(OTHERS):
        return ""
    if first in BY_CONTENDER and path[1:] not in ((), ("ours",), (op,)):
        return ""
    return kind_of_unit(first) or kind_of_unit(last)


def kind_of_unit(name: str) -> str:
    """As :func:`kind_of`, by a single name and whosever the figure is."""
    if "speedup" in name or "percent_of_" in name or name.endswith("_per_s"):
        return "more"
    words = set(name.split("_"))
    # What is over something else is a ratio of the two, better or not.
    return "less" if words & LESS and "over" not in words else ""


@dataclass
class Comparison:
    """What two files hold: where their environments differ, what is only said, and the figures."""

    differences: list[str]
    notes: list[str] = field(default_factory=list)
    figures: list[Compared] = field(default_factory=list)

    def add(self, row: str, before: Figures, after: Figures, columns: Sequence[str] = ()) -> None:
        """Compare a row's figures, but for its identifying columns, and note its words."""
        of_after = flat(after)
        for path, a in flat(before).items():
            if path[0] in columns or path not in of_after:
                continue
            b, name = of_after[path], ": ".join(filter(None, [row, ".".join(path)]))
            if is_number(a) and is_number(b):
                self.figures.append(Compared(name, a, b, kind_of(path, before.get("op", ""))))
            elif a != b:
                self.notes.append(differing(name, a, b))


def is_number(value: object) -> bool:
    """Whether a value is a figure."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def flat(row: Figures, path: Names = ()) -> dict[Names, Any]:
    """Numbers and words of a row by their path; nothing of lists."""
    found: dict[Names, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= flat(value, (*path, name))
        elif is_number(value) or isinstance(value, str):
            found[(*path, name)] = value
    return found


def is_table(value: object) -> bool:
    """Whether a value is a list of rows."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def identifying(before: list[Figures], after: list[Figures]) -> list[str]:
    """The columns by which rows of two lists are matched: as few as tell the rows of each apart.

    Words come first, then other columns from the left; never what has been measured.
    Empty where nothing tells them apart.
    """
    if {"op", "direction"} <= before[0].keys() & after[0].keys():
        return ["op", "direction"]
    shared = [key for key in before[0] if key in after[0] and not kind_of_unit(key)]
    candidates = sorted(shared, key=lambda key: not isinstance(before[0][key], str))
    for count in range(1, len(candidates) + 1):
        taken = candidates[:count]
        if all(len(by_identity(rows, taken)) == len(rows) for rows in (before, after)):
            return taken
    return []


def by_identity(rows: list[Figures], columns: list[str]) -> dict[str, Figures]:
    """Rows of a list by what their identifying columns hold, in words."""

    def name_of(row: Figures) -> str:
        held = [(column, row.get(column)) for column in columns]
        return ", ".join(v if isinstance(v, str) else f"{column} {v}" for column, v in held)

    return {name_of(row): row for row in rows}


def compare(before: Figures, after: Figures) -> Comparison:
    """All that two files both have, and what tells them apart."""
    found = Comparison(environments(before, after))
    found.add("", *({k: v for k, v in kept.items() if k not in HEAD} for kept in (before, after)))
    for key, rows in before.items():
        if not (is_table(rows) and is_table(after.get(key))):
            continue
        columns = identifying(rows, after[key])
        if not columns:
            found.notes.append(f"{key}: nothing tells its rows apart, not compared")
            continue
        prefix = "" if key == "rows" else f"{key}, "
        of_before, of_after = (by_identity(each, columns) for each in (rows, after[key]))
        for name in dict.fromkeys([*of_before, *of_after]):
            if name in of_before and name in of_after:
                found.add(prefix + name, of_before[name], of_after[name], columns)
            else:
                found.notes.append(f"{prefix}{name}: in {'A' if name in of_before else 'B'} only")
    return found


def environments(before: Figures, after: Figures) -> list[str]:
    """What two files were measured on where it differs, and what they say that they hold."""
    pairs = {
        name: (before["environment"].get(name), after["environment"].get(name))
        for name in dict.fromkeys([*before["environment"], *after["environment"]])
    } | {"what": (before.get("what"), after.get("what"))}
    return [differing(name, a, b) for name, (a, b) in pairs.items() if a != b]


def differing(name: str, before: object, after: object) -> str:
    """What two files say of the same thing."""
    said = ("nothing" if one is None else one for one in (before, after))
    return "{}: A {}, B {}".format(name, *said)


def load(file: Path) -> Figures:
    """A result file.

    Raises:
        BadInput: it cannot be read, or is none.
    """
    try:
        kept = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not (isinstance(kept, dict) and isinstance(kept.get("environment"), dict)):
        raise BadInput(f"{file} is not a result file: it has no environment")
    return kept


def pairs_of(before: Path, after: Path) -> dict[str, tuple[Path, Path]]:
    """Files to compare by what they are called, from two files or two folders.

    Raises:
        BadInput: one does not exist, only one is a folder, or the folders share no file.
    """
    for path in (before, after):
        if not path.exists():
            raise BadInput(f"{path} does not exist")
    if before.is_dir() != after.is_dir():
        raise BadInput(f"{before} and {after} are a folder and a file: take two of a kind")
    if not before.is_dir():
        return {after.name: (before, after)}
    of_before, of_after = (
        {str(file.relative_to(folder)) for file in folder.rglob("*.json")}
        for folder in (before, after)
    )
    shared = {name: (before / name, after / name) for name in sorted(of_before & of_after)}
    if not shared:
        raise BadInput(f"{before} and {after} have no result file of the same name")
    for name in sorted(of_before ^ of_after):
        print(f"{name}: in {'A' if name in of_before else 'B'} only")
    return shared


def show(name: str, found: Comparison) -> None:
    """Print a comparison: what differs around it, then each figure."""
    print("\n  ".join([name, *found.differences, *found.notes]))
    lines = [
        (one.name, cell(one.before), cell(one.after), f"{one.ratio:.3f}", one.verdict())
        for one in found.figures
    ]
    lines.insert(0, ("figure", "A", "B", "B/A", ""))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for figure, *others, verdict in lines:
        values = (value.rjust(width) for value, width in zip(others, widths[1:], strict=True))
        print(f"  {figure.ljust(widths[0])}  {'  '.join(values)}  {verdict}".rstrip())
    print()


def main(arguments: list[str] | None = None) -> int:
    """Compare, print; the exit status."""
    parser = argparse.ArgumentParser(description="Compare two result files or folders of them.")
    parser.add_argument("A", type=Path, help="result file or folder: before")
    parser.add_argument("B", type=Path, help="result file or folder: after")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD_PERCENT,
        help="percent by which a figure may be worse (%(default)g)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        if not given.threshold >= 0:
            raise BadInput(f"--threshold is {given.threshold:g}, expected at least 0 percent")
        files = {name: map(load, pair) for name, pair in pairs_of(given.A, given.B).items()}
        found = {name: compare(*pair) for name, pair in files.items()}
        if not any(one.figures for one in found.values()):
            raise BadInput(f"{given.A} and {given.B} have no figure in common")
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    for name, one in found.items():
        show(name, one)
    figures = [(name, figure) for name, one in found.items() for figure in one.figures]
    worse = [
        f"  {name}: {one.name} {cell(one.before)} -> {cell(one.after)}, {one.ratio:.3f}x"
        for name, one in figures
        if one.is_regression(given.threshold / 100)
    ]
    print(f"{len(figures)} figures, {len(worse)} worse in B by more than {given.threshold:g}%")
    print("\n".join(worse), end="\n" if worse else "")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
