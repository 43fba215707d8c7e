"""Counts of the published generators, patterns by simulation, uniformity, errors."""

import functools
import itertools
import math
from collections import deque

import pytest
import torch

from vmae_fast import Mask, Masking, clip_keys

GRID_14 = (8, 14, 14)
GRID_16 = (8, 16, 16)


def keys(count, seed=0, epoch=0, repeat=0):
    return clip_keys(seed, epoch, torch.arange(count), repeat)


def decoded_by_queue(grid, queue, phase):
    """``(t, h, w)`` boolean, True = decoded, from a queue that turns by one with every row."""
    t, h, w = grid
    turning = deque(queue)
    turning.rotate(-phase)
    decoded = torch.zeros(grid, dtype=torch.bool)
    for row in range(t):
        # The four places of a cell, in reading order, take the queue's entries in order.
        cell = [list(turning)[:2], list(turning)[2:]]
        for y, x in itertools.product(range(h), range(w)):
            decoded[row, y, x] = cell[y % 2][x % 2] == 0
        turning.rotate(-1)
    return decoded


@functools.cache
def patterns(grid, decoder_ratio):
    """The positions that each of the four phases decodes, ascending."""
    phases = (decoded_by_queue(grid, QUEUES[decoder_ratio], phase) for phase in range(4))
    return [decoded.flatten().nonzero().flatten().tolist() for decoded in phases]


def phase_of(decode_idx, grid, decoder_ratio):
    """Which of the four phases decodes exactly these positions."""
    return patterns(grid, decoder_ratio).index(sorted(decode_idx.tolist()))


QUEUES = {0.5: [1, 1, 0, 0], 0.75: [1, 1, 1, 0]}


# ---- counts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "ratio", "masked_a_row", "visible_a_row"),
    [
        (GRID_14, 0.9, 176, 20),
        (GRID_14, 0.95, 186, 10),
        (GRID_14, 0.75, 147, 49),
        ((8, 16, 16), 0.9, 230, 26),
        ((3, 5, 7), 0.5, 17, 18),
        ((1, 2, 1), 0.5, 1, 1),
    ],
)
def test_tube_counts(grid, ratio, masked_a_row, visible_a_row):
    t, h, w = grid
    masking = Masking(grid, "tube", ratio)
    mask = masking(keys(3))
    assert masking.num_visible == t * visible_a_row
    assert masking.num_tokens == t * h * w == mask.num_tokens
    assert masking.num_unscored == 0
    assert mask.visible_idx.shape == (3, t * visible_a_row)
    assert mask.decode_idx.shape == (3, t * masked_a_row)
    assert mask.num_scored == t * masked_a_row
    assert mask.scored is None
    assert mask.scored_count() == 3 * t * masked_a_row


def test_the_published_clip_has_160_visible_and_the_larger_grid_208():
    assert Masking(GRID_14).num_visible == 160
    assert Masking(GRID_16).num_visible == 208


@pytest.mark.parametrize(
    ("grid", "ratio", "masked"),
    [(GRID_14, 0.9, 1411), (GRID_14, 0.75, 1176), ((3, 5, 7), 0.33, 34), ((1, 1, 2), 0.99, 1)],
)
def test_random_counts(grid, ratio, masked):
    masking = Masking(grid, "random", ratio)
    mask = masking(keys(3))
    n = grid[0] * grid[1] * grid[2]
    assert masking.num_visible == n - masked
    assert mask.visible_idx.shape == (3, n - masked)
    assert mask.decode_idx.shape == (3, masked)


@pytest.mark.parametrize(
    ("grid", "decoder_ratio", "decoded", "unscored", "scored"),
    [
        (GRID_14, 0.5, 784, 80, 704),
        (GRID_14, 0.75, 392, 40, 352),
        (GRID_16, 0.5, 1024, 104, 920),
        (GRID_16, 0.75, 512, 52, 460),
    ],
)
def test_running_cell_counts(grid, decoder_ratio, decoded, unscored, scored):
    masking = Masking(grid, "tube", 0.9, decoder_ratio)
    mask = masking(keys(32))
    assert masking.num_unscored == unscored
    assert mask.decode_idx.shape == (32, decoded)
    assert mask.num_scored == scored
    assert mask.scored is None
    assert mask.target_idx.shape == (32, scored)
    for clip in range(32):
        visible = set(mask.visible_idx[clip].tolist())
        head, tail = mask.decode_idx[clip].split([unscored, scored])
        # Seen ones first, unseen ones after, ascending within both.
        assert set(head.tolist()) <= visible
        assert not set(tail.tolist()) & visible
        assert (head.diff() > 0).all()
        assert (tail.diff() > 0).all()
        assert torch.equal(tail, mask.target_idx[clip])


# ---- what is masked -----------------------------------------------------------------------


@pytest.mark.parametrize("grid", [GRID_14, (3, 5, 7), (1, 4, 3)])
def test_a_tube_is_the_same_in_each_row(grid):
    t, h, w = grid
    hidden = Masking(grid, "tube", 0.6)(keys(16)).to_bool().view(16, t, h * w)
    assert (hidden == hidden[:, :1]).all()
    assert (hidden[:, 0].sum(dim=1) == int(0.6 * h * w)).all()


def test_random_differs_between_rows():
    hidden = Masking(GRID_14, "random", 0.5)(keys(4)).to_bool().view(4, 8, 196)
    assert not (hidden == hidden[:, :1]).all()


@pytest.mark.parametrize("kind", ["tube", "random"])
@pytest.mark.parametrize("grid", [GRID_14, (3, 5, 7), (2, 1, 2)])
def test_visible_and_decoded_are_a_partition_in_index_order(kind, grid):
    masking = Masking(grid, kind, 0.6)
    mask = masking(keys(9))
    both = torch.cat([mask.visible_idx, mask.decode_idx], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(masking.num_tokens).expand(9, -1))
    assert (mask.visible_idx.diff(dim=1) > 0).all()
    assert (mask.decode_idx.diff(dim=1) > 0).all()
    assert mask.visible_idx.dtype == mask.decode_idx.dtype == torch.int64


@pytest.mark.parametrize("decoder_ratio", [0.5, 0.75])
@pytest.mark.parametrize("kind", ["tube", "random"])
@pytest.mark.parametrize("grid", [GRID_14, (8, 4, 6), (6, 4, 2), (1, 2, 2), (3, 6, 10)])
def test_running_cell_is_a_turning_queue(grid, kind, decoder_ratio):
    mask = Masking(grid, kind, 0.5, decoder_ratio)(keys(64))
    phases = {phase_of(row, grid, decoder_ratio) for row in mask.decode_idx}
    assert phases == {0, 1, 2, 3}


@pytest.mark.parametrize("decoder_ratio", [0.5, 0.75])
def test_every_position_is_decoded_equally_often_over_four_rows(decoder_ratio):
    mask = Masking((8, 4, 6), "tube", 0.5, decoder_ratio)(keys(8))
    decoded = torch.zeros(8, 8 * 24).scatter_(1, mask.decode_idx, 1.0).view(8, 2, 4, 24)
    assert (decoded.sum(dim=2) == 4 * (1 - decoder_ratio)).all()


@pytest.mark.parametrize(
    ("grid", "kind"), [((6, 14, 14), "tube"), (GRID_14, "random"), ((6, 4, 4), "random")]
)
@pytest.mark.parametrize("decoder_ratio", [0.5, 0.75])
def test_scored_weights_where_counts_differ(grid, kind, decoder_ratio):
    masking = Masking(grid, kind, 0.9 if grid[1] == 14 else 0.5, decoder_ratio)
    mask = masking(keys(64))
    n = masking.num_tokens
    assert masking.num_unscored is None
    assert mask.num_scored == mask.decode_idx.shape[1] == int(n * (1 - decoder_ratio))
    assert mask.scored.shape == mask.decode_idx.shape
    assert mask.scored.dtype == torch.float32
    hidden = mask.to_bool()
    decoded = torch.zeros_like(hidden).scatter_(1, mask.decode_idx, True)
    for clip in range(64):
        counted = mask.decode_idx[clip][mask.scored[clip] == 1]
        assert torch.equal(counted, (decoded[clip] & hidden[clip]).nonzero().flatten())
        assert set(mask.scored[clip].tolist()) <= {0.0, 1.0}
    counts = mask.scored.sum(dim=1)
    assert counts.unique().numel() > 1
    assert mask.scored_count() == (decoded & hidden).sum()
    if grid == (6, 14, 14) and decoder_ratio == 0.5:
        # Four rows leave 40 unscored exactly, the two others about 20 of their 40 visible.
        unscored = 588 - counts
        assert unscored.min() >= 45
        assert unscored.max() <= 75
        assert unscored.mean().item() == pytest.approx(60, abs=1.5)


# ---- pinned values and independence --------------------------------------------------------


def test_golden_masks():
    key = clip_keys(0, 0, torch.tensor([0, 1]))
    tube = Masking((4, 4, 6), "tube", 0.75)(key)
    assert tube.visible_idx[:, :6].tolist() == [[2, 4, 7, 9, 13, 16], [3, 5, 6, 7, 15, 23]]
    scattered = Masking((2, 3, 5), "random", 0.75)(key)
    assert scattered.visible_idx.tolist() == [
        [2, 3, 4, 7, 9, 13, 16, 26],
        [3, 5, 6, 7, 10, 15, 18, 23],
    ]
    cells = Masking((4, 4, 4), "tube", 0.75, 0.5)(key)
    assert cells.num_scored == 24
    assert cells.decode_idx[:, :8].tolist() == [
        [9, 18, 25, 34, 39, 45, 55, 61],
        [3, 6, 19, 39, 47, 54, 55, 63],
    ]
    assert cells.decode_idx[0, 8:].tolist() == [
        1, 3, 4, 6, 11, 12, 14, 16, 17, 19, 24, 26, 27, 32, 37, 40, 42, 47, 52, 53, 54, 60, 62, 63,
    ]  # fmt: skip
    weighted = Masking((4, 2, 2), "random", 0.5, 0.75)(key)
    assert weighted.visible_idx.tolist() == [[2, 3, 4, 7, 8, 9, 11, 13], [3, 4, 5, 6, 7, 9, 10, 15]]
    assert weighted.decode_idx.tolist() == [[2, 5, 8, 15], [2, 5, 8, 15]]
    assert weighted.scored.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]


SETTINGS = [
    (GRID_14, "tube", 0.9, 0.0),
    (GRID_14, "random", 0.75, 0.0),
    (GRID_14, "tube", 0.9, 0.5),
    ((6, 4, 4), "random", 0.5, 0.75),
    (GRID_14, "frame", 0.5, 0.75),
    (GRID_14, "tube", 0.9, 0.5, "frame"),
    (GRID_14, "frame", 0.9, 0.5, "random"),
]


def tensors(mask):
    found = [mask.visible_idx, mask.decode_idx]
    return found if mask.scored is None else [*found, mask.scored]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_clips_mask_depends_on_its_key_alone(settings):
    masking = Masking(*settings)
    key = keys(12)
    together = tensors(masking(key))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for mine, shuffled in zip(together, tensors(masking(key[order])), strict=True):
        assert torch.equal(mine[order], shuffled)
    for clip in (0, 5, 11):
        for mine, alone in zip(together, tensors(masking(key[clip : clip + 1])), strict=True):
            assert torch.equal(mine[clip : clip + 1], alone)
    torch.manual_seed(123)
    for mine, again in zip(together, tensors(masking(key)), strict=True):
        assert torch.equal(mine, again)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_drawing_leaves_the_global_generator_alone(settings):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Masking(*settings)(keys(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_masks_on_cpu_and_gpu(settings):
    masking = Masking(*settings)
    clip = torch.arange(64)
    here = masking(clip_keys(-3, 7, clip, 1))
    there = masking(clip_keys(-3, 7, clip.cuda(), 1))
    for mine, theirs in zip(tensors(here), tensors(there), strict=True):
        assert theirs.is_cuda
        assert torch.equal(mine, theirs.cpu())


# ---- uniformity ---------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["clip", "epoch", "repeat", "seed"])
def test_visible_positions_are_uniform(which):
    count, chosen, places = 4096, 20, 196
    counter = torch.arange(count)
    zero = torch.zeros_like(counter)
    key = {
        "clip": lambda: clip_keys(0, 0, counter),
        "epoch": lambda: clip_keys(0, counter, zero),
        "repeat": lambda: clip_keys(0, 0, zero, counter),
        "seed": lambda: torch.cat([clip_keys(s, 0, zero[:1]) for s in range(count)]),
    }[which]()
    visible = ~Masking((1, 14, 14), "tube", 0.9)(key).to_bool()
    share = chosen / places
    z = (visible.double().sum(dim=0) - count * share) / math.sqrt(count * share * (1 - share))
    assert z.abs().max() < 5
    # A sum of 196 squares of z with one constraint: mean 196, standard deviation 19.9.
    assert abs(z.square().sum().item() - places) < 5 * places * math.sqrt(2 / (places - 1))
    # Two places are visible together as often as chance says.
    together = visible.double().t() @ visible.double()
    both = count * share * (chosen - 1) / (places - 1)
    pairs = together[~torch.eye(places, dtype=torch.bool)]
    assert ((pairs - both).abs() / math.sqrt(both)).max() < 6.5


@pytest.mark.parametrize("which", ["clip", "epoch", "repeat", "seed"])
def test_neighbours_overlap_as_chance_says(which):
    count, chosen, places = 4096, 20, 196
    masking = Masking((1, 14, 14), "tube", 0.9)
    clip = torch.arange(count)
    other = {
        "clip": clip_keys(0, 0, clip + 1),
        "epoch": clip_keys(0, 1, clip),
        "repeat": clip_keys(0, 0, clip, 1),
        "seed": clip_keys(1, 0, clip),
    }[which]
    first, second = (~masking(k).to_bool() for k in (clip_keys(0, 0, clip), other))
    overlap = (first & second).sum(dim=1).double()
    # Hypergeometric mean and variance.
    mean = chosen * chosen / places
    variance = mean * (1 - chosen / places) * (places - chosen) / (places - 1)
    assert abs(overlap.mean().item() - mean) < 5 * math.sqrt(variance / count)
    assert overlap.var().item() == pytest.approx(variance, rel=0.12)


def test_phases_are_uniform_and_independent_of_the_visible_positions():
    count = 4096
    grid = (4, 4, 4)
    mask = Masking(grid, "tube", 0.5, 0.5)(keys(count))
    decoded = torch.zeros(count, 64, dtype=torch.bool).scatter_(1, mask.decode_idx, True)
    expected = torch.stack([decoded_by_queue(grid, QUEUES[0.5], p).flatten() for p in range(4)])
    phase = (decoded.unsqueeze(1) == expected).all(dim=2).double()
    assert (phase.sum(dim=1) == 1).all()
    assert (phase.sum(dim=0) - count / 4).abs().max() < 5 * math.sqrt(count * 3 / 16)
    visible = (~mask.to_bool())[:, :16].double()
    joint = phase.t() @ visible
    expected = count / 8
    assert ((joint - expected).abs() / math.sqrt(expected)).max() < 5


# ---- errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((GRID_14, "cube"), r"kind must be one of \('tube', 'random', 'frame'\), got 'cube'"),
        ((GRID_14, "tube", 1.0), "mask ratio 1.0 hides 196 of 196 positions of a row; at least"),
        ((GRID_14, "tube", 0.005), "mask ratio 0.005 hides 0 of 196 positions of a row"),
        ((GRID_14, "random", 1.0), "mask ratio 1.0 hides 1568 of 1568 tokens"),
        ((GRID_14, "random", 0.0), "mask ratio 0.0 hides 0 of 1568 tokens"),
        ((GRID_14, "tube", -0.5), "mask ratio -0.5 hides"),
        ((GRID_14, "tube", 1.5), "mask ratio 1.5 hides 294 of 196"),
        ((GRID_14, "tube", 0.9, 0.6), "decoder mask ratio must be 0, 0.5 or 0.75 .* got 0.6"),
        ((GRID_14, "tube", 0.9, 1.0), "decoder mask ratio must be 0, 0.5 or 0.75 .* got 1.0"),
        ((GRID_14, "tube", 0.9, -0.5), "decoder mask ratio must be .* got -0.5"),
        # A 266 pixel image in patches of 14.
        (((8, 266 // 14, 266 // 14), "tube", 0.9, 0.5), "2x2 cells, but it is 19x19; choose"),
        (((8, 14, 7), "random", 0.9, 0.75), "2x2 cells, but it is 14x7"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Masking(*settings)


def test_an_odd_grid_is_fine_without_decoder_masking():
    assert Masking((8, 19, 19), "tube", 0.9).num_visible == 8 * (361 - int(0.9 * 361))


def test_masking_is_frozen_and_hashable():
    masking = Masking(GRID_14)
    assert masking == Masking(GRID_14, "tube", 0.9, 0.0)
    assert hash(masking) == hash(Masking(GRID_14))
    with pytest.raises(AttributeError):
        masking.ratio = 0.5


def test_decode_part_of_foreign_visible_tokens():
    visible = torch.tensor([[0, 5, 9], [1, 2, 3]])
    plain = Masking((2, 2, 4), "tube", 0.5).decode_part(visible, keys(2))
    assert isinstance(plain, Mask)
    for clip in range(2):
        rest = sorted(set(range(16)) - set(visible[clip].tolist()))
        assert plain.decode_idx[clip].tolist() == rest
    masking = Masking((4, 2, 4), "tube", 0.5, 0.5)
    mask = masking.decode_part(visible, keys(2), static=False)
    for clip in range(2):
        decoded = mask.decode_idx[clip]
        phase_of(decoded, (4, 2, 4), 0.5)
        seen = torch.isin(decoded, visible[clip])
        assert torch.equal(mask.scored[clip], (~seen).float())
