"""What was measured on a GPU, from the result files of the benchmarks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmae_fast.models import VideoMAEConfig

from .flops import published_macs
from .gpus import ATTENTION_SHARE, MATMUL_SHARE, Gpu, Rates
from .planner import Efficiency, StepTime
from .settings import Settings

# "step base v1", "step base v1 of 8 clips".
_STEP = re.compile(r"step (\w+) v([12])\b")
# The benchmarks' V2 steps.
_V2_RATIO = 0.5


@dataclass(frozen=True)
class MeasuredStep:
    """A whole training step that was timed.

    Attributes:
        settings: of the step.
        time_ms: how long it took.
        file: where that is from.
    """

    settings: Settings
    time_ms: float
    file: Path


def default_results() -> Path | None:
    """The folder of result files of a checkout, where this is one."""
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    return folder if folder.is_dir() else None


def measured_rates(results: Path, gpu: Gpu, precision: str) -> Rates | None:
    """The largest product's and copy's rates measured on a GPU; None where there are none.

    Raises:
        ValueError: a file is not one of results.
    """
    if precision != "bf16":
        return None
    best: dict[str, float] = {}
    for _, kept in _files(results, gpu):
        for name, value in kept.get("ceilings", {}).items():
            if isinstance(value, int | float):
                best[name] = max(best.get(name, 0.0), float(value))
    if not {"matmul_tflop_per_s", "copy_gb_per_s"} <= set(best):
        return None
    matmul, copied = best["matmul_tflop_per_s"], best["copy_gb_per_s"]
    attention = matmul * ATTENTION_SHARE / MATMUL_SHARE
    source = f"measured: products {matmul:.0f} TFLOP/s, copies {copied:.0f} GB/s; attention assumed"
    return Rates(matmul, attention, copied, source)


def measured_efficiency(results: Path, gpu: Gpu, rates: Rates, wanted: Settings) -> Efficiency:
    """Share of the roofline's rates that the most similar step reached; assumed without any.

    Of the measured steps those of the same model come first, then the nearest in operations, and
    of several ways to take one the quickest.

    Raises:
        ValueError: a file is not one of results.
    """
    steps = list(measured_steps(results, gpu, wanted))
    if not steps or wanted.precision != "bf16":
        return Efficiency()
    macs = published_macs(wanted.config)

    def distance(step: MeasuredStep) -> tuple[float, float]:
        mine = published_macs(step.settings.config)
        return abs(mine / macs - 1), step.time_ms / step.settings.batch

    nearest = min(steps, key=distance)
    settings = nearest.settings
    floor = StepTime.of(settings.trace(), rates)
    config = settings.config
    version = "V2" if config.decoder_mask_ratio else "V1"
    return Efficiency(
        floor.total / nearest.time_ms,
        f"measured: {nearest.time_ms:.1f} ms for {settings.batch} clips of depth {config.depth}, "
        f"width {config.width}, {version} ({nearest.file.name})",
        measured=True,
    )


def measured_steps(results: Path, gpu: Gpu, like: Settings) -> Iterator[MeasuredStep]:
    """Steps of ours that a GPU ran, with the residual stream of ``like``."""
    for file, kept in _files(results, gpu):
        for row in kept.get("rows", []):
            found = _STEP.match(str(row.get("op", "")))
            if not found or f"{like.residual} residual" not in row["direction"]:
                continue
            ratio = _V2_RATIO if found[2] == "2" else 0.0
            config = VideoMAEConfig.of(found[1], decoder_mask_ratio=ratio)
            settings = Settings(config, row["clips"], residual=like.residual)
            yield MeasuredStep(settings, row["time_ms"], file)


def _files(results: Path, gpu: Gpu) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Result files of a GPU with what they hold."""
    for file in sorted(results.glob("*/*.json")):
        try:
            kept = json.loads(file.read_text())
            device = kept["environment"]["device"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a result file of the benchmarks: {error}") from error
        # As a word: an A100 is no A10.
        if re.search(rf"\b{re.escape(gpu.name)}\b", device, re.IGNORECASE):
            yield file, kept
