"""Which knob a waiting step names, and when it says so."""

from dataclasses import replace

import pytest

from vmae_fast.train.waiting import AGAIN_S, OTHER_S, Loading, WaitingAdvice, advice, knob

# Four workers on sixteen cores beside a GPU.
BASE = Loading(share=0.5, workers=4, cores=16, clip_s=0.025, cpu_share=0.95)


def test_a_tenth_is_nothing_to_speak_of():
    assert advice(replace(BASE, share=0.10)) is None
    assert advice(replace(BASE, share=0.0)) is None
    assert advice(replace(BASE, share=0.11)) is not None


@pytest.mark.parametrize(
    ("share", "workers", "needed"),
    [
        # Four load half of what is asked for: eight, and a tenth more.
        (0.5, 4, 9),
        (0.75, 4, 18),
        # This process decodes a quarter of its time: a third of a process beside the step.
        (0.25, 0, 1),
        # Three quarters: three, and a tenth more.
        (0.75, 0, 4),
        # Never what there is already.
        (0.11, 1, 2),
        (1.0, 1, 110),
    ],
)
def test_how_many_workers_by_hand(share, workers, needed):
    assert replace(BASE, share=share, workers=workers).needed == needed


def test_workers_come_first_while_cores_are_free():
    text = advice(BASE)
    assert text == (
        "the step waited for clips 50% of the time (a clip takes 25 ms of one process): "
        "--workers 9 would keep up; 4 decode now"
    )
    assert "--workers 1 would keep up; now this process decodes itself" in advice(
        replace(BASE, share=0.2, workers=0)
    )


def test_too_few_cores_are_used_and_the_next_knob_is_named_too():
    few = replace(BASE, cores=8)
    assert "--workers 7 uses the cores that are free; 9 would keep up" in advice(few)
    assert "vmae-fast pack" in advice(few)
    assert "vmae-fast pack" not in advice(replace(few, packed=True))
    assert "--repeats 4" in advice(replace(few, packed=True))


def test_then_packing_then_repeats_then_smaller_files():
    full = replace(BASE, cores=5)
    assert knob(full) == "pack"
    assert "vmae-fast pack DATA OUT once, then --data OUT" in advice(full)
    packed = replace(full, packed=True)
    assert knob(packed) == "repeats"
    assert "--repeats 4 makes 4 clips of each decoded one" in advice(packed)
    repeated = replace(packed, repeats=4)
    assert knob(repeated) == "smaller"
    assert "9 processes would keep up, 4 decode now" in advice(repeated)


def test_on_a_cpu_all_cores_compute():
    alone = replace(BASE, workers=0, cores=2, busy_cores=2)
    assert knob(alone) == "pack"
    assert "now this process decodes itself" in advice(alone)


def test_idle_workers_mean_slow_storage():
    slow = replace(BASE, cpu_share=0.2)
    assert knob(slow) == "storage"
    assert "is idle 80% of that, waiting for the storage" in advice(slow)
    assert "--workers 9" in advice(slow)
    assert "some --workers" in advice(replace(slow, workers=0))
    # Crowded workers wait for cores.
    assert knob(replace(slow, cores=4)) == "pack"
    assert knob(replace(slow, cpu_share=None)) == "workers"


def test_a_cache_passes_and_a_full_one_leaves_only_crops():
    assert knob(replace(BASE, cache="filling")) is None
    assert knob(replace(BASE, cache="full")) == "workers"
    assert knob(replace(BASE, cache="full", cores=5)) is None


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("cores", [1, 5, 64])
@pytest.mark.parametrize("cpu_share", [0.1, 0.9])
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_one_sentence(workers, cores, cpu_share, packed):
    text = advice(
        Loading(0.3, workers, cores, packed=packed, cpu_share=cpu_share, repeats=1 + 3 * packed)
    )
    assert "\n" not in text
    assert not text.endswith(".")
    assert text.startswith("the step waited for clips 30% of the time: ")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_it_is_said_once_in_a_while():
    clock = Clock()
    say = WaitingAdvice(clock)
    # Loading starts up.
    assert say(BASE) is None
    clock.now = 10
    assert say(BASE) is not None
    for clock.now in (20, 300, 9 + AGAIN_S):
        assert say(replace(BASE, share=0.6)) is None
    clock.now = 10 + AGAIN_S
    assert "60%" in say(replace(BASE, share=0.6))
    # Another knob is said sooner, and a step that does not wait says nothing.
    clock.now += OTHER_S - 1
    assert say(replace(BASE, cpu_share=0.1)) is None
    clock.now += 1
    assert "storage" in say(replace(BASE, cpu_share=0.1))
    assert say(replace(BASE, share=0.0)) is None
    assert say(replace(BASE, cpu_share=0.1)) is None


def test_the_first_interval_may_be_a_quick_one():
    say = WaitingAdvice(Clock())
    assert say(replace(BASE, share=0.0)) is None
    assert say(BASE) is not None
