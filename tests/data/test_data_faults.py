"""Names, links and permissions as they come; memory over thousands of files, damaged ones too."""

import ctypes
import multiprocessing
import os
import subprocess
import sys

import pytest
from mutating import mutate, write_sources

from vmae_fast.data import (
    ClipDataset,
    ClipRequest,
    DataError,
    PathDecoder,
    list_videos,
    make_loader,
    read_source,
)

ODD_NAMES = [
    "with space.mp4",
    " leading and trailing .mp4",
    "ünïcödé 视频 🎬.mp4",
    "e\u0301 decomposed.mp4",
    "new\nline.mp4",
    "tab\tand 'quotes\".mp4",
    "back\\slash.mp4",
    "colon: http:x.mp4",
    "-dash.mp4",
    "%d percent %s.mp4",
    "wild*card?[1].mp4",
    "#hash.mp4",
    os.fsdecode(b"not utf-8 \xff\xfe.mp4"),
]


@pytest.fixture(scope="module")
def video(tmp_path_factory, clips):
    return clips.write_video(tmp_path_factory.mktemp("one") / "video.mp4", count=24, gop=12)


def read_all(files, workers=1):
    """What became of each file: its path, or the reason why it is bad."""
    dataset = ClipDataset(files, frames=4, stride=2, image_size=(32, 32))
    outcome = {}
    for index, file in enumerate(files):
        outcome[file.path] = "read"
        requests = [[ClipRequest(0, index)]]
        try:
            (batch,) = make_loader(dataset, requests, workers=workers, pin_memory=False)
        except DataError as error:
            outcome[file.path] = str(error)
            continue
        outcome |= {bad.path: bad.reason for bad in batch.bad}
    return {os.path.basename(path): reason for path, reason in outcome.items()}


def test_odd_names(video, tmp_path):
    for name in ODD_NAMES:
        os.link(video, tmp_path / name)
    files = list_videos(tmp_path)
    assert sorted(os.path.basename(file.path) for file in files) == sorted(ODD_NAMES)
    assert read_all(files) == dict.fromkeys(ODD_NAMES, "read")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_of_a_single_file_and_of_its_folder(name, video, tmp_path, monkeypatch):
    folder = tmp_path / name
    folder.mkdir()
    os.link(video, folder / name)
    for data in (folder, folder / name):
        assert read_all(list_videos(data)) == {name: "read"}
    # Relative, where FFmpeg could take a part of it for a protocol or a pattern.
    monkeypatch.chdir(folder)
    assert read_all(list_videos(name), workers=0) == {name: "read"}


def test_links(video, tmp_path):
    """Those that lead nowhere are bad files, as a user would want to know; none hangs."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    os.link(video, elsewhere / "target.mp4")
    (data / "good.mp4").symlink_to(elsewhere / "target.mp4")
    (data / "relative.mp4").symlink_to("../elsewhere/target.mp4")
    (data / "chain.mp4").symlink_to(data / "good.mp4")
    (data / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (data / "self.mp4").symlink_to(data / "self.mp4")
    (data / "ping.mp4").symlink_to(data / "pong.mp4")
    (data / "pong.mp4").symlink_to(data / "ping.mp4")
    (data / "sub/up").symlink_to(data)
    (data / "folder").symlink_to(elsewhere)
    (data / "nothing").symlink_to(tmp_path / "nowhere")
    (data / "round").symlink_to(data / "round")
    missing = "No such file or directory"
    loop = "Too many levels of symbolic links"
    assert read_all(list_videos(data)) == {
        "good.mp4": "read", "relative.mp4": "read", "chain.mp4": "read", "target.mp4": "read",
        "dangling.mp4": missing, "self.mp4": loop, "ping.mp4": loop, "pong.mp4": loop,
    }  # fmt: skip


def test_what_is_no_file(video, tmp_path):
    """Nothing is waited for."""
    os.link(video, tmp_path / "good.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    found = read_all(list_videos(tmp_path))
    assert found.pop("good.mp4") == "read"
    assert found.pop("pipe.mp4") == found.pop("device.mp4") == "not a file"
    assert found.pop("empty.mp4") == "Invalid data found when processing input"
    assert found == {}


def test_an_empty_folder_and_one_video(video, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty.*looked for files ending in mp4"):
        list_videos(tmp_path / "empty")
    (tmp_path / "one").mkdir()
    os.link(video, tmp_path / "one/only.mp4")
    assert read_all(list_videos(tmp_path / "one")) == {"only.mp4": "read"}
    assert "1 video file" in read_source(tmp_path / "one").how


# ---- permissions --------------------------------------------------------------------------

# Linux's numbers of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root opens everything.
OVERRIDES = (1, 2)


def obey_permissions():
    """Let this process, if it is root's, open only what the bits of a file allow."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 of them
    assert libc.capget(header, data) == 0
    for number in OVERRIDES:
        data[0] &= ~(1 << number)
    assert libc.capset(header, data) == 0


def _report(function, arguments, connection):
    obey_permissions()
    try:
        connection.send(function(*arguments))
    except DataError as error:
        connection.send(str(error))


def with_permissions(function, *arguments):
    """Call in a process that permissions hold for; gives the result, or a data error's text."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_report, args=(function, arguments, theirs))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


@pytest.fixture
def closed(tmp_path):
    """Call to take all permissions away; they come back, so that the folder can be removed."""
    taken = []

    def close(path):
        taken.append(path)
        path.chmod(0)

    yield close
    for path in taken:
        path.chmod(0o755)


linux = pytest.mark.skipif(sys.platform != "linux", reason="root is held back as Linux does it")


@linux
def test_an_unreadable_file_is_bad(video, tmp_path, closed):
    (tmp_path / "good.mp4").write_bytes(video.read_bytes())
    (tmp_path / "closed.mp4").write_bytes(video.read_bytes())
    closed(tmp_path / "closed.mp4")
    found = with_permissions(lambda: read_all(list_videos(tmp_path), workers=0))
    assert found == {"good.mp4": "read", "closed.mp4": "Permission denied"}


@linux
def test_an_unreadable_folder_is_not_passed_over(video, tmp_path, closed):
    """Half a data set must not be trained on by mistake."""
    (tmp_path / "closed").mkdir()
    os.link(video, tmp_path / "closed/a.mp4")
    os.link(video, tmp_path / "b.mp4")
    closed(tmp_path / "closed")
    found = with_permissions(list_videos, tmp_path)
    assert "cannot read folder" in found
    assert str(tmp_path / "closed") in found
    assert "Permission denied" in found


@linux
def test_an_unreadable_list_is_an_error(video, tmp_path, closed):
    listing = tmp_path / "list.txt"
    listing.write_text(f"{video}\n")
    closed(listing)
    assert "Permission denied" in with_permissions(list_videos, listing)


# ---- memory -------------------------------------------------------------------------------

# Reads files over and over; prints resident bytes after the first fifth, and at the end.
READS = """
import os, random, sys
sys.path[:0] = {path!r}
from vmae_fast.data import ClipDataset, ClipRequest, DecodeError, list_videos
files = list_videos({folder!r})
dataset = ClipDataset(files, frames=4, stride=2, image_size=(112, 112))
bad = 0
for number in range({count}):
    if number == {count} // 5:
        warm = int(open("/proc/self/statm").read().split()[1])
    try:
        dataset.read(ClipRequest(number // len(files), number % len(files)))
    except DecodeError:
        bad += 1
end = int(open("/proc/self/statm").read().split()[1])
print(warm * os.sysconf("SC_PAGE_SIZE"), end * os.sysconf("SC_PAGE_SIZE"), bad)
"""

# What decodes may differ by: the allocator keeps what the largest file took, and files take turns.
# One frame of 320x256 left behind at every clip would come to 49 MB in 400 decodes, and 2 KB to
# 16 MB in 8,000.
GROWTH_BYTES = 16e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("count", "plain", "damaged"),
    [
        (500, True, 40),
        pytest.param(10_000, True, 0, marks=pytest.mark.slow),
        pytest.param(10_000, False, 90, marks=pytest.mark.slow),
    ],
)
def test_memory_is_flat(tmp_path, count, plain, damaged):
    folder = tmp_path / "files"
    sources = write_sources(folder if plain else tmp_path / "sources", frames=24, size=256)
    mutate(sources, folder, damaged)
    code = READS.format(path=sys.path, folder=str(folder), count=count)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    warm, end, bad = (int(word) for word in done.stdout.split())
    print(f"{count} decodes, {bad} of bad files: {warm / 1e6:.1f} MB, then {end / 1e6:.1f} MB")
    assert bad == 0 or damaged
    assert not damaged or 0.15 * count < bad < 0.7 * count
    assert end - warm < GROWTH_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_batches_is_given_back(video, tmp_path):
    """A hundred batches of 3.2 MB, of which a few are alive at a time."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    dataset = ClipDataset(
        list_videos(video), frames=4, stride=2, image_size=(256, 256), repeats=4,
        decoder=PathDecoder(),
    )  # fmt: skip
    requests = [[ClipRequest(number, 0)] for number in range(100)]
    sizes = []
    for batch in make_loader(dataset, requests, workers=1, pin_memory=False):
        sizes.append(resident())
        assert batch.video.numpy().max() > 0
    assert max(sizes[10:]) - sizes[9] < 5 * 3.2e6
