"""Train the tiny recipe three ways and draw the losses: results/cpu/training_curves.{json,png}.

python benchmarks/plot_curves.py [FOLDER]      some minutes on two cores; needs matplotlib

The fast model, the plain model from the same weights on the same clips and masks, and the fast
model with another seed. Two exact implementations part by rounding alone, which is not an error:
the curves should lie as near to each other as rounding allows early on, and later no further apart
than two seeds do. That loss and gradients agree at the same weights is what tests/models/
test_trajectory.py asserts.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")

from environment import environment
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from plain_videomae import PlainVideoMAE
from plot_style import BLUE, DPI, GREEN, ORANGE

from vmae_fast import VideoMAE, clip_keys
from vmae_fast.data import ClipDataset, ClipSampler, collate_clips, list_videos, synthetic_videos
from vmae_fast.train import Schedule, load_config
from vmae_fast.train.optimizer import learning_rate, make_optimizer

Figures = dict[str, Any]

STEPS = 300
NAME = "training_curves"
# Label, whether plain, seed.
RUNS = (("fast", False, 0), ("plain", True, 0), ("fast, another seed", False, 1))
COLOURS = {"fast": BLUE, "plain": ORANGE, "fast, another seed": GREEN}
# Steps that the upper curves are averaged over.
SMOOTH = 10


def train(folder: Path, plain: bool, seed: int, steps: int) -> list[float]:
    """Loss of every step of the tiny recipe, shortened to ``steps``."""
    recipe = load_config("tiny")
    recipe.optim.steps, recipe.run.seed = steps, seed
    files = list_videos(folder)
    schedule = Schedule.of(recipe, len(files), 1)
    torch.manual_seed(seed)
    model = VideoMAE("tiny")
    trained: torch.nn.Module = PlainVideoMAE(model) if plain else model
    optimizer = make_optimizer(model, recipe.optim)
    config = model.config
    dataset = ClipDataset(
        files,
        frames=config.frames,
        stride=recipe.data.stride,
        image_size=config.size,
        seed=seed,
        cache=True,
    )
    sampler = ClipSampler(
        len(files), clips_per_step=recipe.optim.batch_size, seed=seed, total_steps=steps
    )
    losses = []
    for step, requests in enumerate(sampler):
        batch = collate_clips([dataset[request] for request in requests])
        mask = model.masking(clip_keys(seed, batch.epoch, batch.clip, batch.repeat))
        loss = trained(batch.video, mask).loss
        optimizer.zero_grad()
        loss.backward()
        if recipe.optim.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        optimizer.step()
        losses.append(loss.item())
    return losses


def curves(folder: Path, steps: int) -> Figures:
    """All runs: every step's loss by label, and the mean of the last ones."""
    found = {label: train(folder, plain, seed, steps) for label, plain, seed in RUNS}
    return {
        "environment": environment(),
        "what": f"the tiny recipe in fp32, {steps} steps: loss of the clips of each step",
        **{f"last loss, {label}": round(smoothed(each)[-1], 4) for label, each in found.items()},
        "losses": {label: [float(f"{x:.9g}") for x in each] for label, each in found.items()},
    }


def draw(kept: Figures, picture: Path) -> None:
    """Losses above, distances to the fast run below."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7.5), layout="constrained", sharex=True)
    losses = kept["losses"]
    for label, each in losses.items():
        style = "--" if label == "plain" else "-"
        above.plot(smoothed(each), style, color=COLOURS[label], label=label, linewidth=1.4)
    decorate(above, "Loss", f"loss, mean of {SMOOTH} steps")
    fast = losses["fast"]
    for label, each in losses.items():
        if label != "fast":
            apart = [abs(a - b) / b for a, b in zip(each, fast, strict=True)]
            below.plot(
                apart, ".", color=COLOURS[label], label=f"{label} against fast", markersize=3
            )
    below.set_yscale("log")
    below.set_xlabel("step")
    decorate(below, "How far two runs are apart", "relative difference of one step's loss")
    environment = kept["environment"]
    figure.suptitle(f"{environment['device']}, torch {environment['torch']}: {kept['what']}")
    figure.savefig(picture, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def smoothed(losses: list[float]) -> list[float]:
    """Means of the last SMOOTH steps, of fewer at the start."""
    windows = (losses[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


def decorate(axes: Axes, title: str, unit: str) -> None:
    """What both panels have."""
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")


def main(results: Path, steps: int = STEPS, videos: Path | None = None) -> Path:
    """Train, keep the losses, draw them; the picture written."""
    kept = curves(synthetic_videos() if videos is None else videos, steps)
    file = results / "cpu" / f"{NAME}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=2) + "\n")
    draw(kept, file.with_suffix(".png"))
    return file.with_suffix(".png")


if __name__ == "__main__":
    print(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"))
