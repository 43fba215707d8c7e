"""Videos inside tars: read where they lie, listed with labels, and what becomes of damage."""

import gc
import io
import json
import os
import pickle
import tarfile
from contextlib import suppress

import numpy as np
import pytest

from vmae_fast.data import (
    ClipDataset,
    ClipRequest,
    DataError,
    DecodeError,
    PathDecoder,
    list_videos,
    make_loader,
    read_source,
)
from vmae_fast.data.check import check_files
from vmae_fast.data.probe import probe
from vmae_fast.data.shards import MemberFile, members_of, read_member, split_member


@pytest.fixture(scope="module")
def videos(tmp_path_factory, clips):
    """Videos of 40 frames each; the numbers that they show begin at 0."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("a.mp4", "b c.mkv", "d.avi"):
        clips.write_video(root / name, count=40, gop=12)
    return root


def write_tar(path, members, *, format=tarfile.PAX_FORMAT):
    """Members: name to a file or bytes; a list of pairs may repeat a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            data = content if isinstance(content, bytes) else content.read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def tar(videos, tmp_path):
    """A tar of all of them, with what else lies in tars."""
    return write_tar(
        tmp_path / "some videos.tar",
        {
            "a.mp4": videos / "a.mp4",
            "a.json": b'{"label": "left", "more": [1]}',
            "./in/it/b c.mkv": videos / "b c.mkv",
            "in/it/b c.cls": '"quoted" and ünï\n'.encode(),
            "ü/d.AVI": videos / "d.avi",
            "ü/d.json": b"[no label]",
            "notes.txt": b"no video",
            "in/._a.mp4": b"what a Mac leaves",
        },
    )


def paths_of(tar):
    return [f"{tar}/{name}" for name in ("a.mp4", "in/it/b c.mkv", "ü/d.AVI")]


def test_paths_of_members(tmp_path):
    assert split_member("x/y.tar/a/b.mp4") == ("x/y.tar", "a/b.mp4")
    assert split_member("y.TAR/a.mp4") == ("y.TAR", "a.mp4")
    assert split_member("y.tar") is None
    assert split_member("y.tar.mp4") is None
    assert split_member("y.target/a.mp4") is None
    folder = tmp_path / "unpacked.tar"
    folder.mkdir()
    assert split_member(f"{folder}/a.mp4") is None
    assert split_member(f"{folder}/b.tar/a.mp4") == (f"{folder}/b.tar", "a.mp4")


def test_a_tar_is_listed_with_labels(tar):
    listing = read_source(tar)
    assert [file.path for file in listing.files] == paths_of(tar)
    assert [file.label for file in listing.files] == ["left", '"quoted" and ünï', None]
    assert listing.how == "tar: 3 videos in 1 tar; labels from .cls or .json"
    assert all(file.taken_every == 1 and file.source is None for file in listing.files)


def test_clips_are_those_of_the_files(tar, videos):
    decoder = PathDecoder()
    names = ("a.mp4", "b c.mkv", "d.avi")
    for member, name in zip(paths_of(tar), names, strict=True):
        file = str(videos / name)
        for u in (0.0, 0.37, 0.99):
            found = decoder.read_clip(member, 4, 3, u)
            expected = decoder.read_clip(file, 4, 3, u)
            np.testing.assert_array_equal(found.frames, expected.frames)
            assert found.times_s == expected.times_s
        timed = decoder.read_clip(member, 4, 1, 0.5, fps=7.0)
        np.testing.assert_array_equal(
            timed.frames, decoder.read_clip(file, 4, 1, 0.5, fps=7.0).frames
        )
        np.testing.assert_array_equal(
            decoder.read_all(member).frames, decoder.read_all(file).frames
        )
        about, plain = probe(member), probe(file)
        assert about == type(plain)(**{**plain.__dict__, "path": member})
        assert about.size_bytes == os.path.getsize(file)


def test_torchcodec_gets_the_bytes(tar, videos):
    pytest.importorskip("torchcodec")
    from vmae_fast.data import make_decoder

    try:
        decoder = make_decoder("torchcodec")
    except DataError as error:
        pytest.skip(str(error))
    member, file = paths_of(tar)[0], str(videos / "a.mp4")
    found, expected = (decoder.read_clip(path, 4, 3, 0.4).frames for path in (member, file))
    np.testing.assert_array_equal(found, expected)


def test_lists_and_single_members(tar, videos, tmp_path):
    assert [file.path for file in list_videos(paths_of(tar)[1])] == [paths_of(tar)[1]]
    listing = tmp_path / "list.csv"
    listing.write_text("path,label\nsome videos.tar/a.mp4,mine\nsome videos.tar/in/it/b c.mkv\n")
    files = list_videos(listing)
    assert [(file.path, file.label) for file in files] == [
        (paths_of(tar)[0], "mine"), (paths_of(tar)[1], '"quoted" and ünï'),
    ]  # fmt: skip
    dataset = ClipDataset(files, frames=4, stride=2, image_size=(32, 32))
    assert dataset.read(ClipRequest(0, 1)).crops[0].shape == (4, 32, 32, 3)


def test_folders_of_tars(tar, videos, tmp_path):
    root = tmp_path / "data"
    write_tar(root / "b/1.tar", {"x.mp4": videos / "a.mp4"})
    write_tar(root / "a/2.tar", {"y.mp4": videos / "a.mp4", "x.mp4": videos / "a.mp4"})
    write_tar(root / "a/texts.tar", {"y.txt": b"no video"})
    listing = read_source(root)
    assert [os.path.relpath(file.path, root) for file in listing.files] == [
        "a/2.tar/y.mp4", "a/2.tar/x.mp4", "b/1.tar/x.mp4",
    ]  # fmt: skip
    assert listing.how == "folder of tars: 3 videos in 3 tars"
    # Beside videos a tar is a file like others, as it always was.
    (root / "a/z.mp4").write_bytes((videos / "a.mp4").read_bytes())
    assert [os.path.basename(file.path) for file in read_source(root).files] == ["z.mp4"]
    assert "3 other files passed over" in read_source(root).how


def test_only_the_training_part_of_tars(videos, tmp_path):
    for part in ("train", "val"):
        write_tar(tmp_path / part / "0.tar", {f"{part}.mp4": videos / "a.mp4"})
    listing = read_source(tmp_path)
    assert [os.path.basename(file.path) for file in listing.files] == ["train.mp4"]
    assert "train/ only; not val/" in listing.how


def test_tars_without_videos_are_said_so(tmp_path):
    tar = write_tar(tmp_path / "t.tar", {"a.txt": b"x"})
    with pytest.raises(DataError, match=r"no video in .*t\.tar"):
        read_source(tar)
    with pytest.raises(DataError, match="no video in"):
        read_source(tmp_path)
    (tmp_path / "t.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"no video in .*t\.tar"):
        read_source(tar)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_forms_of_tars(videos, tmp_path, format):
    long = "/".join(["folder"] * 12) + "/" + "v" * 60 + ".mp4"
    tar = write_tar(tmp_path / "f.tar", {long: videos / "a.mp4"}, format=format)
    assert [file.path for file in list_videos(tar)] == [f"{tar}/{long}"]
    assert read_member(f"{tar}/{long}") == (videos / "a.mp4").read_bytes()


def test_of_members_of_one_name_the_last_counts(videos, tmp_path):
    tar = write_tar(tmp_path / "t.tar", [("a.mp4", b"old"), ("a.mp4", videos / "a.mp4")])
    assert len(list_videos(tar)) == 1
    assert read_member(f"{tar}/a.mp4") == (videos / "a.mp4").read_bytes()


def test_what_is_no_file_or_leads_out_is_left_out(videos, tmp_path):
    tar = tmp_path / "t.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(videos / "a.mp4", "../out.mp4")
        archive.add(videos / "a.mp4", "x/../y.mp4")
        for kind, name in ((tarfile.SYMTYPE, "link.mp4"), (tarfile.DIRTYPE, "dir.mp4")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert [file.path for file in list_videos(tar)] == [f"{tar}/y.mp4"]
    for name in ("../out.mp4", "link.mp4", "dir.mp4"):
        with pytest.raises(DecodeError, match="no such member"):
            PathDecoder().read_clip(f"{tar}/{name}", 4, 1, 0.0)


def reason_of(path):
    with pytest.raises(DecodeError) as caught:
        PathDecoder().read_clip(str(path), 4, 2, 0.3)
    assert caught.value.path == str(path)
    return caught.value.reason


def test_what_cannot_be_read_is_a_decode_error(tar, tmp_path):
    assert reason_of(f"{tar}/none.mp4") == "no such member in the tar"
    assert "Invalid data" in reason_of(f"{tar}/notes.txt")
    assert reason_of(tmp_path / "no.tar/a.mp4") == "No such file or directory"
    os.mkfifo(tmp_path / "pipe.tar")
    assert reason_of(tmp_path / "pipe.tar/a.mp4") == "not a file"
    with pytest.raises(DecodeError, match="no such member"):
        probe(f"{tar}/none.mp4")


def test_a_tar_cut_off_keeps_what_is_before(tar):
    first, second, third = paths_of(tar)
    offset, size = members_of(str(tar)).find("in/it/b c.mkv")
    whole = tar.read_bytes()
    tar.write_bytes(whole[: offset + size - 1])
    listing = read_source(tar)
    assert [file.path for file in listing.files] == [first]
    assert "cut off" in listing.how
    assert PathDecoder().read_clip(first, 4, 2, 0.3).frames.shape[0] == 4
    for path in (second, third):
        assert reason_of(path) == "no such member in the tar (cut off)"
    # Mended in the same process, it is whole again.
    tar.write_bytes(whole)
    assert len(read_source(tar).files) == 3
    assert PathDecoder().read_clip(third, 4, 2, 0.3).frames.shape[0] == 4


def test_a_header_overwritten_is_damage_and_no_end(tar):
    offset, _ = members_of(str(tar)).find("in/it/b c.mkv")
    with tar.open("r+b") as file:
        file.seek(offset - 512)
        file.write(b"\x55" * 512)
    listing = read_source(tar)
    assert [file.path for file in listing.files] == paths_of(tar)[:1]
    assert "damaged in the middle" in listing.how
    assert "damaged in the middle" in reason_of(paths_of(tar)[2])


def test_a_bad_member_costs_its_clip(tar, videos, tmp_path):
    """In worker processes, with a missing tar and a member that is no video among them."""
    write_tar(tmp_path / "data/1.tar", {"bad.mp4": b"no video", "good.mp4": videos / "a.mp4"})
    files = list_videos(tmp_path / "data") + list_videos(tar)
    files += list_videos(f"{tmp_path}/gone.tar/x.mp4")
    dataset = ClipDataset(files, frames=4, stride=2, image_size=(32, 32))
    dataset = pickle.loads(pickle.dumps(dataset))
    batches = [[ClipRequest(0, index) for index in range(len(files))]] * 2
    for batch in make_loader(dataset, batches, workers=2, pin_memory=False):
        assert batch.video.shape[0] == len(files)
        assert {os.path.basename(bad.path) for bad in batch.bad} == {"bad.mp4", "x.mp4"}
    report = check_files(dataset, workers=2)
    assert {os.path.basename(file.path) for file in report.bad} == {"bad.mp4", "x.mp4"}


def test_no_file_stays_open(tar):
    decoder = PathDecoder()
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    for path in (*paths_of(tar), f"{tar}/notes.txt", f"{tar}/none.mp4"):
        for _ in range(3):
            with suppress(DecodeError):
                decoder.read_clip(path, 4, 2, 0.3)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_only_what_a_clip_needs_is_read(clips, tmp_path):
    video = clips.write_video(
        tmp_path / "v.mp4", count=240, gop=12, size=(192, 256), options={"crf": "0"}
    )
    tar = write_tar(tmp_path / "t.tar", {"before": b"x" * 1000, "v.mp4": video})
    read = []

    class Counting(MemberFile):
        def read(self, size=-1):
            data = super().read(size)
            read.append(len(data))
            return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmae_fast.data.shards.MemberFile", Counting)
        clip = PathDecoder().read_clip(f"{tar}/v.mp4", 4, 1, 0.5)
    assert len(clip.frames) == 4
    assert 0 < sum(read) < os.path.getsize(video) / 2


def test_a_member_as_a_file(tmp_path):
    tar = write_tar(tmp_path / "t.tar", {"a": bytes(range(200)), "b": b"behind"})
    offset, size = members_of(str(tar)).find("a")
    with tar.open("rb") as plain:
        file = MemberFile(plain.fileno(), offset, size, "a")
        assert (file.readable(), file.seekable(), file.tell()) == (True, True, 0)
        assert file.read(3) == bytes([0, 1, 2])
        assert file.seek(-2, os.SEEK_END) == 198
        assert file.read() == bytes([198, 199])
        assert file.read(5) == b""
        assert file.seek(10) == 10
        assert file.seek(5, os.SEEK_CUR) == 15
        assert file.read(1) == bytes([15])
        assert file.seek(1000) == 1000
        assert file.read() == b""
    assert json.dumps(read_member(str(tmp_path / "no tar"))) == "null"


def test_members_take_little_memory(tmp_path):
    """Names and places are arrays: some 50 bytes a member, where a dict takes 300."""
    names = [f"{number:06d}-video-0000.mp4" for number in range(5000)]
    tar = write_tar(tmp_path / "t.tar", dict.fromkeys(names, b""))
    members = members_of(str(tar))
    assert members.names_in_order() == names
    assert (members.names.nbytes + members.places.nbytes) / len(names) < 64
    assert members_of(str(tar)) is members
    assert all(members.find(name) for name in names)
    assert members.find(names[0] + "x") is None
    assert members.find("") is None
