"""What the host notes of a step, and how quick steps are."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from vmae_fast.data import BadFile


@dataclass
class Report:
    """What the host knows of an optimiser step; its figures follow later.

    Attributes:
        step: steps done before it.
        lr: its learning rate.
        wait_s: seconds waited for its clips.
        paths: its clips on this process.
        bad: files of this process that could not be read.
        pace: clips a second and share of waiting, where it is a step that is logged.
    """

    step: int
    lr: float = 0.0
    wait_s: float = 0.0
    paths: list[str] = field(default_factory=list)
    bad: list[BadFile] = field(default_factory=list)
    pace: dict[str, float] | None = None


class Pace:
    """Clips a second and the share of waiting for data, from one row of the metrics to the next.

    Args:
        step: steps done.
        batch_size: clips of a step.
    """

    def __init__(self, step: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self._restart(step)

    def figures(self, step: int) -> dict[str, float]:
        """Those since the last call; ``step`` steps are done."""
        elapsed = time.perf_counter() - self._started
        clips = (step - self._since) * self.batch_size
        found = {"clips_per_s": clips / elapsed, "data_wait": self.waited_s / elapsed}
        self._restart(step)
        return found

    def _restart(self, step: int) -> None:
        self._started, self._since, self.waited_s = time.perf_counter(), step, 0.0
