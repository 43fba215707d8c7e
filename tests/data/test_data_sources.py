"""Folders, lists and single files as data; the validation split."""

import os
from pathlib import Path

import pytest

from vmae_fast.data import DataError, VideoFile, list_videos, read_source, split_validation
from vmae_fast.data.folders import is_frame_folder


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
    with pytest.raises(DataError, match=r"mp4, mkv, webm, avi, mov, .* 2 other files"):
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
        (b"a.mp4 3\nb.mp4 dog\n", r"line 2: expected `path label` .* as line 1 has it"),
        (
            b"# list\na.mp4 0 250 3\nb.mp4 3\n",
            r"line 3: expected `path start total label` .* line 2",
        ),
        (b"\xff\xfe\x00\x01", "cannot read"),
    ],
)
def test_bad_lists(content, match, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_bytes(content)
    with pytest.raises(DataError, match=match):
        list_videos(listing)


def test_class_sub_folders_are_labels(tmp_path):
    touch(tmp_path, "dog/1.mp4", "dog/2.mp4", "cat/1.mp4")
    listing = read_source(tmp_path)
    assert [file.label for file in listing.files] == ["cat", "dog", "dog"]
    assert listing.how == "folder: 3 video files; labels from 2 class sub-folders"
    # Neither one folder nor several levels are classes.
    touch(tmp_path, "dog/more/3.mp4")
    assert {file.label for file in read_source(tmp_path).files} == {None}
    touch(tmp_path / "one", "all/1.mp4", "all/2.mp4")
    assert {file.label for file in read_source(tmp_path / "one").files} == {None}


def test_parts_of_a_data_set_are_kept_apart(tmp_path):
    touch(tmp_path, "train/dog/1.mp4", "train/cat/1.mp4", "test/dog/9.mp4", "validation/cat/8.mp4")
    listing = read_source(tmp_path)
    assert relative(tmp_path, listing.files) == ["train/cat/1.mp4", "train/dog/1.mp4"]
    assert [file.label for file in listing.files] == ["cat", "dog"]
    assert listing.how.endswith("its part train/ only; not test/, validation/")
    touch(tmp_path, "other/1.mp4")
    assert len(list_videos(tmp_path)) == 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,label,text\na.mp4,dog,x\nsub/b.mp4,cat,y\nc.mp4,,\n"),
        (
            "metadata.jsonl",
            '{"file_name": "a.mp4", "label": "dog"}\n\n{"file_name": "sub/b.mp4", "label": "cat"}',
        ),
    ],
)
def test_labels_from_metadata(name, content, tmp_path):
    touch(tmp_path, "a.mp4", "sub/b.mp4", "c.mp4")
    (tmp_path / name).write_text(content)
    listing = read_source(tmp_path)
    assert [file.label for file in listing.files] == ["dog", None, "cat"]
    assert f"labels from {name}" in listing.how
    (tmp_path / name).write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match=r"cannot read .*metadata"):
        read_source(tmp_path)


def test_folders_of_numbered_pictures_are_videos(tmp_path):
    touch(tmp_path, *(f"walk/v1/img_{k:05}.jpg" for k in range(1, 4)), "walk/v1/notes.txt")
    touch(tmp_path, *(f"run/v2_final/{k}.PNG" for k in range(8, 12)), "run/thumb.jpg")
    touch(tmp_path, "walk/film.mp4", "walk/film_1.jpg", "walk/film_2.jpg")
    listing = read_source(tmp_path)
    assert relative(tmp_path, listing.files) == ["run/v2_final", "walk/film.mp4", "walk/v1"]
    assert [file.label for file in listing.files] == ["run", "walk", "walk"]
    assert listing.how.startswith("folder: 1 video file and 2 frame folders; labels from 2 class")
    assert "3 other files passed over" in listing.how
    # A folder of frames by itself.
    (only,) = list_videos(tmp_path / "walk/v1")
    assert only == VideoFile(str(tmp_path / "walk/v1"))
    assert is_frame_folder(tmp_path / "walk/v1")
    # One numbered picture is no video.
    touch(tmp_path, "pictures/img_00001.jpg", "pictures/cover.jpg")
    assert not is_frame_folder(tmp_path / "pictures")
    assert len(list_videos(tmp_path)) == 3
    assert not is_frame_folder(tmp_path / "walk")


def test_v1_list(tmp_path):
    listing = tmp_path / "train.csv"
    listing.write_text("a b/one 1.mp4 3\n/data/x,y.avi  17\nframes 2\n")
    found = read_source(listing)
    assert found.files == [
        VideoFile(f"{tmp_path}/a b/one 1.mp4", "3"),
        VideoFile("/data/x,y.avi", "17"),
        VideoFile(f"{tmp_path}/frames", "2"),
    ]
    assert found.how == (
        "list of 3, V1's form `path label`; relative paths start at its own folder"
    )


def test_v2_lists(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    listing = tmp_path / "train.txt"
    listing.write_text("k400/a.mp4 0 -1 0\nSomethingV2/12 1 48 7\nb.mp4 30 90 1\n")
    found = read_source(listing, root)
    assert found.files == [
        VideoFile(f"{root}/k400/a.mp4", "0"),
        VideoFile(f"{root}/SomethingV2/12", "7", 1, 48),
        VideoFile(f"{root}/b.mp4", "1", 30, 90),
    ]
    assert f"V2's form `path start total label`; relative paths start at {root}" in found.how
    # Its pretraining lists have no label.
    listing.write_text("SomethingV2/12 1 48\nk400/a.mp4 0 -1\n")
    assert list_videos(listing, root) == [
        VideoFile(f"{root}/SomethingV2/12", None, 1, 48),
        VideoFile(f"{root}/k400/a.mp4"),
    ]
    with pytest.raises(DataError, match="is not a folder"):
        list_videos(listing, tmp_path / "nowhere")


def test_two_numbers_are_told_apart_by_what_is_on_disk(tmp_path):
    touch(tmp_path, *(f"v1/img_{k:05}.jpg" for k in range(1, 6)))
    touch(tmp_path, *(f"v2/img_{k:05}.jpg" for k in range(1, 4)))
    listing = tmp_path / "list.txt"
    listing.write_text("v1 5 3\nv2 3 3\n")  # total and label
    found = read_source(listing)
    assert found.files[0] == VideoFile(f"{tmp_path}/v1", "3", None, 5)
    assert "`path total label`" in found.how
    listing.write_text("v1 3 5\nv2 3 3\n")  # start and total, though no start is 0 or 1
    assert list_videos(listing)[0] == VideoFile(f"{tmp_path}/v1", None, 3, 5)
    # Nothing on disk: totals of 0 and 1 are no videos.
    listing.write_text("x1 1 5\nx2 0 3\n")
    assert list_videos(listing)[0] == VideoFile(f"{tmp_path}/x1", None, 1, 5)
    listing.write_text("x1 90 5\nx2 1 3\nx3.mp4 40 2\n")
    assert list_videos(listing) == [
        VideoFile(f"{tmp_path}/x1", "5", None, 90),
        VideoFile(f"{tmp_path}/x2", "3", None, 1),
        VideoFile(f"{tmp_path}/x3.mp4", "2"),  # a video file's total is its own
    ]
    # A total of -1 is V2's, whatever the start says; of 0 it says as little.
    listing.write_text("x1.mp4 90 -1\nx2 70 30\n")
    assert list_videos(listing) == [
        VideoFile(f"{tmp_path}/x1.mp4"),
        VideoFile(f"{tmp_path}/x2", None, 70, 30),
    ]
    listing.write_text("x1.mp4 0 0 3\n")
    assert list_videos(listing) == [VideoFile(f"{tmp_path}/x1.mp4", "3")]


def test_tabs_headers_and_paths_that_end_in_a_number(tmp_path):
    listing = tmp_path / "list.tsv"
    listing.write_text("Video\tClass\na b.mp4\tbrown dog\n")
    assert list_videos(listing) == [VideoFile(f"{tmp_path}/a b.mp4", "brown dog")]
    listing.write_text("a b.mp4\tbrown dog\nc.mp4\n")
    assert list_videos(listing) == [
        VideoFile(f"{tmp_path}/a b.mp4", "brown dog"),
        VideoFile(f"{tmp_path}/c.mp4"),
    ]
    # What is there as a whole is a path, whatever it looks like.
    (tmp_path / "holiday 2024").mkdir()
    listing.write_text("holiday 2024\n")
    assert list_videos(listing) == [VideoFile(f"{tmp_path}/holiday 2024")]
    listing.write_text("filename,label\na.mp4,3\n")
    assert list_videos(listing) == [VideoFile(f"{tmp_path}/a.mp4", "3")]


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
