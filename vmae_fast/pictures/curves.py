"""How the loss of a run went, and its encoder's features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmae_fast._files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches.
_WIDTH, _PANEL_HEIGHT = 8, 4.5

Rows = Sequence[dict[str, Any]]


def save_loss_curve(path: Path, rows: Rows) -> Path:
    """Draw training and held-out loss against their zero predictions, and the learning rate.

    Where the rows hold figures of the features, a second panel below has those: k-NN accuracies
    on held-out clips with the line of chance, spread and effective rank.

    Args:
        path: PNG to write.
        rows: metrics, as the trainer writes them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if any("val_feature_rank" in row for row in rows) else 1
    figure = Figure(figsize=(_WIDTH, _PANEL_HEIGHT * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
    _draw_loss(axes[0], rows)
    if panels == 2:
        _draw_features(axes[1], rows)
    axes[-1].set_xlabel("step")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path


def _draw_loss(axes: Axes, rows: Rows) -> None:
    axes.plot(
        *_series(rows, "zero_prediction"), color="0.75", lw=1, label="predicting zeros, training"
    )
    axes.plot(*_series(rows, "loss"), color="tab:blue", lw=1, label="loss, training")
    axes.plot(
        *_series(rows, "val_zero_prediction"), color="0.4", ls="--", marker=".",
        label="predicting zeros, held out",
    )  # fmt: skip
    axes.plot(*_series(rows, "val_loss"), color="tab:red", marker="o", ms=4, label="loss, held out")
    axes.set(ylabel="mean squared error", title="Masked reconstruction loss")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=8)
    rate = axes.twinx()
    rate.plot(*_series(rows, "lr"), color="tab:green", lw=0.8, alpha=0.5)
    rate.set_ylabel("learning rate", color="tab:green", fontsize=8)
    rate.tick_params(axis="y", labelsize=7)
    rate.set_ylim(bottom=0)


def _draw_features(axes: Axes, rows: Rows) -> None:
    """Shares from 0 to 1 on the left, the rank on the right."""
    axes.plot(
        *_series(rows, "val_knn_accuracy"), color="tab:red", marker="o", ms=4,
        label="k-NN accuracy by features",
    )  # fmt: skip
    axes.plot(
        *_series(rows, "val_knn_motion"), color="tab:orange", marker="o", ms=4,
        label="k-NN accuracy by motion",
    )  # fmt: skip
    axes.plot(
        *_series(rows, "val_knn_chance"), color="0.4", ls="--", lw=1,
        label="chance",
    )  # fmt: skip
    axes.plot(
        *_series(rows, "val_feature_std"), color="tab:blue", marker=".", lw=1,
        label="spread of the features",
    )  # fmt: skip
    if not any("val_knn_accuracy" in row for row in rows):
        # No empty entries in the legend where the clips have no classes.
        for line in axes.lines[:3]:
            line.set_label("_")
    axes.set(ylabel="share", title="Features of the encoder", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    rank = axes.twinx()
    rank.plot(*_series(rows, "val_feature_rank"), color="tab:green", marker=".", lw=1, alpha=0.7)
    rank.set_ylabel("effective rank", color="tab:green", fontsize=8)
    rank.tick_params(axis="y", labelsize=7)
    rank.set_ylim(bottom=0)
    # Below: the curves go everywhere.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=8)


def _series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one figure."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [p[0] for p in points], [p[1] for p in points]
