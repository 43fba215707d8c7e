"""Ways to make clips of video files, each on one core: ours and what stands beside it.

Every way makes the same clip of a file in a round, and the same crops of it: start and boxes are
those that ClipDataset draws.
"""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from vmae_fast.data import (
    ClipDataset,
    ClipRequest,
    DataError,
    Sampling,
    VideoFile,
    clip_indices,
    host_rng,
    make_decoder,
    multi_scale_crop_box,
)
from vmae_fast.data.container import opened
from vmae_fast.data.rng import CROP, START

LENGTH, STRIDE, SIZE = 16, 4, (224, 224)
REPEATS = 4
DECODE, DECORD = "decode alone", "decord as VideoMAE uses it"
# ImageNet's, by which VideoMAE's loader normalises on the CPU.
_MEAN, _STD = (torch.tensor(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@dataclass(frozen=True)
class Way:
    """A way to make clips.

    Attributes:
        name: for tables.
        crops: clips that it makes of each decoding.
        call: with the round and the number of the file.
    """

    name: str
    crops: int
    call: Callable[[int, int], Any]


def ways(files: list[VideoFile]) -> tuple[list[Way], dict[str, str]]:
    """Every way to load these files that there is here, and why others are left out."""
    plain = dataset(files)
    found = [
        Way(DECODE, 1, lambda epoch, index: decode(plain, epoch, index)),
        Way("ours", 1, lambda epoch, index: load(plain, epoch, index)),
        Way(f"ours, {REPEATS} repeats", REPEATS, lambda e, i: load(plain, e, i, REPEATS)),
    ]
    skipping = dataset(files, skip_nonref=True)
    found.append(Way("ours, skip_nonref", 1, lambda epoch, index: load(skipping, epoch, index)))
    left_out: dict[str, str] = {}
    try:
        other = dataset(files, name="torchcodec")
        found.append(Way("ours by torchcodec", 1, lambda epoch, index: load(other, epoch, index)))
    except DataError as error:
        left_out["ours by torchcodec"] = str(error)
    try:
        import decord  # noqa: F401

        found.append(Way(DECORD, 1, lambda epoch, index: by_decord(plain, epoch, index)))
    except (ImportError, OSError) as error:
        left_out[DECORD] = f"decord cannot be imported ({error}); pip install decord"
    return found, left_out


def packed_ways(files: list[VideoFile]) -> list[Way]:
    """Ours on a packed data set."""
    packed = dataset([file.sampled(Sampling(STRIDE)) for file in files])
    return [
        Way(DECODE, 1, lambda epoch, index: decode(packed, epoch, index)),
        Way("ours", 1, lambda epoch, index: load(packed, epoch, index)),
        Way(f"ours, {REPEATS} repeats", REPEATS, lambda e, i: load(packed, e, i, REPEATS)),
    ]


def dataset(files: list[VideoFile], name: str = "pyav", skip_nonref: bool = False) -> ClipDataset:
    """Clips of 16 frames for 224 x 224 pixels, by a decoder."""
    decoder = make_decoder(name, skip_nonref=skip_nonref)
    return ClipDataset(files, frames=LENGTH, stride=STRIDE, image_size=SIZE, decoder=decoder)


def load(clips: ClipDataset, epoch: int, index: int, repeats: int = 1) -> list[torch.Tensor]:
    """Ours: uint8 ``(T, H, W, C)`` crops of a file's clip in a round."""
    return clips.read(ClipRequest(epoch, index, repeats=repeats)).crops


def drawn(clips: ClipDataset, epoch: int, index: int, num_frames: int) -> list[int]:
    """Numbers of the frames that ClipDataset takes of a file in a round."""
    u = host_rng(clips.seed, stream=START, epoch=epoch, clip=index).random()
    sampling = clips.files[index].sampling or clips.sampling
    return clip_indices(num_frames, clips.frames, sampling.stride, u)


def decode(clips: ClipDataset, epoch: int, index: int) -> int:
    """The ceiling: libavcodec from the keyframe before the clip to its last frame, and no more.

    Nothing is converted. Returns the number of frames that were decoded.
    """
    count = 0
    with opened(clips.files[index].path) as video:
        stream = video.stream
        first, *_, last = drawn(clips, epoch, index, stream.frames)
        ticks = 1 / (stream.average_rate * stream.time_base)
        start = stream.start_time or 0
        video.container.seek(int(start + first * ticks), stream=stream)
        for frame in video.container.decode(stream):
            count += 1
            if frame.pts >= start + (last - 0.5) * ticks:
                break
    return count


def by_decord(clips: ClipDataset, epoch: int, index: int) -> torch.Tensor:
    """As VideoMAE's loader does it: decord, then Pillow frame by frame, then floats.

    Returns:
        ``(T, C, H, W)``, normalised.
    """
    import decord
    from PIL import Image

    reader = decord.VideoReader(clips.files[index].path, num_threads=1)
    indices = drawn(clips, epoch, index, len(reader))
    frames = [Image.fromarray(frame) for frame in reader.get_batch(indices).asnumpy()]
    rng = host_rng(clips.seed, stream=CROP, epoch=epoch, clip=index, repeat=0)
    top, left, height, width = multi_scale_crop_box(frames[0].height, frames[0].width, SIZE, rng)
    box = (left, top, left + width, top + height)
    crops = [frame.crop(box).resize(SIZE[::-1], Image.Resampling.BILINEAR) for frame in frames]
    stacked = torch.from_numpy(np.concatenate([np.asarray(crop) for crop in crops], axis=2))
    video = stacked.permute(2, 0, 1).contiguous().float().div(255)
    video = video.view(LENGTH, 3, *SIZE)
    return video.sub_(_MEAN[:, None, None]).div_(_STD[:, None, None])


def as_uint8(video: torch.Tensor) -> torch.Tensor:
    """What ``by_decord`` gives as ours is: uint8 ``(T, H, W, C)``."""
    shown = (video * _STD[:, None, None] + _MEAN[:, None, None]) * 255
    return shown.round().to(torch.uint8).permute(0, 2, 3, 1)


@contextmanager
def one_core():
    """This process on one core and one thread of torch while the context lasts."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        os.sched_setaffinity(0, {max(cores)})
        torch.set_num_threads(1)
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def measure(
    found: dict[tuple[str, str], Way], files: int, rounds: int
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(CPU, wall) seconds a decoding of each way in each round, all ways in turn.

    A first round, of other clips, is not counted.
    """
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in found}
    with one_core():
        for epoch in range(-1, rounds):
            for key, way in found.items():
                wall, cpu = time.perf_counter(), time.process_time()
                for index in range(files):
                    way.call(rounds if epoch < 0 else epoch, index)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                if epoch >= 0:
                    times[key].append((cpu / files, wall / files))
    return times


def median_ratio(ours: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """CPU time of one over that of another: the median of the rounds' ratios."""
    return statistics.median(a[0] / b[0] for a, b in zip(ours, other, strict=True))


def versions() -> dict[str, str]:
    """Of the libraries that decode, where they are."""
    import av

    found = {"av": f"{av.__version__} (libavcodec {av.library_versions['libavcodec'][0]})"}
    others = (name for name in ("decord", "torchcodec") if find_spec(name))
    return found | {name: version(name) for name in others}
