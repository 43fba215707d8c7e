"""The section of RESULTS.md on loading video, from the figures of test_data.py."""

import math

from words import NOTHING, Figures, number, sentence, table, versions

NAME = "data_loading"
# VideoMAE base, 800 epochs of Kinetics-400 in a day (targets.py).
GPU_CLIPS_PER_S = 2222
OURS = ("ours", "ours, skip_nonref", "ours, 4 repeats")
HEAD = [
    "files", "loader", "CPU ms a clip", "wall ms", "clips/s of a core", "time over decoding alone",
    "over decord", "targets",
]  # fmt: skip


def section(figures: Figures) -> str:
    """What was measured, its table, and how many cores feed a GPU."""
    about = figures["environment"]
    origin = versions(about, ("torch", "vector_units"))
    libraries = ", ".join(f"{name} {value}" for name, value in figures["versions"].items())
    kinds = "; ".join(
        f"{kind['files']}: {number(kind['kbit_a_second'])} kbit/s, "
        f"{number(kind['mean_file_bytes'] / 1000)} kB a file"
        for kind in figures["kinds"]
    )
    parts = [
        f"### {figures['title']} (`{NAME}`)\n",
        f"{sentence(figures['what'])}. {kinds}. {origin}, {libraries}.\n",
        table(HEAD, [_line(row) for row in figures["loaders"]]),
    ]
    parts += [f"Without {name}: {why}.\n" for name, why in figures["left_out"].items()]
    parts += [
        f"Cores that keep a GPU at {GPU_CLIPS_PER_S:,} clips/s busy:\n",
        _cores(figures["loaders"]),
    ]
    return "\n".join(parts)


def cores(clips_per_s: float) -> int:
    """Cores for one GPU, each of which makes so many clips a second."""
    return math.ceil(GPU_CLIPS_PER_S / clips_per_s)


def _line(row: Figures) -> list[str]:
    judged = [
        f"{one['target']}: {number(one['measured'])}, {'met' if one['met'] else '**missed**'}"
        for one in row["targets"]
    ]
    over = row.get("speedup_over_decord")
    return [
        row["files"],
        row["loader"],
        number(row["cpu_ms"]),
        number(row["wall_ms"]),
        number(row["clips_per_s"]),
        f"{number(row['over_decode'])}x",
        f"{number(over)}x" if over else NOTHING,
        "; ".join(judged) or NOTHING,
    ]


def _cores(rows: list[Figures]) -> str:
    speeds = {(row["files"], row["loader"]): row["clips_per_s"] for row in rows}
    kinds = list(dict.fromkeys(files for files, _ in speeds))
    lines = [
        [kind, *(f"{cores(speeds[kind, way]):,}" if (kind, way) in speeds else NOTHING
                 for way in OURS)]
        for kind in kinds
    ]  # fmt: skip
    return table(["files", *OURS], lines)
