"""Draw results/published/mask_coverage.json as the PNG beside it.

One drawn clip under each mask, its time steps from left to right, and beside it how many of its
tokens are covered in each row and column of patches and at each time.
"""

import json
from pathlib import Path

import numpy as np
from mask_coverage import COVERED, LEFT_OUT, SUMMED, UNSCORED
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from plot_style import BLUE, ORANGE, VERMILION, Figures, save

SIZE_INCHES = (15, 10.5)
WIDTHS = (8.6, 2, 2, 1.4)
DARK, LIGHT = "#3B3B3B", "#E4E4E4"
# Of whose mask, the colour of each sign, with what it means.
COLOURS = {
    "encoder": {COVERED: DARK, LEFT_OUT: LIGHT},
    "decoder": {COVERED: BLUE, UNSCORED: ORANGE, LEFT_OUT: LIGHT},
}
LEGEND = {
    DARK: "seen by the encoder",
    BLUE: "decoded and scored",
    ORANGE: "decoded, but seen by the encoder: not scored",
    LIGHT: "left out: not seen, or not decoded",
}
# Patches between two time steps of a strip.
GAP = 1
AXES = {"rows": "row of patches", "columns": "column of patches", "time": "time step"}
BARS = {"encoder": DARK, "decoder": BLUE}


def draw(file: Path) -> Path:
    """Draw one file."""
    kept = json.loads(file.read_text())
    rows, grid = kept["coverage"], kept["drawn"]["grid"]
    clips = [signs_of(kept["drawn"]["strips"][name_of(row)], grid) for row in rows]
    figure, panels = plt.subplots(
        len(rows), len(WIDTHS), figsize=SIZE_INCHES, layout="constrained", width_ratios=WIDTHS
    )
    for row, clip, (strip, *bars) in zip(rows, clips, panels, strict=True):
        draw_strip(strip, clip, COLOURS[row["of"]])
        strip.set_ylabel(
            f"{row['of']}:\n{row['mask']}\n{row['tokens']} tokens",
            rotation=0, ha="right", va="center",
        )  # fmt: skip
        for axes, name in zip(bars, AXES, strict=True):
            draw_bars(axes, percent_over(clip, name), row, name)
    decorate(panels, clips, rows)
    figure.legend(
        handles=[Patch(color=colour, label=label) for colour, label in LEGEND.items()],
        loc="outside lower center", ncols=len(LEGEND), frameon=False,
    )  # fmt: skip
    figure.suptitle(
        f"{kept['title']}: one drawn clip of {'x'.join(map(str, grid))} tokens under each mask, "
        "decoders' masks under 90% tubes\nBars are of that clip, the line is their mean; spread is "
        f"standard deviation over mean, averaged over {kept['drawn']['clips']:,} clips"
    )
    return save(figure, file)


def name_of(row: Figures) -> str:
    """What a row's clip is kept under."""
    return f"{row['of']} {row['mask']}"


def signs_of(strip: list[str], grid: list[int]) -> np.ndarray:
    """``(T, H, W)`` signs of a clip's tokens."""
    return np.array([list(step) for step in strip]).reshape(grid)


def percent_over(clip: np.ndarray, name: str) -> np.ndarray:
    """Percent of the tokens covered in each row, column or time step."""
    # A clip's own axes come after that of clips.
    axes = tuple(axis - 1 for axis in SUMMED[name])
    return 100 * (clip != LEFT_OUT).mean(axis=axes)


def draw_strip(axes: Axes, clip: np.ndarray, colours: dict[str, str]) -> None:
    """All time steps side by side."""
    times, height, width = clip.shape
    picture = np.ones((height, times * (width + GAP) - GAP, 3))
    for time, step in enumerate(clip):
        start = time * (width + GAP)
        for sign, colour in colours.items():
            picture[:, start : start + width][step == sign] = to_rgb(colour)
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def draw_bars(axes: Axes, percent: np.ndarray, row: Figures, name: str) -> None:
    """Coverage of the drawn clip, and the spread that clips have on average."""
    axes.bar(np.arange(1, len(percent) + 1), percent, width=0.8, color=BARS[row["of"]])
    axes.axhline(percent.mean(), color=VERMILION, linewidth=1, linestyle="--")
    axes.set_title(f"spread {row[f'{name}_spread']:.2f}", fontsize="small", pad=3)
    axes.set_xticks([1, len(percent)])
    axes.tick_params(labelsize="small")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def decorate(panels: np.ndarray, clips: list[np.ndarray], rows: list[Figures]) -> None:
    """One scale for each column of bars and whose mask it is; titles above, names below."""
    head = panels[0]
    head[0].set_title(f"one clip, its {len(clips[0])} time steps from left to right")
    for column, (name, words) in enumerate(AXES.items(), start=1):
        for of in COLOURS:
            mine = [index for index, row in enumerate(rows) if row["of"] == of]
            most = max(percent_over(clips[index], name).max() for index in mine)
            for index in mine:
                panels[index][column].set_ylim(0, 1.1 * most)
        panels[-1][column].set_xlabel(words)
        over = f"over {name}\n" if name != "time" else "over time\n"
        head[column].set_title(over + head[column].get_title(), fontsize="small", pad=3)
    for line in panels:
        line[1].set_ylabel("% covered", fontsize="small")
