"""The order of clips: which ones make up each step of a run, on any rank, from any step on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from .rng import SHUFFLE, WEIGHT, host_rng

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClipRequest:
    """Clips wanted of one entry of the file list.

    Attributes:
        epoch: the pass over the files that they are drawn for. Where files count several times in
            an epoch, each time is a pass of its own.
        index: of the entry.
        first: the first of its repeats that is wanted.
        repeats: how many from there; None takes all that are left.
    """

    epoch: int
    index: int
    first: int = 0
    repeats: int | None = None


class ClipSampler(Sampler[list[ClipRequest]]):
    """The order of clips, as a batch sampler: one list of requests a micro-batch of this rank.

    The clips make one endless stream: those of an epoch's files in that epoch's permutation, the
    repeats of a file next to each other, one epoch after the other. Step ``k`` takes the
    ``clips_per_step`` clips from ``k * clips_per_step`` on; each rank takes a contiguous part of
    them, cut into ``accumulate`` micro-batches. All of it follows from (seed, step), so
    ``start_step`` is all that resuming takes, and no file is left out at the end of an epoch. A
    file whose repeats fall into two micro-batches is decoded for both.

    Args:
        num_files_or_indices: how many files there are, or the file indices to use.
        clips_per_step: clips of one optimiser step over all ranks and micro-batches.
        seed: of the permutations.
        total_steps: steps in the whole run.
        start_step: steps already done.
        rank: of this process.
        world_size: number of processes.
        accumulate: micro-batches a step.
        repeats: clips that are made of each file: one number, or one for each file.
        weights: how often each file counts in an epoch: one number, or one for each file. Of 2.5
            the half is every second epoch: files of one weight take turns, evenly.

    Attributes:
        files_per_epoch: files decoded in an epoch.
        clips_per_epoch: clips made of them.

    Raises:
        ValueError: no file, a step that does not divide evenly, or a number out of its range.
    """

    def __init__(
        self,
        num_files_or_indices: int | Sequence[int],
        *,
        clips_per_step: int,
        seed: int,
        total_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        repeats: int | Sequence[int] = 1,
        weights: float | Sequence[float] = 1.0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step must be in [0, {total_steps}], got {start_step}")
        parts = world_size * accumulate
        if accumulate < 1 or clips_per_step < 1 or clips_per_step % parts:
            raise ValueError(
                f"clips_per_step={clips_per_step} must be a multiple of world_size * accumulate "
                f"= {world_size} * {accumulate} = {parts}"
            )
        self._epochs = EpochOrder(num_files_or_indices, seed, repeats, weights)
        self.files_per_epoch = self._epochs.files
        self.clips_per_epoch = self._epochs.clips
        self.clips_per_step = clips_per_step
        self.total_steps, self.start_step = total_steps, start_step
        self.rank, self.accumulate = rank, accumulate
        self.clips_per_batch = clips_per_step // parts

    def __len__(self) -> int:
        """Micro-batches still to come."""
        return (self.total_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[ClipRequest]]:
        for step in range(self.start_step, self.total_steps):
            for micro in range(self.accumulate):
                batch = self.rank * self.accumulate + micro
                first = step * self.clips_per_step + batch * self.clips_per_batch
                yield self._epochs.requests(first, self.clips_per_batch)


class EpochOrder:
    """The endless stream of clips, epoch after epoch.

    Args:
        num_files_or_indices, seed, repeats, weights: see :class:`ClipSampler`.

    Attributes:
        files: files decoded in an epoch.
        clips: clips made of them.

    Raises:
        ValueError: no file, or a number out of its range.
    """

    def __init__(
        self,
        num_files_or_indices: int | Sequence[int],
        seed: int,
        repeats: int | Sequence[int] = 1,
        weights: float | Sequence[float] = 1.0,
    ) -> None:
        if isinstance(num_files_or_indices, int):
            indices = np.arange(num_files_or_indices)
        else:
            indices = np.asarray(num_files_or_indices, dtype=np.int64)
        if not len(indices):
            raise ValueError("num_files_or_indices names no file; at least 1 is needed")
        self.seed = seed
        many = np.broadcast_to(np.asarray(repeats, dtype=np.int64), indices.shape)
        often = np.broadcast_to(np.asarray(weights, dtype=np.float64), indices.shape)
        if many.min() < 1 or not (often > 0).all() or not np.isfinite(often).all():
            raise ValueError("repeats must be at least 1 and weights above 0 and finite")
        self._copies = math.ceil(often.max())
        self._groups = [
            _Group(indices[chosen], int(r), float(w))
            for w, r in sorted({(w, r) for w, r in zip(often.tolist(), many.tolist(), strict=True)})
            for chosen in [(often == w) & (many == r)]
        ]
        self.files = sum(group.files for group in self._groups)
        self.clips = sum(group.files * group.repeats for group in self._groups)
        # A step can straddle two epochs, so two orders are kept.
        self._order = lru_cache(maxsize=2)(self._permutation)

    def requests(self, first: int, count: int) -> list[ClipRequest]:
        """Requests for ``count`` clips of the stream from the ``first`` on."""
        found: list[ClipRequest] = []
        while count:
            epoch, place = divmod(first, self.clips)
            indices, passes, repeats, ends = self._order(epoch)
            at = int(np.searchsorted(ends, place, side="right"))
            whole = int(repeats[at])
            start = place - (int(ends[at]) - whole)
            taken = min(whole - start, count)
            found.append(
                ClipRequest(
                    int(passes[at]), int(indices[at]), start,
                    None if start + taken == whole else taken,
                )
            )  # fmt: skip
            first, count = first + taken, count - taken
        return found

    def _permutation(self, epoch: int) -> tuple[Ints, Ints, Ints, Ints]:
        """Of an epoch's files in order: index, pass, repeats, and where their clips end."""
        parts = [group.of_epoch(epoch, self.seed) for group in self._groups]
        # In the order of the files: how they are grouped must not show in a plain epoch.
        indices, copies, repeats = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((indices, copies))
        rng = host_rng(self.seed, stream=SHUFFLE, epoch=epoch)
        order = order[rng.permutation(len(order))]
        passes = epoch * self._copies + copies[order]
        return indices[order], passes, repeats[order], np.cumsum(repeats[order])


class _Group:
    """Files of the same weight and repeats."""

    def __init__(self, indices: Ints, repeats: int, weight: float) -> None:
        self.indices, self.repeats = indices, repeats
        self.whole = int(weight)
        part = weight - self.whole
        # At least one, so that none is never seen.
        self.share = max(round(part * len(indices)), 1) if part else 0
        self.files = self.whole * len(indices) + self.share

    def of_epoch(self, epoch: int, seed: int) -> tuple[Ints, Ints, Ints]:
        """Index, number among the file's times in the epoch, and repeats of each."""
        indices = [self.indices] * self.whole
        if self.share:
            # A window that moves on over one fixed shuffle: all have had their turn before one
            # has its second.
            shuffle = host_rng(seed, stream=WEIGHT).permutation(len(self.indices))
            window = (epoch * self.share + np.arange(self.share)) % len(shuffle)
            indices.append(np.sort(self.indices[shuffle[window]]))
        copies = [np.full(len(part), number) for number, part in enumerate(indices)]
        return (
            np.concatenate(indices),
            np.concatenate(copies),
            np.full(self.files, self.repeats),
        )
