"""Render RESULTS.md, and README's headline, from the result files and from nothing else.

python benchmarks/report.py           write them
python benchmarks/report.py --check   exit with 1 if they are not what the files say
"""

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path

import report_data
from headline import MissingMarker, with_headline
from targets import CUDA, DEVICE, TARGETS
from words import (
    NOT_YET,
    NOTHING,
    Figures,
    cell,
    in_words,
    number,
    sentence,
    table,
    versions,
)

HERE = Path(__file__).parent
HEAD = """# Results
Rendered by `python benchmarks/report.py` from the files under `results/`; not to be edited.
[NOTES.md](NOTES.md) says what was learnt from them.

GB/s count the bytes that must move at least, and "copy" is the time of a copy of as many; the
percentages are of a large copy's GB/s and of a large product's TFLOP/s, measured in the same
process: bf16 on a GPU, fp32 on a CPU, and only of operations in the same precision. Peers stand
with their time and how many times ours is quicker; (e) marks a time that includes launches and
waiting, since the peer cannot be captured in a CUDA graph. Those that do not run on the device are
named after "without"; the files say why. Attention stands with the kernel that ran: "op" is ours,
on a CPU PyTorch's within our op. Rows called "cuda" are of the CUDA C++ kernels, with the Triton
kernel, timed in the same run, as the peer "triton". MiB are "peak", the most that tensors take at
once, or "kept", what a forward pass keeps for the backward pass. Whole training steps stand with
clips a second, with TFLOP/s by the MACs of the papers times 6, and with GiB of all that a step
holds at once: weights, gradients, optimiser state and activations.
"""
# Where what is counted is filed; all other folders are devices.
PUBLISHED = "published"
PUBLISHED_HEAD = """## Published tables

What is counted, not timed, and so the same on every device, beside what the papers say.
"""
VERSIONS = ("torch", "triton", "transformers", "driver", "threads", "vector_units")
# Of what is counted.
VERSIONS_OF_COUNTS = ("torch",)
# Of a file: said above its tables.
ABOVE = ("environment", "title", "what", "missing")
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
STEP_HEAD = [
    "step", "as", "clips", "ms", "clips/s", "TFLOP/s", "MFU", "peers", "GiB", "targets",
]  # fmt: skip
STEPS = (
    "whole training steps in bf16 autocast with fused AdamW; MFU is of the published peak, and "
    "Hugging Face's class, which has no decoder masking, stands beside V1 steps alone"
)


def render(results: Path) -> str:
    """The whole page for a folder of published/NAME.json and DEVICE/NAME.json."""
    files = {file: json.loads(file.read_text()) for file in sorted(results.glob("*/*.json"))}
    folders = {
        folder: {file.stem: files[file] for file in group}
        for folder, group in groupby(files, key=lambda file: file.parent)
    }
    parts = [HEAD]
    for folder, found in sorted(folders.items(), key=lambda one: one[0].name != PUBLISHED):
        of_ops = {name: figures for name, figures in found.items() if has_op_rows(figures)}
        parts.append(_folder_head(folder, found))
        parts += _token_tables(list(of_ops.values()))
        if report_data.NAME in found:
            parts.append(report_data.section(found[report_data.NAME]))
        for name, figures in found.items():
            if name not in of_ops and name != report_data.NAME:
                parts.append(_other(name, figures, folder / f"{name}.png"))
    return "\n".join([*parts, _missing(list(files.values()))])


def has_op_rows(figures: Figures) -> bool:
    """Whether a file holds the rows of an op or of a step, as rows.py makes them."""
    return all({"op", "direction"} <= row.keys() for row in figures.get("rows", [{}]))


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


def _token_tables(files: list[Figures]) -> list[str]:
    """One table for all files of the same run."""
    parts = []
    # Steps of all models in one table, whose first columns say what each is.
    files = [{**one, "what": STEPS} if _is_of_steps(one) else one for one in files]
    for origin, group in groupby(sorted(files, key=_origin), key=_origin):
        rows = [row for figures in group for row in figures["rows"]]
        steps = [_step_line(row) for row in rows if "clips_per_s" in row]
        tokens = [_token_line(row) for row in rows if "clips_per_s" not in row]
        parts.append(f"{origin}\n")
        parts += [table(TOKEN_HEAD, tokens)] if tokens or not steps else []
        parts += [table(STEP_HEAD, steps)] if steps else []
    return parts


def _is_of_steps(figures: Figures) -> bool:
    return any("clips_per_s" in row for row in figures["rows"])


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
        f"{number(mfu)}%" if (mfu := row.get("percent_of_published_peak")) else NOTHING,
        ", ".join(filter(None, [against(row), *refused(row)])) or NOTHING,
        ", ".join(f"{name} {number(one['peak_gib'])}" for name, one in held.items()),
        "; ".join(judgements(row)) or NOTHING,
    ]


def _folder_head(folder: Path, found: dict[str, Figures]) -> str:
    if folder.name == PUBLISHED:
        return PUBLISHED_HEAD
    device = next(iter(found.values()))["environment"]["device"]
    return f"## {device} (`{folder.name}`)\n"


def _origin(figures: Figures, names: tuple[str, ...] = VERSIONS) -> str:
    """What was measured, and on what."""
    ceilings = figures.get("ceilings", {})
    reached = [f"copy {number(ceilings[key])} GB/s" for key in ["copy_gb_per_s"] if key in ceilings]
    if "matmul_tflop_per_s" in ceilings:
        product = f"{ceilings.get('matmul_dtype', 'bfloat16')} product"
        reached.append(f"{product} {number(ceilings['matmul_tflop_per_s'])} TFLOP/s")
    origin = versions(figures["environment"], names)
    return ". ".join([sentence(figures["what"]), *reached, f"{origin}."])


def _other(name: str, figures: Figures, picture: Path) -> str:
    """Figures of any other benchmark: a table of its scalars, one of each list, its picture."""
    counted = picture.parent.name == PUBLISHED
    nothing = figures.get("missing", NOTHING)
    heading = f"{figures['title']} (`{name}`)" if "title" in figures else name
    origin = _origin(figures, VERSIONS_OF_COUNTS if counted else VERSIONS)
    parts = [f"### {heading}\n", f"{origin}\n"]
    # What a picture is drawn from alone is a dict.
    shown = {k: v for k, v in figures.items() if k not in ABOVE and not isinstance(v, dict)}
    lists = {key: value for key, value in shown.items() if _is_table(value)}
    scalars = [[in_words(k), cell(v, nothing)] for k, v in shown.items() if k not in lists]
    if scalars:
        parts.append(table(["figure", "value"], scalars))
    for key, rows in lists.items():
        if len(lists) > 1:
            parts.append(f"{sentence(in_words(key))}:\n")
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines = [[cell(row[c], nothing) if c in row else "" for c in columns] for row in rows]
        parts.append(table([in_words(column) for column in columns], lines))
    if picture.exists():
        # As seen from the page, which lies beside the folder of all results.
        parts.append(f"![{figures.get('title', name)}]({'/'.join(picture.parts[-3:])})\n")
    return "\n".join(parts)


def _is_table(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value) and value != []


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
            NOT_YET + (", off by default" if op.endswith(CUDA) else ""),
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
    readme: Path = HERE.parent / "README.md",
) -> int:
    """Write page and headline, or compare them with the files; the exit status."""
    parser = argparse.ArgumentParser(description="Render RESULTS.md and README's headline.")
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    check = parser.parse_args(arguments).check
    try:
        texts = {
            page: render(results).rstrip("\n") + "\n",
            readme: with_headline(readme, results),
        }
    except MissingMarker as error:
        print(error, file=sys.stderr)
        return 2
    stale = [file for file, text in texts.items() if not file.exists() or file.read_text() != text]
    for file in stale:
        if check:
            told = f"{file} is not what {results} says; run python benchmarks/report.py"
            print(told, file=sys.stderr)
        else:
            file.write_text(texts[file])
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
