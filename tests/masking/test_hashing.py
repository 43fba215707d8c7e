"""Keys and permutations: pinned, equal to plain integers, uniform, independent."""

import itertools
import math

import pytest
import torch

from vmae_fast import clip_keys
from vmae_fast.masking.hashing import combine, mix, random_words, shuffled

WORD = 2**32


def python_mix(word):
    """The published 16-15-15 mixer on unsigned Python integers."""
    word ^= word >> 16
    word = word * 0x21F0AAAD % WORD
    word ^= word >> 15
    word = word * 0xD35A2D97 % WORD
    return word ^ (word >> 15)


def python_combine(word, counter):
    low = (counter + 0x9E3779B9) % WORD
    high = (counter >> 32) % WORD
    return python_mix((python_mix(word ^ python_mix(low)) + high + 0x9E3779B9) % WORD)


def python_key(seed, epoch, clip, repeat):
    word = 0
    for counter in (seed, epoch, clip, repeat):
        word = python_combine(word, counter)
    return word


# Written down once: masks of a run that is resumed by a later release must not change.
GOLDEN_KEYS = [
    ((0, 0, 0, 0), 2209215413),
    ((0, 0, 1, 0), 1296506890),
    ((0, 0, 2, 0), 4132829394),
    ((1, 0, 0, 0), 2988216293),
    ((0, 1, 0, 0), 239790092),
    ((0, 0, 0, 1), 99766236),
    ((-1, 3, 5, 2), 3884046870),
    ((-1, 3, 10**12, 2), 3140126874),
    ((2**63 - 1, 7, 123456789, 0), 3726928987),
    ((2**32, 0, 0, 0), 3944679039),
    ((-(2**63) + 1, -1, -1, 0), 3393467657),
]


@pytest.mark.parametrize(("coordinates", "golden"), GOLDEN_KEYS, ids=str)
def test_golden_keys(coordinates, golden):
    seed, epoch, clip, repeat = coordinates
    assert clip_keys(seed, epoch, torch.tensor([clip]), repeat).tolist() == [golden]
    assert python_key(*coordinates) == golden


def test_keys_equal_plain_integers():
    generator = torch.Generator().manual_seed(0)
    epoch, clip, repeat = torch.randint(-(2**62), 2**62, (3, 200), generator=generator)
    for seed in (0, 17, -5, 2**63 - 1, -(2**63)):
        keys = clip_keys(seed, epoch, clip, repeat)
        rows = torch.stack([epoch, clip, repeat], dim=1).tolist()
        expected = [python_key(seed, *row) for row in rows]
        assert keys.dtype == torch.int64
        assert keys.tolist() == expected


def test_numbers_and_tensors_give_the_same_keys():
    clip = torch.arange(7)
    numbers = clip_keys(3, 5, clip, 2)
    assert torch.equal(numbers, clip_keys(3, torch.full((7,), 5), clip, torch.full((7,), 2)))


def test_mix_is_a_bijection_on_words():
    words = torch.arange(0, WORD, 65521)
    mixed = mix(words)
    assert mixed.min() >= 0
    assert mixed.max() < WORD
    assert mixed.unique().numel() == words.numel()
    assert mixed[:50].tolist() == [python_mix(w) for w in words[:50].tolist()]


def test_every_coordinate_matters_in_both_halves():
    base = python_key(1, 2, 3, 4)
    changed = set()
    for position in range(4):
        for bit in (0, 1, 31, 32, 33, 62):
            coordinates = [1, 2, 3, 4]
            coordinates[position] ^= 1 << bit
            seed, epoch, clip, repeat = coordinates
            key = clip_keys(seed, epoch, torch.tensor([clip]), repeat).item()
            changed.add(key)
    assert base not in changed
    assert len(changed) == 24


def test_coordinates_are_not_interchangeable():
    keys = {
        clip_keys(seed, epoch, torch.tensor([clip]), repeat).item()
        for seed, epoch, clip, repeat in itertools.permutations((0, 1, 2, 3))
    }
    assert len(keys) == 24


def test_key_bits_are_fair_and_independent():
    count = 8192
    keys = clip_keys(0, 0, torch.arange(count))
    bits = (keys.unsqueeze(1) >> torch.arange(32)) & 1
    signs = bits.double() * 2 - 1
    # Five standard deviations of a mean of 8192 signs.
    bound = 5 / math.sqrt(count)
    assert signs.mean(dim=0).abs().max() < bound
    between = signs.t() @ signs / count - torch.eye(32)
    assert between.abs().max() < bound
    following = signs[1:].t() @ signs[:-1] / count
    assert following.abs().max() < bound


def test_neighbouring_seeds_epochs_and_repeats_share_no_bits():
    clip = torch.arange(8192)
    shifts = torch.arange(32)
    base = (clip_keys(0, 0, clip).unsqueeze(1) >> shifts) & 1
    for other in (clip_keys(1, 0, clip), clip_keys(0, 1, clip), clip_keys(0, 0, clip, 1),
                  clip_keys(0, 0, clip + 1)):  # fmt: skip
        equal = (base == ((other.unsqueeze(1) >> shifts) & 1)).double().mean(dim=0)
        # Half of all bits agree, within five standard deviations.
        assert (equal - 0.5).abs().max() < 2.5 / math.sqrt(8192)


def test_random_words_and_combine_equal_plain_integers():
    key = clip_keys(9, 0, torch.arange(3))
    words = random_words(key, 5)
    expected = [[python_combine(k, i) for i in range(5)] for k in key.tolist()]
    assert words.tolist() == expected
    assert combine(key, 3).tolist() == [row[3] for row in expected]


@pytest.mark.parametrize("count", [1, 2, 17, 1568])
def test_shuffled_is_a_permutation(count):
    order = shuffled(clip_keys(0, 0, torch.arange(5)), count)
    assert torch.equal(order.sort(dim=1).values, torch.arange(count).expand(5, count))


def test_shuffled_breaks_ties_by_position():
    # Ranking by (word, position): what a stable sort of the words gives.
    key = clip_keys(4, 0, torch.arange(20))
    expected = random_words(key, 301).sort(dim=1, stable=True).indices
    assert torch.equal(shuffled(key, 301), expected)


def test_all_permutations_of_four_are_equally_likely():
    count = 4800
    order = shuffled(clip_keys(0, 0, torch.arange(count)), 4)
    code = (order * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    observed = code.unique(return_counts=True)[1].double()
    assert observed.numel() == 24
    chi_square = ((observed - count / 24).square() / (count / 24)).sum().item()
    # 23 degrees of freedom: mean 23, standard deviation 6.8.
    assert chi_square < 23 + 5 * math.sqrt(2 * 23)
