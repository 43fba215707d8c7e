"""Mask: conversion from and to booleans, and its errors."""

import dataclasses

import pytest
import torch
from helpers import random_mask

from vmae_fast import Mask


@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 17, 5), (4, 1568, 1408)], ids=str)
def test_from_bool_and_back(shape):
    batch, num_tokens, num_masked = shape
    boolean = random_mask(batch, num_tokens, num_masked)
    before = boolean.clone()
    mask = Mask.from_bool(boolean)
    assert mask.num_tokens == num_tokens
    assert mask.num_scored == num_masked
    assert mask.scored is None
    assert mask.batch_size == batch
    for clip in range(batch):
        # True = masked; both parts in index order.
        assert mask.visible_idx[clip].tolist() == [
            n for n in range(num_tokens) if not boolean[clip, n]
        ]
        assert mask.decode_idx[clip].tolist() == [n for n in range(num_tokens) if boolean[clip, n]]
    assert torch.equal(mask.target_idx, mask.decode_idx)
    assert torch.equal(mask.to_bool(), boolean)
    assert torch.equal(boolean, before)
    assert mask.scored_count() == batch * num_masked


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_zeros_and_ones_are_accepted(dtype):
    boolean = random_mask(2, 9, 4)
    mask, expected = Mask.from_bool(boolean.to(dtype)), Mask.from_bool(boolean)
    assert torch.equal(mask.visible_idx, expected.visible_idx)
    assert torch.equal(mask.decode_idx, expected.decode_idx)


def test_non_contiguous_boolean():
    boolean = random_mask(4, 17, 6)
    mask = Mask.from_bool(boolean.t().contiguous().t())
    assert torch.equal(mask.to_bool(), boolean)


def unequal():
    mask = torch.zeros(4, 196, dtype=torch.bool)
    mask[:, :176] = True
    mask[3, 5] = False
    return mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            unequal(),
            "mask marks 176 tokens in clip 0 but 175 in clip 3; every clip in a batch must "
            "mask the same number",
        ),
        (torch.zeros(2, 9, dtype=torch.bool), "mask marks 0 of 9 tokens in each clip"),
        (torch.ones(2, 9, dtype=torch.bool), "mask marks 9 of 9 tokens in each clip"),
        (torch.ones(9, dtype=torch.bool), r"mask must be \(B, N\), got shape \(9,\)"),
        (torch.ones(2, 3, 3, dtype=torch.bool), r"mask must be \(B, N\), got .*\(2, 3, 3\)"),
        (random_mask(2, 9, 4).float(), "mask must be boolean .* got torch.float32"),
        (torch.arange(9).expand(2, 9), "mask must be boolean .* got torch.int64; index tensors"),
        (-random_mask(2, 9, 4).long(), "mask must be boolean .* got torch.int64"),
        (torch.zeros(0, 9, dtype=torch.bool), "mask marks 0 of 9 tokens"),
    ],
)
def test_errors(mask, message):
    with pytest.raises(ValueError, match=message):
        Mask.from_bool(mask)


def test_target_is_the_scored_tail():
    mask = Mask(torch.tensor([[0, 1]]), torch.tensor([[1, 3, 5]]), 6, 2)
    assert mask.target_idx.tolist() == [[3, 5]]
    assert mask.scored_count() == 2
    assert mask.to_bool().tolist() == [[False, False, True, True, True, True]]


def test_scored_weights_are_counted():
    scored = torch.tensor([[1.0, 0.0, 1.0]])
    mask = Mask(torch.tensor([[0, 1]]), torch.tensor([[1, 3, 5]]), 6, 3, scored)
    assert mask.scored_count() == 2
    assert mask.target_idx.tolist() == [[1, 3, 5]]


def test_to_moves_everything():
    scored = torch.ones(1, 3)
    mask = Mask(torch.tensor([[0, 1]]), torch.tensor([[1, 3, 5]]), 6, 3, scored)
    moved = mask.to("meta")
    assert {moved.visible_idx.device.type, moved.decode_idx.device.type} == {"meta"}
    assert moved.scored.device.type == "meta"
    assert (moved.num_tokens, moved.num_scored) == (6, 3)
    assert mask.visible_idx.device.type == "cpu"
    without = dataclasses.replace(mask, scored=None).to("meta")
    assert without.scored is None


def test_repr_counts_and_is_frozen():
    mask = Mask.from_bool(random_mask(3, 17, 5))
    assert repr(mask) == "Mask(3 clips of 17 tokens: 12 visible, 5 decoded, scored 5)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.num_scored = 3
