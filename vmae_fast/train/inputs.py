"""The data of a run: files, the held-out part, loaders, and the list of bad files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vmae_fast.data import (
    CHANNELS,
    BadFile,
    ClipBatch,
    ClipDataset,
    ClipRequest,
    ClipSampler,
    DataError,
    EpochOrder,
    LoadingWork,
    Sampling,
    VideoFile,
    clips_by_duration,
    lost_files,
    make_decoder,
    make_loader,
    parts_of,
    read_source,
    split_by_source,
    synthetic_videos,
)
from vmae_fast.models import VideoMAEConfig

from .config import ConfigError, DataSettings, PretrainConfig
from .distributed import Ranks
from .prefetch import prefetched
from .run_folder import digest
from .schedule import Schedule
from .waiting import Loading, WaitingAdvice

# Cores up to which, where they compute the step too, decoding in the training process itself is
# quicker than workers of its own.
_FEW_CORES = 2
_MOST_WORKERS = 16
# Clips in the picture at the end of a run.
_SAMPLES = 3
# What the path of a clip in a shard has in it.
_IN_SHARD = ".tar/"


class RunError(RuntimeError):
    """A run that had to stop; the message says why and what was kept."""


class Inputs:
    """Files of a run, split into training and held-out ones.

    Args:
        config: the settings.
        model: the model's settings, for the clips' shape.
        ranks: this process.

    Attributes:
        files: what clips are taken from; a file stands there once for each of its clips an epoch.
        num_files: different files among them.
        train, val: indices into ``files``, of files to train on and of held-out ones.
        notes: how each source was read, a line each.
        fingerprint: of the list, by which a run that goes on knows it again.
        work: what loading training clips took so far on this process.

    Raises:
        ConfigError: clips have a number of channels that videos do not.
        DataError: there is no video.
    """

    def __init__(self, config: PretrainConfig, model: VideoMAEConfig, ranks: Ranks) -> None:
        if model.in_channels not in CHANNELS:
            raise ConfigError(
                f"in_channels={model.in_channels}: videos are read as 3 channels (RGB), 1 (grey) "
                "or 4 (RGBA); for others train with the modules and your own loader"
            )
        self.config, self.model, self.ranks = config, model, ranks
        self.notes: list[str] = []
        self.work = LoadingWork()
        self._work_before, self._waiting = LoadingWork(), WaitingAdvice()
        self._lost: dict[str, str] = {}
        found = [self._list(source) for source in config.sources]
        files = [file for listed in found for file in listed]
        names = [
            name
            for source, listed in zip(config.sources, found, strict=True)
            for name in self._names(source, listed)
        ]
        self._packed = all(_IN_SHARD in file.path for file in files)
        self.num_files = len({file.path for file in files})
        train, val = split_by_source(files, config.loading.val, config.run.seed)
        counts = self._clips_of(found)
        firsts = np.cumsum([0, *counts])
        self.files = [
            part
            for file, count in zip(files, counts, strict=True)
            for part in parts_of(file, count)
        ]
        self.train = [n for index in train for n in range(firsts[index], firsts[index + 1])]
        self.val = [n for index in val for n in range(firsts[index], firsts[index + 1])]
        self.fingerprint = digest(
            name if count == 1 else f"{name} in {count}"
            for name, count in zip(names, counts, strict=True)
        )

    def epoch(self) -> EpochOrder:
        """The order of the training clips, and how many an epoch has."""
        return EpochOrder(self.train, self.config.run.seed, *self._repeats_and_weights())

    def train_batches(self, schedule: Schedule, start_step: int) -> Iterator[ClipBatch]:
        """Micro-batches of this process from ``start_step`` on; a GPU gets their videos ahead."""
        repeats, weights = self._repeats_and_weights()
        sampler = ClipSampler(
            self.train,
            clips_per_step=self.config.optim.batch_size,
            seed=self.config.run.seed,
            total_steps=schedule.total_steps,
            start_step=start_step,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            accumulate=schedule.accumulate,
            repeats=repeats,
            weights=weights,
        )
        loader = make_loader(
            self.dataset(train=True),
            sampler,
            workers=self.workers,
            pin_memory=self.ranks.device.type == "cuda",
            decode_timeout=self.config.loading.decode_timeout,
        )
        self.work = loader.work
        return prefetched(iter(loader), self.ranks.device)

    def batches(
        self, dataset: ClipDataset, requests: Sequence[ClipRequest], size: int
    ) -> Iterator[ClipBatch]:
        """Clips of a data set, ``size`` at a time, by as many processes as training has."""
        cut = [list(requests[first : first + size]) for first in range(0, len(requests), size)]
        loader = make_loader(
            dataset,
            cut,
            # A cache is this process's.
            workers=0 if self.config.loading.cache else min(self.workers, len(cut)),
            pin_memory=False,
            decode_timeout=self.config.loading.decode_timeout,
        )
        return iter(loader)

    def pass_over(self, bad: Mapping[str, str]) -> None:
        """Do not open files, path to reason, that took a process down in an earlier part of a run.

        Other bad files are opened again: that harms nobody, and they may have come back.
        """
        self._lost.update(lost_files(bad))

    @property
    def workers(self) -> int:
        """Decoding processes of this process."""
        asked = self.config.loading.workers
        if asked is not None:
            return asked
        computes = self.ranks.device.type == "cpu"
        if self.config.loading.cache or (computes and self.cores <= _FEW_CORES):
            return 0
        return max(min(self.cores - 1, _MOST_WORKERS), 1)

    @property
    def cores(self) -> int:
        """This process's part of the cores."""
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        else:
            cores = os.cpu_count() or 1
        return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)

    def waiting_advice(self, share: float) -> str | None:
        """What to say after an interval in which the step waited for clips, if anything.

        Args:
            share: of the interval's time that it waited.
        """
        now, before = replace(self.work), self._work_before
        self._work_before = now
        clips, wall_s = now.clips - before.clips, now.wall_s - before.wall_s
        cache, on_cpu = self.config.loading.cache, self.ranks.device.type == "cpu"
        loading = Loading(
            share=share,
            workers=self.workers,
            cores=self.cores,
            busy_cores=self.cores if on_cpu else 1,
            repeats=min(source.repeats for source in self.config.sources),
            packed=self._packed,
            cache="none" if not cache else "filling" if now.clips < len(self.train) else "full",
            clip_s=wall_s / clips if clips else None,
            cpu_share=(now.cpu_s - before.cpu_s) / wall_s if wall_s else None,
        )
        return self._waiting(loading)

    def validation_requests(self) -> list[ClipRequest]:
        """This process's part of the held-out clips."""
        part = self.val[self.ranks.rank :: self.ranks.world_size]
        return [ClipRequest(0, index) for index in part]

    def validation_dataset(self) -> ClipDataset:
        """The held-out clips: middle start, centre crop."""
        return self.dataset(train=False)

    def samples(self, dataset: ClipDataset) -> list[Tensor]:
        """A few clips to draw, uint8 ``(C, T, H, W)``: held-out ones, or training ones."""
        indices = self.val or self.train
        chosen = indices[:: max(len(indices) // _SAMPLES, 1)][:_SAMPLES]
        requests = [ClipRequest(0, index) for index in chosen]
        return [batch.video[0] for batch in self.batches(dataset, requests, 1)]

    def dataset(self, *, train: bool) -> ClipDataset:
        """Clips of all files: with random starts and crops, or middle starts and centre crops."""
        loading = self.config.loading
        return ClipDataset(
            self.files,
            frames=self.model.frames,
            image_size=self.model.size,
            seed=self.config.run.seed,
            flip=loading.flip,
            train=train,
            cache=loading.cache,
            replacements=self.train if train or not self.val else self.val,
            decoder=make_decoder(
                loading.decoder, self.model.in_channels, skip_nonref=loading.skip_nonref
            ),
            channels=self.model.in_channels,
            lost=self._lost,
        )

    def _list(self, source: DataSettings) -> list[VideoFile]:
        if source.data is None:
            if self.ranks.is_main:
                folder = synthetic_videos(progress=_progress)
            self.ranks.barrier()
            if not self.ranks.is_main:
                folder = synthetic_videos()
            listing, called = read_source(folder), "made videos"
        else:
            listing, called = read_source(source.data, source.data_root), source.data
        self.notes.append(f"data: {called}: {listing.how}")
        return [file.sampled(source.sampling) for file in listing.files]

    def _clips_of(self, found: list[list[VideoFile]]) -> list[int]:
        """Clips of every file in an epoch."""
        counts: list[int] = []
        for source, files in zip(self.config.sources, found, strict=True):
            if source.clips_per_video != "auto":
                counts += [source.clips_per_video] * len(files)
                continue
            # Each process opens its part of them.
            ranks = self.ranks
            mine = clips_by_duration(files[ranks.rank :: ranks.world_size], show=ranks.is_main)
            parts: list[Any] = ranks.gather(mine)
            counts += [
                parts[n % ranks.world_size][n // ranks.world_size] for n in range(len(files))
            ]
        return counts

    def _repeats_and_weights(self) -> tuple[list[int], list[float]]:
        samplings = [self.files[index].sampling or Sampling() for index in self.train]
        return [s.repeats for s in samplings], [s.weight for s in samplings]

    def _names(self, source: DataSettings, files: list[VideoFile]) -> list[str]:
        """Names that stay the same when a data set moves, with what decides the order of clips."""
        if source.data is None:
            return [Path(file.path).name for file in files]
        root = Path(source.data)
        if not root.is_dir():
            root = root.parent if source.data_root is None else Path(source.data_root)
        often = (source.repeats, source.weight)
        order = "" if often == (1, 1.0) else f" {often}"
        return [
            f"{_relative(file.path, root)}{order}"
            + ("" if file.first is None else f" {file.first}")
            + ("" if file.count is None else f" {file.count}")
            for file in files
        ]


def _relative(path: str, root: Path) -> str:
    try:
        return str(Path(path).relative_to(root))
    except ValueError:
        return path


class BadFiles:
    """Files that could not be read so far, and the share of them that ends the run.

    Args:
        num_files: different files in the data set.
        limit: largest share that may be bad.
        known: path to reason, from before a resume.
    """

    def __init__(self, num_files: int, limit: float, known: dict[str, str]) -> None:
        self.num_files, self.limit = num_files, limit
        self.reasons = dict(known)

    def add(self, files: list[BadFile]) -> list[BadFile]:
        """Note files; returns those not known before."""
        fresh = [file for file in files if file.path not in self.reasons]
        self.reasons |= {file.path: file.reason for file in fresh}
        return fresh

    @property
    def too_many(self) -> bool:
        """Whether the share is above the limit."""
        return len(self.reasons) > self.limit * self.num_files

    def message(self, listed_in: Path) -> str:
        """What to tell the user when there are too many."""
        return (
            f"{len(self.reasons)} of {self.num_files} files could not be read, more than "
            f"--max-bad {self.limit:g} allows; they are listed in {listed_in}"
        )


def _progress(done: int, total: int) -> None:
    if done in (0, total) or done % 64 == 0:
        print(f"making the demonstration videos: {done} of {total}", flush=True)


__all__ = ["BadFiles", "DataError", "Inputs", "RunError"]
