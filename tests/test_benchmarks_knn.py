"""The script that keeps what the default run's features are worth."""

import knn_features
import pytest


def rows(first, last):
    figures = {"val_feature_std": 0.5, "val_feature_rank": 9.87654321, "val_knn_chance": 0.125}
    return [
        {"step": 0, **figures, "val_knn_accuracy": first, "val_knn_motion": first / 2},
        {"step": 1, "loss": 1.0},
        {"step": 5, **figures, "val_knn_accuracy": 9.0, "val_knn_motion": 9.0},
        {"step": 9, **figures, "val_knn_accuracy": last, "val_knn_motion": last / 2},
    ]


def test_figures_before_and_after_and_their_means():
    runs = [
        knn_features.of_rows(seed, rows(*ends))
        for seed, ends in enumerate([(0.1, 0.4), (0.2, 0.8)])
    ]
    assert runs[0]["untrained"]["step"] == 0
    assert runs[0]["trained"]["step"] == 9
    assert runs[1]["trained"]["feature_rank"] == 9.877
    assert knn_features.means(runs) == pytest.approx(
        {
            "mean knn_accuracy, untrained": 0.15,
            "mean knn_accuracy, trained": 0.6,
            "mean knn_motion, untrained": 0.075,
            "mean knn_motion, trained": 0.3,
        }
    )
