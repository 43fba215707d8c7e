"""Folders, lists and single files as data; the validation split."""

import os
from pathlib import Path

import pytest

from vmae_fast.data import DataError, VideoFile, list_videos, split_validation


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def relative(root, files):
    return [Path(file.path).relative_to(root).as_posix() for file in files]


def test_folder_is_walked_sorted_and_filtered(tmp_path):
    touch(tmp_path, "b/2.mp4", "b/10.MKV", "a.webm", "b/c/d/x y.Mov", "z.avi", "é/ü.mp4")
    touch(tmp_path, "notes.txt", "mp4", ".hidden.mp4", ".hidden/x.mp4", "b/._2.mp4")
    expected = ["a.webm", "b/10.MKV", "b/2.mp4", "b/c/d/x y.Mov", "z.avi", "é/ü.mp4"]
    assert relative(tmp_path, list_videos(tmp_path)) == expected
    assert list_videos(str(tmp_path)) == list_videos(tmp_path)
    assert {file.label for file in list_videos(tmp_path)} == {None}


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "data/real/a.mp4", "elsewhere/b.mp4")
    data = tmp_path / "data"
    os.symlink(tmp_path / "elsewhere", data / "link")
    os.symlink(data, data / "real/loop")
    os.symlink(data / "real/a.mp4", data / "c.mp4")
    os.symlink(data / "nowhere.mp4", data / "dangling.mp4")
    expected = ["c.mp4", "dangling.mp4", "link/b.mp4", "real/a.mp4"]
    assert relative(data, list_videos(data)) == expected


def test_folder_without_videos(tmp_path):
    touch(tmp_path, "a.txt", "b/c.jpg", ".hidden.mp4")
    with pytest.raises(DataError, match=r"mp4, mkv, webm, avi, mov .* 2 other files"):
        list_videos(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_unreadable_folder_is_not_passed_over(tmp_path):
    touch(tmp_path, "a.mp4", "closed/b.mp4")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(DataError, match="cannot read folder"):
            list_videos(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"does not exist; name a folder"):
        list_videos(tmp_path / "nothing")


def test_single_file(tmp_path):
    touch(tmp_path, "one.MP4")
    assert list_videos(tmp_path / "one.MP4") == [VideoFile(str(tmp_path / "one.MP4"))]


def test_list(tmp_path):
    touch(tmp_path, "lists/there.mp4")
    listing = tmp_path / "lists/train.csv"
    listing.write_text(
        "\ufeffpath,label\n"
        "# a comment, with a comma\n"
        "\n"
        "there.mp4,dog\r\n"
        "sub/missing one.mp4\n"
        '"with, comma.mp4", cat \n'
        '  "say ""hi"".mkv"\n'
        "/absolute/x.mp4,\n"
        "../up.mp4,7\n",
        encoding="utf-8",
    )
    here = str(tmp_path / "lists") + "/"
    assert list_videos(listing) == [
        VideoFile(here + "there.mp4", "dog"),
        VideoFile(here + "sub/missing one.mp4"),
        VideoFile(here + "with, comma.mp4", "cat"),
        VideoFile(here + 'say "hi".mkv'),
        VideoFile("/absolute/x.mp4"),
        VideoFile(here + "../up.mp4", "7"),
    ]


def test_list_header_is_optional_and_only_first(tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text("a.mp4\nPath\n")
    assert relative(tmp_path, list_videos(listing)) == ["a.mp4", "Path"]
    listing.write_text("Path\na.mp4")
    assert relative(tmp_path, list_videos(listing)) == ["a.mp4"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "names no video"),
        (b"# nothing\n\npath,label\n", "names no video"),
        (b"a.mp4,1,2\n", r"line 1: expected path or path,label, got 3 fields"),
        (b"a.mp4\n,dog\n", "line 2: expected path"),
        (b'"a.mp4\n', "line 1: unexpected end"),
        (b"a.mp4 3\n", r"divided by a space; write a.mp4,3"),
        (b"a.mp4 0 250 3\n", r"divided by a space; write a.mp4,3"),
        (b"\xff\xfe\x00\x01", "cannot read"),
    ],
)
def test_bad_lists(content, match, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_bytes(content)
    with pytest.raises(DataError, match=match):
        list_videos(listing)


def test_split_is_a_seeded_partition():
    train, val = split_validation(100, 0.1, seed=3)
    assert len(val) == 10
    assert sorted(train + val) == list(range(100))
    assert train == sorted(train)
    assert val == sorted(val)
    assert (train, val) == split_validation(100, 0.1, seed=3)
    assert val != split_validation(100, 0.1, seed=4)[1]
    # Chosen at random, not a block of neighbours.
    assert val[-1] - val[0] > 30


@pytest.mark.parametrize(
    ("num_files", "share", "num_val"),
    [(1, 0.5, 0), (1, 0, 0), (2, 0.01, 1), (2, 0.99, 1), (10, 0, 0), (10, 0.26, 3), (3, 0.99, 2)],
)
def test_split_sizes(num_files, share, num_val):
    train, val = split_validation(num_files, share, seed=0)
    assert (len(train), len(val)) == (num_files - num_val, num_val)


@pytest.mark.parametrize(("num_files", "share"), [(0, 0.1), (5, 1.0), (5, -0.1)])
def test_split_errors(num_files, share):
    with pytest.raises(ValueError, match="must be"):
        split_validation(num_files, share, seed=0)
