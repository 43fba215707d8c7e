"""Draw each results/DEVICE/mask_ratio.json as the PNG beside it."""

import json
from pathlib import Path
from textwrap import fill

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from plot_style import BLUE, ORANGE, Figures, save, title_of
from words import number

SIZE_INCHES = (12, 5.2)
TITLE_COLUMNS = 120
# From here on operations are drawn in TFLOP.
GFLOP_IN_THOUSANDS = 10_000
# By what is measured: label, colour, and where its labels stand: above and right, below and left.
CURVES = {"step": ("whole step", ORANGE, 1), "encoder": ("encoder alone", BLUE, -1)}
LABEL_POINTS = 9


def draw(file: Path) -> Path:
    """Draw one file."""
    kept = json.loads(file.read_text())
    rows = kept["ratios"]
    figure, (time, work) = plt.subplots(1, 2, figsize=SIZE_INCHES, layout="constrained")
    draw_curves(time, rows, "ms", "Time", "milliseconds, forward and backward")
    many = rows[0]["step_gflop"] >= GFLOP_IN_THOUSANDS
    unit, scale = ("TFLOP", 1e-3) if many else ("GFLOP", 1.0)
    draw_curves(work, rows, "gflop", "Operations, as run", f"{unit}, forward and backward", scale)
    figure.suptitle(fill(title_of(kept), TITLE_COLUMNS), fontsize="medium")
    return save(figure, file)


def draw_curves(
    axes: Axes, rows: list[Figures], unit: str, title: str, label: str, scale: float = 1.0
) -> None:
    """Encoder and whole step over the ratio, each point with its figure times the scale."""
    for name, (called, colour, side) in CURVES.items():
        points = [(100 * row["ratio"], scale * row[f"{name}_{unit}"]) for row in rows]
        axes.plot(*zip(*points, strict=True), "-o", color=colour, label=called)
        for x, y in points:
            axes.annotate(
                number(y), (x, y), (side * LABEL_POINTS, side * LABEL_POINTS),
                textcoords="offset points",
                ha="center", va="bottom" if side > 0 else "top", fontsize="small", color=colour,
            )  # fmt: skip
    axes.set_xticks([100 * row["ratio"] for row in rows])
    # Else the last labels would touch the frame.
    axes.margins(x=0.09)
    axes.set_ylim(-0.08 * axes.get_ylim()[1], 1.08 * axes.get_ylim()[1])
    axes.set_title(title)
    axes.set_xlabel("tokens hidden from the encoder, percent")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
