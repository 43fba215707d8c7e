"""What the published pretraining runs cost, and what they would cost with ours.

Hours of ours come from clips a second that were measured on a GPU, if they were; those of a plan
(vmae_fast.plan) stand beside them and are called planned.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmae_fast import VideoMAEConfig
from vmae_fast.plan import Settings, find_gpu, make_plan, published_macs

Figures = dict[str, Any]

# Files of the training sets, as the papers count them.
KINETICS_400, SSV2, UNLABELED_HYBRID = 240_000, 169_000, 1_350_000
PLANNED_GPU = "h200"


@dataclass(frozen=True)
class Published:
    """What a run is published to have cost.

    Attributes:
        gpu_hours: of all GPUs.
        gpus: which, how many, and by which program.
        kind: of vmae_fast.plan's table, the nearest where memory is not told.
        source: paper.
    """

    gpu_hours: float
    gpus: str
    kind: str
    source: str


@dataclass(frozen=True)
class Recipe:
    """A published pretraining run.

    Attributes:
        name: what it trains, and on what.
        step: name of the benchmark's step that is its own.
        size, settings: of the model.
        batch: clips at a time in the benchmark.
        clips: of all the run.
        published: its cost, by whose account.
    """

    name: str
    step: str
    size: str
    batch: int
    clips: float
    settings: Figures = field(default_factory=dict)
    published: tuple[Published, ...] = ()

    @property
    def config(self) -> VideoMAEConfig:
        """The model's settings."""
        return VideoMAEConfig.of(self.size, **self.settings)


_V2 = {"decoder_mask_ratio": 0.5}
_AVION = "AVION, arXiv 2309.16669"
_V2_PAPER = "VideoMAE V2, arXiv 2303.16727"
RECIPES = (
    Recipe(
        "V1 base, 800 epochs of Kinetics-400", "step base v1", "base", 64, 800 * KINETICS_400,
        published=(
            Published(995, "4 A5000, VideoMAE", "a5000", _AVION),
            Published(583, "4 A5000, AVION", "a5000", _AVION),
        ),
    ),
    Recipe("V1 base, 2,400 epochs of SSv2", "step base v1", "base", 64, 2400 * SSV2),
    Recipe("V1 large, 1,600 epochs of Kinetics-400", "step large v1", "large", 64,
           1600 * KINETICS_400),
    Recipe("V1 huge, 1,600 epochs of Kinetics-400", "step huge v1", "huge", 32,
           1600 * KINETICS_400),
    Recipe("V2 base, 800 epochs of Kinetics-400", "step base v2", "base", 64, 800 * KINETICS_400,
           _V2),
    Recipe(
        "V2 giant, encoder-only masks, 1,200 epochs of 1.35 M clips", "step giant v1", "giant", 16,
        1200 * UNLABELED_HYBRID,
        published=(Published(356 * 64, "64 A100", "a100", _V2_PAPER),),
    ),
    Recipe(
        "V2 giant, dual masks, 1,200 epochs of 1.35 M clips", "step giant v2", "giant", 16,
        1200 * UNLABELED_HYBRID, _V2,
        published=(Published(241 * 64, "64 A100", "a100", _V2_PAPER),),
    ),
)  # fmt: skip


def costs(recipes: tuple[Recipe, ...], results: Path) -> list[Figures]:
    """A row for each published account of each recipe, or one where there is none."""
    measured = measured_clips_per_s(results)
    rows = []
    for recipe in recipes:
        settings = Settings(recipe.config, recipe.batch)
        plan = make_plan(settings, find_gpu(PLANNED_GPU), clips=recipe.clips)
        known = {
            f"measured_{device}_gpu_hours": recipe.clips / found[recipe.step] / 3600
            for device, found in measured.items()
            if recipe.step in found
        }
        alike = {
            published: make_plan(settings, find_gpu(published.kind), clips=recipe.clips).hours
            for published in recipe.published
        }
        rows += [
            {
                "run": recipe.name,
                "clips_m": recipe.clips / 1e6,
                "gmacs_a_clip": published_macs(recipe.config) / 1e9,
                "published_gpu_hours": published and published.gpu_hours,
                "published_on": published and f"{published.gpus} ({published.source})",
                "planned_same_gpu_gpu_hours": published and alike[published],
                f"planned_{PLANNED_GPU}_clips_a_second": plan.clips_per_s,
                f"planned_{PLANNED_GPU}_gpu_hours": plan.hours,
                **(known or {"measured_gpu_hours": "not yet measured"}),
            }
            for published in recipe.published or (None,)
        ]
    return rows


def measured_clips_per_s(results: Path) -> dict[str, dict[str, float]]:
    """By device and step: most clips a second of ours, published residual stream, on a GPU."""
    found: dict[str, dict[str, float]] = {}
    for file in sorted(results.glob("*/step_*.json")):
        kept = json.loads(file.read_text())
        for row in kept.get("rows", []):
            if "clips_per_s" not in row or "fp32 residual" not in row["direction"]:
                continue
            of_device = found.setdefault(file.parent.name, {})
            of_device[row["op"]] = max(of_device.get(row["op"], 0.0), row["clips_per_s"])
    return found
