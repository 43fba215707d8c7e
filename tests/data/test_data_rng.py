"""Host random numbers: Philox by its paper, no overlap between counters."""

import numpy as np
import pytest

from vmae_fast.data import host_rng

WORD = 1 << 64


def philox_4x64_10(counter, key):
    """Philox-4x64 with 10 rounds, after Salmon et al., SC 2011, table 2 and section 3.3."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        low = 0xD2E7470EE14C6C93 * counter[0]
        high = 0xCA5A826395121157 * counter[2]
        counter = [
            high // WORD ^ counter[1] ^ key[0],
            high % WORD,
            low // WORD ^ counter[3] ^ key[1],
            low % WORD,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) % WORD, (key[1] + 0xBB67AE8584CAA73B) % WORD]
    return counter


def test_words_are_philox_of_the_counter():
    rng = host_rng(-5, stream=3, epoch=7, clip=11, repeat=2)
    # numpy adds one to the counter before each block.
    key = (WORD - 5, 3)
    expected = philox_4x64_10((1, 2, 11, 7), key) + philox_4x64_10((2, 2, 11, 7), key)
    assert rng.bit_generator.random_raw(8).tolist() == expected


def test_long_draws_of_neighbours_share_nothing():
    drawn = [
        host_rng(seed, stream=stream, epoch=epoch, clip=clip, repeat=repeat)
        .bit_generator.random_raw(2000)
        .tolist()
        for seed in (0, 1)
        for stream in (1, 2)
        for epoch in (0, 1)
        for clip in (0, 1)
        for repeat in (0, 1)
    ]
    words = [word for words in drawn for word in words]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("name", ["stream", "epoch", "clip", "repeat"])
@pytest.mark.parametrize("value", [-1, WORD])
def test_counters_that_do_not_fit(name, value):
    with pytest.raises(ValueError, match=f"{name} must be in"):
        host_rng(0, **{"stream": 1, name: value})


def test_draws_are_uniform():
    drawn = np.array([host_rng(0, stream=2, clip=clip).random() for clip in range(2000)])
    assert abs(drawn.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.1
