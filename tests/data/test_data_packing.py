"""What is packed from sources of all kinds, and what is lost to bad files and to nobody else."""

import json
import os
import threading

import numpy as np
import pytest
from pack_readers import failing, slow
from PIL import Image

from vmae_fast.data import (
    ClipDataset,
    ClipRequest,
    DataError,
    PathDecoder,
    Sampling,
    VideoFile,
    read_source,
    split_by_source,
    split_validation,
)
from vmae_fast.data.pack import pack
from vmae_fast.data.segments import PackSettings, segments_of, small_size
from vmae_fast.data.shard_writer import ShardWriter
from vmae_fast.data.shards import read_member

SMALL = {"segment_frames": 40, "crf": 8}


def numbers_of(clips, file):
    return clips.read_numbers(PathDecoder().read_all(file.path).frames)


def about(file):
    return json.loads(read_member(file.path.removesuffix(".mp4") + ".json"))


@pytest.fixture(scope="module")
def video(tmp_path_factory, clips):
    return clips.write_video(tmp_path_factory.mktemp("one") / "video.mp4", count=120, gop=12)


def test_stride_counts_frames_of_the_source(video, clips, tmp_path):
    """A clip at 4 takes consecutive kept frames, at 8 every second; each begins at any of them."""
    pack(read_source(video).files, tmp_path / "out", stride=4, **SMALL)
    (file,) = read_source(tmp_path / "out").files
    for stride in (4, 8):
        sampled = file.sampled(Sampling(stride))
        dataset = ClipDataset([sampled], frames=4, image_size=(48, 64))
        starts = set()
        for epoch in range(60):
            clip = dataset.decoder.read_clip(file.path, 4, sampled.sampling.stride, epoch / 60)
            numbers = clips.read_numbers(clip.frames)
            assert np.diff(numbers).tolist() == [stride] * 3
            starts.add(numbers[0])
        assert starts == set(range(0, 120 - 4 * stride + 1, 4))
        assert dataset.read(ClipRequest(0, 0)).crops[0].shape == (4, 48, 64, 3)
    with pytest.raises(DataError, match=r"every 4th frame .* multiple of 4; give --stride 4"):
        file.sampled(Sampling(6))
    # By time a stride says nothing, and the segment's clock is the source's.
    assert file.sampled(Sampling(6, fps=3.0)).sampling.fps == 3.0
    timed = PathDecoder().read_clip(file.path, 4, 1, 0.0, fps=3.0)
    assert clips.read_numbers(timed.frames) == [0, 8, 16, 24]


def test_bad_files_are_listed_and_cost_nothing_else(video, clips, tmp_path):
    names = ["a.mp4", "crash.mp4", "e.mp4", "strange.mp4", "z b,ü\tc.mp4"]
    for name in names:
        (tmp_path / name).symlink_to(video)
    (tmp_path / "text.mp4").write_text("no video")
    clips.write_audio(tmp_path / "sound.mp4")
    files = read_source(tmp_path).files
    counted = []
    report = pack(
        files, tmp_path / "out", **SMALL, workers=2, read=failing, progress=counted.append
    )
    reasons = {os.path.basename(path): reason for path, reason in report.bad}
    assert reasons == {
        "crash.mp4": "its decoder crashed",
        "strange.mp4": "IndexError: what a library\nmakes of it",
        "text.mp4": "Invalid data found when processing input",
        "sound.mp4": "no video stream (audio only)",
    }
    assert sum(counted) == len(files) == report.files == 7
    packed = read_source(tmp_path / "out").files
    assert [os.path.basename(file.source) for file in packed] == ["a.mp4", "e.mp4", names[-1]]
    for file in packed:
        assert numbers_of(clips, file) == list(range(0, 120, 4))
    lines = (tmp_path / "out/bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[1] for line in lines] == [
        " ".join(reason.splitlines()) for _, reason in report.bad
    ]
    # One process, and nobody that crashes: the same bytes but for those that failed.
    good = [file for file in files if os.path.basename(file.path) not in reasons]
    pack(good, tmp_path / "alone", **SMALL)
    again = read_source(tmp_path / "alone").files
    for one, other in zip(packed, again, strict=True):
        assert read_member(one.path) == read_member(other.path)


def test_stops_between_shards_of_one_video_change_no_byte(video, clips, tmp_path, monkeypatch):
    """Each start writes one shard more, of which a video fills several."""
    (tmp_path / "bad.mp4").write_text("no video")
    files = [VideoFile(str(path)) for path in (tmp_path / "bad.mp4", video, video)]
    flags = SMALL | {"stride": 1, "segment_frames": 20, "overlap": 4, "shard_mb": 0.02}
    pack(files, tmp_path / "whole", **flags)
    firsts = [about(file)["first_frame"] for file in read_source(tmp_path / "whole").files]
    assert firsts == [0, 16, 32, 48, 64, 80, 96] * 2
    shards = sorted(path.name for path in (tmp_path / "whole").glob("*.tar"))
    assert len(shards) > 4
    close = ShardWriter._close

    def stop(writer, *arguments):
        if len(writer.shards) > before:
            raise KeyboardInterrupt
        close(writer, *arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_close", stop)
        for before in range(len(shards) - 1):
            with pytest.raises(KeyboardInterrupt):
                pack(files, out, **flags)
            assert sorted(path.name for path in out.glob("*.tar")) == shards[: before + 1]
    pack(files, out, **flags)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


def test_two_processes_do_not_pack_into_one_folder(video, tmp_path):
    files, out = read_source(video).files, tmp_path / "out"
    first = threading.Thread(target=pack, args=(files, out), kwargs=SMALL | {"read": slow})
    first.start()
    while not (out / ".pack/state.json").exists():
        assert first.is_alive()
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"another process is packing into .*out"):
            pack(files, out, **SMALL, overwrite=overwrite)
    first.join()
    assert pack(files, out, **SMALL).segments == 1


def test_frame_folders_and_lists(video, clips, tmp_path):
    """Parts that V2's lists name, by number, gaps held; labels; numbers of the first frame."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(1, 61):
        if number != 9:
            picture = Image.fromarray(clips.draw_frame(number, 48, 64))
            picture.save(folder / f"img_{number:05}.png")
    (tmp_path / "list.txt").write_text(f"frames 5 30 7\n{video} 20 41 8\n{video} -1 -1 9\n")
    report = pack(read_source(tmp_path / "list.txt").files, tmp_path / "out", **SMALL)
    assert (report.files, report.segments, report.bad) == (3, 3, [])
    parts, part, whole = read_source(tmp_path / "out").files
    assert numbers_of(clips, parts) == [5, 8, 13, 17, 21, 25, 29, 33]
    assert numbers_of(clips, part) == list(range(20, 61, 4))
    assert numbers_of(clips, whole) == list(range(0, 120, 4))
    assert [file.label for file in (parts, part, whole)] == ["7", "8", "9"]
    assert [about(file)["first_frame"] for file in (parts, part, whole)] == [5, 20, 0]
    assert [about(file)["fps"] for file in (parts, part, whole)] == [None, 24.0, 24.0]
    assert part.source == whole.source == str(video) != parts.source
    # All pictures of a folder, by position.
    pack(read_source(folder).files, tmp_path / "plain", stride=10, **SMALL)
    (file,) = read_source(tmp_path / "plain").files
    assert numbers_of(clips, file) == [1, 12, 22, 32, 42, 52]


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (130, 20, 77)]


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_come_back(colour, tmp_path):
    picture = np.full((64, 96, 3), colour, np.uint8)
    (sample,) = segments_of(
        VideoFile("x"), 0, "x", PackSettings(crf=4), lambda *_: iter([(picture, None)] * 3)
    )
    path = tmp_path / "v.mp4"
    path.write_bytes(sample.video)
    found = PathDecoder().read_all(str(path)).frames
    assert np.abs(found.astype(int) - picture).max() <= 3


def test_turned_video_with_wide_pixels_goes_in_upright(clips, tmp_path):
    """Its upper part, bright as it is stored, lies right or left as it is shown."""
    frames = [clips.flat_frame("yuv444p", (60 + 3 * k, 120, 140), size=(64, 96)) for k in range(8)]
    for frame in frames:
        frame.planes[0].update(b"\xc8" * (frame.planes[0].buffer_size // 2) + bytes(
            memoryview(frame.planes[0]))[frame.planes[0].buffer_size // 2 :])  # fmt: skip
    quarter = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    path = clips.write_frames(
        tmp_path / "v.mp4", frames, codec="libx264", matrix=quarter, aspect=2, options={"crf": "1"}
    )
    seen = PathDecoder().read_all(str(path)).frames[::2]
    assert seen.shape == (4, 192, 64, 3)
    pack(read_source(path).files, tmp_path / "out", stride=2, **SMALL)
    (file,) = read_source(tmp_path / "out").files
    packed = PathDecoder().read_all(file.path).frames
    assert packed.shape == seen.shape
    # Away from the edge, where half of the colours' pixels are stored.
    for half in (np.s_[:, :, :28], np.s_[:, :, 36:]):
        assert np.abs(packed[half].astype(int) - seen[half]).max() <= 6
    assert abs(int(seen[0, 0, 0, 1]) - int(seen[0, 0, -1, 1])) > 60


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1080, 1920), (256, 456)),
        ((1920, 1080), (456, 256)),
        ((256, 320), (256, 320)),
        ((255, 321), (254, 320)),
        ((257, 257), (256, 256)),
        ((2, 2), (2, 2)),
        ((1, 9), (2, 8)),
    ],
)
def test_sizes(size, expected):
    assert small_size(*size, 256) == expected


def test_large_videos_get_small(clips, tmp_path):
    path = clips.write_video(tmp_path / "v.mp4", count=8, size=(144, 192))
    pack(read_source(path).files, tmp_path / "out", short_side=48, stride=1, **SMALL)
    (file,) = read_source(tmp_path / "out").files
    frames = PathDecoder().read_all(file.path).frames
    assert frames.shape == (8, 48, 64, 3)
    assert clips.read_numbers(frames) == list(range(8))


def test_every_keyframe_is_where_it_should_be(video, tmp_path):
    import av

    pack(read_source(video).files, tmp_path / "out", stride=1, keyint=8, segment_frames=200)
    (file,) = read_source(tmp_path / "out").files
    (tmp_path / "v.mp4").write_bytes(read_member(file.path))
    with av.open(str(tmp_path / "v.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        context = container.streams.video[0].codec_context
        assert [k for k, p in enumerate(packets) if p.is_keyframe] == list(range(0, 120, 8))
        assert all(packet.pts == packet.dts for packet in packets)
        assert (context.pix_fmt, context.colorspace, context.color_range) == ("yuv420p", 6, 1)
        assert [stream.type for stream in container.streams] == ["video"]


def test_what_is_packed_is_not_packed_again(video, tmp_path):
    pack(read_source(video).files, tmp_path / "out", **SMALL)
    with pytest.raises(DataError, match="packed already, with every 4th frame"):
        pack(read_source(tmp_path / "out").files, tmp_path / "more")


def test_a_shard_alone_still_knows_how_it_was_packed(video, tmp_path):
    """Beside its index, and taken to another place by itself."""
    pack([VideoFile(str(video), "up")], tmp_path / "out", stride=3, **SMALL)
    (whole,) = read_source(tmp_path / "out").files
    (beside,) = read_source(tmp_path / "out/shard-000000.tar").files
    assert beside == whole
    (tmp_path / "away").mkdir()
    (tmp_path / "out/shard-000000.tar").rename(tmp_path / "away/x.tar")
    listing = read_source(tmp_path / "away")
    (alone,) = listing.files
    assert (alone.label, alone.taken_every) == ("up", 3)
    assert alone.source is not None
    assert "packed with every 3rd frame" in listing.how


def test_a_damaged_index_is_said_so(video, tmp_path):
    pack(read_source(video).files, tmp_path / "out", **SMALL)
    index = tmp_path / "out/index.json"
    index.write_text(index.read_text()[:100])
    with pytest.raises(DataError, match=r"index.json' is damaged; pack again with --overwrite"):
        read_source(tmp_path / "out")


def test_training_on_it_resumes_to_the_same_weights(video, clips, tmp_path):
    """With decoding processes, to which members of tars go by their paths."""
    import shutil

    from safetensors.numpy import load_file

    from vmae_fast import cli

    for k in range(3):
        (tmp_path / f"videos/{k}.mp4").parent.mkdir(exist_ok=True)
        (tmp_path / f"videos/{k}.mp4").symlink_to(video)
    files = read_source(tmp_path / "videos").files
    pack(files, tmp_path / "out", stride=2, segment_frames=20, overlap=7, crf=20)
    run = tmp_path / "run"
    command = [
        "pretrain", "--data", str(tmp_path / "out"), "--model", "tiny", "--frames", "4",
        "--image-size", "32", "--stride", "4", "--batch-size", "4", "--val", "0.34", "--workers",
        "2", "--device", "cpu", "--save-every", "2", "--steps", "4", "--out", str(run),
    ]  # fmt: skip
    assert cli.main(command) == 0
    last = run / "checkpoints/step-00000004"
    (weights,) = last.glob("model*.safetensors")
    before = load_file(weights)
    shutil.rmtree(last)
    assert cli.main([*command, "--resume"]) == 0
    after = load_file(weights)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_splits_are_by_source_and_otherwise_as_before():
    plain = [VideoFile(f"{k}.mp4") for k in range(40)]
    assert split_by_source(plain, 0.2, 3) == split_validation(40, 0.2, 3)
    sources = [f"s{k // 3}" for k in range(60)]
    files = [VideoFile(f"{k}.mp4", source=source) for k, source in enumerate(sources)]
    train, held_out = split_by_source(files, 0.25, 1)
    assert sorted(train + held_out) == list(range(60))
    assert not {sources[k] for k in train} & {sources[k] for k in held_out}
    assert len(held_out) == 15
    # The same videos are held out as of the set that it was made of.
    assert sorted({k // 3 for k in held_out}) == split_validation(20, 0.25, 1)[1]
