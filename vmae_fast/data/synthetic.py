"""The embedded data set: small videos of moving shapes, made once and kept in a cache folder.

It lets everything be tried with no data at hand. They are real H.264 files, so that decoding,
sampling and augmentation run as with any others. Each shows one or two shapes in one of eight
``MOTIONS`` over a smooth, slowly drifting background; its folder is the name of the motion.
"""

from __future__ import annotations

import colorsys
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from .rng import SYNTHETIC, host_rng

Array = npt.NDArray[np.float32]

MOTIONS: Final = (
    *("left", "right", "up", "down"),
    *("clockwise", "counterclockwise", "grow", "shrink"),
)

# Part of the folder's name: raise it with any change to what the videos show.
SYNTHETIC_VERSION: Final = 3

_RATE: Final = 24  # frames a second
# Near lossless: the background's slopes are a level or two a pixel, and coding noise of that
# order would be what per-tubelet normalised targets consist of.
_CRF: Final = 14
_SHAPES: Final = ("square", "disc", "triangle", "bar")
_DIRECTIONS: Final = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def synthetic_videos(
    root: Path | None = None,
    *,
    count: int = 256,
    size: int = 72,
    frames: int = 40,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Return the folder of the synthetic videos, making it first if it is not there.

    The files are ``<motion>/<nnnn>.mp4``, the motions dealt in turn. They are made in a temporary
    folder that is renamed when complete: a process that dies leaves no half-made set, and of two
    that make it at once both get a whole one. The same arguments give the same videos.

    Args:
        root: parent folder; by default ``$VMAE_FAST_CACHE``, else ``$XDG_CACHE_HOME/vmae-fast``,
            else ``~/.cache/vmae-fast``.
        count: number of files, at least 1.
        size: height and width in pixels, even (as yuv420p wants), at least 16.
        frames: frames a file, at least 1, at 24 a second.
        seed: of the content.
        progress: called with (files made, files in all) after each file.

    Returns:
        The folder; its name carries the version and every argument.

    Raises:
        ValueError: an argument is out of its range.
    """
    if count < 1 or frames < 1 or size < 16 or size % 2:
        raise ValueError(
            "count and frames must be at least 1 and size even and at least 16, got "
            f"count={count}, frames={frames}, size={size}"
        )
    parent = _cache_root() if root is None else Path(root)
    name = f"synthetic-v{SYNTHETIC_VERSION}-{count}x{frames}x{size}px-seed{seed}"
    folder = parent / name
    if folder.is_dir():
        return folder
    # Hidden, so that listing the parent as a data set does not find it.
    making = parent / f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        for number in range(count):
            motion = MOTIONS[number % len(MOTIONS)]
            file = making / motion / f"{number:04d}.mp4"
            file.parent.mkdir(parents=True, exist_ok=True)
            rng = host_rng(seed, stream=SYNTHETIC, clip=number)
            _write_video(file, render_motion(motion, rng, size=size, frames=frames))
            if progress is not None:
                progress(number + 1, count)
        try:
            making.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and its set is as good
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def render_motion(
    motion: str, rng: np.random.Generator, *, size: int, frames: int
) -> npt.NDArray[np.uint8]:
    """Draw one video of ``motion``, one of ``MOTIONS``: uint8 RGB ``(frames, size, size, 3)``."""
    video = _background(rng, size, frames)
    for _ in range(rng.integers(1, 3)):
        cover, light = _Shape.draw(motion, rng, size).render(motion, size, frames)
        colour = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.6, 1.0), 1.0), np.float32)
        video += cover[..., None] * (light[..., None] * (255 * colour) - video)
    return np.rint(video).clip(0, 255).astype(np.uint8)


def _cache_root() -> Path:
    if os.environ.get("VMAE_FAST_CACHE"):
        return Path(os.environ["VMAE_FAST_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "vmae-fast"


def _background(rng: np.random.Generator, size: int, frames: int) -> Array:
    """A few long, slowly drifting waves, ``(frames, size, size, 3)`` on a scale of 0 to 255.

    Wavelengths of 1.5 to 4 frame widths and channels that rise and fall together make a masked
    patch predictable from those around it: a small model then learns within minutes. With busier
    backgrounds the same model hardly got below the loss of predicting zero.
    """
    time, y, x = _grid(size, frames)
    video: Array = np.empty((frames, size, size, 3), np.float32)
    video[:] = rng.uniform(85, 135, size=3).astype(np.float32)
    for _ in range(3):
        wavelength = rng.uniform(1.5, 4.0) * size
        direction, phase = rng.uniform(0, 2 * np.pi, size=2)
        drift = rng.uniform(0.2, 0.6) * size / 72  # pixels a frame
        along = np.float32(np.cos(direction)) * x + np.float32(np.sin(direction)) * y
        turn = np.float32(2 * np.pi / wavelength)
        wave = np.sin(turn * (along + np.float32(drift) * time) + np.float32(phase))
        colour = 30 * (1 + 0.3 * rng.standard_normal(3))
        video += wave[..., None] * colour.astype(np.float32)
    return video


@dataclass(frozen=True)
class _Shape:
    """A shape halfway through its video, and its pace. In pixels, x to the right, y down."""

    kind: str
    x: float
    y: float
    radius: float
    angle: float  # radians, clockwise on the screen
    speed: float  # pixels or radians a frame, or growth over the whole video as a logarithm
    stripes: float  # depth of the stripes, 0 (plain) to 1

    @staticmethod
    def draw(motion: str, rng: np.random.Generator, size: int) -> _Shape:
        kind = _SHAPES[rng.integers(len(_SHAPES))]
        radius = rng.uniform(0.18, 0.28) * size
        striped = rng.random() < 0.5
        if motion in _DIRECTIONS:
            speed = rng.uniform(1.3, 2.6) * size / 72
        elif motion in ("clockwise", "counterclockwise"):
            speed = np.radians(rng.uniform(4, 8))
            radius *= 1.3
            striped = striped or kind == "disc"  # a plain disc does not show that it turns
        else:
            speed = np.log(rng.uniform(2.5, 4.0))
        x, y = rng.uniform(0.15, 0.85, size=2) * size
        depth = rng.uniform(0.3, 0.5) if striped else 0.0
        return _Shape(kind, x, y, radius, rng.uniform(0, 2 * np.pi), float(speed), depth)

    def render(self, motion: str, size: int, frames: int) -> tuple[Array, Array]:
        """The share of each pixel that it covers and its brightness, ``(frames, size, size)``."""
        time, y, x = _grid(size, frames)
        time = time - np.float32((frames - 1) / 2)  # the drawn state is that of the middle
        right, down = _DIRECTIONS.get(motion, (0, 0))
        centre_x = self._wrap(self.x + right * self.speed * time, size)
        centre_y = self._wrap(self.y + down * self.speed * time, size)
        turning = {"clockwise": 1, "counterclockwise": -1}.get(motion, 0)
        angle = self.angle + turning * self.speed * time
        growing = {"grow": 1, "shrink": -1}.get(motion, 0)
        radius = self.radius * np.exp(growing * self.speed * time / max(frames - 1, 1))
        cos, sin = (np.cos(angle) / radius), (np.sin(angle) / radius)
        # The shape's own frame of reference, where its radius is 1.
        across = cos * (x - centre_x) + sin * (y - centre_y)
        along = cos * (y - centre_y) - sin * (x - centre_x)
        cover = (0.5 - _outside(self.kind, across, along) * radius).clip(0, 1)
        light = 1 - self.stripes * (0.5 + 0.5 * np.sin(np.float32(2 * np.pi) * across))
        return cover.astype(np.float32), light.astype(np.float32)

    def _wrap(self, centre: Array, size: int) -> Array:
        """Let a shape that has left on one side come back on the other."""
        margin = 1.3 * self.radius  # a bar's corner reaches 1.21 radii
        wrapped: Array = (centre + margin) % np.float32(size + 2 * margin) - np.float32(margin)
        return wrapped


def _outside(kind: str, across: Array, along: Array) -> Array:
    """Distance outside a shape of radius 1, negative inside, ``(frames, size, size)``."""
    distance: Array
    if kind == "disc":
        distance = np.hypot(across, along) - np.float32(1)
    elif kind == "square":
        distance = np.maximum(abs(across), abs(along)) - np.float32(0.8)
    elif kind == "bar":
        distance = np.maximum(abs(across) - np.float32(1.15), abs(along) - np.float32(0.35))
    else:  # a triangle: three edges, each 0.55 from the centre
        slanted = np.float32(np.sqrt(0.75)) * abs(across) - np.float32(0.5) * along
        distance = np.maximum(slanted, along) - np.float32(0.55)
    return distance


def _grid(size: int, frames: int) -> tuple[Array, Array, Array]:
    """Frame numbers and pixel coordinates, shaped to broadcast to ``(frames, size, size)``."""
    time = np.arange(frames, dtype=np.float32)[:, None, None]
    pixel = np.arange(size, dtype=np.float32)
    return time, pixel[None, :, None], pixel[None, None, :]


def _write_video(file: Path, video: npt.NDArray[np.uint8]) -> None:
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=_RATE)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # x264's lookahead differs from process to process in some files; without it, and with one
        # thread, the same frames give the same bytes.
        fixed = "mbtree=0:rc-lookahead=0:sync-lookahead=0"
        stream.options = {"preset": "veryfast", "crf": str(_CRF), "x264-params": fixed}
        # x264's result depends on its number of threads.
        stream.codec_context.thread_count = 1
        for picture in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
