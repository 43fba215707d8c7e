"""The order of clips: permutations, ranks, resuming, weights and repeats."""

import collections

import numpy as np
import pytest

from vmae_fast.data import ClipRequest, ClipSampler


def sampler_of(count, **arguments):
    return ClipSampler(count, **{"clips_per_step": 4, "seed": 5, "total_steps": 5, **arguments})


def flat(batches):
    return [(request.epoch, request.index) for batch in batches for request in batch]


def test_epochs_are_permutations_without_remainder():
    order = flat(ClipSampler(10, clips_per_step=4, seed=3, total_steps=15))
    assert len(order) == 60
    for epoch in range(6):
        part = order[10 * epoch : 10 * (epoch + 1)]
        assert {number for number, _ in part} == {epoch}
        assert sorted(index for _, index in part) == list(range(10))
    assert len({tuple(i for _, i in order[10 * e : 10 * e + 10]) for e in range(6)}) == 6
    assert order != flat(ClipSampler(10, clips_per_step=4, seed=4, total_steps=15))


def test_a_step_may_hold_several_epochs():
    order = flat(ClipSampler(3, clips_per_step=8, seed=3, total_steps=3))
    assert [epoch for epoch, _ in order] == [position // 3 for position in range(24)]
    assert collections.Counter(index for _, index in order) == {0: 8, 1: 8, 2: 8}


def test_indices_may_be_given():
    order = flat(ClipSampler([4, 7, 9], clips_per_step=3, seed=3, total_steps=2))
    assert sorted(index for _, index in order[:3]) == [4, 7, 9]
    assert {type(index) for _, index in order} == {int}


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (4, 1), (1, 3), (4, 3)])
def test_ranks_and_micro_batches_share_out_each_step(world_size, accumulate):
    steps, per_step = 7, 24
    whole = flat(ClipSampler(31, clips_per_step=per_step, seed=3, total_steps=steps))
    shares = [
        list(
            ClipSampler(
                31,
                clips_per_step=per_step,
                seed=3,
                total_steps=steps,
                rank=rank,
                world_size=world_size,
                accumulate=accumulate,
            )
        )
        for rank in range(world_size)
    ]
    for share in shares:
        assert len(share) == steps * accumulate
        assert {len(batch) for batch in share} == {per_step // world_size // accumulate}
    for step in range(steps):
        together = [
            batch
            for share in shares
            for batch in share[step * accumulate : (step + 1) * accumulate]
        ]
        assert flat(together) == whole[step * per_step : (step + 1) * per_step]


def test_resuming_is_the_tail():
    arguments = {"clips_per_step": 8, "seed": 3, "total_steps": 9, "accumulate": 2}
    whole = list(ClipSampler(11, **arguments))
    for start in range(10):
        resumed = ClipSampler(11, start_step=start, **arguments)
        assert len(resumed) == 2 * (9 - start)
        assert list(resumed) == whole[2 * start :]


def test_iterating_twice_gives_the_same():
    sampler = ClipSampler(5, clips_per_step=2, seed=0, total_steps=6)
    assert list(sampler) == list(sampler)


def test_one_permutation_an_epoch(monkeypatch):
    sampler = ClipSampler(1000, clips_per_step=10, seed=0, total_steps=250)
    epochs = []
    original = np.random.Generator

    class Counting(original):
        def permutation(self, *arguments):
            epochs.append(arguments)
            return original.permutation(self, *arguments)

    monkeypatch.setattr(np.random, "Generator", Counting)
    assert sum(len(batch) for batch in sampler) == 2500
    assert len(epochs) == 3


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"clips_per_step": 10, "world_size": 4}, r"clips_per_step=10 .* 4 \* 1 = 4"),
        ({"clips_per_step": 12, "world_size": 4, "accumulate": 2}, r"=12 .* 4 \* 2 = 8"),
        ({"clips_per_step": 0}, "clips_per_step=0"),
        ({"accumulate": 0}, "must be a multiple"),
        ({"rank": 1}, r"rank must be in \[0, world_size=1\), got 1"),
        ({"start_step": 6}, r"start_step must be in \[0, 5\], got 6"),
    ],
)
def test_sampler_errors(wrong, match):
    with pytest.raises(ValueError, match=match):
        sampler_of(9, **wrong)


def test_sampler_without_files():
    for nothing in (0, []):
        with pytest.raises(ValueError, match="names no file"):
            sampler_of(nothing)


# ---- weights and repeats ------------------------------------------------------------------


def clips(requests, repeats):
    """Every clip of some requests: (pass, index, repeat)."""
    return [
        (r.epoch, r.index, k)
        for r in requests
        for k in range(r.first, repeats[r.index] if r.repeats is None else r.first + r.repeats)
    ]


def test_equal_repeats_are_the_plain_order_of_files():
    plain = ClipSampler(7, clips_per_step=3, seed=1, total_steps=20)
    repeated = ClipSampler(7, clips_per_step=12, seed=1, total_steps=20, repeats=4)
    assert list(plain) == list(repeated)
    assert (repeated.files_per_epoch, repeated.clips_per_epoch) == (7, 28)


def test_repeats_of_each_file_make_batches_of_one_size():
    repeats = [1, 4, 2, 3, 1]
    sampler = ClipSampler(
        5, clips_per_step=6, seed=3, total_steps=11, repeats=repeats, accumulate=2
    )
    assert (sampler.files_per_epoch, sampler.clips_per_epoch) == (5, 11)
    batches = list(sampler)
    assert {len(clips(batch, repeats)) for batch in batches} == {3}
    whole = [clip for batch in batches for clip in clips(batch, repeats)]
    for epoch in range(6):
        part = whole[11 * epoch : 11 * (epoch + 1)]
        assert sorted(part) == [(epoch, i, k) for i in range(5) for k in range(repeats[i])]
        # Those of a file stand together, in order.
        assert [k for _, i, k in part if i == 1] == [0, 1, 2, 3]
        first = [i for _, i, _ in part].index(1)
        assert [i for _, i, _ in part][first : first + 4] == [1] * 4
    # One that is cut is asked for in two parts.
    cut = [r for batch in batches for r in batch if r.first or r.repeats is not None]
    assert cut


def test_repeats_do_not_change_the_order_of_files():
    plain = ClipSampler(9, clips_per_step=9, seed=1, total_steps=1)
    mixed = ClipSampler(9, clips_per_step=18, seed=1, total_steps=1, repeats=[3, 1, 2] * 3)
    assert [r.index for r in next(iter(mixed))] == [r.index for r in next(iter(plain))]


def test_weights_are_times_an_epoch():
    weights = [1, 2, 0.5, 0.5, 0.5, 0.5]
    sampler = ClipSampler(6, clips_per_step=5, seed=3, total_steps=24, weights=weights)
    assert sampler.files_per_epoch == 5
    for epoch, batch in enumerate(sampler):
        counts = collections.Counter(request.index for request in batch)
        assert counts[0] == 1
        assert counts[1] == 2
        assert sum(counts[index] for index in range(2, 6)) == 2
        # Twice in an epoch are two passes, so that it is two clips.
        assert sorted(r.epoch for r in batch if r.index == 1) == [2 * epoch, 2 * epoch + 1]
        assert {r.epoch for r in batch if r.index != 1} == {2 * epoch}
    seen = [r.index for batch in sampler for r in batch]
    # Taking turns: in any two epochs in a row each of the four comes once.
    for epoch in range(0, 24, 2):
        part = [index for index in seen[5 * epoch : 5 * epoch + 10] if index > 1]
        assert sorted(part) == [2, 3, 4, 5]


def test_a_weight_between_leaves_no_file_behind():
    sampler = ClipSampler(10, clips_per_step=7, seed=0, total_steps=100, weights=0.7)
    counts = collections.Counter(request.index for batch in sampler for request in batch)
    assert set(counts.values()) == {70}


def test_a_small_weight_is_seen_now_and_then():
    sampler = ClipSampler(3, clips_per_step=1, seed=0, total_steps=6, weights=0.01)
    assert collections.Counter(r.index for (r,) in sampler) == {0: 2, 1: 2, 2: 2}


def test_ranks_share_mixed_repeats_and_weights():
    arguments = {"seed": 2, "total_steps": 9, "clips_per_step": 12}
    repeats, weights = [1, 2, 4, 1, 3], [1, 0.5, 1.5, 0.5, 2]
    mixed = {"repeats": repeats, "weights": weights, **arguments}
    whole = [c for batch in ClipSampler(5, **mixed) for c in clips(batch, repeats)]
    shares = [list(ClipSampler(5, rank=r, world_size=3, **mixed)) for r in range(3)]
    together = [c for step in zip(*shares, strict=True) for b in step for c in clips(b, repeats)]
    assert together == whole
    tail = list(ClipSampler(5, start_step=4, **mixed))
    assert tail == list(ClipSampler(5, **mixed))[4:]
    assert len(set(whole)) == len(whole)


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"weights": 0}, {"weights": float("nan")}])
def test_wrong_weights_and_repeats(wrong):
    with pytest.raises(ValueError, match="repeats must be at least 1 and weights above 0"):
        sampler_of(3, **wrong)


def test_requests_are_plain_values():
    (batch,) = ClipSampler(1, clips_per_step=1, seed=0, total_steps=1)
    assert batch == [ClipRequest(0, 0)]
