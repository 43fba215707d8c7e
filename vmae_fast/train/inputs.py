"""The data of a run: files, the held-out part, loaders, and the list of bad files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from vmae_fast.data import (
    BadFile,
    ClipBatch,
    ClipDataset,
    ClipRequest,
    ClipSampler,
    DataError,
    VideoFile,
    list_videos,
    make_loader,
    split_validation,
    synthetic_videos,
)
from vmae_fast.models import VideoMAEConfig

from .config import PretrainConfig, Schedule
from .distributed import Ranks
from .run_folder import digest

# Cores up to which decoding in the training process itself is quicker than workers of its own.
_FEW_CORES = 2
_MOST_WORKERS = 16
# Clips in the picture at the end of a run.
_SAMPLES = 3


class RunError(RuntimeError):
    """A run that had to stop; the message says why and what was kept."""


class Inputs:
    """Files of a run, split into training and held-out ones.

    Args:
        config: the settings.
        model: the model's settings, for the clips' shape.
        ranks: this process.

    Raises:
        DataError: there is no video.
    """

    def __init__(self, config: PretrainConfig, model: VideoMAEConfig, ranks: Ranks) -> None:
        self.config, self.model, self.ranks = config, model, ranks
        self.files = self._list()
        self.train, self.val = split_validation(len(self.files), config.data.val, config.run.seed)
        self.fingerprint = digest(self._relative(file) for file in self.files)

    def train_batches(self, schedule: Schedule, start_step: int) -> Iterator[ClipBatch]:
        """Micro-batches of this process from ``start_step`` on."""
        sampler = ClipSampler(
            self.train,
            files_per_step=schedule.files_per_step,
            seed=self.config.run.seed,
            total_steps=schedule.total_steps,
            start_step=start_step,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            accumulate=schedule.accumulate,
        )
        dataset = self._dataset(train=True)
        loader = make_loader(
            dataset,
            sampler,
            workers=self.workers,
            pin_memory=self.ranks.device.type == "cuda",
        )
        return iter(loader)

    @property
    def workers(self) -> int:
        """Decoding processes of this process."""
        asked = self.config.data.workers
        if asked is not None:
            return asked
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        per_rank = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if self.config.data.cache or per_rank <= _FEW_CORES:
            return 0
        return min(per_rank - 1, _MOST_WORKERS)

    def validation_requests(self) -> list[ClipRequest]:
        """This process's part of the held-out clips."""
        part = self.val[self.ranks.rank :: self.ranks.world_size]
        return [ClipRequest(0, index) for index in part]

    def validation_dataset(self) -> ClipDataset:
        """The held-out clips: middle start, centre crop."""
        return self._dataset(train=False)

    def samples(self, dataset: ClipDataset) -> list[Tensor]:
        """A few clips to draw, uint8 ``(C, T, H, W)``: held-out ones, or training ones."""
        indices = self.val or self.train
        chosen = indices[:: max(len(indices) // _SAMPLES, 1)][:_SAMPLES]
        return [dataset[ClipRequest(0, i)].crops[0].permute(3, 0, 1, 2) for i in chosen]

    def _dataset(self, *, train: bool) -> ClipDataset:
        data = self.config.data
        return ClipDataset(
            self.files,
            frames=self.model.frames,
            stride=data.stride,
            image_size=self.model.size,
            seed=self.config.run.seed,
            repeats=data.repeats if train else 1,
            flip=data.flip,
            train=train,
            cache=data.cache,
            replacements=self.train if train or not self.val else self.val,
        )

    def _list(self) -> list[VideoFile]:
        if self.config.data.data is not None:
            return list_videos(self.config.data.data)
        if self.ranks.is_main:
            folder = synthetic_videos(progress=_progress)
        self.ranks.barrier()
        if not self.ranks.is_main:
            folder = synthetic_videos()
        return list_videos(folder)

    def _relative(self, file: VideoFile) -> str:
        # The data set may move between a run and its continuation; its content may not change.
        root = self.config.data.data
        if root is None:
            return Path(file.path).name
        try:
            return str(Path(file.path).relative_to(Path(root)))
        except ValueError:
            return file.path


class BadFiles:
    """Files that could not be read so far, and the share of them that ends the run.

    Args:
        num_files: files in the data set.
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
