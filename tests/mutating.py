"""Video files made worse in ways that are seen in the wild, and in some that nobody has seen."""

import random
import re
from pathlib import Path

import numpy as np

# 32-bit values of sizes, counts and durations that no reader should believe.
ABSURD = (0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0)
# Boxes of MP4 and QuickTime that hold such values.
BOXES = (
    b"ftyp moov mvhd trak tkhd edts elst mdia mdhd minf stbl stsd avc1 avcC hvc1 hev1 hvcC av01 "
    b"stts ctts stss stsc stsz stco co64 mdat moof traf tfhd trun sidx"
).split()
# The same for RIFF (AVI): chunks and lists.
CHUNKS = b"RIFF hdrl avih strl strh strf movi idx1 00dc".split()
SUFFIXES = ("mp4", "mkv", "webm", "avi", "mov", "mpg", "ts", "flv", "wmv", "m4v")
# Where most of what describes a file lies.
HEADER_BYTES = 1024


def _flips(data, rng, end):
    for _ in range(rng.choice((1, 3, 10, 100))):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return data


def flipped(data, rng):
    """Bits anywhere."""
    return _flips(data, rng, len(data))


def flipped_header(data, rng):
    """Bits where the file is described."""
    return _flips(data, rng, min(len(data), HEADER_BYTES))


def truncated(data, rng):
    """Cut off, as by a download that broke."""
    return data[: rng.randrange(1, len(data))]


def without_start(data, rng):
    """The first part lost."""
    return data[rng.randrange(1, len(data)) :]


def empty(data, rng):
    """No byte, or zeros of the same length."""
    return rng.choice((bytearray(), bytearray(len(data))))


def zeroed(data, rng):
    """A stretch of zeros, as after a crash of a file system."""
    start = rng.randrange(len(data))
    size = rng.randrange(1, len(data) - start + 1)
    data[start : start + size] = bytes(size)
    return data


def shuffled(data, rng):
    """Blocks of 512 bytes in another order."""
    blocks = [data[k : k + 512] for k in range(0, len(data), 512)]
    first, second = rng.randrange(len(blocks)), rng.randrange(len(blocks))
    blocks[first], blocks[second] = blocks[second], blocks[first]
    return bytearray(b"".join(blocks))


def absurd(data, rng):
    """Sizes, counts and durations that cannot be: after the name of a box, or anywhere in front."""
    names = [m for name in (*BOXES, *CHUNKS) for m in re.finditer(re.escape(name), bytes(data))]
    for _ in range(rng.choice((1, 1, 2, 4))):
        if names and rng.random() < 0.8:
            # Of a box the size stands before its name; of a chunk, after it.
            at = rng.choice(names).start() + rng.choice((-4, 4, 8, 12, 16, 20, 28, 32))
        else:
            at = rng.randrange(min(len(data), HEADER_BYTES))
        at = min(max(at, 0), len(data) - 4)
        data[at : at + 4] = rng.choice(ABSURD).to_bytes(4, rng.choice(("big", "little")))
    return data


def noise(data, rng):
    """Nothing of a video, or only its first bytes."""
    kept = rng.choice((0, 16, 64))
    return data[:kept] + rng.randbytes(len(data) - kept)


MUTATIONS = (
    flipped, flipped_header, flipped_header, truncated, without_start, empty, zeroed, shuffled,
    absurd, absurd, absurd, noise,
)  # fmt: skip


def mutate(sources, folder, count, seed=0):
    """Write ``count`` mutated copies of files, the same for a seed; returns their paths.

    A tenth is not changed but gets another file's ending.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        source = Path(rng.choice(sources))
        data, suffix = bytearray(source.read_bytes()), source.suffix[1:]
        if rng.random() < 0.1:
            suffix, name = rng.choice(SUFFIXES), "renamed"
        else:
            change = rng.choice(MUTATIONS)
            data, name = change(data, rng), change.__name__
        path = folder / f"{number:04}-{name}-{source.stem}.{suffix}"
        path.write_bytes(data)
        written.append(path)
    return written


# Of what kinds the files are that are changed: suffix, codec, and what else its encoder is told.
KINDS = {
    "h264": ("mp4", "libx264", {}),
    "h264-fragments": ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "h264-mkv": ("mkv", "libx264", {}),
    "h264-ts": ("ts", "libx264", {}),
    "h264-flv": ("flv", "libx264", {}),
    "hevc": ("mp4", "libx265", {"x265-params": "log-level=none:pools=1"}),
    "av1": ("mkv", "libsvtav1", {"preset": "12"}),
    "vp9": ("webm", "libvpx-vp9", {"deadline": "realtime"}),
    "vp8": ("webm", "libvpx", {"deadline": "realtime"}),
    "mpeg4": ("avi", "mpeg4", {}),
    "mpeg2": ("mpg", "mpeg2video", {}),
    "mjpeg": ("avi", "mjpeg", {}),
    "prores": ("mov", "prores_ks", {}),
    "ffv1": ("mkv", "ffv1", {}),
    "wmv": ("wmv", "wmv2", {}),
}
PIXELS = {"mjpeg": "yuvj420p", "prores": "yuv422p10le"}


def write_sources(folder, frames=24, size=64):
    """A short file of each kind, of moving stripes; returns their paths."""
    import av

    folder.mkdir(parents=True, exist_ok=True)
    found = []
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    for name, (suffix, codec, options) in KINDS.items():
        path = folder / f"{name}.{suffix}"
        muxer = {key: options.pop(key) for key in ("movflags",) if key in (options := {**options})}
        with av.open(str(path), "w", options=muxer) as container:
            stream = container.add_stream(codec, rate=25, options=options)
            stream.width = stream.height = size
            stream.pix_fmt = PIXELS.get(name, "yuv420p")
            stream.codec_context.gop_size, stream.codec_context.thread_count = 12, 1
            for number in range(frames):
                waves = [np.sin((x * (c + 1) + y + 9 * number) / 7) for c in range(3)]
                picture = (127 + 120 * np.stack(waves, axis=2)).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        found.append(path)
    return found
