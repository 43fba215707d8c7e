"""Counter-based random numbers for the host side of the data path.

Every draw is a pure function of (seed, stream, epoch, clip, repeat). It therefore does not matter
which rank or worker makes it, how many of them there are, or what was drawn before: a resumed
run, and a run on another number of GPUs, sees the same clips.
"""

from __future__ import annotations

from typing import Final

import numpy as np

# One stream a purpose, so that two purposes never share draws. The numbers are part of what a
# seed means: changing one changes every run made with it.
SHUFFLE: Final = 1  # order of the files within an epoch
START: Final = 2  # where a clip starts in its file
CROP: Final = 3  # crop box and flip of one repeat of a clip
SPLIT: Final = 4  # which files are held out for validation
REPLACE: Final = 5  # which file stands in for one that cannot be read
SYNTHETIC: Final = 6  # content of the embedded synthetic videos
WEIGHT: Final = 7  # turns of the files that do not count in every epoch

_WORD: Final = 1 << 64


def host_rng(
    seed: int, *, stream: int, epoch: int = 0, clip: int = 0, repeat: int = 0
) -> np.random.Generator:
    """Return the generator that belongs to one (seed, stream, epoch, clip, repeat).

    Args:
        seed: any integer; taken modulo 2**64.
        stream: one of this module's stream constants, 0 <= stream < 2**64.
        epoch: pass over the files, from 0.
        clip: index of the file in the list, from 0.
        repeat: repeated-augmentation index, or attempt number, from 0.

    Returns:
        A fresh ``numpy.random.Generator`` over Philox-4x64 (Salmon et al., "Parallel random
        numbers: as easy as 1, 2, 3", SC 2011). Two generators that differ in any argument never
        share a block before 2**64 blocks have been drawn from one of them.

    Raises:
        ValueError: a counter is negative or does not fit 64 bits.
    """
    for name, value in (("stream", stream), ("epoch", epoch), ("clip", clip), ("repeat", repeat)):
        if not 0 <= value < _WORD:
            raise ValueError(f"{name} must be in [0, 2**64), got {value}")
    key = np.array([seed % _WORD, stream], dtype=np.uint64)
    # Philox counts its own blocks in the lowest word, so that word must stay free: with, say, the
    # repeat there, draw 5 of repeat 0 would be draw 1 of repeat 1.
    counter = np.array([0, repeat, clip, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
