"""Metrics of a run: JSONL, TensorBoard, and what the terminal shows."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from vmae_fast._files import atomic_file

# Where there is no terminal, a line at most this often (seconds).
LOG_INTERVAL = 5.0


class Metrics:
    """Writes metrics and shows progress; does nothing on processes other than the main one.

    Args:
        path: the run's folder.
        total_steps: steps of the whole run.
        start_step: steps already done; metrics of later ones, left by a run that went on after
            its last checkpoint, are dropped.
        active: whether this is the main process.
    """

    def __init__(self, path: Path, total_steps: int, start_step: int, *, active: bool) -> None:
        self.active = active
        self._last_line = 0.0
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.file = path / "metrics.jsonl"
        kept = [row for row in read_metrics(self.file) if row["step"] <= start_step]
        # Whole or as it was: a run may be killed here too.
        with atomic_file(self.file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._jsonl = self.file.open("a")
        self._board = SummaryWriter(str(path / "tensorboard"), purge_step=start_step + 1)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            disable=not self._terminal,
        )

    def step(self, shown: dict[str, float] | None = None) -> None:
        """Count one step; ``shown`` replaces the figures beside the bar."""
        if not self.active:
            return
        if shown is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})
        self._bar.update()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one row: ``step`` steps are done."""
        if not self.active:
            return
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(name.replace("val_", "val/"), value, step)
        if not self._terminal and time.monotonic() - self._last_line >= LOG_INTERVAL:
            self._last_line = time.monotonic()
            figures = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.say(f"step {step}: {figures}")

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if self.active:
            self._bar.write(text, file=sys.stderr) if self._terminal else print(
                text, file=sys.stderr, flush=True
            )

    def close(self) -> None:
        """Finish the files and the bar."""
        if self.active:
            self._bar.close()
            self._jsonl.close()
            self._board.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a killed process left half written is dropped."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines()
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError:
        return [json.loads(line) for line in lines[:-1]]
