"""A profile of some training steps: their trace, and tables of kernels, ranges and gaps."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from vmae_fast import profiling
from vmae_fast._files import atomic_file

Event = dict[str, Any]

# Steps of a run before the recorded ones: kernels are compiled, and the host runs as far ahead of
# the device as it will. A choice, as is the number of recorded ones.
WARM_UPS = 6
RECORDED = 3
# Events of the device in a trace, and of the host where it hands it work.
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
# Of the summary, which is read in a terminal.
MOST_ROWS = 40
MOST_GAPS = 5
NAME_LENGTH = 100


class Recorder:
    """torch.profiler with ranges on, and the marks that Nsight's tools begin and end at.

    With ``VMAE_FAST_NVTX=1`` the GPU is left to the tool that started this process: what it does
    can be read by one profiler at a time.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        reads_gpu = self.cuda and os.environ.get("VMAE_FAST_NVTX", "0") in ("", "0")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if reads_gpu else [])]
        self._profile = profile(activities=activities)
        self._ranges = profiling.ranges()

    def start(self) -> None:
        """Begin, once the device has done what it was given before."""
        if self.cuda:
            torch.cuda.synchronize()
        self._ranges.__enter__()
        self._profile.start()
        if self.cuda:
            torch.cuda.profiler.start()

    def stop(self) -> list[Event]:
        """End, once the device is done; the trace's events, as Chrome's format has them."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        self._profile.stop()
        self._ranges.__exit__(None, None, None)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(file))
            events: list[Event] = json.loads(file.read_text(errors="replace"))["traceEvents"]
        nest(events)
        return events


def nest(events: list[Event]) -> None:
    """Let blocks' ranges of the backward pass begin after, and end before, what they cut across.

    They begin and end within autograd's own event for a node, and a viewer leaves out events of
    which neither lies within the other (perfetto.dev, "FAQ").
    """
    edges = [e for e in events if e.get("ph") == "X" and profiling.EDGE in e["name"]]
    for event in events:
        if event.get("cat") != "user_annotation" or not event["name"].endswith(profiling.BACKWARD):
            continue
        start, end = event["ts"], _end(event)
        around = [e for e in edges if e["tid"] == event["tid"]]
        start = max((_end(e) for e in around if e["ts"] <= start < _end(e) < end), default=start)
        end = min((e["ts"] for e in around if start < e["ts"] <= end <= _end(e)), default=end)
        event["ts"], event["dur"] = start, end - start


class Row(NamedTuple):
    """A line of a table.

    Attributes:
        name: of a kernel, an operator or a range.
        calls: how often it was there.
        ms: milliseconds of all of them: of the device where it was recorded, else of the host.
        percent: of what all kernels took; without a GPU, of operators of what all of them took,
            and of ranges of the time from the first to the last operator.
    """

    name: str
    calls: int
    ms: float
    percent: float


class Gap(NamedTuple):
    """A time in which the device did nothing, in ms, and what it did before and after."""

    ms: float
    after: str
    before: str


class Trace:
    """What a trace comes to.

    Args:
        events: as :meth:`Recorder.stop` gives them.
        steps: how many training steps they are of.

    Attributes:
        on_device: whether kernels were recorded, and times are of them.
    """

    def __init__(self, events: list[Event], steps: int = 1) -> None:
        self.events, self.steps = events, steps
        whole = [e for e in events if e.get("ph") == "X"]
        self._kernels = sorted((e for e in whole if e.get("cat") in _ON_DEVICE), key=_start)
        self._operators = [e for e in whole if e.get("cat") == "cpu_op"]
        self._ranges = [e for e in whole if e.get("cat") == "user_annotation"]
        launches = (e for e in whole if e.get("cat") in _LAUNCHES)
        self._launched = {_correlation(e): e["ts"] for e in launches}
        self.on_device = bool(self._kernels)

    def kernels(self) -> list[Row]:
        """Kernels and copies, longest first; without a GPU operators, less what they call."""
        if self.on_device:
            return _rows((e["name"], e["dur"]) for e in self._kernels)
        return _rows(_own_times(self._operators))

    def ranges(self, kind: str) -> list[Row]:
        """Ranges, longest first. Each counts all that is within it, other ranges too.

        Args:
            kind: "phase", "block" or "op".
        """
        asked = [e for e in self._ranges if profiling.kind_of(e["name"]) == kind]
        if not self.on_device:
            return _rows(((e["name"], e["dur"]) for e in asked), 1e3 * self.window_ms())
        # Work that the host hands over within a range is the range's, whenever it is done.
        handed = sorted(
            (self._launched.get(_correlation(e), _start(e)), e["dur"]) for e in self._kernels
        )
        starts = [start for start, _ in handed]
        sums = [0.0, *accumulate(taken for _, taken in handed)]

        def device_us(event: Event) -> float:
            return sums[bisect_right(starts, _end(event))] - sums[bisect_left(starts, event["ts"])]

        return _rows(((e["name"], device_us(e)) for e in asked), sums[-1])

    def window_ms(self) -> float:
        """From the first kernel's start to the last one's end; without a GPU, operator's."""
        events = self._kernels or self._operators
        return (max(map(_end, events)) - min(map(_start, events))) / 1e3 if events else 0.0

    def gaps(self) -> list[Gap]:
        """Where nothing ran between the first kernel and the last, longest first."""
        found: list[Gap] = []
        busy_until, last = None, ""
        for event in self._kernels:
            if busy_until is not None and event["ts"] > busy_until:
                found.append(Gap((event["ts"] - busy_until) / 1e3, last, event["name"]))
            if busy_until is None or _end(event) > busy_until:
                busy_until, last = _end(event), event["name"]
        return sorted(found, reverse=True)

    def summary(self, title: str) -> str:
        """All of it as text; calls and times are those of all steps together."""
        window_ms = self.window_ms()
        steps = f"{window_ms:.3f} ms, {window_ms / self.steps:.3f} a step"
        lines = [title, f"calls and ms are of {self.steps} step(s) together: {steps}"]
        if self.on_device:
            gaps = self.gaps()
            idle_ms = sum(gap.ms for gap in gaps)
            share = 100 * idle_ms / window_ms
            lines.append(
                f"the device was idle for {idle_ms:.3f} ms, {share:.1f}%, in {len(gaps)} gaps"
            )
            lines += [
                f"  {gap.ms:.3f} ms between {gap.after[:40]} and {gap.before[:40]}"
                for gap in gaps[:MOST_GAPS]
            ]
        else:
            lines.append("no GPU was recorded: times are the host's")
        first = "kernel or copy" if self.on_device else "operator, less what it calls"
        lines += _table(first, self.kernels())
        for kind in ("phase", "block", "op"):
            lines += _table(kind, self.ranges(kind))
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, title: str) -> tuple[Path, Path]:
        """``trace.json.gz``, for ui.perfetto.dev and chrome://tracing, and ``summary.txt``."""
        folder.mkdir(parents=True, exist_ok=True)
        trace, text = folder / "trace.json.gz", folder / "summary.txt"
        whole = json.dumps({"traceEvents": self.events, "displayTimeUnit": "ms"})
        with atomic_file(trace) as temporary:
            temporary.write_bytes(gzip.compress(whole.encode()))
        with atomic_file(text) as temporary:
            temporary.write_text(self.summary(title))
        return trace, text


def first_rows(rows: list[Row], count: int) -> list[Row]:
    """The first rows, and "all others" as one more."""
    rest = rows[count:]
    sums = (sum(row.calls for row in rest), sum(r.ms for r in rest), sum(r.percent for r in rest))
    return [*rows[:count], *([Row("all others", *sums)] if rest else [])]


def _rows(times: Iterable[tuple[str, float]], total_us: float | None = None) -> list[Row]:
    """A row for each name, from names and microseconds; the longest first."""
    taken: defaultdict[str, list[float]] = defaultdict(list)
    for name, us in times:
        taken[name].append(us)
    sums = {name: sum(each) for name, each in taken.items()}
    total_us = sum(sums.values()) if total_us is None else total_us
    rows = [
        Row(name, len(taken[name]), us / 1e3, 100 * us / total_us if total_us else 0.0)
        for name, us in sums.items()
    ]
    return sorted(rows, key=lambda row: (-row.ms, row.name))


def _own_times(events: list[Event]) -> Iterator[tuple[str, float]]:
    """Name and microseconds of each, less those of the same thread that lie within it."""
    around: list[Event] = []
    own: dict[int, float] = {}
    for event in sorted(events, key=lambda e: (str(e["tid"]), e["ts"], -e["dur"])):
        own[id(event)] = event["dur"]
        while around and (around[-1]["tid"] != event["tid"] or _end(around[-1]) <= event["ts"]):
            around.pop()
        if around:
            own[id(around[-1])] -= event["dur"]
        around.append(event)
    return ((event["name"], own[id(event)]) for event in events)


def _table(first: str, rows: list[Row]) -> list[str]:
    lines = ["", f"{'calls':>7} {'ms':>11} {'%':>6}  {first}"]
    for row in first_rows(rows, MOST_ROWS):
        name = row.name[:NAME_LENGTH]
        lines.append(f"{row.calls:>7} {row.ms:>11.3f} {row.percent:>6.1f}  {name}")
    return lines


def _start(event: Event) -> float:
    return event["ts"]


def _end(event: Event) -> float:
    return event["ts"] + event["dur"]


def _correlation(event: Event) -> int | None:
    return event.get("args", {}).get("correlation")


# ---- of a run -----------------------------------------------------------------------------


def steady_steps(first: int, total: int) -> range:
    """Which steps to record of a run that does those from ``first`` to ``total - 1``.

    Those after :data:`WARM_UPS`; the last ones of a shorter run; none where it does none.
    """
    start = max(min(first + WARM_UPS, total - RECORDED), first)
    return range(start, min(start + RECORDED, total))


class ProfiledSteps:
    """Records some steps of a loop, and writes what they came to. An error drops the recording.

    Args:
        steps: which, by the number of those done before; empty records none.
        device: where they run.
        folder: for what is written.
        note: more for the summary's first line.
        say: prints a line.

    Attributes:
        written: the files, once they are there.
    """

    def __init__(
        self,
        steps: range,
        device: torch.device,
        folder: Path,
        note: str = "",
        say: Callable[[str], None] = print,
    ) -> None:
        self.steps, self.device, self.folder, self.note = steps, device, folder, note
        self._say = say
        self.written: tuple[Path, ...] = ()
        self._recorder: Recorder | None = None

    def __enter__(self) -> ProfiledSteps:
        return self

    def __exit__(self, *_: object) -> None:
        if self._recorder is not None:
            self._recorder.stop()

    def at(self, step: int) -> None:
        """Say that ``step`` steps are done, and another one is about to begin."""
        if step == self.steps.stop:
            self.finish(step)
        elif step == self.steps.start:
            self._recorder = Recorder(self.device)
            self._recorder.start()

    def finish(self, step: int) -> None:
        """Say that ``step`` steps are done, and that may be all."""
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        trace = Trace(recorder.stop(), max(step - self.steps.start, 1))
        title = f"steps {self.steps.start + 1} to {step} of a run on {self.device}{self.note}"
        try:
            self.written = trace.write(self.folder, title)
        except OSError as error:
            # A full disk: no reason to end a run.
            self._say(f"--profile: the profile could not be written: {error}")
