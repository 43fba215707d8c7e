"""Counter-based randomness: the same integers on every device, in every order of work.

All arithmetic is on int64 tensors that hold 32-bit words. Multipliers are written as signed
32-bit numbers, so that a product of a word and a multiplier always fits into int64 and no step
relies on overflow.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", int, Tensor)

_WORD = 0xFFFFFFFF
# Multipliers and shifts of a two-round mixer of very low measured bias, 0.1076, found by search
# (github.com/skeeto/hash-prospector/issues/19); the second multiplier as a signed word.
_MULTIPLIER_1 = 0x21F0AAAD
_MULTIPLIER_2 = 0xD35A2D97 - (1 << 32)
# The golden ratio in 32 bits separates counters that differ by small steps.
_GOLDEN = 0x9E3779B9 - (1 << 32)


def mix(word: Word) -> Word:
    """Bijective mixing of 32-bit words, in an int64 tensor of any shape or a Python int."""
    word = ((word ^ (word >> 16)) * _MULTIPLIER_1) & _WORD
    word = ((word ^ (word >> 15)) * _MULTIPLIER_2) & _WORD
    return word ^ (word >> 15)


def combine(word: Tensor, counter: Tensor | int) -> Tensor:
    """Mix a further counter (any 64-bit integer, both halves count) into 32-bit words."""
    low: Any = (counter + _GOLDEN) & _WORD
    high = (counter >> 32) & _WORD
    return mix((mix(word ^ mix(low)) + high + _GOLDEN) & _WORD)


def clip_keys(
    seed: int,
    epoch: Tensor | int,
    clip: Tensor,
    repeat: Tensor | int = 0,
) -> Tensor:
    """One 32-bit key per clip from its coordinates in the run.

    Args:
        seed: the run's seed, up to 63 bits.
        epoch: pass over the data, a number or ``(B,)`` int64.
        clip: ``(B,)`` int64 index of the clip's file in the data set.
        repeat: which crop of a repeatedly augmented clip, a number or ``(B,)`` int64.

    Returns:
        ``(B,)`` int64 in 0..2^32-1, on clip's device; equal on CPU and GPU.
    """
    word = combine(torch.zeros_like(clip, dtype=torch.int64), seed)
    for counter in (epoch, clip, repeat):
        word = combine(word, counter)
    return word


def random_words(key: Tensor, count: int) -> Tensor:
    """``count`` 32-bit words for each key: ``(B,)`` to ``(B, count)`` int64."""
    counter = torch.arange(count, device=key.device, dtype=torch.int64)
    return combine(key.unsqueeze(1), counter)


def shuffled(key: Tensor, count: int) -> Tensor:
    """A random permutation of 0..count-1 for each key: ``(B,)`` to ``(B, count)`` int64.

    Sorts unique integers (word, position), so ties cannot order differently on two devices.
    """
    position = torch.arange(count, device=key.device, dtype=torch.int64)
    ranked = (random_words(key, count) << 31) | position
    return ranked.sort(dim=1).values & 0x7FFFFFFF
