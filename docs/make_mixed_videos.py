"""Make a folder of mixed videos, as people have them, to follow docs/your-own-video.md with.

    python docs/make_mixed_videos.py my-videos

Shapes in eight motions, one folder for each, every file of another kind: containers without
durations, variable rates, phones held sideways, non-square pixels, HDR, interlaced, grey, frames as
pictures, a long one, and some that nothing can be done with.
"""

import argparse
import itertools
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from vmae_fast.data import MOTIONS, host_rng, render_motion

SIZE, FRAMES, RATE = 160, 120, 24
# Codes of ITU-T H.273.
BT2020_PRIMARIES, BT2020_MATRIX, PQ = 9, 9, 16


class Pipe:
    """A file that cannot be sought in: a muxer then writes no duration, as in a live stream."""

    def __init__(self, path: Path) -> None:
        self.write = path.open("wb").write


def write(
    path: Path,
    pictures: np.ndarray,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int = RATE,
    gop: int = 12,
    times: list[int] | None = None,
    aspect: Fraction | None = None,
    live: bool = False,
    hdr: bool = False,
    interlaced: bool = False,
    **options: str,
) -> Path:
    """Write ``(T, H, W, 3)`` uint8 pictures as one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    target: Any = Pipe(path) if live else str(path)
    kind = {".mkv": "matroska", ".webm": "webm"}.get(path.suffix) if live else None
    with av.open(target, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt, stream.options = pixels, options
        stream.codec_context.gop_size = gop
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if hdr:
            stream.codec_context.color_primaries = BT2020_PRIMARIES
            stream.codec_context.color_trc = PQ
            stream.codec_context.colorspace = BT2020_MATRIX
        if interlaced:
            pictures = weave(pictures)
        for number, picture in enumerate(pictures):
            if hdr:
                frame = av.VideoFrame.from_ndarray(to_pq(picture), format=pixels)
            else:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def to_pq(picture: np.ndarray) -> np.ndarray:
    """8-bit sRGB as planes of yuv420p10: BT.2020, the PQ curve of ST 2084, white at 203 cd/m2."""
    signal = picture / 255
    linear = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    # ITU-R BT.2087.
    to_2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    power = (linear @ np.array(to_2020).T * 203 / 10000).clip(0, 1) ** 0.1593017578125
    pq = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    luma = pq @ np.array([0.2627, 0.6780, 0.0593])
    planes = [64 + 876 * luma]
    for channel, span in ((2, 1.8814), (0, 1.4746)):
        colour = 512 + 896 * (pq[..., channel] - luma) / span
        planes.append(colour.reshape(SIZE // 2, 2, SIZE // 2, 2).mean((1, 3)).reshape(-1, SIZE))
    return np.rint(np.concatenate(planes)).astype(np.uint16)


def weave(pictures: np.ndarray) -> np.ndarray:
    """Every second row from the picture after it, as a camera that takes half pictures."""
    woven = pictures.copy()
    woven[:-1, 1::2] = pictures[1:, 1::2]
    return woven


def turn(path: Path) -> None:
    """Ask players to turn an mp4 a quarter clockwise, as phones do."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    matrix = np.array([0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000], ">i4")
    data[at : at + 36] = matrix.tobytes()
    path.write_bytes(bytes(data))


def write_sound(path: Path) -> None:
    """Write a second of silence and no picture."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000, layout="mono")
        for start in range(0, 16000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def make(root: Path) -> None:
    """Write the folder; it must not be there yet."""
    films = draw()

    def place(name: str) -> tuple[Path, np.ndarray]:
        motion, film = next(films)
        return root / motion / name, film

    for number in range(40):
        path, film = place(f"plain-{number:02}.mp4")
        write(path, film)
    path, film = place("no-duration.mkv")
    write(path, film, live=True)
    path, film = place("no-duration.webm")
    write(path, film, codec="libvpx-vp9", live=True, deadline="realtime", **{"cpu-used": "8"})
    path, film = place("variable-rate.mp4")
    write(path, film, times=[k if k < 60 else 3 * k - 120 for k in range(FRAMES)])
    path, film = place("phone.mp4")
    turn(write(path, film[:, :, ::-1].swapaxes(1, 2).copy()))
    path, film = place("wide-pixels.mkv")
    write(path, film[:, :, ::2].copy(), aspect=Fraction(2, 1))
    path, film = place("hdr-10-bit.mp4")
    write(
        path, film, codec="libx265", pixels="yuv420p10le", hdr=True,
        **{
            "x265-params": "log-level=none:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
        },
    )  # fmt: skip
    path, film = place("interlaced.ts")
    write(path, film, codec="mpeg2video", rate=25, interlaced=True, flags="+ildct+ilme", b="4M")
    path, film = place("open-gop.mkv")
    write(path, film, **{"x264-params": "open-gop=1:bframes=3:scenecut=0"})
    path, film = place("grey.avi")
    write(path, film, codec="ffv1", pixels="gray")
    path, film = place("frames")
    path.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(film):
        Image.fromarray(picture).save(path / f"img_{number + 1:05}.jpg", quality=92)
    path, film = place("long.mp4")
    write(path, np.concatenate([film, film[::-1]] * 9))  # 90 s
    write_sound(root / MOTIONS[0] / "sound-only.mp4")
    whole = (root / MOTIONS[0] / "plain-00.mp4").read_bytes()
    (root / MOTIONS[0] / "cut-off.mp4").write_bytes(whole[: len(whole) // 2])
    (root / MOTIONS[1] / "not-a-video.mp4").write_text("A page that said 404.\n")


def draw() -> Iterator[tuple[str, np.ndarray]]:
    """The motions in turn, each time with other shapes."""
    for number, motion in enumerate(itertools.cycle(MOTIONS)):
        rng = host_rng(7, stream=6, clip=number)
        yield motion, render_motion(motion, rng, size=SIZE, frames=FRAMES)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="made anew")
    parser.add_argument("--overwrite", action="store_true", help="delete what is there first")
    options = parser.parse_args()
    if options.folder.exists():
        if not options.overwrite:
            parser.error(f"{options.folder} is there already; --overwrite deletes it")
        shutil.rmtree(options.folder)
    make(options.folder)
    print(f"made {sum(path.is_file() for path in options.folder.rglob('*'))} files")


if __name__ == "__main__":
    main()
