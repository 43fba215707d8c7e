"""Whole runs on real video files, in this process."""

import json
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from safetensors.torch import load_file

from vmae_fast import VideoMAE
from vmae_fast.data import DataError
from vmae_fast.train import ConfigError, RunError, load_config, pretrain
from vmae_fast.train.loop import Pretraining
from vmae_fast.train.metrics import read_metrics
from vmae_fast.train.stop import StopRequest


def weights(result_or_path):
    path = getattr(result_or_path, "checkpoint", result_or_path)
    return load_file(path / "model.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def stop_after(monkeypatch, steps):
    """Let the run see a SIGTERM after so many of its own steps."""
    step = Pretraining._step
    done = 0

    def counted(self, *args):
        nonlocal done
        done += 1
        report = step(self, *args)
        if done == steps:
            stopper.signal = 15
        return report

    stopper = None
    enter = StopRequest.__enter__

    def remembered(self):
        nonlocal stopper
        stopper = self
        return enter(self)

    monkeypatch.setattr(StopRequest, "__enter__", remembered)
    monkeypatch.setattr(Pretraining, "_step", counted)


def test_a_run_writes_what_it_says(config):
    result = pretrain(config)
    assert result.steps == 8
    assert result.signal == 0
    assert sorted(p.name for p in result.path.glob("checkpoints/*")) == [
        "step-00000004",
        "step-00000008",
    ]
    rows = read_metrics(result.path / "metrics.jsonl")
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == list(range(1, 9))
    expected = {
        "step", "loss", "zero_prediction", "lr", "grad_norm", "clips_per_s", "data_wait", "epoch",
        "bad_files",
    }  # fmt: skip
    assert expected <= losses[0].keys()
    assert all(0 <= row["data_wait"] <= 1 for row in losses)
    assert [row["step"] for row in rows if "val_loss" in row] == [4, 8]
    assert rows[-1]["val_loss"] == result.val_loss
    assert list(result.path.glob("tensorboard/*"))
    assert load_config(result.path / "config.toml") == config
    resolved = json.loads((result.path / "resolved.json").read_text())
    assert resolved["files"] == {"train": 14, "held_out": 2}
    VideoMAE.from_pretrained(result.checkpoint)


def test_validation_is_what_the_checkpoint_gives(config):
    """Held-out loss against an independent evaluation with the masks the docs promise."""
    from vmae_fast import clip_keys
    from vmae_fast.data import ClipDataset, ClipRequest, list_videos, split_validation

    result = pretrain(config)
    model = VideoMAE.from_pretrained(result.checkpoint).eval()
    files = list_videos(config.data.data)
    _, held_out = split_validation(len(files), config.loading.val, config.run.seed)
    dataset = ClipDataset(files, frames=4, stride=2, image_size=(32, 32), train=False)
    total = 0.0
    with torch.no_grad():
        for index in held_out:
            video = dataset[ClipRequest(0, index)].crops[0].permute(3, 0, 1, 2).unsqueeze(0)
            mask = model.masking(clip_keys(0, 0, torch.tensor([index])))
            total += model(video, mask).loss.item()
    assert result.val_loss == pytest.approx(total / len(held_out), rel=1e-5)


@pytest.mark.parametrize(
    "extra",
    [{}, {"mask_kind": "random", "decoder_mask_ratio": 0.5}],
    ids=["static_counts", "scored_weights"],
)
def test_accumulation_equals_the_large_batch(config, tmp_path, extra):
    for name, value in extra.items():
        setattr(config.model, name, value)
    config.optim.steps = 3
    states = []
    for micro in (8, 2):
        config.optim.micro_batch = micro
        config.run.out = str(tmp_path / f"micro{micro}")
        states.append(weights(pretrain(config)))
    for name, large in states[0].items():
        assert relative_error(states[1][name], large) < 1e-4, name
    rows = [read_metrics(tmp_path / f"micro{m}" / "metrics.jsonl") for m in (8, 2)]
    for large, small in zip(*rows, strict=True):
        for figure in ("loss", "grad_norm", "val_loss"):
            if figure in large:
                assert small[figure] == pytest.approx(large[figure], rel=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_resume_is_bitwise(config, tmp_path, monkeypatch, steps):
    """With drop path, flips, repeats, accumulation and averaged weights."""
    config.model.drop_path = 0.3
    config.loading.flip, config.data.repeats = True, 2
    config.optim.micro_batch, config.optim.ema_decay, config.optim.clip_grad = 4, 0.9, 0.5
    whole = pretrain(config)

    config.run.out = str(tmp_path / "broken")
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        stopped = pretrain(config)
    assert stopped.signal == 15
    assert stopped.steps == steps
    config.run.resume = True
    resumed = pretrain(config)

    assert_same_weights(weights(resumed), weights(whole))
    assert_same_weights(weights(resumed.checkpoint / "ema"), weights(whole.checkpoint / "ema"))
    states = [torch.load(r.checkpoint / "trainer.pt") for r in (whole, resumed)]
    for a, b in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    rows = [read_metrics(run.path / "metrics.jsonl") for run in (whole, resumed)]
    for a, b in zip(*rows, strict=True):
        for figure in ("step", "loss", "val_loss", "grad_norm", "lr"):
            assert a.get(figure) == b.get(figure)


def test_averaged_weights_follow_the_formula(config):
    config.optim.steps, config.optim.ema_decay = 3, 0.75
    config.run.save_every = 1
    result = pretrain(config)
    torch.manual_seed(config.run.seed)
    average = config.model.build(None).state_dict()
    for step in (1, 2, 3):
        now = weights(result.path / "checkpoints" / f"step-{step:08d}")
        average = {name: 0.75 * a + 0.25 * now[name] for name, a in average.items()}
    kept = weights(result.checkpoint / "ema")
    for name, expected in average.items():
        torch.testing.assert_close(kept[name], expected, rtol=1e-5, atol=1e-7)


def test_only_the_last_checkpoints_stay(config):
    config.run.save_every, config.run.keep = 1, 2
    result = pretrain(config)
    names = sorted(p.name for p in (result.path / "checkpoints").iterdir())
    assert names == ["step-00000007", "step-00000008"]


def test_an_existing_run_is_refused(config, tmp_path):
    config.optim.steps = 3
    first = pretrain(config)
    with pytest.raises(ConfigError, match=r"holds a run already; --resume .* --overwrite"):
        pretrain(config)
    assert first.checkpoint.exists()
    config.run.overwrite = True
    config.optim.steps = 4
    assert pretrain(config).steps == 4
    assert not first.checkpoint.exists()
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "me.jpg").write_text("x")
    config.run.out = str(foreign)
    with pytest.raises(ConfigError, match="no run's"):
        pretrain(config)
    assert (foreign / "me.jpg").exists()


def test_resume_is_checked(config, tmp_path, videos):
    config.run.resume = True
    with pytest.raises(ConfigError, match="--resume: no run at"):
        pretrain(config)
    config.run.resume = False
    config.optim.steps = 4
    pretrain(config)
    config.run.resume = True
    config.run.seed = 1
    with pytest.raises(ConfigError, match="seed 0"):
        pretrain(config)
    config.run.seed = 0
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join(str(p) for p in sorted(videos.rglob("*.mp4"))[:9]))
    config.data.data = str(listing)
    with pytest.raises(ConfigError, match="another list of files"):
        pretrain(config)
    config.data.data = str(videos)
    config.model.model = "small"
    with pytest.raises(ConfigError, match="has width 128, but --model small has 384"):
        pretrain(config)


def test_resume_longer_than_planned(config):
    config.optim.steps = 4
    pretrain(config)
    config.run.resume, config.optim.steps = True, 6
    assert pretrain(config).steps == 6
    config.optim.steps = 5
    with pytest.raises(ConfigError, match="6 steps in, past the run's 5"):
        pretrain(config)


def test_init_starts_from_weights(config, tmp_path):
    first = pretrain(config)
    config.run.out, config.run.init = str(tmp_path / "second"), str(first.checkpoint)
    config.model.model = None
    config.optim.steps, config.optim.lr, config.optim.weight_decay = 1, 0.0, 0.0
    config.optim.min_lr = config.optim.warmup_steps = 0
    assert_same_weights(weights(pretrain(config)), weights(first))


def spoil(videos, tmp_path, good, bad):
    """A folder of good links and broken files."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in sorted(videos.rglob("*.mp4"))[:good]:
        (folder / f"{path.parent.name}-{path.name}").symlink_to(path)
    for number in range(bad):
        (folder / f"bad{number}.mp4").write_bytes(b"not a video" * number)
    return folder


def test_bad_files_are_skipped_listed_and_counted(config, videos, tmp_path):
    config.data.data = str(spoil(videos, tmp_path, 15, 1))
    result = pretrain(config)
    assert result.steps == 8
    listed = (result.path / "bad_files.txt").read_text().splitlines()
    assert len(listed) == 1
    assert "bad0.mp4\t" in listed[0]
    assert read_metrics(result.path / "metrics.jsonl")[-2]["bad_files"] == 1


def test_too_many_bad_files_end_the_run(config, videos, tmp_path):
    config.data.data = str(spoil(videos, tmp_path, 10, 4))
    with pytest.raises(RunError, match=r"of 14 files could not be read.*bad_files\.txt"):
        pretrain(config)
    listed = (Path(config.run.out) / "bad_files.txt").read_text().splitlines()
    assert 2 <= len(listed) <= 4


def test_a_folder_of_bad_files_is_a_clear_error(config, videos, tmp_path):
    config.data.data = str(spoil(videos, tmp_path, 0, 12))
    with pytest.raises(DataError, match="in a row could not be read"):
        pretrain(config)


def test_workers_and_cache_change_nothing(config, tmp_path):
    config.optim.steps = 3
    states = []
    for workers, cache in ((0, False), (2, False), (0, True)):
        config.loading.workers, config.loading.cache = workers, cache
        config.run.out = str(tmp_path / f"{workers}{cache}")
        states.append(weights(pretrain(config)))
    assert_same_weights(states[1], states[0])
    assert_same_weights(states[2], states[0])


def test_bf16_trains(config):
    config.run.precision = "bf16"
    result = pretrain(config)
    assert all(tensor.dtype == torch.float32 for tensor in weights(result).values())
    losses = [r["loss"] for r in read_metrics(result.path / "metrics.jsonl") if "loss" in r]
    assert 0.5 < min(losses) <= max(losses) < 2
