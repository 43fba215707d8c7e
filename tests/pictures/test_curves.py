"""Curves of a run: which panels there are, and what stands in them."""

import matplotlib.figure
import pytest
from PIL import Image

from vmae_fast.pictures import save_loss_curve

LOSSES = [
    *({"step": n, "loss": 1 / n, "zero_prediction": 1.0, "lr": 1e-3} for n in range(1, 9)),
    {"step": 8, "val_loss": 0.3, "val_zero_prediction": 1.0},
]
SPREAD = [{"step": n, "val_feature_std": 0.1 * n, "val_feature_rank": 3.0 + n} for n in (0, 4, 8)]
CLASSES = [
    {**row, "val_knn_accuracy": 0.1 * n, "val_knn_motion": 0.2 * n, "val_knn_chance": 0.125}
    for n, row in enumerate(SPREAD)
]


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved."""
    found = []
    save = matplotlib.figure.Figure.savefig

    def kept(self, *args, **kwargs):
        found.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", kept)
    return found


def lines(figure):
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for axes in figure.axes
        for line in axes.lines
    }


def test_rows_without_features_give_one_panel(tmp_path, drawn):
    path = save_loss_curve(tmp_path / "curve.png", LOSSES)
    assert Image.open(path).size == (960, 540)
    assert [axes.get_title() for axes in drawn[0].axes] == ["Masked reconstruction loss", ""]
    assert lines(drawn[0])["loss, held out"] == ([8], [0.3])


def test_features_have_a_panel_below(tmp_path, drawn):
    path = save_loss_curve(tmp_path / "curve.png", LOSSES + CLASSES)
    assert Image.open(path).size == (960, 1080)
    found = lines(drawn[0])
    assert found["k-NN accuracy by features"] == ([0, 4, 8], pytest.approx([0, 0.1, 0.2]))
    assert found["k-NN accuracy by motion"][1] == pytest.approx([0, 0.2, 0.4])
    assert found["chance"] == ([0, 4, 8], [0.125] * 3)
    assert found["spread of the features"][1] == pytest.approx([0, 0.4, 0.8])
    ranks = [list(line.get_ydata()) for line in drawn[0].axes[-1].lines]
    assert ranks == [[3.0, 7.0, 11.0]]


def test_clips_without_classes_leave_no_empty_entry(tmp_path, drawn):
    save_loss_curve(tmp_path / "curve.png", LOSSES + SPREAD)
    legend = [
        text.get_text()
        for axes in drawn[0].axes
        if axes.get_legend()
        for text in axes.get_legend().get_texts()
    ]
    assert "spread of the features" in legend
    assert not any("k-NN" in text or "chance" in text for text in legend)
