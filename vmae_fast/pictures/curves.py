"""How the loss of a run went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmae_fast._files import atomic_file


def save_loss_curve(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Draw training and held-out loss against their zero predictions, and the learning rate.

    Args:
        path: PNG to write.
        rows: metrics, as the trainer writes them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def series(name: str) -> tuple[list[float], list[float]]:
        points = [(row["step"], row[name]) for row in rows if name in row]
        return [p[0] for p in points], [p[1] for p in points]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*series("zero_prediction"), color="0.75", lw=1, label="predicting zeros, training")
    axes.plot(*series("loss"), color="tab:blue", lw=1, label="loss, training")
    axes.plot(
        *series("val_zero_prediction"), color="0.4", ls="--", marker=".",
        label="predicting zeros, held out",
    )  # fmt: skip
    axes.plot(*series("val_loss"), color="tab:red", marker="o", ms=4, label="loss, held out")
    axes.set(xlabel="step", ylabel="mean squared error", title="Masked reconstruction loss")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=8)
    rate = axes.twinx()
    rate.plot(*series("lr"), color="tab:green", lw=0.8, alpha=0.5)
    rate.set_ylabel("learning rate", color="tab:green", fontsize=8)
    rate.tick_params(axis="y", labelsize=7)
    rate.set_ylim(bottom=0)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path
