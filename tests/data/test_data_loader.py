"""Workers that die, hang or are killed: the batches are those of workers that live."""

import gc
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from crashing import SLOW_S, CrashingDecoder, StrangeError

from vmae_fast.data import (
    BadFile,
    ClipDataset,
    ClipRequest,
    ClipSampler,
    DataError,
    list_videos,
    lost_files,
    make_loader,
)
from vmae_fast.data import worker as worker_module

# Two of ten: an epoch is more than a step of 8, so that files come again.
FAULTY = (3, 7)
REASONS = {
    "crash": "its decoder crashed (SIGKILL)",
    "segfault": "its decoder crashed (SIGSEGV)",
    "abort": "its decoder crashed (SIGABRT)",
    "exit": "its decoder crashed (exit status 7)",
    "hang": "its decoder hung for 1 s",
    "unreadable": "merely unreadable",
}


@pytest.fixture(scope="module")
def video(tmp_path_factory, clips):
    return clips.write_video(tmp_path_factory.mktemp("one") / "video.mp4", count=24, gop=12)


@pytest.fixture
def folder(video, tmp_path):
    """Ten names of a video; call with what the name of the faulty ones begins with."""

    def make(fault, faulty=FAULTY):
        root = tmp_path / f"folder-{len(os.listdir(tmp_path))}"
        root.mkdir()
        for number in range(10):
            name = f"{fault}{number}.mp4" if number in faulty else f"video{number}.mp4"
            (root / name).symlink_to(video)
        return root

    return make


def dataset_of(root, decoder=None, **options):
    # By number, not by name: the order must not hang on the fault.
    files = sorted(list_videos(root), key=lambda file: file.path[-5])
    options = {"frames": 4, "stride": 2, "image_size": (32, 32), "seed": 5, **options}
    return ClipDataset(files, decoder=decoder or CrashingDecoder(), **options)


def loader_of(dataset, workers=2, steps=5, decode_timeout=None, **options):
    repeats = dataset.sampling.repeats
    options = {"clips_per_step": 8, "seed": 5, "total_steps": steps, "repeats": repeats, **options}
    sampler = ClipSampler(len(dataset), **options)
    return make_loader(
        dataset, sampler, workers=workers, pin_memory=False, decode_timeout=decode_timeout
    )


def content(batches, reasons=True):
    """What batches hold, files by their number."""
    return [
        (
            batch.video.numpy().tobytes(), batch.clip.tolist(), batch.repeat.tolist(),
            batch.epoch.tolist(), [path[-5] for path in batch.paths],
            [(bad.path[-5], bad.reason if reasons else "") for bad in batch.bad],
        )
        for batch in batches
    ]  # fmt: skip


def kill_a_worker():
    os.kill(random.choice(active_children()).pid, signal.SIGKILL)


def no_child_is_left():
    gc.collect()
    return not active_children()


@pytest.mark.parametrize(
    ("fault", "workers", "repeats"),
    [("crash", 1, 1), ("crash", 3, 1), ("crash", 1, 2), ("crash", 3, 2), ("segfault", 2, 2),
     ("abort", 2, 1), ("exit", 2, 1), ("hang", 1, 1), ("hang", 3, 2)],
)  # fmt: skip
def test_a_lost_worker_costs_its_file(folder, tmp_path, fault, workers, repeats):
    """As if that file were merely unreadable, in every batch, epoch after epoch."""
    log = tmp_path / "log"
    log.mkdir()
    dataset = dataset_of(folder(fault), CrashingDecoder(log=log), repeats=repeats)
    timeout = 1.0 if fault == "hang" else None
    found = list(loader_of(dataset, workers, decode_timeout=timeout))
    plain = dataset_of(folder("unreadable"), repeats=repeats)
    expected = list(loader_of(plain, workers=0))
    assert content(found, reasons=False) == content(expected, reasons=False)
    assert sum(len(batch.bad) for batch in found) >= 3
    assert {bad.reason for batch in found for bad in batch.bad} == {REASONS[fault]}
    assert sorted(dataset.lost) == sorted({bad.path for batch in found for bad in batch.bad})
    assert lost_files(dataset.lost) == dataset.lost
    # A hang is believed at once, a crash when it comes again; workers that were at the same file
    # may have met it at the same time.
    opened = [name.partition("-")[2] for name in os.listdir(log)]
    for number in FAULTY:
        assert 1 <= opened.count(f"{fault}{number}.mp4") <= (1 if fault == "hang" else 2) * workers
    assert no_child_is_left()


def test_known_files_are_not_opened(folder, tmp_path):
    """As after a resume: the same batches from there on, without a crash."""
    root = folder("crash")
    first = dataset_of(root)
    whole = content(loader_of(first, workers=1))
    log = tmp_path / "log"
    log.mkdir()
    lost = lost_files({**first.lost, "other.mp4": "no video stream"})
    assert lost == first.lost
    again = dataset_of(root, CrashingDecoder(log=log), lost=lost)
    assert content(loader_of(again, workers=1, start_step=2)) == whole[2:]
    assert os.listdir(log) == []
    # In this process too, which would not survive it.
    assert content(loader_of(dataset_of(root, lost=lost), workers=0)) == whole


def test_data_sets_share_what_is_lost(folder):
    root, lost = folder("crash"), {}
    training = loader_of(dataset_of(root, lost=lost), workers=1, steps=40)
    under_way = iter(training)
    held_out = dataset_of(root, lost=lost, train=False)
    list(loader_of(held_out, workers=1, steps=2))
    assert {os.path.basename(path) for path in lost} == {"crash3.mp4", "crash7.mp4"}
    assert {bad.path for batch in under_way for bad in batch.bad} == lost.keys()


def test_workers_hear_of_files_that_others_lost(folder):
    """With the next batch that is asked of them, and without a death of their own."""
    dataset = dataset_of(folder("video"))
    batches = iter(loader_of(dataset, workers=2, steps=20))
    workers = {worker.pid for worker in active_children()}
    path = dataset.files[4].path
    dataset.lost[path] = "its decoder crashed (elsewhere)"
    # Six were asked for before.
    for _ in range(6):
        assert next(batches).bad == []
    found = [next(batches) for _ in range(10)]
    assert {worker.pid for worker in active_children()} == workers
    assert path not in {path for batch in found for path in batch.paths}
    assert {bad.path for batch in found for bad in batch.bad} == {path}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_death_by_chance_costs_nothing(folder, tmp_path, workers):
    """Killed once at a file that is sound: the memory ran out, say."""
    once = tmp_path / "once"
    once.mkdir()
    dataset = dataset_of(folder("crash"), CrashingDecoder(only_once=once))
    found = list(loader_of(dataset, workers))
    assert len(os.listdir(once)) == 2
    assert dataset.lost == {}
    assert [batch.bad for batch in found] == [[]] * 5
    assert content(found) == content(loader_of(dataset_of(folder("video")), workers=0))


def test_killed_at_any_moment(folder):
    """By signals that come from outside, whatever the workers are at."""
    dataset = dataset_of(folder("video"))
    expected = content(loader_of(dataset, workers=0, steps=48))
    found, killed = [], 0
    for number, batch in enumerate(loader_of(dataset, workers=2, steps=48)):
        found.append(batch)
        # All that was on its way at the last kill came meanwhile: no file is met twice by chance.
        if number % 6 == 0:
            time.sleep(0.0007 * number)
            kill_a_worker()
            killed += 1
    assert killed == 8
    assert content(found) == expected
    assert dataset.lost == {}


def test_only_the_time_at_one_file_counts(folder):
    """Waiting in a queue behind slow files is no hang."""
    dataset = dataset_of(folder("slow", faulty=range(10)))
    assert 8 * SLOW_S > 4 * SLOW_S
    found = list(loader_of(dataset, workers=1, steps=2, decode_timeout=4 * SLOW_S))
    assert [batch.bad for batch in found] == [[], []]


def test_the_alarm_is_off_between_files(folder):
    """A worker without work is not ended."""
    batches = iter(loader_of(dataset_of(folder("video")), workers=1, decode_timeout=0.3))
    first = next(batches)
    before = [worker.pid for worker in active_children()]
    time.sleep(0.7)
    assert [worker.pid for worker in active_children()] == before
    assert len([first, *batches]) == 5


class Restless(ClipDataset):
    """Ends its process before a file is opened."""

    def __getitem__(self, request):
        os._exit(3)


def test_deaths_without_a_file_to_blame(folder):
    files = list_videos(folder("video"))
    dataset = Restless(files, frames=4, stride=2, image_size=(32, 32))
    with pytest.raises(DataError) as caught:
        list(loader_of(dataset, workers=2))
    assert "4 times in a row (exit status 3), with no file in hand" in str(caught.value)
    for advice in ("--workers", "/dev/shm", "ulimit", "out of memory"):
        assert advice in str(caught.value)
    assert dataset.lost == {}
    assert no_child_is_left()


class Dying(ClipDataset):
    """Ends its process at one file before it is opened."""

    def __getitem__(self, request):
        if request.index == 0:
            os._exit(3)
        return super().__getitem__(request)


def test_the_complaint_comes_when_it_is_its_turn(folder):
    """Not while what came before is still under way."""
    files = dataset_of(folder("slow", faulty=range(1, 10))).files
    dataset = Dying(
        files, frames=4, stride=2, image_size=(32, 32), decoder=CrashingDecoder(), train=False
    )
    requests = [[ClipRequest(0, index)] for index in (1, 0)]
    requests[0] *= 5  # a second, in which the other one dies for the last time
    batches = iter(make_loader(dataset, requests, workers=2, pin_memory=False))
    assert next(batches).clip.tolist() == [1] * 5
    with pytest.raises(DataError, match="4 times in a row"):
        next(batches)
    assert no_child_is_left()


def test_deaths_at_ever_other_files(folder, tmp_path):
    """As where memory is short: no file is to blame."""
    dataset = dataset_of(folder("crash", faulty=range(10)), CrashingDecoder(only_once=tmp_path))
    with pytest.raises(DataError, match=r"4 times in a row \(SIGKILL\), the last time while"):
        list(loader_of(dataset, workers=1))
    assert dataset.lost == {}
    assert no_child_is_left()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_comes_at_its_batch(folder, workers):
    """And those before it are given; then there is nothing more."""
    dataset = dataset_of(folder("strange", faulty=(4,)))
    expected = content(loader_of(dataset_of(folder("video")), workers=0, steps=5))
    orders = [request.index for requests in loader_of(dataset).requests for request in requests]
    at = orders.index(4) // 8
    assert orders.index(4) % 8
    batches, found = iter(loader_of(dataset, workers)), []
    with pytest.raises(RuntimeError if workers else StrangeError, match="strange") as caught:
        found.extend(batches)
    assert content(found) == expected[:at]
    if workers:
        # Where it was raised is not lost.
        assert "_strange" in str(caught.value.__cause__)
    assert next(batches, None) is None
    assert no_child_is_left()


def test_unreadable_sets_end_with_their_error(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    loader = loader_of(ClipDataset(list_videos(tmp_path), frames=2, image_size=(8, 8)), workers=1)
    with pytest.raises(DataError, match=r"1 file could not be read.*\n.*text\.mp4"):
        next(iter(loader))
    assert no_child_is_left()


def lowest_descriptor():
    lowest = os.dup(0)
    os.close(lowest)
    return lowest


@pytest.mark.parametrize("room", [20, 5, 1])
def test_out_of_descriptors_is_a_clear_error(folder, room):
    """Of batches that are held each takes one; two workers take eight to begin with."""
    resource = pytest.importorskip("resource")
    batches = loader_of(dataset_of(folder("video")), workers=2, steps=100)
    starts, message = room < 8, r"could not be handed over .* \(ulimit -v, -n, -f\)"
    if starts:
        message = r"could not be started .*Too many open files.* \(ulimit -u, -n, -v\)"
    else:
        batches = iter(batches)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_descriptor() + room, before[1]))
    held = []
    try:
        with pytest.raises(DataError, match=message):
            held.extend(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert no_child_is_left()


def test_an_iterator_that_is_dropped_takes_its_workers_along(folder):
    batches = iter(loader_of(dataset_of(folder("video")), workers=2, steps=100))
    next(batches)
    assert len(active_children()) == 2
    del batches
    assert no_child_is_left()


def test_batches_outlive_their_workers(folder):
    dataset = dataset_of(folder("video"))
    expected = content(loader_of(dataset, workers=0))
    batches = list(loader_of(dataset, workers=2))
    assert no_child_is_left()
    assert content(batches) == expected
    batches[0].video.zero_()
    assert content(batches[1:]) == expected[1:]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory as Linux shows it")
def test_memory_is_used_again_once_a_batch_is_gone(folder):
    """And not before: what is held stays as it is, and another size gets memory of its own."""
    dataset = dataset_of(folder("video"))
    requests = list(loader_of(dataset, steps=60).requests)
    # Small ones first, so that memory for them is there when larger ones come.
    requests[:10] = [batch[:3] for batch in requests[:10]]
    expected = content(make_loader(dataset, requests, workers=0, pin_memory=False))
    held, seen, used = [], set(), set()
    batches = iter(make_loader(dataset, requests, workers=1, pin_memory=False))
    (worker,) = active_children()
    for number in range(60):
        batch = next(batches)
        assert content([batch]) == expected[number : number + 1]
        # Every tenth, and clip numbers alone of some others.
        if number % 10 == 0:
            held.append((number, batch, batch.clip.clone()))
        elif number % 10 == 5:
            held.append((number, None, batch.clip))
        seen.add(len(shared_files(worker.pid)))
        used |= shared_files(os.getpid())
    for number, batch, clip in held:
        assert batch is None or content([batch]) == expected[number : number + 1]
        assert clip.tolist() == expected[number][1]
    # Never more than it keeps, and the one that it fills.
    assert max(seen) <= worker_module._BUFFERS + 1
    # A set for each of the two sizes, and one for each that was held: of sixty.
    assert len(used) <= 2 * worker_module._BUFFERS + len(held)


def shared_files(pid):
    """Inodes of the buffers that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "vmae-fast-batch" in line}


def test_batches_are_pinned_beside(folder, monkeypatch):
    """Each once, as they come, by another thread; a stand-in pins, for want of a GPU."""
    import threading

    from vmae_fast.data import ClipBatch

    pinned = []

    def pin(self):
        pinned.append((threading.current_thread(), self.clip.tolist()))
        return self.to("cpu")

    monkeypatch.setattr(ClipBatch, "pin_memory", pin)
    dataset = dataset_of(folder("crash"))
    loader = loader_of(dataset, workers=2)
    loader.pin_memory = True
    found = list(loader)
    assert sorted(clip for _, clip in pinned) == sorted(batch.clip.tolist() for batch in found)
    assert threading.main_thread() not in {thread for thread, _ in pinned}
    expected = loader_of(dataset_of(folder("unreadable")), workers=0)
    assert content(found, reasons=False) == content(expected, reasons=False)


def test_work_is_counted(folder):
    for workers in (0, 2):
        loader = loader_of(dataset_of(folder("slow", faulty=range(4))), workers, steps=2)
        indices = [request.index for requests in loader.requests for request in requests]
        slept = SLOW_S * sum(index < 4 for index in indices)
        list(loader)
        assert loader.work.clips == 16
        assert slept < loader.work.wall_s < slept + 16
        # Asleep is not at work.
        assert 0 < loader.work.cpu_s < loader.work.wall_s - 0.8 * slept


def held():
    """Descriptors, children and files in shared memory and temporary folders of this process."""
    gc.collect()
    # Other tests may have left processes of other kinds, which end when they like.
    children = [child for child in active_children() if child.name == "vmae-fast loader"]
    shared = [name for name in os.listdir("/dev/shm") if str(os.getpid()) in name]
    maps = Path("/proc/self/maps").read_text().count("vmae-fast-batch")
    return len(os.listdir("/proc/self/fd")), len(children), len(shared), maps


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts what Linux shows in /proc")
@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_replaced_workers_leave_nothing(folder, times):
    dataset = dataset_of(folder("video"))
    steps = 8 * times + 10
    batches = iter(loader_of(dataset, workers=2, steps=steps))
    next(batches)
    kept, given = None, 1
    for number in range(times):
        if number == 2:
            kept = held()
        slot = batches._slots[number % 2]
        killed = slot.worker
        os.kill(killed.process.pid, signal.SIGKILL)
        # That it died shows when a batch is wanted of it.
        while slot.worker is killed:
            next(batches)
            given += 1
    # Batches that wait to be taken are mapped: at most 3 a worker, one descriptor each.
    now = held()
    assert now[1:3] == kept[1:3] == (2, 0)
    assert now[0] <= kept[0] + 6
    assert now[3] <= 7
    assert given + len(list(batches)) == steps
    assert no_child_is_left()
    # A pipe and what Python holds of a process go with the workers.
    assert held()[0] <= kept[0] - 4
    assert held()[1:] == (0, 0, 0)


ORPHANS = """
import sys, time
from multiprocessing import active_children
sys.path[:0] = {path!r}
from crashing import CrashingDecoder
from vmae_fast.data import ClipDataset, ClipSampler, list_videos, make_loader, worker
worker._PARENT_CHECK_S = 0.2
dataset = ClipDataset(
    list_videos({root!r}), frames=4, stride=2, image_size=(32, 32), decoder=CrashingDecoder()
)
sampler = ClipSampler(10, clips_per_step=8, seed=5, total_steps=1000)
batches = iter(make_loader(dataset, sampler, workers=2, pin_memory=False, decode_timeout=2.0))
print(*(child.pid for child in active_children()), flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("fault", ["video", "hang"])
def test_workers_do_not_outlive_a_killed_parent(folder, fault):
    """Not even one whose decoder hangs."""
    code = ORPHANS.format(path=sys.path, root=str(folder(fault)))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_wrong_arguments(folder):
    dataset = dataset_of(folder("video"))
    for timeout in (0, -1.0):
        with pytest.raises(ValueError, match="decode_timeout must be above 0 seconds"):
            make_loader(dataset, [], workers=1, pin_memory=False, decode_timeout=timeout)
    assert list(make_loader(dataset, [], workers=1, pin_memory=False)) == []


def test_bad_files_are_those_of_a_decode_error(folder):
    """What a batch says of a lost file has the form of any bad file's."""
    dataset = dataset_of(folder("abort"))
    bad = [bad for batch in loader_of(dataset, workers=1) for bad in batch.bad]
    assert set(bad) == {BadFile(path, REASONS["abort"]) for path in dataset.lost}
    assert torch.is_tensor(next(iter(loader_of(dataset, workers=1))).video)
