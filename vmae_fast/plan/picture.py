"""A plan as a picture; needs matplotlib."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .memory import memory_parts
from .planner import Plan
from .text import clips, parts_of

# Of Okabe and Ito, and one of Tol, told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#E69F00", "#D55E00", "#999999",
            "#000000", "#882255")  # fmt: skip
_GIB = 2**30


def save_picture(plan: Plan, path: Path) -> Path:
    """Draw memory over the batch, the step by part, and how several GPUs scale, as PNG.

    Args:
        plan: what is drawn.
        path: of the picture.

    Returns:
        path.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings, config = plan.settings, plan.settings.config
    several = settings.gpus > 1
    count = 2 + several
    figure, axes = plt.subplots(1, count, figsize=(6.5 * count, 4.8), layout="constrained")
    _draw_memory(axes[0], plan)
    _draw_step(axes[1], plan)
    if several:
        _draw_scaling(axes[2], plan)
    version = "V2" if config.decoder_mask_ratio else "V1"
    height, width = config.size
    figure.suptitle(
        f"Plan: depth {config.depth}, width {config.width}, {version}, "
        f"{config.frames}x{height}x{width}, {settings.precision}, {settings.gpus} x {plan.gpu.name}"
        + (f", {settings.parallel}" if several else "")
    )
    try:
        figure.savefig(path, dpi=130, metadata={"Software": None})
    finally:
        plt.close(figure)
    return path


def _batches(plan: Plan) -> list[int]:
    """Some, from few clips to more than fit, the planned one among them."""
    largest = max(plan.largest_batch, 1)
    shares = {max(round(largest * share), 1) for share in (0.25, 0.5, 0.75, 1.0)}
    return sorted({*shares, plan.settings.batch})


def _draw_memory(axes: Any, plan: Plan) -> None:
    batches = _batches(plan)
    columns = []
    for batch in batches:
        settings = replace(plan.settings, batch=batch)
        columns.append(memory_parts(settings, settings.trace()))
    names = list(dict.fromkeys(name for column in columns for name in column))
    bottom = [0.0] * len(batches)
    for name, colour in zip(names, _COLOURS, strict=False):
        heights = [column.get(name, 0) / _GIB for column in columns]
        axes.bar(range(len(batches)), heights, 0.7, bottom=bottom, color=colour, label=name)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    limit = plan.gpu.memory_gib
    axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    axes.text(-0.4, limit * 1.01, f"{limit:g} GiB of the {plan.gpu.name}", va="bottom")
    axes.set_ylim(0, 1.15 * max(limit, *bottom))
    labels = [f"{batch:,}\n(planned)" if batch == plan.settings.batch else f"{batch:,}"
              for batch in batches]  # fmt: skip
    axes.set_xticks(range(len(batches)), labels)
    axes.set_xlabel("clips that a GPU holds at a time")
    axes.set_ylabel("GiB")
    axes.set_title("Memory of a GPU when it holds most")
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_step(axes: Any, plan: Plan) -> None:
    share = plan.efficiency.share
    parts = {name: ms / share for name, ms in parts_of(plan.floor).items()}
    if plan.settings.gpus > 1:
        parts["waiting for exchange"] = plan.exchange.exposed_ms
    names = list(parts)[::-1]
    axes.barh(names, [parts[name] for name in names], color=_COLOURS[0])
    for place, name in enumerate(names):
        part = parts[name] / plan.step_ms
        axes.text(parts[name], place, f" {parts[name]:,.1f} ms, {part:.0%}", va="center")
    axes.set_xlim(0, 1.35 * max(parts.values()))
    axes.set_xlabel("milliseconds")
    word = "by a measured step" if plan.efficiency.measured else "not yet measured"
    axes.set_title(
        f"A step of {plan.settings.clips_per_step:,} clips: {plan.step_ms:,.1f} ms, "
        f"{plan.clips_per_s:,.0f} clips/s\n({word})"
    )


def _draw_scaling(axes: Any, plan: Plan) -> None:
    rows = plan.scaling
    places = range(len(rows))
    seen = [row.clips_per_s for row in rows]
    times = [seen[0] * row.settings.gpus for row in rows]
    axes.plot(places, times, "--", color="black", linewidth=1, label="one GPU's, so many times")
    axes.plot(places, seen, color=_COLOURS[0])
    for fits, face, label in ((True, _COLOURS[0], "predicted"), (False, "white", "does not fit")):
        some = [place for place in places if rows[place].fits == fits]
        if some:
            axes.plot(some, [seen[place] for place in some], "o", color=_COLOURS[0],
                      markerfacecolor=face, label=label)  # fmt: skip
    axes.set_yscale("log", base=2)
    axes.set_ylim(min(seen) / 2, 2 * max(*seen, *times))
    axes.yaxis.set_major_formatter("{x:,.4g}")
    labels = [f"{row.settings.gpus:,}\n{row.scaling_efficiency:.0%}" for row in rows]
    axes.set_xticks(places, labels)
    axes.set_xlabel(f"GPUs, {plan.links.gpus_per_node:,} to a node, and efficiency")
    axes.set_ylabel("clips/s")
    axes.set_title(f"Scaling with {clips(plan.settings.batch)} a GPU at a time, predicted")
    axes.legend(frameon=False, loc="upper left")
