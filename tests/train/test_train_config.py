"""Settings: TOML in and out, errors that name what would do, numbers of the recipes."""

import dataclasses
import itertools
import math

import pytest
import tyro
from tyro.conf import OmitArgPrefixes

from vmae_fast import Masking
from vmae_fast.train import ConfigError, PretrainConfig, Schedule, load_config, to_toml
from vmae_fast.train.optimizer import learning_rate


def test_toml_round_trip(tmp_path):
    config = PretrainConfig()
    config.model.model = "small"
    config.model.mask_kind, config.model.decoder_mask_kind = "frame", "random"
    config.optim.lr = 3e-4
    config.data.data = 'a "quoted" folder'
    config.run.out = "somewhere"
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nbatch_sise = 8", "'batch_sise'.*did you mean 'batch_size'"),
        ("[optim]\nstride = 8", ".optim.: unknown key 'stride'; it belongs into .data."),
        ("[optimm]\nlr = 1.0", "unknown table .optimm.; did you mean 'optim'"),
        ("lr = 1.0", "'lr' belongs into the table .optim."),
        ("[optim]\nlr = 'fast'", "lr must be float, got 'fast'"),
        ("[loading]\nflip = 1", "flip must be bool, got 1"),
        ("[optim]\nsteps = true", "steps must be int, got True"),
        ("[run]\nprecision = 'fp8'", "must be 'auto', 'fp32', 'bf16', got 'fp8'"),
        ("[model]\nmask_kind = 'cube'", "must be 'tube', 'random', 'frame', got 'cube'"),
        (
            "[model]\ndecoder_mask_kind = 'cell'",
            "must be 'running_cell', 'frame', 'random', got 'cell'",
        ),
        ("[optim", "is not TOML"),
        ("optim = 3", "is a table"),
    ],
)
def test_bad_toml_is_named(tmp_path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_kinds_of_masks_reach_the_model(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(
        "[model]\nmodel = 'tiny'\nmask_kind = 'frame'\nmask_ratio = 0.5\n"
        "decoder_mask_ratio = 0.3\ndecoder_mask_kind = 'random'\n"
    )
    masking = load_config(file).model.build(None).masking
    assert masking == Masking((4, 8, 8), "frame", 0.5, 0.3, "random")
    given = ["--decoder-mask-kind", "frame", "--decoder-mask-ratio", "0.5", "--mask-kind", "tube"]
    flags = tyro.cli(OmitArgPrefixes[PretrainConfig], default=load_config(file), args=given)
    assert flags.model.build(None).masking == Masking((4, 8, 8), "tube", 0.5, 0.5, "frame")


def test_masks_that_leave_nothing_to_score_are_an_error_of_the_config():
    config = PretrainConfig()
    config.model = dataclasses.replace(
        config.model, model="tiny", decoder_mask_ratio=0.9, decoder_mask_kind="random"
    )
    with pytest.raises(ConfigError, match=r"decodes 26 tokens, but the encoder sees 28"):
        config.model.build(None)


def test_missing_files_and_recipes():
    with pytest.raises(ConfigError, match=r"no config file at nowhere\.toml"):
        load_config("nowhere.toml")
    with pytest.raises(ConfigError, match=r"recipes are tiny, v1-base-k400, .*v2-base"):
        load_config("v3-base")


@pytest.mark.parametrize("recipe", ["tiny", "v1-base-k400", "v1-base-ssv2", "v2-base"])
def test_recipes_are_whole(recipe):
    config = load_config(recipe)
    config.check()
    config.model.build(None) if recipe == "tiny" else config.model.overrides()


def test_published_numbers_of_v1():
    schedule = Schedule.of(load_config("v1-base-k400"), num_files=240_000, world_size=64)
    assert schedule.lr == pytest.approx(1.5e-4 * 8)
    assert schedule.min_lr == pytest.approx(1e-5 * 8)
    assert schedule.total_steps == round(800 * 240_000 / 2048)
    assert schedule.warmup_steps == round(40 * 240_000 / 2048)
    assert schedule.accumulate * schedule.micro_batch * 64 == 2048


def test_v2_scales_with_files_not_clips():
    config = load_config("v2-base")
    schedule = Schedule.of(config, num_files=1_000_000, world_size=8)
    assert schedule.files_per_step == 8192 // 4
    assert schedule.lr == pytest.approx(1e-3 * 8192 / 4 / 256)
    assert schedule.total_steps == round(200 * 1_000_000 / 2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 10, "micro_batch": 4}, "micro_batch=4 must divide the 10 clips"),
        ({"warmup_steps": 500}, "as long as the run"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"epochs": 0.0}, "epochs must be above 0"),
        ({"clip_grad": 0.0}, "clip_grad must be above 0"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
    ],
)
def test_bad_numbers(change, message):
    config = PretrainConfig()
    config.optim = dataclasses.replace(config.optim, steps=100, **change)

    def work_out():
        config.check()
        return Schedule.of(config, 100, 1)

    with pytest.raises(ConfigError, match=message):
        work_out()


def test_batch_must_divide_over_processes():
    config = PretrainConfig()
    config.optim.batch_size = 6
    with pytest.raises(ConfigError, match="does not divide over 4 processes"):
        Schedule.of(config, 100, 4)


def test_unknown_size_suggests():
    config = PretrainConfig()
    config.model.model = "bsae"
    with pytest.raises(ConfigError, match="did you mean 'base'"):
        config.check()


def test_schedule_shape():
    config = PretrainConfig()
    config.optim = dataclasses.replace(
        config.optim, steps=100, warmup_steps=10, lr=1.0, min_lr=0.1, batch_size=8
    )
    schedule = Schedule.of(config, 50, 1)
    rates = [learning_rate(step, schedule) for step in range(101)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
