"""What to do about a step that waits for its clips."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

# Share of the time waited from which it is worth a line.
WORTH_A_LINE: Final = 0.10
# Seconds from a piece of advice to the same one again, and to any other: shares go up and down.
AGAIN_S: Final = 600.0
OTHER_S: Final = 60.0
# Crops of a decoded clip that V2 takes.
_REPEATS: Final = 4
# CPU time over time of a worker, under which it mostly waits for the storage. Decoding alone is
# near 1, and 0.9 was seen for files in the system's cache.
_IDLE: Final = 0.5
# More workers than the bare rate needs: clips differ, and some are slow.
_SPARE: Final = 1.1

Knob = Literal["storage", "workers", "pack", "repeats", "smaller"]


@dataclass(frozen=True)
class Loading:
    """How clips come to a step, over one interval.

    Attributes:
        share: of the time that the step waited for clips.
        workers: processes that decode for this process.
        cores: this process may use, its workers included.
        busy_cores: of these that it computes with itself: one where a GPU computes.
        repeats: crops of each decoded clip.
        packed: whether the data are what ``vmae-fast pack`` writes.
        cache: of decoded videos in memory: there is none, not all came in yet, or it is full.
        clip_s: seconds of a worker for a clip; None where it is not known.
        cpu_share: of that time in which it computed; None where it is not known.
    """

    share: float
    workers: int
    cores: int
    busy_cores: int = 1
    repeats: int = 1
    packed: bool = False
    cache: Literal["none", "filling", "full"] = "none"
    clip_s: float | None = None
    cpu_share: float | None = None

    @property
    def needed(self) -> int:
        """Workers with which the step would not wait, if each is as quick as now."""
        busy = min(self.share, 0.99)
        # With none, this process decodes in the time that it waits, and computes in the rest.
        load = self.workers / (1 - busy) if self.workers else busy / (1 - busy)
        return max(math.ceil(load * _SPARE), self.workers + 1)

    @property
    def free(self) -> int:
        """Cores on which nothing runs yet."""
        return max(self.cores - self.busy_cores - self.workers, 0)

    @property
    def waits_for_storage(self) -> bool:
        """Whether workers mostly wait for files. With more workers than cores they wait anyway."""
        crowded = self.workers + self.busy_cores > self.cores and self.workers > 0
        return self.cpu_share is not None and self.cpu_share < _IDLE and not crowded


def knob(loading: Loading) -> Knob | None:
    """The most useful thing to change; None where the step hardly waits."""
    if loading.share <= WORTH_A_LINE or loading.cache == "filling":
        return None
    if loading.cache == "full":
        # Nothing is decoded any more; what is left are crops.
        return "workers" if loading.free else None
    if loading.waits_for_storage:
        return "storage"
    if loading.free:
        return "workers"
    if not loading.packed:
        return "pack"
    return "repeats" if loading.repeats < _REPEATS else "smaller"


def advice(loading: Loading) -> str | None:
    """One sentence that says what to do; None where the step hardly waits."""
    chosen = knob(loading)
    if chosen is None:
        return None
    took = ""
    if loading.clip_s is not None:
        took = f" (a clip takes {1000 * loading.clip_s:.3g} ms of one process)"
    return f"the step waited for clips {loading.share:.0%} of the time{took}: " + {
        "storage": _storage,
        "workers": _workers,
        "pack": _pack,
        "repeats": _repeats,
        "smaller": _smaller,
    }[chosen](loading)


def _storage(loading: Loading) -> str:
    assert loading.cpu_share is not None
    idle = 1 - loading.cpu_share
    some = f"--workers {loading.needed}" if loading.workers else "some --workers"
    return (
        f"whoever decodes is idle {idle:.0%} of that, waiting for the storage, if not for a core "
        f"that another program has; put the data on a "
        f"local disk (vmae-fast pack writes them small), or let {some} wait side by side"
    )


def _workers(loading: Loading) -> str:
    possible = loading.workers + loading.free
    if loading.needed <= possible:
        return f"--workers {loading.needed} would keep up; {_now(loading)}"
    rest = "vmae-fast pack once" if not loading.packed else "--repeats 4 or smaller files"
    return (
        f"--workers {possible} uses the cores that are free; {loading.needed} would keep up, so "
        f"{rest} as well"
    )


def _pack(loading: Loading) -> str:
    return (
        f"vmae-fast pack DATA OUT once, then --data OUT, makes clips quicker to decode; "
        f"{_now(loading)}, and none of {loading.cores} cores is free"
    )


def _repeats(loading: Loading) -> str:
    return (
        f"--repeats {_REPEATS} makes {_REPEATS} clips of each decoded one, as V2 does; "
        f"{_now(loading)}, and none of {loading.cores} cores is free"
    )


def _smaller(loading: Loading) -> str:
    return (
        f"pack the data again at a smaller short side, or take a machine with more cores: "
        f"{loading.needed} processes would keep up, {_now(loading)}"
    )


def _now(loading: Loading) -> str:
    if not loading.workers:
        return "now this process decodes itself"
    return f"{loading.workers} decode{'s' * (loading.workers == 1)} now"


class WaitingAdvice:
    """Says it at the right times: not while loading starts up, and not over and over.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, False
        self._said: Knob | None = None
        self._when = 0.0

    def __call__(self, loading: Loading) -> str | None:
        """What to say after an interval, if anything."""
        if not self._started:
            self._started = True
            return None
        chosen, now = knob(loading), self._clock()
        pause_s = 0.0 if self._said is None else AGAIN_S if chosen == self._said else OTHER_S
        if chosen is None or now - self._when < pause_s:
            return None
        self._said, self._when = chosen, now
        return advice(loading)
