"""Draw results/published/memory_dual_masking.json as the PNG beside it."""

import json
from collections.abc import Callable
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from plot_style import BLUE, ORANGE, VERMILION, Figures, save

# Of each model that is counted.
COLOURS = {
    "ours, bf16": BLUE,
    "plain, SDPA, bf16": ORANGE,
    "plain, attention written out, bf16": VERMILION,
}
MASKINGS = {"encoder_only": ("--", "o", "encoder-only"), "dual": ("-", "s", "dual")}
SIZE_INCHES = (14, 5)


def draw(file: Path) -> Path:
    """Draw one file."""
    kept = json.loads(file.read_text())
    figure, (held, saved, share) = plt.subplots(1, 3, figsize=SIZE_INCHES, layout="constrained")
    draw_held(held, kept["a_clip"])
    draw_saved(saved, kept["a_clip"])
    draw_share(share, kept["a_clip"])
    figure.suptitle(
        "Memory that one clip more adds to a step's peak: encoder-only against dual masking\n"
        "lines are counted, stars are VideoMAE V2's (how they were measured is not stated)"
    )
    return save(figure, file)


def draw_held(axes: Axes, rows: list[Figures]) -> None:
    """MB a clip over size."""
    for model, colour in COLOURS.items():
        mine = of(rows, model)
        for masking, (style, marker, words) in MASKINGS.items():
            values = [row[f"peak_{masking}_mb"] for row in mine]
            axes.plot(
                places(rows, mine), values, style, marker=marker, color=colour,
                label=f"{model}: {words}",
            )  # fmt: skip
    for masking, (_, _, words) in MASKINGS.items():
        filled = "black" if masking == "dual" else "none"
        scatter(axes, rows, lambda p, m=masking: p[m], filled, f"VideoMAE V2: {words}")
    finish(axes, rows, "Peak", "MB a clip")
    # Room for the legend.
    axes.set_ylim(top=1.45 * axes.get_ylim()[1])


def draw_saved(axes: Axes, rows: list[Figures]) -> None:
    """What dual masking saves, in MB."""
    for model, colour in COLOURS.items():
        mine = of(rows, model)
        values = [row["peak_saved_mb"] for row in mine]
        axes.plot(places(rows, mine), values, "-s", color=colour, label=model)
    scatter(axes, rows, lambda p: p["encoder_only"] - p["dual"], "black", "VideoMAE V2")
    finish(axes, rows, "Saved by dual masking", "MB a clip")


def draw_share(axes: Axes, rows: list[Figures]) -> None:
    """What dual masking saves, in percent."""
    for model, colour in COLOURS.items():
        mine = of(rows, model)
        values = [100 * (1 - row["peak_ratio"]) for row in mine]
        axes.plot(places(rows, mine), values, "-s", color=colour, label=model)
    scatter(axes, rows, lambda p: 100 * (1 - p["dual"] / p["encoder_only"]), "black", "VideoMAE V2")
    finish(axes, rows, "Saved by dual masking", "percent of encoder-only")


def of(rows: list[Figures], model: str) -> list[Figures]:
    """A model's rows, by size."""
    return [row for row in rows if row["model"] == model]


def places(rows: list[Figures], mine: list[Figures]) -> list[int]:
    """Where a model's sizes stand on the axis; it need not have all of them."""
    sizes = [row["size"] for row in of(rows, next(iter(COLOURS)))]
    return [sizes.index(row["size"]) for row in mine]


def scatter(
    axes: Axes, rows: list[Figures], figure_of: Callable[[Figures], float], filled: str, label: str
) -> None:
    """The published figures where there are any; ``figure_of`` takes those by masking."""
    points = [
        (at, figure_of({name: row[f"published_{name}_mb"] for name in MASKINGS}))
        for at, row in enumerate(of(rows, next(iter(COLOURS))))
        if row["published_dual_mb"] is not None
    ]
    at, values = zip(*points, strict=True)
    axes.plot(
        at, values, "*", color="black", markerfacecolor=filled, markersize=13, label=label, zorder=3
    )


def finish(axes: Axes, rows: list[Figures], title: str, unit: str) -> None:
    """What all panels have."""
    sizes = [row["size"] for row in of(rows, next(iter(COLOURS)))]
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_xlabel("model size, V2's decoders (giant has 14-pixel patches)")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
