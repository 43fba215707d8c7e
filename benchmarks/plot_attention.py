"""Draw each results/DEVICE/attention_curves.json as the PNG beside it."""

import json
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from plot_style import BLUE, GREEN, ORANGE, PURPLE, VERMILION, Figures, save, title_of

COLOURS = {"joint": BLUE, "divided": ORANGE, "space": PURPLE}
SIZE_INCHES = (14, 4.8)


def draw(file: Path) -> Path:
    """Draw one file."""
    kept = json.loads(file.read_text())
    figure, (time, memory, growth) = plt.subplots(1, 3, figsize=SIZE_INCHES, layout="constrained")
    draw_time(time, kept["over_rows"])
    draw_memory(memory, kept["over_rows"])
    draw_growth(growth, kept)
    figure.suptitle(title_of(kept))
    return save(figure, file)


def draw_time(axes: Axes, rows: list[Figures]) -> None:
    """Milliseconds of either pass over t."""
    for attention in dict.fromkeys(row["attention"] for row in rows):
        colour = COLOURS[attention]
        mine = [row for row in rows if row["attention"] == attention]
        for direction, style, marker in (("forward", "--", "o"), ("backward", "-", "s")):
            times = [row[f"{direction}_ms"] for row in mine]
            axes.plot(
                [row["t"] for row in mine], times, style, marker=marker, color=colour,
                label=f"{attention}, {direction}",
            )  # fmt: skip
    over_t(axes, rows, "Time: joint, divided and space-only", "milliseconds a pass")
    # Above the lines there is room for the legend.
    axes.set_ylim(top=4 * axes.get_ylim()[1])


def draw_memory(axes: Axes, rows: list[Figures]) -> None:
    """Peak of both passes over t."""
    for attention in dict.fromkeys(row["attention"] for row in rows):
        colour = COLOURS[attention]
        mine = [row for row in rows if row["attention"] == attention]
        at, peaks = [row["t"] for row in mine], [row["peak_mib"] for row in mine]
        qkv = " (two qkv gradients)" if attention == "divided" else " (one qkv gradient)"
        axes.plot(at, peaks, "-s", color=colour, label=attention + qkv)
    over_t(axes, rows, "Peak memory: joint, divided and space-only", "MiB, forward and backward")


def over_t(axes: Axes, rows: list[Figures], title: str, unit: str) -> None:
    """Logarithmic axes over t, with the pairs that each attends to."""
    ticks = {row["t"]: "" for row in rows}
    for row in rows:
        ticks[row["t"]] += f"\n{row['attention']} {row['pairs_m']:.3g} M"
    logarithmic(axes, title, unit)
    axes.set_xticks(list(ticks), [f"{t}{pairs}" for t, pairs in ticks.items()])
    axes.set_xlabel("t of t x 14 x 14 tokens; pairs of tokens, in millions")


def draw_growth(axes: Axes, kept: Figures) -> None:
    """Peak memory over tokens, ours and eager's."""
    for name, colour, marker in (("ours", GREEN, "s"), ("eager", VERMILION, "o")):
        known = [row for row in kept["over_tokens"] if row[f"{name}_mib"]]
        at, peaks = [row["tokens"] for row in known], [row[f"{name}_mib"] for row in known]
        label = f"{name}: grows as N to the {kept[f'{name}_memory_slope']:.2f}"
        axes.plot(at, peaks, "-", marker=marker, color=colour, label=label)
    logarithmic(axes, "Peak memory: ours against eager", "MiB, forward and backward")
    tokens = [row["tokens"] for row in kept["over_tokens"]]
    axes.set_xticks(tokens, [str(one) for one in tokens])
    axes.set_xlabel("tokens N, joint attention")


def logarithmic(axes: Axes, title: str, unit: str) -> None:
    """What all panels have."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
