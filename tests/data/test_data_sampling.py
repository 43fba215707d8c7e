"""Clip frames: V1's span, uniform starts, and the last reachable position held."""

from collections import Counter
from itertools import pairwise

import pytest

from vmae_fast.data import CENTER_START, clip_indices, clip_span
from vmae_fast.data.sampling import clip_times


def test_published_example_of_a_short_clip():
    expected = [0, 4, 8, 12, 16, 20, 24, 28, 28, 28, 28, 28, 28, 28, 28, 28]
    assert clip_indices(30, 16, 4, 0.9) == expected


def test_every_start_is_drawn_equally_often():
    # 16 frames at stride 4 span 64: 70 frames leave the starts 0 to 6.
    assert clip_span(16, 4) == 64
    draws = 7000
    starts = Counter(clip_indices(70, 16, 4, k / draws)[0] for k in range(draws))
    assert starts == dict.fromkeys(range(7), 1000)
    for start in range(7):
        assert clip_indices(70, 16, 4, (start + 0.5) / 7) == list(range(start, start + 64, 4))


@pytest.mark.parametrize(
    ("num_frames", "start"), [(64, 0), (65, 1), (66, 1), (70, 3), (63, 0), (1, 0)]
)
def test_centre(num_frames, start):
    assert clip_indices(num_frames, 16, 4, CENTER_START)[0] == start


def test_indices_stay_inside_for_any_length():
    for num_frames in range(1, 80):
        for stride in (1, 2, 3, 7):
            for u in (0.0, 0.4, 1 - 2**-53):
                indices = clip_indices(num_frames, 5, stride, u)
                assert len(indices) == 5
                assert indices[0] >= 0
                assert indices[-1] < num_frames
                steps = [b - a for a, b in pairwise(indices)]
                held = steps.index(0) if 0 in steps else len(steps)
                assert steps == [stride] * held + [0] * (len(steps) - held)
                if held < len(steps):  # held because the next one would be outside
                    assert indices[-1] + stride >= num_frames


def test_u_just_below_one_is_the_last_start():
    for num_frames in [*range(1, 5000), 2**31 - 1, 2**40 + 3]:
        assert clip_indices(num_frames, 1, 1, 1 - 2**-53) == [num_frames - 1]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 4, 2, 0.5), "num_frames must be at least 1, got 0"),
        ((9, 0, 2, 0.5), "frames and stride .* got 0 and 2"),
        ((9, 4, 0, 0.5), "frames and stride .* got 4 and 0"),
        ((9, 4, 2, 1.0), "u must be in"),
        ((9, 4, 2, -0.1), "u must be in"),
        ((9, 4, 2, float("nan")), "u must be in"),
    ],
)
def test_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        clip_indices(*arguments)


def test_times_of_a_clip_that_fits():
    # 8 frames at 4 a second take 2 s of 10: starts in [0, 8).
    assert clip_times(10, 8, 4, 0.0) == [k / 4 for k in range(8)]
    assert clip_times(10, 8, 4, CENTER_START) == [4 + k / 4 for k in range(8)]
    assert clip_times(10, 8, 4, 0.75)[0] == 6
    assert clip_times(10, 8, 4, 1 - 2**-53)[-1] < 10


def test_times_of_a_short_video_hold_the_last_reachable():
    assert clip_times(1, 6, 4, 0.9) == [0, 0.25, 0.5, 0.75, 0.75, 0.75]
    assert clip_times(1.1, 6, 4, 0.9) == [0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert clip_times(0.1, 3, 4, 0.9) == [0, 0, 0]


@pytest.mark.parametrize("rate", [24, 25, 30000 / 1001, 60])
def test_times_are_the_indices_at_a_constant_rate(rate):
    for num_frames in (1, 5, 30, 61, 63, 64):
        for stride in (1, 2, 3, 4):
            # A duration as containers give it, in whole microseconds.
            seconds = round(num_frames / rate, 6)
            times = clip_times(seconds, 16, rate / stride, 0.0)
            frames = [int(time * rate + 1e-3) for time in times]
            assert frames == clip_indices(num_frames, 16, stride, 0.0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0.0, 4, 2.0, 0.5), "seconds must be above 0"),
        ((float("nan"), 4, 2.0, 0.5), "seconds must be above 0"),
        ((float("inf"), 4, 2.0, 0.5), "seconds must be above 0"),
        ((9.0, 0, 2.0, 0.5), "frames must be at least 1"),
        ((9.0, 4, 0.0, 0.5), "fps must be above 0"),
        ((9.0, 4, float("nan"), 0.5), "fps must be above 0"),
        ((9.0, 4, 2.0, 1.0), "u must be in"),
    ],
)
def test_errors_of_times(arguments, match):
    with pytest.raises(ValueError, match=match):
        clip_times(*arguments)
