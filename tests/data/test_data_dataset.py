"""Batches depend on the seed and the step alone; bad files are replaced and reported."""

import collections

import numpy as np
import pytest
import torch

from vmae_fast.data import (
    BadFile,
    Clip,
    ClipDataset,
    ClipRequest,
    ClipSampler,
    DataError,
    DecodeError,
    PathDecoder,
    Sampling,
    VideoFile,
    clip_indices,
    collate_clips,
    list_videos,
    make_loader,
)
from vmae_fast.data.rng import START, host_rng


class ArrayDecoder:
    """Videos made up from their names: ``n`` frames of noise, or an error for ``bad``."""

    def __init__(self, height=40, width=56):
        self.height, self.width = height, width
        self.calls, self.asked = [], []

    def read_all(self, path):
        self.calls.append(path)
        if "bad" in path:
            raise DecodeError(path, f"{path} is broken")
        name, count = path.split(":")
        seed = sum(name.encode())
        shape = (int(count), self.height, self.width, 3)
        frames = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        return Clip(frames, tuple(k / 10 for k in range(len(frames))))

    def read_clip(self, path, frames, stride, u, **how):
        self.asked.append((frames, stride, u, how))
        video = self.read_all(path)
        indices = clip_indices(len(video.frames), frames, stride, u)
        return Clip(video.frames[indices], tuple(video.times_s[k] for k in indices))


def files_of(*paths):
    return [VideoFile(path) for path in paths]


def same_batches(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name in ("video", "clip", "repeat", "epoch"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.paths == b.paths
        assert a.bad == b.bad


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips):
    """Six videos of several containers and lengths, and one that cannot be read."""
    root = tmp_path_factory.mktemp("set")
    for number, suffix in enumerate(["mp4", "mkv", "mov", "mp4", "mkv", "mp4"]):
        clips.write_video(root / f"{number}.{suffix}", count=15 * (number + 1), gop=12, rate=24)
    (root / "bad.mp4").write_text("not a video")
    return root


def real_set(folder, **arguments):
    options = {"frames": 8, "stride": 2, "image_size": (32, 32), "seed": 5, **arguments}
    return ClipDataset(list_videos(folder), **options)


def sampler_of(count, **arguments):
    return ClipSampler(count, **{"clips_per_step": 4, "seed": 5, "total_steps": 5, **arguments})


def test_batch_contract():
    dataset = ClipDataset(
        files_of("a:9", "b:30", "c:50"),
        frames=4,
        stride=3,
        image_size=(24, 32),
        repeats=3,
        decoder=ArrayDecoder(),
    )
    batch = collate_clips([dataset[ClipRequest(7, 2)], dataset[ClipRequest(8, 0)]])
    assert batch.video.shape == (6, 3, 4, 24, 32)
    assert batch.video.dtype == torch.uint8
    assert batch.video.permute(0, 2, 3, 4, 1).is_contiguous()
    assert batch.clip.tolist() == [2, 2, 2, 0, 0, 0]
    assert batch.repeat.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.epoch.tolist() == [7, 7, 7, 8, 8, 8]
    assert {batch.clip.dtype, batch.repeat.dtype, batch.epoch.dtype} == {torch.int64}
    assert batch.paths == ["c:50"] * 3 + ["a:9"] * 3
    assert batch.bad == []
    assert len({clip.numpy().tobytes() for clip in batch.video}) == 6


def test_crops_of_a_clip_show_the_same_frames():
    """Every crop is a window of the decoded clip, at a place of its own."""
    decoder = ArrayDecoder(height=24, width=200)
    dataset = ClipDataset(
        files_of("a:30"), frames=4, stride=3, image_size=(24, 24), repeats=16, decoder=decoder
    )
    video = decoder.read_all("a:30").frames
    item = dataset[ClipRequest(0, 0)]
    found = set()
    for crop in item.crops:
        for start in range(30 - 12 + 1):
            clip = video[start : start + 12 : 3]
            for left in range(200 - 24 + 1):
                if np.array_equal(crop.numpy(), clip[:, :, left : left + 24]):
                    found.add((start, left))
    # The full-size square, one crop in ten, is the only one that is not scaled.
    assert found
    assert len({start for start, _ in found}) == 1


def test_starts_and_crops_follow_the_seed_and_the_epoch():
    def video(seed, epoch, **arguments):
        options = {"frames": 4, "stride": 3, "image_size": (24, 24), "decoder": ArrayDecoder()}
        dataset = ClipDataset(files_of("a:90"), seed=seed, **options, **arguments)
        return dataset[ClipRequest(epoch, 0)].crops[0].numpy().tobytes()

    assert video(0, 0) == video(0, 0)
    assert len({video(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    assert video(0, 0, train=False) == video(1, 1, train=False)


def test_flip_mirrors_half_of_the_training_crops():
    options = {"frames": 2, "stride": 1, "image_size": (40, 56), "repeats": 200}
    plain = ClipDataset(files_of("a:9"), decoder=ArrayDecoder(), **options)
    mirrored = ClipDataset(files_of("a:9"), decoder=ArrayDecoder(), flip=True, **options)
    pairs = list(
        zip(plain[ClipRequest(0, 0)].crops, mirrored[ClipRequest(0, 0)].crops, strict=True)
    )
    flipped = sum(torch.equal(a.flip(2), b) for a, b in pairs)
    assert flipped + sum(torch.equal(a, b) for a, b in pairs) == 200
    assert 70 < flipped < 130
    for_validation = ClipDataset(
        files_of("a:9"), decoder=ArrayDecoder(), flip=True, train=False, **options
    )
    crops = for_validation[ClipRequest(0, 0)].crops
    assert all(torch.equal(crop, crops[0]) for crop in crops)


def test_validation_is_the_middle_clip_and_the_centre():
    decoder = ArrayDecoder(height=40, width=56)
    dataset = ClipDataset(
        files_of("a:31"), frames=4, stride=2, image_size=(40, 40), train=False, decoder=decoder
    )
    video = decoder.read_all("a:31").frames
    expected = video[12:19:2, :, 8:48]  # starts 0 to 23, the middle one 12
    assert np.array_equal(dataset[ClipRequest(3, 0)].crops[0].numpy(), expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    """Batches, bad files included, are those of the process itself."""
    batches = {}
    for count in (0, workers):
        loader = make_loader(
            real_set(folder, repeats=2), sampler_of(7), workers=count, pin_memory=False
        )
        batches[count] = list(loader)
    same_batches(batches[0], batches[workers])
    assert len(batches[0]) == 5
    assert batches[workers][0].video.permute(0, 2, 3, 4, 1).is_contiguous()
    assert any(batch.bad for batch in batches[0])


def test_loading_leaves_the_global_random_state_alone(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make_loader(real_set(folder), sampler_of(7), workers=0, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), before)


def test_cached_clips_are_the_uncached_ones(folder):
    requests = [ClipRequest(epoch, index) for epoch in range(4) for index in range(7)]
    plain, cached = real_set(folder), real_set(folder, cache=True)
    same_batches(
        [collate_clips([plain[request]]) for request in requests],
        [collate_clips([cached[request]]) for request in requests],
    )


def test_cache_reads_every_file_once_bad_ones_too():
    decoder = ArrayDecoder()
    dataset = ClipDataset(
        files_of("a:9", "bad", "b:9"),
        frames=2,
        stride=1,
        image_size=(8, 8),
        cache=True,
        decoder=decoder,
    )
    items = [dataset[ClipRequest(epoch, index)] for epoch in range(4) for index in range(3)]
    assert collections.Counter(decoder.calls) == {"a:9": 1, "bad": 1, "b:9": 1}
    assert [len(item.bad) for item in items] == [0, 1, 0] * 4


def test_a_crop_does_not_write_into_the_cache():
    dataset = ClipDataset(
        files_of("a:2"),
        frames=2,
        stride=1,
        image_size=(40, 56),
        train=False,
        cache=True,
        decoder=ArrayDecoder(height=40, width=56),
    )
    first = dataset[ClipRequest(0, 0)].crops[0]
    kept = first.clone()
    first.zero_()
    assert torch.equal(dataset[ClipRequest(0, 0)].crops[0], kept)


def test_what_an_entry_says_of_itself_reaches_the_decoder():
    by_time = Sampling(stride=5, fps=2.0, repeats=3)
    files = [
        VideoFile("a:90", first=10, count=40, part=(1, 4), sampling=Sampling(stride=7)),
        VideoFile("b:90", sampling=by_time),
        VideoFile("c:90"),
    ]
    for cache in (False, True):
        decoder = ArrayDecoder()
        dataset = ClipDataset(
            files, frames=2, stride=3, image_size=(8, 8), repeats=2, cache=cache, decoder=decoder
        )
        items = [dataset[ClipRequest(4, index)] for index in range(3)]
        assert [len(item.crops) for item in items] == [1, 3, 2]
        # Parts of files, and clips by time, are never cut out of what is cached.
        assert len(decoder.asked) == (2 if cache else 3)
        one, two = decoder.asked[:2]
        assert one[:2] == (2, 7)
        assert one[3] == {"fps": None, "first": 10, "count": 40}
        assert two[3] == {"fps": 2.0, "first": None, "count": None}
        u = host_rng(0, stream=START, epoch=4, clip=0).random()
        assert one[2] == pytest.approx((1 + u) / 4)


def test_a_part_of_the_repeats_may_be_asked_for():
    dataset = ClipDataset(
        files_of("a:9"), frames=2, stride=1, image_size=(8, 8), repeats=4, decoder=ArrayDecoder()
    )
    whole = dataset[ClipRequest(2, 0)]
    part = collate_clips([dataset[ClipRequest(2, 0, first=1, repeats=2)]])
    assert part.repeat.tolist() == [1, 2]
    for number, crop in enumerate(whole.crops[1:3]):
        assert torch.equal(part.video[number].permute(1, 2, 3, 0), crop)
    rest = dataset[ClipRequest(2, 0, first=3)]
    assert (rest.first, len(rest.crops)) == (3, 1)


def test_parts_of_a_bad_file_are_not_its_replacements():
    files = [VideoFile("bad", part=(k, 30)) for k in range(30)] + files_of("a:9")
    dataset = ClipDataset(files, frames=2, stride=1, image_size=(8, 8), decoder=ArrayDecoder())
    for epoch in range(5):
        item = dataset[ClipRequest(epoch, 3)]
        assert item.path == "a:9"
        assert len(item.bad) == 1


@pytest.mark.parametrize("train", [True, False])
def test_bad_files_are_replaced_alike_and_reported(train):
    files = files_of("a:9", "bad0", "b:9", "bad1", *(f"c{k}:9" for k in range(6)))
    options = {"frames": 2, "stride": 1, "image_size": (8, 8), "seed": 1, "train": train}
    dataset = ClipDataset(files, decoder=ArrayDecoder(), **options)
    used = []
    for epoch in range(40):
        item = dataset[ClipRequest(epoch, 1)]
        assert item.bad[0] == BadFile("bad0", "bad0 is broken")
        assert item.bad[1:] in ([], [BadFile("bad1", "bad1 is broken")])
        assert item.path == files[item.clip].path
        assert "bad" not in item.path
        # The clip is what a request for that file gives, on a dataset with another history.
        direct = ClipDataset(files, decoder=ArrayDecoder(), **options)[
            ClipRequest(epoch, item.clip)
        ]
        assert torch.equal(item.crops[0], direct.crops[0])
        again = ClipDataset(files, decoder=ArrayDecoder(), **options)[ClipRequest(epoch, 1)]
        assert (again.clip, again.bad) == (item.clip, item.bad)
        used.append(item.clip)
    assert len(set(used)) == 8  # any good file, not always the next one


def test_replacements_stay_in_their_pool():
    files = files_of("bad", *(f"{name}:9" for name in "abcdefgh"))
    dataset = ClipDataset(
        files, frames=2, stride=1, image_size=(8, 8), decoder=ArrayDecoder(), replacements=[0, 3, 5]
    )
    assert {dataset[ClipRequest(epoch, 0)].clip for epoch in range(20)} == {3, 5}


def test_too_many_bad_files_in_a_row():
    many = ClipDataset(
        files_of(*(f"bad{k}" for k in range(30))),
        frames=2,
        stride=1,
        image_size=(8, 8),
        decoder=ArrayDecoder(),
    )
    with pytest.raises(DataError, match=r"10 files in a row") as caught:
        many[ClipRequest(0, 4)]
    assert str(caught.value).count("is broken") == 10
    assert "bad4: bad4 is broken" in str(caught.value)
    few = ClipDataset(
        files_of("bad0", "bad1"), frames=2, stride=1, image_size=(8, 8), decoder=ArrayDecoder()
    )
    with pytest.raises(DataError, match=r"2 files in a row"):
        few[ClipRequest(0, 0)]


def test_a_worker_passes_the_data_error_on(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    dataset = real_set(tmp_path)
    loader = make_loader(dataset, sampler_of(1), workers=1, pin_memory=False)
    with pytest.raises(DataError, match=r"text.mp4"):
        next(iter(loader))


def test_dataset_errors():
    good = {"frames": 2, "stride": 1, "image_size": (8, 8)}
    for wrong in ({"frames": 0}, {"stride": 0}, {"image_size": (8, 0)}, {"repeats": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            ClipDataset(files_of("a:9"), **{**good, **wrong})
    with pytest.raises(ValueError, match="must not be empty"):
        ClipDataset([], **good)
    with pytest.raises(ValueError, match="must not be empty"):
        ClipDataset(files_of("a:9"), replacements=[], **good)


def test_batch_moves_keep_the_layout():
    dataset = ClipDataset(
        files_of("a:9"), frames=2, stride=1, image_size=(8, 12), decoder=ArrayDecoder()
    )
    batch = collate_clips([dataset[ClipRequest(0, 0)]] * 2)
    moved = batch.to("meta")
    assert moved.video.device.type == moved.epoch.device.type == "meta"
    assert moved.clip.device.type == moved.repeat.device.type == "meta"
    assert moved.video.stride() == batch.video.stride()
    assert moved.paths == batch.paths


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_reach_the_gpu_unchanged(folder):
    loaders = [
        make_loader(real_set(folder), sampler_of(7), workers=2, pin_memory=pin)
        for pin in (False, True)
    ]
    for plain, pinned in zip(*loaders, strict=True):
        assert pinned.video.is_pinned()
        assert pinned.clip.is_pinned()
        on_gpu = pinned.to("cuda")
        assert on_gpu.video.is_cuda
        assert on_gpu.video.stride() == plain.video.stride()
        same_batches([on_gpu.to("cpu", non_blocking=False)], [plain])


def test_resumed_batches_are_the_tail(folder):
    def batches(start):
        sampler = sampler_of(7, start_step=start)
        return list(make_loader(real_set(folder), sampler, workers=0, pin_memory=False))

    same_batches(batches(3), batches(0)[3:])


def test_loader_refuses_a_negative_number_of_workers():
    dataset = ClipDataset(files_of("a:9"), frames=2, stride=1, image_size=(8, 8))
    assert isinstance(dataset.decoder, PathDecoder)
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        make_loader(dataset, sampler_of(1), workers=-1, pin_memory=False)


def test_import_needs_no_video_library():
    import subprocess
    import sys

    code = "import sys; sys.modules['av'] = None; import vmae_fast.data"
    subprocess.run([sys.executable, "-c", code], check=True)
