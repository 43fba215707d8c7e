"""Batches copied ahead: the same ones, in order, with their errors where they belong."""

import pytest
import torch

from vmae_fast.data import BadFile, ClipBatch, DataError
from vmae_fast.train.prefetch import Prefetched, prefetched


def batch_of(number):
    return ClipBatch(
        video=torch.full((2, 3, 2, 4, 4), number, dtype=torch.uint8),
        clip=torch.tensor([number, number]),
        repeat=torch.tensor([0, 1]),
        epoch=torch.tensor([0, 0]),
        paths=[f"{number}.mp4"] * 2,
        bad=[BadFile(f"bad{number}.mp4", "why")],
    )


class Source:
    """Batches by number, of which so many are there before they are asked for."""

    def __init__(self, count, there=0, error=None):
        self.count, self.there, self.error = count, there, error
        self.given = 0

    def ready(self):
        return self.given < self.there

    def __iter__(self):
        return self

    def __next__(self):
        if self.given == self.count:
            raise self.error or StopIteration
        self.given += 1
        return batch_of(self.given - 1)


class Copies:
    """Stands for a stream: says what was started and finished, in order."""

    def __init__(self):
        self.log = []

    def start(self, batch):
        number = int(batch.clip[0])
        self.log.append(("start", number))
        return batch, number

    def finish(self, batch, arrival):
        assert arrival == int(batch.clip[0])
        self.log.append(("finish", arrival))
        return batch


def test_other_devices_get_the_batches_as_they_are():
    batches = iter([batch_of(0)])
    assert prefetched(batches, torch.device("cpu")) is batches


@pytest.mark.parametrize("there", [0, 3, 9])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_same_batches_in_order(there, ahead):
    copies = Copies()
    found = list(Prefetched(Source(6, there), copies, ahead))
    assert [int(batch.video.flatten()[0]) for batch in found] == list(range(6))
    assert [batch.bad[0].path for batch in found] == [f"bad{k}.mp4" for k in range(6)]
    assert [number for what, number in copies.log if what == "start"] == list(range(6))
    assert [number for what, number in copies.log if what == "finish"] == list(range(6))


def test_one_more_is_under_way_where_it_is_there():
    copies = Copies()
    batches = Prefetched(Source(9, there=9), copies, ahead=1)
    next(batches)
    assert copies.log == [("start", 0), ("start", 1), ("finish", 0)]
    next(batches)
    assert copies.log[3:] == [("start", 2), ("finish", 1)]


def test_nothing_is_waited_for_ahead_of_its_turn():
    source, copies = Source(9, there=1), Copies()
    batches = Prefetched(source, copies, ahead=2)
    next(batches)
    assert copies.log == [("start", 0), ("finish", 0)]
    source.there = 3
    next(batches)
    assert source.given == 3
    # An iterator that cannot say is asked batch by batch.
    plain = iter([batch_of(0), batch_of(1)])
    first = Prefetched(plain, Copies(), ahead=2)
    next(first)
    assert int(next(plain).clip[0]) == 1


def test_an_error_comes_at_its_batch():
    error = DataError("too many bad files")
    source = Source(2, there=9, error=error)
    source.ready = lambda: True
    batches = Prefetched(source, Copies(), ahead=2)
    assert [int(next(batches).clip[0]) for _ in range(2)] == [0, 1]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert caught.value is error


def test_an_interruption_is_not_put_off():
    source = Source(1, there=9, error=KeyboardInterrupt())
    source.ready = lambda: True
    with pytest.raises(KeyboardInterrupt):
        next(Prefetched(source, Copies(), ahead=1))


def test_the_end_is_the_end():
    source = Source(2)
    source.ready = lambda: True
    batches = Prefetched(source, Copies(), ahead=2)
    assert len(list(batches)) == 2
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(batches)
