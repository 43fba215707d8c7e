"""V1's crop boxes by enumeration; crop and scale against a triangle filter in fp64."""

from collections import Counter

import numpy as np
import pytest
import torch

from vmae_fast.data import center_crop_box, crop_resize, multi_scale_crop_box


def boxes_320x256_to_224():
    """Every (pair of scales, place) there is, written out from the recipe."""
    sides = [256, 224, 192, 168]  # 256 times 1, .875, .75, .66, whole pixels
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)]
    boxes = Counter()
    for i, j in pairs:
        height, width = sides[i], sides[j]
        down, right = (256 - height) // 4, (320 - width) // 4
        corners = [(0, 0), (0, 4 * right), (4 * down, 0), (4 * down, 4 * right)]
        edges = [(0, 2 * right), (4 * down, 2 * right), (2 * down, 0), (2 * down, 4 * right)]
        quarters = [(down, right), (down, 3 * right), (3 * down, right), (3 * down, 3 * right)]
        for top, left in [*corners, (2 * down, 2 * right), *edges, *quarters]:
            boxes[(top, left, height, width)] += 1
    assert sum(boxes.values()) == 130
    return boxes


def test_multi_scale_boxes_of_320x256():
    expected = boxes_320x256_to_224()
    rng = np.random.default_rng(0)
    draws = 26000
    drawn = Counter(multi_scale_crop_box(256, 320, (224, 224), rng) for _ in range(draws))
    assert set(drawn) == set(expected)
    for box, times in expected.items():
        mean = draws * times / 130
        assert abs(drawn[box] - mean) < 5 * mean**0.5


@pytest.mark.parametrize(
    ("height", "width", "size", "sides"),
    [
        (226, 300, (224, 224), {224, 197, 169, 149}),  # 226 is 2 away: taken as 224
        (227, 300, (224, 224), {227, 198, 170, 149}),  # 3 away: kept
        (222, 222, (224, 224), {222, 194, 166, 146}),  # would grow to 224: stays inside
        (100, 100, (66, 66), {100, 87, 75, 66}),
        (1, 1, (8, 8), {1}),
        (2, 1000, (8, 8), {1, 2}),
    ],
)
def test_snapping_and_small_frames(height, width, size, sides):
    rng = np.random.default_rng(0)
    boxes = [multi_scale_crop_box(height, width, size, rng) for _ in range(2000)]
    assert {box[2] for box in boxes} | {box[3] for box in boxes} == sides
    for top, left, box_height, box_width in boxes:
        assert 0 <= top <= height - box_height
        assert 0 <= left <= width - box_width


def test_each_side_snaps_to_its_own_target():
    rng = np.random.default_rng(0)
    boxes = [multi_scale_crop_box(130, 200, (128, 114), rng) for _ in range(2000)]
    assert {box[2] for box in boxes} == {128, 113, 97, 85}
    assert {box[3] for box in boxes} == {130, 114, 97, 85}


@pytest.mark.parametrize(
    ("frame", "size", "box"),
    [
        ((256, 320), (224, 224), (0, 32, 256, 256)),
        ((320, 256), (224, 224), (32, 0, 256, 256)),
        ((101, 200), (64, 64), (0, 49, 101, 101)),
        ((200, 400), (100, 200), (0, 0, 200, 400)),
        ((200, 500), (100, 200), (0, 50, 200, 400)),
        ((300, 400), (100, 200), (50, 0, 200, 400)),
        ((10, 1000), (100, 1), (0, 499, 10, 1)),
    ],
)
def test_center_box(frame, size, box):
    assert center_crop_box(*frame, size) == box


def triangle_filter(length, target):
    """Rows of weights (target, length): linear interpolation, widened when shrinking."""
    scale = length / target
    reach = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(length) + 0.5 - centres[:, None]) / reach
    weights = np.maximum(0, 1 - distance)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((3, 5, 37, 41), (32, 32)),
        ((0, 0, 47, 61), (16, 24)),
        ((1, 2, 20, 31), (32, 32)),
        ((10, 10, 1, 1), (4, 3)),
        ((2, 3, 32, 40), (32, 24)),
        ((0, 0, 47, 61), (1, 1)),
    ],
)
def test_crop_resize_is_the_antialiased_triangle_filter(kind, box, size):
    frames = np.random.default_rng(1).integers(0, 256, (3, 47, 61, 3), np.uint8)
    top, left, height, width = box
    crop = frames[:, top : top + height, left : left + width].astype(np.float64)
    down, across = triangle_filter(height, size[0]), triangle_filter(width, size[1])
    truth = np.einsum("yh,xw,thwc->tyxc", down, across, crop)
    source = frames if kind == "numpy" else torch.from_numpy(frames)
    result = crop_resize(source, box, size)
    assert result.dtype == torch.uint8
    assert result.shape == (3, *size, 3)
    assert result.is_contiguous()
    # Rounded once for each direction.
    assert np.abs(result.numpy() - truth).max() <= 1.01
    flipped = crop_resize(source, box, size, flip=True)
    assert flipped.is_contiguous()
    assert np.abs(flipped.numpy() - truth[:, :, ::-1]).max() <= 1.01


@pytest.mark.parametrize("flip", [False, True])
def test_a_box_of_the_target_size_is_only_cut_out(flip):
    frames = np.random.default_rng(1).integers(0, 256, (3, 47, 61, 3), np.uint8)
    cut = frames[:, 4:36, 7:39]
    result = crop_resize(frames, (4, 7, 32, 32), (32, 32), flip=flip)
    np.testing.assert_array_equal(result.numpy(), cut[:, :, ::-1] if flip else cut)
    assert result.is_contiguous()
    whole = crop_resize(frames, (0, 0, 47, 61), (47, 61), flip=flip)
    before = frames.copy()
    whole.zero_()
    np.testing.assert_array_equal(frames, before)


def test_any_strides():
    frames = np.random.default_rng(1).integers(0, 256, (3, 20, 30, 3), np.uint8)
    turned = np.rot90(frames, 1, axes=(1, 2))[::-1]
    expected = crop_resize(turned.copy(), (1, 2, 15, 13), (8, 8))
    assert torch.equal(crop_resize(turned, (1, 2, 15, 13), (8, 8)), expected)
    channels_first = torch.from_numpy(turned.copy()).permute(0, 3, 1, 2).contiguous()
    assert torch.equal(
        crop_resize(channels_first.permute(0, 2, 3, 1), (1, 2, 15, 13), (8, 8)), expected
    )


def test_errors():
    frames = np.zeros((2, 20, 30, 3), np.uint8)
    with pytest.raises(ValueError, match=r"leaves the frame of 20x30"):
        crop_resize(frames, (0, 0, 21, 30), (8, 8))
    with pytest.raises(ValueError, match=r"leaves the frame"):
        crop_resize(frames, (-1, 0, 10, 10), (8, 8))
    with pytest.raises(ValueError, match=r"must be at least 1"):
        crop_resize(frames, (0, 0, 0, 10), (8, 8))
    with pytest.raises(ValueError, match=r"must be uint8"):
        crop_resize(frames.astype(np.float32), (0, 0, 10, 10), (8, 8))
    with pytest.raises(ValueError, match=r"must be uint8"):
        crop_resize(frames[0], (0, 0, 10, 10), (8, 8))
    with pytest.raises(ValueError, match=r"must be at least 1"):
        multi_scale_crop_box(0, 10, (8, 8), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"must be at least 1"):
        center_crop_box(10, 10, (0, 8))
