"""Several sources, clips a video, sampling by time, grey clips: as a run takes them."""

import collections

import pytest
import torch
from safetensors.torch import load_file

from vmae_fast.data import LoadingWork, synthetic_videos
from vmae_fast.models import VideoMAEConfig
from vmae_fast.train import (
    ConfigError,
    DataSettings,
    PretrainConfig,
    Schedule,
    load_config,
    pretrain,
    to_toml,
)
from vmae_fast.train.distributed import Ranks, alone
from vmae_fast.train.inputs import Inputs

MODEL = VideoMAEConfig.of("tiny", frames=4, image_size=32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Short videos (1 s) and long ones (40 s)."""
    root = tmp_path_factory.mktemp("sources")
    short = synthetic_videos(root, count=6, size=32, frames=24)
    long = synthetic_videos(root, count=2, size=32, frames=960, seed=1)
    return short, long


def mixture(*sources, **optim):
    config = PretrainConfig()
    config.model.model, config.model.frames, config.model.image_size = "tiny", 4, 32
    config.mixture = [DataSettings(data=str(path), **how) for path, how in sources]
    config.loading.val, config.loading.workers = 0.0, 0
    config.optim.batch_size = 4
    for name, value in optim.items():
        setattr(config.optim, name, value)
    config.check()
    return config


def toml_of(tmp_path, text):
    file = tmp_path / "config.toml"
    file.write_text(text)
    return load_config(file)


def test_tables_of_sources(tmp_path):
    config = toml_of(
        tmp_path,
        '[[data]]\npath = "a.csv"\nroot = "/r"\nstride = 2\n\n'
        '[[data]]\npath = "b"\nsample_fps = 6\nweight = 0.5\nrepeats = 3\n'
        'clips_per_video = "auto"\n\n[loading]\nflip = true\n',
    )
    one, two = config.sources
    assert (one.data, one.data_root, one.stride, one.weight) == ("a.csv", "/r", 2, 1.0)
    assert (two.sample_fps, two.weight, two.repeats, two.clips_per_video) == (6.0, 0.5, 3, "auto")
    assert config.loading.flip
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "again.toml") == config
    # One table is the same as the plain one.
    alone_ = toml_of(tmp_path, '[[data]]\npath = "a"\nstride = 3\n')
    assert alone_ == toml_of(tmp_path, '[data]\npath = "a"\nstride = 3\n')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[data]]\nstried = 3\n", r"\[\[data\]\] number 1: unknown key 'stried'; did you mean"),
        ("[[data]]\npath = 3\n", r"number 1 path must be str, got 3"),
        ("[[data]]\ncache = true\n", "'cache'; it belongs into .loading."),
        ("[[data]]\nclips_per_video = 'many'\n", "must be int or 'auto', got 'many'"),
        ("[[optim]]\nlr = 1.0\n", "is a table"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        toml_of(tmp_path, text)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"sample_fps": 0.0}, "sample_fps must be above 0, got 0"),
        ({"sample_fps": float("nan")}, "sample_fps must be above 0"),
        ({"weight": -1.0}, "weight must be above 0"),
        ({"clips_per_video": 0}, "clips_per_video must be at least 1"),
    ],
)
def test_wrong_numbers_of_a_source(wrong, message):
    with pytest.raises(ConfigError, match=message):
        mixture(("a", {}), ("b", wrong))


def test_a_source_of_several_needs_a_path():
    config = mixture(("a", {}), ("b", {}))
    config.mixture[1].data = None
    with pytest.raises(ConfigError, match="needs a path"):
        config.check()


def test_sources_keep_their_own_sampling_weight_and_repeats(folders):
    short, long = folders
    config = mixture((short, {"stride": 2, "weight": 2.0}), (long, {"stride": 3, "repeats": 3}))
    inputs = Inputs(config, MODEL, alone())
    assert [note.split(": ")[1] for note in inputs.notes] == [str(short), str(long)]
    assert inputs.num_files == len(inputs.files) == 8
    epoch = inputs.epoch()
    assert (epoch.files, epoch.clips) == (6 * 2 + 2, 6 * 2 + 2 * 3)
    schedule = Schedule.of(config, epoch.files, 1, epoch.clips)
    # Four clips a step are 4 * 14 / 18 files.
    assert schedule.files_per_step == pytest.approx(4 * 14 / 18)
    batches = inputs.train_batches(schedule, 0)
    seen = collections.Counter()
    for _ in range(9):  # two epochs of 18 clips
        batch = next(batches)
        assert batch.video.shape[0] == 4
        seen.update(path.split("/")[-3] for path in batch.paths)
    assert seen == {short.name: 24, long.name: 12}
    dataset = inputs.dataset(train=True)
    for request in epoch.requests(0, 18):
        item = dataset[request]
        rate = 1 / 24
        stride = 2 if short.name in item.path else 3
        steps = torch.tensor(item.times_s).diff()
        assert torch.allclose(steps, torch.full((3,), stride * rate), atol=1e-3)


def test_sampling_by_time(folders):
    config = mixture((folders[1], {"sample_fps": 2.0}))
    item = Inputs(config, MODEL, alone()).dataset(train=True)
    times = torch.tensor(item[next(iter_requests(config))].times_s)
    # What is shown half a second apart, to the frame of 1/24 s.
    assert torch.allclose(times.diff(), torch.full((3,), 0.5), atol=1 / 24 + 1e-6)


def iter_requests(config):
    yield from Inputs(config, MODEL, alone()).epoch().requests(0, 1)


def test_clips_per_video(folders):
    short, long = folders
    inputs = Inputs(mixture((long, {"clips_per_video": 5, "stride": 1})), MODEL, alone())
    assert (inputs.num_files, len(inputs.files), inputs.epoch().files) == (2, 10, 10)
    dataset = inputs.dataset(train=True)
    for epoch in range(3):
        starts = collections.defaultdict(list)
        for request in inputs.epoch().requests(epoch * 10, 10):
            item = dataset[request]
            starts[item.path].append((request.index % 5, item.times_s[0]))
        assert {len(found) for found in starts.values()} == {5}
        for path in starts:
            # Each in its own fifth of the 957 starts.
            for part, seconds in starts[path]:
                assert part * 957 / 5 - 1 <= round(seconds * 24) <= (part + 1) * 957 / 5
    # By duration: 40 s are four clips, 1 s is one.
    auto = {"clips_per_video": "auto"}
    inputs = Inputs(mixture((short, auto), (long, auto)), MODEL, alone())
    assert [len(list(g)) for g in (inputs.files[:6], inputs.files[6:])] == [6, 8]
    assert inputs.files[6].part == (0, 4)


def test_held_out_files_have_no_clip_in_training(folders):
    config = mixture((folders[1], {"clips_per_video": 4}), (folders[0], {}))
    config.loading.val = 0.4
    inputs = Inputs(config, MODEL, alone())
    paths = [{inputs.files[i].path for i in part} for part in (inputs.train, inputs.val)]
    assert paths[0] & paths[1] == set()
    assert len(paths[0] | paths[1]) == 8
    assert sorted(inputs.train + inputs.val) == list(range(len(inputs.files)))


def test_ranks_read_the_same_list(folders, monkeypatch):
    """Durations are read by all processes, each a part."""
    config = mixture((folders[0], {"clips_per_video": "auto"}), (folders[1], {"stride": 2}))
    config.mixture[1].clips_per_video = "auto"
    whole = Inputs(config, MODEL, alone())
    from vmae_fast.train import inputs as module

    parts = []
    monkeypatch.setattr(module, "clips_by_duration", lambda files, show: parts.append(files) or [])
    answers = iter([[[1, 1, 1], [1, 1, 1]], [[4], [4]]])
    monkeypatch.setattr(Ranks, "gather", lambda self, value: next(answers))
    second = Inputs(config, MODEL, Ranks(1, 2, torch.device("cpu")))
    assert [len(part) for part in parts] == [3, 1]
    assert second.files == whole.files
    assert second.fingerprint == whole.fingerprint


def test_the_list_is_known_again_when_it_moves_and_not_when_it_changes(folders, tmp_path):
    def fingerprint(*sources):
        return Inputs(mixture(*sources), MODEL, alone()).fingerprint

    moved = tmp_path / "elsewhere"
    moved.symlink_to(folders[0])
    assert fingerprint((folders[0], {})) == fingerprint((moved, {}))
    known = fingerprint((folders[0], {}), (folders[1], {}))
    for other in ({"clips_per_video": 2}, {"weight": 2.0}, {"repeats": 2}):
        assert fingerprint((folders[0], {}), (folders[1], other)) != known
    # The same clips in the same order, sampled otherwise.
    assert fingerprint((folders[0], {}), (folders[1], {"stride": 2})) == known


@pytest.mark.parametrize("channels", [1, 4])
def test_a_mixture_of_grey_or_transparent_clips_trains_and_goes_on_bitwise(
    folders, tmp_path, channels
):
    def config_of(out, steps):
        short, long = folders
        config = mixture(
            (short, {"stride": 2, "weight": 1.5}),
            (long, {"repeats": 3, "clips_per_video": 2, "sample_fps": 12.0}),
            steps=steps, lr=1e-3, warmup_steps=1, micro_batch=2,
        )  # fmt: skip
        config.model.in_channels = channels
        config.run.out, config.run.device, config.run.save_every = str(out), "cpu", 2
        config.loading.val = 0.2
        return config

    whole = pretrain(config_of(tmp_path / "whole", 6))
    assert whole.val_loss is not None
    assert whole.samples[0].shape[0] == channels
    cut = config_of(tmp_path / "cut", 6)
    first = load_config(tmp_path / "whole/config.toml")
    assert first.sources == cut.sources
    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"cut/checkpoints/step-{step:08d}")
    cut.run.resume = True
    again = pretrain(cut)
    a, b = (load_file(r.checkpoint / "model.safetensors") for r in (whole, again))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["encoder.patch_embed.weight"].shape[1] == channels
    from vmae_fast import VideoMAE
    from vmae_fast.pictures import reconstruct

    shown = reconstruct(VideoMAE.from_pretrained(whole.checkpoint), whole.samples[0])
    assert shown.original.shape == shown.reconstructed.shape == (4, 32, 32, 3)


def test_channels_that_videos_do_not_have(folders):
    model = VideoMAEConfig.of("tiny", frames=4, image_size=32, in_channels=2)
    with pytest.raises(ConfigError, match=r"in_channels=2: videos are read as 3 channels"):
        Inputs(mixture((folders[0], {})), model, alone())


def test_the_hybrid_recipe_is_published():
    config = load_config("v2-giant-hybrid")
    config.check()
    assert {source.stride for source in config.sources} == {2, 4}
    assert {source.repeats for source in config.sources} == {4}
    schedule = Schedule.of(config, num_files=1_350_000, world_size=64)
    assert schedule.lr == pytest.approx(4.8e-3)
    assert config.optim.clip_grad == 0.02
    assert schedule.total_steps == round(300 * 1_350_000 / 2048)
    assert config.model.overrides()["decoder_mask_ratio"] == 0.5


@pytest.mark.parametrize(
    ("device", "cores", "cache", "expected"),
    [
        ("cpu", 1, False, 0), ("cpu", 2, False, 0), ("cpu", 3, False, 2), ("cpu", 64, False, 16),
        # Beside a GPU even one core decodes while it computes.
        ("cuda", 1, False, 1), ("cuda", 2, False, 1), ("cuda", 8, False, 7), ("cuda", 8, True, 0),
    ],
)  # fmt: skip
def test_workers_by_cores(folders, monkeypatch, device, cores, cache, expected):
    config = mixture((folders[0], {}))
    config.loading.workers, config.loading.cache = None, cache
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    inputs = Inputs(config, MODEL, Ranks(0, 1, torch.device(device)))
    assert inputs.workers == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert inputs.cores == max(cores // 2, 1)


def test_what_to_do_about_waiting_comes_from_the_run(folders, monkeypatch):
    """Figures of the clips that were loaded since the last time."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    config = mixture((folders[0], {}))
    config.loading.workers = 1
    inputs = Inputs(config, MODEL, Ranks(0, 1, torch.device("cpu")))
    epoch = inputs.epoch()
    batches = inputs.train_batches(Schedule.of(config, epoch.files, 1, epoch.clips), 0)
    assert inputs.waiting_advice(0.5) is None  # loading starts up
    for _ in range(4):
        next(batches)
    assert inputs.waiting_advice(0.05) is None
    for _ in range(4):
        next(batches)
    text = inputs.waiting_advice(0.5)
    assert text.startswith("the step waited for clips 50% of the time (a clip takes ")
    assert inputs.waiting_advice(0.6) is None  # said already

    asked = []
    monkeypatch.setattr(inputs, "_waiting", asked.append)
    for inputs.work in (LoadingWork(90, 3.0, 2.0), LoadingWork(100, 4.0, 2.25)):
        inputs.waiting_advice(0.5)
    assert asked[1].clip_s == pytest.approx(0.1)
    assert asked[1].cpu_share == pytest.approx(0.25)
    assert (asked[1].workers, asked[1].cores, asked[1].busy_cores) == (1, 8, 8)
