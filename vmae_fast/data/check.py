"""Reads a whole data set once: what it holds, what is bad in it, and how quick it loads."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from .apart import CRASHED, run_apart
from .clip import DecodeError
from .dataset import ClipDataset
from .listing import VideoFile
from .order import ClipRequest
from .probe import VideoInfo, probe

# Files that a process gets at a time: few enough that a crash costs little.
_AT_A_TIME: Final = 4
# Kinds of a property that a report names; the rest is counted together.
_MOST_KINDS: Final = 8


@dataclass(frozen=True)
class CheckedFile:
    """What became of a file.

    Attributes:
        path: the file.
        info: its headers; None where they could not be read.
        clip_s: seconds of one process for one clip, from opening to crops; None where it failed.
        reason: why it is bad; "" where it is not.
    """

    path: str
    info: VideoInfo | None
    clip_s: float | None
    reason: str


@dataclass
class Report:
    """What a data set holds.

    Attributes:
        files: all of them, in order.
        workers: processes that read them.
        wall_s: seconds that reading them took.
    """

    files: list[CheckedFile]
    workers: int
    wall_s: float
    source: str = ""
    _infos: list[VideoInfo] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._infos = [file.info for file in self.files if file.info and not file.reason]

    @property
    def bad(self) -> list[CheckedFile]:
        """Files that cannot be trained on."""
        return [file for file in self.files if file.reason]

    @property
    def clip_s(self) -> float | None:
        """Mean seconds of one process for a clip, as many processes at work as were here."""
        times = [file.clip_s for file in self.files if file.clip_s is not None]
        return statistics.fmean(times) if times else None

    def clips_per_s(self, workers: int) -> float | None:
        """Clips a second that ``workers`` processes load, if each is as quick as here."""
        return None if self.clip_s is None else workers / self.clip_s

    def waiting(self, step_s: float, batch_size: int, workers: int) -> float | None:
        """Share of the time that a step of ``step_s`` seconds waits for its clips.

        Loading runs ahead of the step, so that it waits only where loading is the slower of the
        two: 1 - step / loading.
        """
        rate = self.clips_per_s(workers)
        return None if rate is None else max(0.0, 1.0 - step_s / (batch_size / rate))

    def summary(self) -> dict[str, Any]:
        """Figures for a file: counts, durations, rates, sizes, kinds, bad files."""
        infos = self._infos
        seconds = [info.seconds for info in infos if info.seconds is not None]
        return {
            "source": self.source,
            "files": len(self.files),
            "good": len(self.files) - len(self.bad),
            "bad": [{"path": file.path, "reason": file.reason} for file in self.bad],
            "hours": sum(seconds) / 3600,
            "seconds": _spread(seconds),
            "fps": _spread([info.fps for info in infos if info.fps is not None]),
            "frames": _spread([float(info.frames) for info in infos if info.frames is not None]),
            "size_bytes": sum(info.size_bytes for info in infos),
            "width": _spread([float(info.width) for info in infos]),
            "height": _spread([float(info.height) for info in infos]),
            "container": _kinds(map(_container, infos)),
            **{
                name: _kinds(getattr(info, name) for info in infos)
                for name in ("codec", "pixel_format")
            },
            "notes": _kinds(note for info in infos for note in info.notes),
            "workers": self.workers,
            "clip_s": self.clip_s,
            "clips_per_s": self.clips_per_s(self.workers),
            "wall_s": self.wall_s,
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row for each file: its headers, time and reason."""
        return [
            {
                "path": file.path,
                "reason": file.reason,
                "clip_s": file.clip_s,
                **({} if file.info is None else asdict(file.info)),
            }
            for file in self.files
        ]


def check_files(
    dataset: ClipDataset,
    *,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Read every file's headers and one clip, in several processes.

    A file whose decoder takes its process down is bad too, and the rest are read all the same.

    Args:
        dataset: the files, and how clips are taken from them.
        workers: processes, at least 1.
        progress: called with the number of files read since the last call.

    Raises:
        ValueError: ``workers`` is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    started = time.perf_counter()
    found: dict[int, CheckedFile] = {}

    def note(indices: list[int], checked: list[CheckedFile]) -> None:
        found.update(zip(indices, checked, strict=True))
        if progress is not None:
            progress(len(indices))

    count = len(dataset.files)
    size = max(1, min(_AT_A_TIME, count // (2 * workers)))
    run_apart(
        (list(range(count))[k : k + size] for k in range(0, count, size)),
        _check,
        workers=workers,
        start=_start,
        arguments=(dataset,),
        crashed=lambda index: CheckedFile(dataset.files[index].path, None, None, CRASHED),
        note=note,
    )
    files = [found[index] for index in range(count)]
    return Report(files, workers, time.perf_counter() - started)


# ---- in the processes ---------------------------------------------------------------------

_dataset: ClipDataset | None = None


def _start(dataset: ClipDataset) -> None:
    import torch

    global _dataset
    _dataset = dataset
    torch.set_num_threads(1)


def _check(indices: list[int]) -> list[CheckedFile]:
    assert _dataset is not None
    return [check_file(_dataset, index) for index in indices]


def check_file(dataset: ClipDataset, index: int) -> CheckedFile:
    """Read one file's headers, and its clip as a data set gives it."""
    file: VideoFile = dataset.files[index]
    try:
        info = probe(file.path)
    except DecodeError as error:
        return CheckedFile(file.path, None, None, error.reason)
    before = time.perf_counter()
    try:
        dataset.read(ClipRequest(0, index))
    except DecodeError as error:
        return CheckedFile(file.path, info, None, error.reason)
    return CheckedFile(file.path, info, time.perf_counter() - before, "")


def _container(info: VideoInfo) -> str:
    """One name where FFmpeg's reader has several: the file's own ending, if it is one of them."""
    names, suffix = info.container.split(","), info.path.rpartition(".")[2].lower()
    return suffix if suffix in names else names[0]


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def _kinds(values: Iterable[str]) -> dict[str, int]:
    counts = Counter(values).most_common()
    kinds = dict(counts[:_MOST_KINDS])
    if len(counts) > _MOST_KINDS:
        kinds["others"] = sum(count for _, count in counts[_MOST_KINDS:])
    return kinds
