"""Render RESULTS.md from the result files, and from nothing else.

python benchmarks/report.py           write it
python benchmarks/report.py --check   exit with 1 if it is not what the files say
"""

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from targets import CUDA, DEVICE, TARGETS

Figures = dict[str, Any]

HERE = Path(__file__).parent
HEAD = """# Results
Rendered by `python benchmarks/report.py` from the files under `results/`; not to be edited.
[NOTES.md](NOTES.md) says what was learnt from them.

GB/s count the bytes that must move at least, and "copy" is the time of a copy of as many; the
percentages are of a large copy's GB/s and of a large bf16 product's TFLOP/s, measured in the same
process. Peers stand with their time and how many times ours is quicker; (e) marks a time that
includes launches and waiting, since the peer cannot be captured in a CUDA graph. Those that do not
run on the device are named after "without"; the files say why. Attention stands with the kernel
that ran: "op" is ours, on a CPU PyTorch's within our op. Rows called "cuda" are of the CUDA C++
kernels, with the Triton kernel, timed in the same run, as the peer "triton". MiB are "peak", the
most that tensors take at once, or "kept", what a forward pass keeps for the backward pass.
Whole training steps stand with clips a second, with TFLOP/s by the MACs of the papers times 6, and
with GiB of all that a step holds at once: weights, gradients, optimiser state and activations.
"""
NOTHING = "-"
TOKEN_HEAD = [
    "op",
    "direction",
    "ms",
    "copy, ms",
    "GB/s",
    "TFLOP/s",
    "peers",
    "MiB",
    "targets",
]
STEP_HEAD = ["step", "as", "clips", "ms", "clips/s", "TFLOP/s", "peers", "GiB", "targets"]


def render(results: Path) -> str:
    """The whole page for a folder of DEVICE/NAME.json."""
    files = {file: json.loads(file.read_text()) for file in sorted(results.glob("*/*.json"))}
    parts = [HEAD]
    for folder, group in groupby(files, key=lambda file: file.parent):
        of_device = [(file.stem, files[file]) for file in group]
        parts += [f"## {of_device[0][1]['environment']['device']} (`{folder.name}`)\n"]
        parts += _token_tables([figures for _, figures in of_device if "rows" in figures])
        for name, figures in of_device:
            if "rows" not in figures:
                parts.append(_other(name, figures, folder / f"{name}.png"))
    return "\n".join([*parts, _missing(list(files.values()))])


def against(row: Figures) -> str:
    """The peers of a row, the quickest first: time, and how many times ours is quicker."""
    return ", ".join(
        f"{name} {number(peer['time_ms'])} ms{' (e)' if peer['how'] == 'events' else ''} "
        f"({number(row['speedup'][name])}x)"
        for name, peer in sorted(row["peers"].items(), key=lambda one: one[1]["time_ms"])
    )


def refused(row: Figures) -> list[str]:
    """The peers that the device does not run, in words."""
    return [f"without {name}" for name in row.get("left_out", {})]


def title(row: Figures) -> str:
    """The op of a row and, where it has a choice, the kernel that it ran."""
    named = "kernel" in row and not row["op"].endswith(CUDA)
    return f"{row['op']} ({row['kernel']})" if named else str(row["op"])


def rates(row: Figures) -> list[str]:
    """Bandwidth and arithmetic rate of a row, each with its share of the ceiling."""
    gb_per_s = NOTHING
    if "gb_per_s" in row:
        gb_per_s = f"{number(row['gb_per_s'])} ({number(row['percent_of_copy'])}%)"
    if "tflop_per_s" not in row:
        return [gb_per_s, NOTHING]
    share = f" ({number(row['percent_of_matmul'])}%)" if "percent_of_matmul" in row else ""
    return [gb_per_s, number(row["tflop_per_s"]) + share]


def judgements(row: Figures) -> list[str]:
    """Each target of a row with what was measured and whether that meets it."""
    return [
        f"{one['target']}: {number(one['measured'])}, {'met' if one['met'] else '**missed**'}"
        for one in row["targets"]
    ]


def number(value: float) -> str:
    """Three digits, without exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _token_tables(files: list[Figures]) -> list[str]:
    """One table for all files of the same run."""
    parts = []
    for origin, group in groupby(sorted(files, key=_origin), key=_origin):
        rows = [row for figures in group for row in figures["rows"]]
        steps = [_step_line(row) for row in rows if "clips_per_s" in row]
        tokens = [_token_line(row) for row in rows if "clips_per_s" not in row]
        parts.append(f"{origin}\n")
        parts += [table(TOKEN_HEAD, tokens)] if tokens or not steps else []
        parts += [table(STEP_HEAD, steps)] if steps else []
    return parts


def _token_line(row: Figures) -> list[str]:
    memory = [
        f"{word}: " + ", ".join(f"{name} {number(mib)}" for name, mib in row[key].items())
        for word, key in (("peak", "peak_mib"), ("kept", "kept_mib"))
        if key in row
    ]
    time = number(row["time_ms"]) + (" (e)" if row["how"] == "events" else "")
    return [
        title(row),
        row["direction"],
        time,
        number(row["copy_of_as_many_bytes_ms"]),
        *rates(row),
        ", ".join(filter(None, [against(row), *refused(row)])) or NOTHING,
        "; ".join(memory) or NOTHING,
        "; ".join(judgements(row)) or NOTHING,
    ]


def _step_line(row: Figures) -> list[str]:
    held = {"ours": row, **row["peers"]}
    return [
        row["op"],
        row["direction"],
        str(row["clips"]),
        number(row["time_ms"]) + (" (e)" if row["how"] == "events" else ""),
        number(row["clips_per_s"]),
        rates(row)[1],
        against(row) or NOTHING,
        ", ".join(f"{name} {number(one['peak_gib'])}" for name, one in held.items()),
        "; ".join(judgements(row)) or NOTHING,
    ]


def _origin(figures: Figures) -> str:
    """What was measured, and on what."""
    ceilings = figures.get("ceilings", {})
    reached = [f"copy {number(ceilings[key])} GB/s" for key in ["copy_gb_per_s"] if key in ceilings]
    if "matmul_tflop_per_s" in ceilings:
        reached.append(f"bf16 product {number(ceilings['matmul_tflop_per_s'])} TFLOP/s")
    return ". ".join([figures["what"][0].upper() + figures["what"][1:], *reached]) + (
        f". {_versions(figures['environment'])}."
    )


def _versions(environment: Figures) -> str:
    names = ("torch", "triton", "transformers", "driver", "threads", "vector_units")
    known = [f"{name} {environment[name]}" for name in names if name in environment]
    return ", ".join([environment["date"], f"commit {environment['commit']}", *known])


def _other(name: str, figures: Figures, picture: Path) -> str:
    """Figures of any other benchmark: a table of its scalars, one of each list, its picture."""
    shown = {key: value for key, value in figures.items() if key not in ("environment", "what")}
    parts = [f"### {name}\n", f"{_origin(figures)}\n"]
    # What a picture is drawn from alone is a dict.
    scalars = [[key, _cell(v)] for key, v in shown.items() if not isinstance(v, list | dict)]
    if scalars:
        parts.append(table(["figure", "value"], scalars))
    lists = [value for value in shown.values() if isinstance(value, list)]
    parts += [table(list(rows[0]), [[*map(_cell, row.values())] for row in rows]) for rows in lists]
    if picture.exists():
        # As seen from the page, which lies beside the folder of all results.
        parts.append(f"![{name}]({'/'.join(picture.parts[-3:])})\n")
    return "\n".join(parts)


def _cell(value: object) -> str:
    if value is None:
        return NOTHING
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _missing(files: list[Figures]) -> str:
    """Rows with a target that no file of the targets' device holds."""
    measured = {
        (row["op"], row["direction"])
        for figures in files
        if DEVICE in figures["environment"]["device"]
        for row in figures.get("rows", [])
    }
    rows = [
        [
            op,
            direction,
            "; ".join(target.words() for target in targets),
            "not yet measured" + (", off by default" if op.endswith(CUDA) else ""),
        ]
        for (op, direction), targets in TARGETS.items()
        if (op, direction) not in measured
    ]
    if not rows:
        return ""
    title = f"## Not yet measured on {DEVICE}\n\n"
    return title + table(["op", "direction", "target", "measured"], rows)


def main(
    arguments: list[str] | None = None,
    results: Path = HERE / "results",
    page: Path = HERE / "RESULTS.md",
) -> int:
    """Write the page, or compare it with the files; the exit status."""
    parser = argparse.ArgumentParser(description="Render RESULTS.md from the result files.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    text = render(results).rstrip("\n") + "\n"
    if not parser.parse_args(arguments).check:
        page.write_text(text)
        return 0
    if page.exists() and page.read_text() == text:
        return 0
    print(f"{page} is not what {results} says; run python benchmarks/report.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
