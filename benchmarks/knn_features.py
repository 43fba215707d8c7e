"""What the default run's features are worth before and after it: results/cpu/knn_features.json.

python benchmarks/knn_features.py [FOLDER]      some minutes for each seed on two cores

Whole runs of the tiny recipe with several seeds, each with its own weights, order and held-out
files: k-NN accuracy of the motion classes by features and by motion, spread and effective rank.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from environment import environment

from vmae_fast.train import load_config, pretrain
from vmae_fast.train.metrics import read_metrics

Figures = dict[str, Any]

NAME = "knn_features"
SEEDS = (0, 1, 2)


def run(seed: int, folder: Path, recipe: str | Path = "tiny") -> Figures:
    """One run's figures before its first step and after its last one."""
    config = load_config(recipe)
    config.run.seed, config.run.out = seed, str(folder)
    pretrain(config)
    return of_rows(seed, read_metrics(folder / "metrics.jsonl"))


def of_rows(seed: int, rows: list[Figures]) -> Figures:
    """The same of the rows that a run wrote."""
    found = [row for row in rows if "val_feature_rank" in row]
    before, after = (
        {name.removeprefix("val_"): float(f"{value:.4g}") for name, value in row.items()}
        for row in (found[0], found[-1])
    )
    return {"seed": seed, "untrained": before, "trained": after}


def means(runs: list[Figures]) -> Figures:
    """The k-NN accuracies over all seeds."""
    return {
        f"mean {name}, {when}": round(sum(one[when][name] for one in runs) / len(runs), 3)
        for name in ("knn_accuracy", "knn_motion")
        for when in ("untrained", "trained")
    }


def main(results: Path, seeds: tuple[int, ...] = SEEDS, recipe: str | Path = "tiny") -> Path:
    """Train with every seed and keep the figures; the file written."""
    with TemporaryDirectory() as scratch:
        runs = [run(seed, Path(scratch) / str(seed), recipe) for seed in seeds]
    kept = {
        "environment": environment(),
        "what": "the tiny recipe, whole runs: features before the first step and after the last",
        "chance": runs[0]["trained"]["knn_chance"],
        **means(runs),
        "runs": runs,
    }
    file = results / "cpu" / f"{NAME}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=2) + "\n")
    return file


if __name__ == "__main__":
    print(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"))
