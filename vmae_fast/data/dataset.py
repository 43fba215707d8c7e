"""Clips for training: files in, uint8 batches out, in an order that any rank can work out.

The order is decided by ``ClipSampler`` (``order.py``) alone, the content of a clip by
``ClipDataset`` alone, both from counter-based random numbers. What a batch holds therefore does
not depend on the number of workers or GPUs, nor on where a run was stopped and resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import center_crop_box, crop_resize, multi_scale_crop_box
from .clip import Clip, DecodeError, Decoder
from .decode import PathDecoder
from .listing import DataError, Sampling, VideoFile
from .order import ClipRequest
from .rng import CROP, REPLACE, START, host_rng
from .sampling import CENTER_START, clip_indices, clip_span

# Channels that clips can have: grey, RGB, RGBA.
CHANNELS: Final = (1, 3, 4)

# Bad files in a row before giving up: a stray bad file is passed over, a wrong folder is not.
MAX_ATTEMPTS: Final = 10


@dataclass(frozen=True)
class BadFile:
    """A file that could not be read, and why."""

    path: str
    reason: str


@dataclass
class ClipItem:
    """The clips made of one file.

    Attributes:
        crops: one uint8 ``(T, H, W, C)`` tensor a repeat.
        first: number of the first of these repeats.
        clip: index of the file used; not the one requested where that could not be read.
        epoch: the request's.
        path: of the file used.
        times_s: when each frame is shown, seconds from the start of the file; NaN where the file
            has no clock.
        bad: files that could not be read on the way.
    """

    crops: list[Tensor]
    clip: int
    epoch: int
    path: str
    times_s: tuple[float, ...]
    first: int = 0
    bad: list[BadFile] = field(default_factory=list)


@dataclass
class ClipBatch:
    """A batch of ``B`` clips; the repeats of one file stand next to each other.

    Attributes:
        video: uint8 RGB ``(B, C, T, H, W)``, a permuted view of ``(B, T, H, W, C)`` contiguous
            memory.
        clip: int64 ``(B,)``, index of the file used. With ``epoch`` and ``repeat`` it is the
            counter for any further random number about this clip, its mask for one.
        repeat: int64 ``(B,)``, which crop of the file's clip this is.
        epoch: int64 ``(B,)``.
        paths: the file of each clip.
        bad: files that could not be read and were replaced, once for each time it happened.
    """

    video: Tensor
    clip: Tensor
    repeat: Tensor
    epoch: Tensor
    paths: list[str]
    bad: list[BadFile]

    def pin_memory(self) -> ClipBatch:
        """The same batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ClipBatch:
        """The batch with its tensors on ``device``, the memory layout of ``video`` kept."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def video_to(self, device: torch.device | str) -> Tensor:
        """The video alone on ``device``, its memory layout kept; does not wait for the copy."""
        return self._video(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, move: Callable[[Tensor], Tensor]) -> ClipBatch:
        return replace(
            self,
            video=self._video(move),
            clip=move(self.clip),
            repeat=move(self.repeat),
            epoch=move(self.epoch),
        )

    def _video(self, move: Callable[[Tensor], Tensor]) -> Tensor:
        # It moves as the contiguous memory that it is, so that no copy reorders it.
        return move(self.video.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class ClipDataset(Dataset[ClipItem]):
    """Clips of a list of video files, decoded on demand.

    ``dataset[ClipRequest(epoch, index)]`` decodes one clip of file ``index`` and cuts its repeats'
    crops out of it. In training the start is drawn from (seed, epoch, file), each crop and flip
    from (seed, epoch, file, repeat); otherwise the clip is the middle one and the crop the centre.

    A file that cannot be read is noted, and another one drawn from (seed, epoch, file, attempt)
    takes its place; its clip is the one that a request for it in the same epoch gives.

    Args:
        files: the videos; must not be empty. What a file says of its sampling goes before
            ``stride``, ``fps`` and ``repeats``.
        frames: frames in a clip.
        stride: source frames from one to the next.
        image_size: ``(height, width)`` of the clips.
        seed: of every draw.
        repeats: crops a decoded clip (V2's repeated augmentation has 4); 1 outside training.
        flip: mirror half of the crops (training only; V1 and V2 pretrain without).
        train: random start and crop; False: middle start, centre crop.
        cache: keep every decoded video whole in memory, uint8, in each worker that has read it:
            for sets far smaller than memory. The clips are the same as without. Entries that are
            parts of files, and those sampled by ``fps``, are decoded each time.
        decoder: how files are read; PyAV, and Pillow for folders of frames, unless given.
        replacements: file indices that may stand in for a bad file, so that training never sees
            a held-out file; all of them unless given.
        fps: frames of the clip a second, in place of the stride.
        channels: of the clips: 3 (RGB), 1 (grey) or 4 (RGBA).
        lost: files that must not be opened, path to reason: bad files to begin with. Held, not
            copied, so that several data sets can share what is found out later.

    Attributes:
        reading: called with a file's index before it is opened, and with None afterwards; None
            is nobody. A process that may be lost at a file says by it which one.

    Raises:
        ValueError: ``files`` or ``replacements`` is empty, or a number is out of its range.
    """

    def __init__(
        self,
        files: Sequence[VideoFile],
        *,
        frames: int,
        stride: int = 1,
        image_size: tuple[int, int],
        seed: int = 0,
        repeats: int = 1,
        flip: bool = False,
        train: bool = True,
        cache: bool = False,
        decoder: Decoder | None = None,
        replacements: Sequence[int] | None = None,
        fps: float | None = None,
        channels: int = 3,
        lost: dict[str, str] | None = None,
    ) -> None:
        clip_span(frames, stride)  # checks both
        if repeats < 1 or min(image_size) < 1:
            raise ValueError(
                f"repeats and image_size must be at least 1, got {repeats} and {image_size}"
            )
        self.files = list(files)
        self.frames, self.image_size = frames, image_size
        self.sampling = Sampling(stride, fps, repeats)
        self.seed, self.flip, self.train = seed, flip, train
        self.decoder: Decoder = PathDecoder(channels) if decoder is None else decoder
        self.replacements = list(range(len(self.files)) if replacements is None else replacements)
        if not self.files or not self.replacements:
            raise ValueError("files and replacements must not be empty")
        self.lost: dict[str, str] = {} if lost is None else lost
        self.reading: Callable[[int | None], None] | None = None
        self._cache: dict[str, Clip | DecodeError] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, request: ClipRequest) -> ClipItem:
        """Decode one file's clips.

        Raises:
            DataError: ``MAX_ATTEMPTS`` files in a row, or all that there are, cannot be read.
        """
        wanted = self._repeats(request)
        bad: list[BadFile] = []
        tried: set[str] = set()
        index: int | None = request.index
        while index is not None and len(bad) < MAX_ATTEMPTS:
            path = self.files[index].path
            try:
                item = self._item(request.epoch, index, wanted)
            except DecodeError as error:
                bad.append(BadFile(path, error.reason))
                tried.add(path)
                index = self._replacement(request, tried)
            else:
                item.bad = bad
                return item
        listing = "\n".join(f"  {file.path}: {file.reason}" for file in bad)
        several = f"{len(bad)} files in a row" if len(bad) > 1 else "1 file"
        raise DataError(
            f"{several} could not be read; vmae-fast check says which can. Where they are not "
            f"found, --data-root says where relative paths of a list start:\n{listing}"
        )

    def read(self, request: ClipRequest) -> ClipItem:
        """Decode the clips of the very file that is asked for.

        Raises:
            DecodeError: it cannot be read.
        """
        return self._item(request.epoch, request.index, self._repeats(request))

    def _item(self, epoch: int, index: int, repeats: range) -> ClipItem:
        path = self.files[index].path
        if path in self.lost:
            raise DecodeError(path, self.lost[path])
        if self.reading is not None:
            self.reading(index)
        try:
            clip = self._read_clip(epoch, index)
            crops = [self._crop(clip.frames, epoch, index, k) for k in repeats]
        finally:
            if self.reading is not None:
                self.reading(None)
        return ClipItem(crops, index, epoch, path, clip.times_s, repeats.start)

    def _repeats(self, request: ClipRequest) -> range:
        """Numbers of the repeats that a request asks for."""
        if not self.train:
            return range(1)
        if request.repeats is not None:
            return range(request.first, request.first + request.repeats)
        return range(request.first, self._sampling(request.index).repeats)

    def _sampling(self, index: int) -> Sampling:
        return self.files[index].sampling or self.sampling

    def _read_clip(self, epoch: int, index: int) -> Clip:
        u = CENTER_START
        if self.train:
            u = host_rng(self.seed, stream=START, epoch=epoch, clip=index).random()
        file, sampling = self.files[index], self._sampling(index)
        part, parts = file.part
        # The largest float below 1 where the sum rounds up to it.
        u = min((part + u) / parts, 1 - 2**-53)
        whole = file.first is None and file.count is None
        if self._cache is None or not whole or sampling.fps is not None:
            return self.decoder.read_clip(
                file.path, self.frames, sampling.stride, u,
                fps=sampling.fps, first=file.first, count=file.count,
            )  # fmt: skip
        if file.path not in self._cache:
            try:
                self._cache[file.path] = self.decoder.read_all(file.path)
            except DecodeError as error:
                # Without the traceback, whose frames would keep the decoder's buffers alive.
                self._cache[file.path] = DecodeError(error.path, error.reason)
        video = self._cache[file.path]
        if isinstance(video, DecodeError):
            raise DecodeError(video.path, video.reason)
        indices = clip_indices(len(video.frames), self.frames, sampling.stride, u)
        return Clip(video.frames[indices], tuple(video.times_s[index] for index in indices))

    def _crop(self, clip: npt.NDArray[np.uint8], epoch: int, index: int, repeat: int) -> Tensor:
        height, width = clip.shape[1:3]
        if not self.train:
            return crop_resize(
                clip, center_crop_box(height, width, self.image_size), self.image_size
            )
        rng = host_rng(self.seed, stream=CROP, epoch=epoch, clip=index, repeat=repeat)
        box = multi_scale_crop_box(height, width, self.image_size, rng)
        flip = self.flip and rng.random() < 0.5
        return crop_resize(clip, box, self.image_size, flip=flip)

    def _replacement(self, request: ClipRequest, tried: set[str]) -> int | None:
        """A file not tried yet, drawn by the number of attempts; None if there is none left."""
        left = [index for index in self.replacements if self.files[index].path not in tried]
        if not left:
            return None
        rng = host_rng(
            self.seed, stream=REPLACE, epoch=request.epoch, clip=request.index, repeat=len(tried)
        )
        return left[rng.integers(len(left))]


def collate_clips(items: Sequence[ClipItem], *, out: Tensor | None = None) -> ClipBatch:
    """Join the clips of several files into a batch, in order, repeats next to each other.

    Args:
        items: they.
        out: uint8 ``(B, T, H, W, C)`` to write the video to; None makes one.
    """
    stacked = torch.stack([crop for item in items for crop in item.crops], out=out)

    def per_clip(values: Sequence[int]) -> Tensor:
        counts = [len(item.crops) for item in items]
        return torch.tensor(values).repeat_interleave(torch.tensor(counts))

    return ClipBatch(
        video=stacked.permute(0, 4, 1, 2, 3),
        clip=per_clip([item.clip for item in items]),
        repeat=torch.tensor([item.first + k for item in items for k in range(len(item.crops))]),
        epoch=per_clip([item.epoch for item in items]),
        paths=[item.path for item in items for _ in item.crops],
        bad=[file for item in items for file in item.bad],
    )
