"""Videos to load in benchmarks: motion under film grain, which costs what real video costs.

Flat synthetic video decodes several times as quickly. Here a textured scene is panned, discs move
over it, and each frame has noise of its own; x264 makes some 400 kbit/s of it with a keyframe every
250 frames, 540 with one every 30.
"""

import hashlib
import os
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np

FRAMES, RATE = 300, 30
HEIGHT, WIDTH = 256, 320
# Keyframes are so many frames apart.
GOPS = (250, 30)
# Standard deviation of the grain, in levels, and x264's quality: between them, 300 to 600 kbit/s.
GRAIN, CRF = 8.0, 25.2
KBIT_PER_S = (300, 600)
# Room to pan in, pixels down and across.
_ROOM = (80, 120)
_COLOURS = np.array([[200, 90, 40], [40, 200, 90], [90, 40, 200]], np.float32)


def videos(gop: int, count: int, frames: int = FRAMES) -> list[Path]:
    """``count`` files with keyframes ``gop`` frames apart, made once and kept for later runs."""
    about = f"{Path(__file__).read_text()} {gop} {frames}"
    digest = hashlib.sha256(about.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir(), f"vmae-fast-benchmark-{digest}")
    folder.mkdir(exist_ok=True)
    paths = [folder / f"gop{gop}-{seed}.mp4" for seed in range(count)]
    for seed, path in enumerate(paths):
        if not path.exists():
            part = folder / f"{os.getpid()}-{path.name}"
            write(part, seed, gop, frames)
            part.rename(path)
    return paths


def write(path: Path, seed: int, gop: int, frames: int = FRAMES) -> None:
    """Encode a video as libx264 does by default, with B-frames, at a constant quality."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        # Grain looks like a cut to it at times.
        stream.options = {"crf": str(CRF), "preset": "medium", "sc_threshold": "0"}
        for number, picture in enumerate(pictures(seed, frames)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def pictures(seed: int, frames: int):
    """The frames before they are encoded, uint8 ``(H, W, 3)``."""
    rng = np.random.default_rng(seed)
    scene = _texture(rng, HEIGHT + _ROOM[0], WIDTH + _ROOM[1])
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for t in range(frames):
        top = round(_ROOM[0] / 2 + 0.48 * _ROOM[0] * np.sin(t / 60 + seed))
        left = round(_ROOM[1] / 2 + 0.48 * _ROOM[1] * np.sin(t / 45 + seed))
        picture = scene[top : top + HEIGHT, left : left + WIDTH].copy()
        for k, colour in enumerate(_COLOURS):
            down = HEIGHT * (0.5 + 0.35 * np.sin(t / 25 + 2 * k + seed))
            across = WIDTH * (0.5 + 0.35 * np.cos(t / 20 + k + seed))
            picture[(rows - down) ** 2 + (columns - across) ** 2 < (18 + 8 * k) ** 2] = colour
        grain = rng.normal(0, GRAIN, (HEIGHT, WIDTH, 1)).astype(np.float32)
        yield (picture + grain).clip(0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise of several scales, float32 ``(H, W, 3)`` about 128."""
    import torch
    from torch.nn import functional as F

    total = torch.zeros(1, 3, height, width)
    for step in (4, 8, 16, 32, 64, 128):
        coarse = rng.normal(size=(1, 3, height // step + 2, width // step + 2)).astype(np.float32)
        fine = F.interpolate(torch.from_numpy(coarse), size=(height, width), mode="bicubic")
        total += fine * step**0.5
    return (128 + 45 * total[0] / total.std()).permute(1, 2, 0).numpy()
