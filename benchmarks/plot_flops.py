"""Draw what test_flops_tables.py counted, each file as the PNG beside it."""

import json
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from plot_style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    Figures,
    save,
)

# Of the parts of a pretraining model, bottom to top of a bar; black is the published figure.
ITEM_COLOURS = (VERMILION, BLUE, GREY, ORANGE, YELLOW, GREEN, PURPLE)
ATTENTION_COLOURS = {"joint": BLUE, "divided": ORANGE, "space": PURPLE}
# Of the sorts of products in an encoder.
SORTS = {"patch_embedding": VERMILION, "linear_layers": SKY, "attention": GREEN}
# Plain and ours stand so far left and right of the middle, with bars so wide.
ASIDE, BAR_WIDTH = 0.21, 0.38


def draw(file: Path) -> Path:
    """Draw one file."""
    return DRAWN[file.stem](file, json.loads(file.read_text()))


def draw_masking(file: Path, kept: Figures) -> Path:
    """A panel for each size of model: plain beside ours."""
    sizes = list(dict.fromkeys(row["model"] for row in kept["forward"]))
    rows = {size: [row for row in kept["forward"] if row["model"] == size] for size in sizes}
    # As wide as there are bars in a panel, and some for its axis.
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(12, 5.4), layout="constrained", squeeze=False,
        width_ratios=[len(rows[size]) + 0.5 for size in sizes],
    )  # fmt: skip
    for axes, size in zip(panels[0], sizes, strict=True):
        draw_bars(axes, size, rows[size], kept["by_item"])
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside right center", frameon=False, markerscale=0.6
    )
    figure.suptitle("Operations of a forward pass under decoder masking: plain (left) and ours")
    return save(figure, file)


def draw_bars(axes: Axes, size: str, rows: list[Figures], by_item: Figures) -> None:
    """Stacked bars of one size, the published figures as lines across those of the plain model."""
    for at, row in enumerate(rows):
        counted = by_item[f"{size}, {row['decoder_masking']}"]
        for name, x in (("plain", at - ASIDE), ("ours", at + ASIDE)):
            bottom = 0.0
            for (item, gmac), colour in zip(counted[name].items(), ITEM_COLOURS, strict=True):
                label = item if (at, name) == (0, "plain") else None
                axes.bar(x, gmac, BAR_WIDTH, bottom=bottom, color=colour, label=label)
                bottom += gmac
        share = f"{row['ours_over_plain']:.2f}x"
        axes.text(at + ASIDE, bottom, share, ha="center", va="bottom", fontsize="small")
    published = [row["published_gmac"] for row in rows]
    places = [at - ASIDE for at in range(len(rows))]
    axes.plot(places, published, "_k", markersize=30, markeredgewidth=2, label="published")
    axes.set_xticks(range(len(rows)), [in_lines(row["decoder_masking"]) for row in rows])
    axes.set_xlabel("decoder masking")
    axes.set_ylabel("GMACs a clip")
    axes.set_ylim(0, 1.08 * max(published))
    axes.set_title(size)
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)


def in_lines(label: str) -> str:
    """ "running cell 50%" with its share in a line of its own."""
    return "\n".join(label.rsplit(" ", 1))


def draw_pairs(file: Path, kept: Figures) -> Path:
    """Pairs over t, a whole block over t, and whole encoders for inputs of the same t."""
    figure, (pairs, block, encoder) = plt.subplots(
        1, 3, figsize=(15, 4.8), layout="constrained", width_ratios=[1, 1, 1.2]
    )
    known = [row for row in kept["alone"] if row["published_pairs_m"]]
    published = [float(row["published_pairs_m"]) for row in known]
    pairs.plot([row["t"] for row in known], published, "_k", markersize=16, label="published")
    draw_over_t(pairs, kept["alone"], "attention", "pairs_m")
    pairs.set(title="Attention alone", ylabel="millions of pairs of tokens a clip")
    gflop_per_m = kept["alone"][0]["forward_gflop"] / kept["alone"][0]["pairs_m"]
    operations = pairs.secondary_yaxis(
        "right", functions=(lambda m: m * gflop_per_m, lambda gflop: gflop / gflop_per_m)
    )
    operations.set_ylabel("GFLOP a clip, forward")
    plain_numbers(operations)
    draw_over_t(block, kept["blocks"], "block", "gflop")
    block.set(title="A whole encoder block, linear layers included", ylabel="GFLOP a clip, forward")
    draw_encoders(encoder, kept["encoders"])
    figure.suptitle("Joint, divided and space-only attention over t x 14 x 14 tokens, base size")
    return save(figure, file)


def draw_over_t(axes: Axes, rows: list[Figures], kind: str, figure: str) -> None:
    """A figure over t by kind of attention, on logarithmic axes; the last shares of joint's."""
    for attention, colour in ATTENTION_COLOURS.items():
        mine = [row for row in rows if row[kind] == attention]
        label = f"{attention}: {mine[-1]['over_joint']:.2g}x at t={mine[-1]['t']}"
        # Divided and space lie near to each other.
        style = "--" if attention == "space" else "-"
        axes.plot(
            [row["t"] for row in mine], [row[figure] for row in mine], style, marker="o",
            color=colour, label=label,
        )  # fmt: skip
    ticks = sorted({row["t"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain_numbers(axes)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xlabel("t, rows of 14 x 14 tokens")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")


def plain_numbers(axes: Axes) -> None:
    """1, 2, 3, 5, 10 and so on at a logarithmic y axis."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def draw_encoders(axes: Axes, rows: list[Figures]) -> None:
    """Stacked bars of whole encoders, by sort of product."""
    for at, row in enumerate(rows):
        bottom = 0.0
        for sort, colour in SORTS.items():
            label = sort.replace("_", " ") if at == 0 else None
            height = row[f"{sort}_gflop"]
            axes.bar(at, height, 0.7, bottom=bottom, color=colour, label=label)
            bottom += height
        share = f"{row['over_joint']:.2f}x"
        axes.text(at, bottom, share, ha="center", va="bottom", fontsize="small")
    # The input stands below the middle one of its encoders.
    labels = [row["encoder"] for row in rows]
    for given in dict.fromkeys(row["input"] for row in rows):
        places = [at for at, row in enumerate(rows) if row["input"] == given]
        labels[places[len(places) // 2]] += f"\n{given}"
        if places[0]:
            axes.axvline(places[0] - 0.5, ymax=0.9, color=GREY, linewidth=0.8)
    axes.set_xticks(range(len(rows)), labels)
    axes.set_ylim(0, 1.25 * max(row["gflop"] for row in rows))
    axes.set_xlabel("input; either makes 16 rows of tubelets")
    axes.set(title="A whole encoder of 12 such blocks", ylabel="GFLOP a clip, forward")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize="small", ncols=3)


DRAWN = {"flops_decoder_masking": draw_masking, "attention_pairs": draw_pairs}
