"""The preview shows what training gets: the same clips, and masks to the token."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from vmae_fast import Masking, cli
from vmae_fast.models import VideoMAEConfig
from vmae_fast.pictures import PreviewClip, save_preview
from vmae_fast.pictures.draw import LABEL_MARGIN, as_rgb
from vmae_fast.pictures.preview import token_states

SETTINGS = {
    "frames": 8, "image_size": 128, "patch_size": 32, "mask_ratio": 0.75,
    "decoder_mask_ratio": 0.5, "width": 8, "heads": 2, "decoder_width": 8, "decoder_heads": 2,
}  # fmt: skip
CONFIG = VideoMAEConfig(**SETTINGS)


def clip_of(channels=3, times=None):
    video = torch.randint(130, 256, (8, 128, 128, channels), dtype=torch.uint8)
    return PreviewClip(video, "a.mp4, label dog", times or tuple(k / 4 for k in range(8)))


@pytest.mark.parametrize("kind", ["tube", "random"])
def test_states_are_those_of_the_mask(kind):
    mask = Masking((4, 4, 4), kind, 0.75, 0.5)(torch.arange(3))
    sees, state = token_states(mask)
    for row in range(3):
        seen, decoded = set(mask.visible_idx[row].tolist()), set(mask.decode_idx[row].tolist())
        for token in range(64):
            assert sees[row, token] == (token in seen)
            expected = 0 if token not in decoded else 1 if token in seen else 2
            assert state[row, token] == expected
    assert {int(s) for s in state.unique()} == {0, 1, 2}


def test_the_sheet_shows_frames_and_both_masks_to_the_pixel(tmp_path):
    torch.manual_seed(0)
    clip, mask = clip_of(), CONFIG.masking(torch.tensor([7]))
    path = save_preview(tmp_path / "p.png", [clip], mask, CONFIG, "one line\nanother")
    sheet = np.asarray(Image.open(path).convert("RGB"))
    sees, state = (tokens.view(4, 4, 4) for tokens in token_states(mask))
    # Below a header of two lines and a title of one; panels of 128 pixels, 2 apart.
    top = sheet.shape[0] - 24 - 3 * 130
    for t in range(8):
        left = LABEL_MARGIN + t * 130
        panels = [
            sheet[top + row * 130 : top + row * 130 + 128, left : left + 128] for row in range(3)
        ]
        assert np.array_equal(panels[0], clip.video[t].numpy())
        for y in range(4):
            for x in range(4):
                part = np.s_[32 * y : 32 * y + 32, 32 * x : 32 * x + 32]
                true = panels[0][part]
                seen = np.array_equal(panels[1][part], true)
                assert seen == bool(sees[t // 2, y, x])
                assert seen or (panels[1][part] == 128).all()
                made = panels[2][part]
                if state[t // 2, y, x] == 2:
                    assert np.array_equal(made, true)
                elif state[t // 2, y, x] == 0:
                    assert (made == 24).all()
                else:
                    assert np.array_equal(made, true // 2 + np.array([35, 55, 127], np.uint8))


def test_times_stand_below_the_frames_where_there_are_any(tmp_path):
    mask = CONFIG.masking(torch.tensor([7]))
    sheets = []
    for times in ((0.0,) * 8, (math.nan,) * 8):
        path = save_preview(tmp_path / "p.png", [clip_of(times=times)], mask, CONFIG, "x")
        sheets.append(np.asarray(Image.open(path).convert("L"))[-24:])
    assert sheets[0].min() < 100
    assert (sheets[1] == 255).all()


def test_grey_and_transparent_clips_are_shown(tmp_path):
    grey = torch.full((1, 2, 2, 1), 9, dtype=torch.uint8)
    assert (as_rgb(grey) == 9).all()
    assert as_rgb(grey).shape == (1, 2, 2, 3)
    rgba = torch.tensor([[[[200, 0, 40, 255], [200, 0, 40, 0]]]], dtype=torch.uint8)
    assert as_rgb(rgba).tolist() == [[[[200, 0, 40], [128, 128, 128]]]]
    for channels in (1, 4):
        config = VideoMAEConfig(**SETTINGS, in_channels=channels)
        mask = config.masking(torch.tensor([7]))
        save_preview(tmp_path / "p.png", [clip_of(channels)], mask, config, "x")


# ---- the command --------------------------------------------------------------------------

SMALL = ["--model", "tiny", "--frames", "4", "--image-size", "32", "--stride", "2"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    from vmae_fast.data import synthetic_videos

    return synthetic_videos(tmp_path_factory.mktemp("videos"), count=8, size=40, frames=24)


def test_the_clips_are_those_of_the_training_step(videos, tmp_path, monkeypatch):
    """Run the trainer and the preview with the same settings: same pixels, same masks."""
    fed = []
    from vmae_fast.train.step import TrainStep

    original = TrainStep.forward_backward

    def record(self, video, keys, *rest, **named):
        fed.append((video.clone(), self.model.masking(keys)))
        return original(self, video, keys, *rest, **named)

    monkeypatch.setattr(TrainStep, "forward_backward", record)
    settings = [*SMALL, "--flip", "--repeats", "2", "--decoder-mask-ratio", "0.5", "--seed", "3"]
    settings += ["--batch-size", "4", "--data", str(videos)]
    run = [*settings, "--steps", "3", "--warmup-steps", "1", "--out", str(tmp_path / "run")]
    assert cli.main(["pretrain", *run, "--workers", "0", "--device", "cpu", "--val", "0.2"]) == 0

    shown = []

    def keep(path, clips, mask, config, header):
        shown.append((clips, mask))
        return path

    monkeypatch.setattr("vmae_fast.pictures.save_preview", keep)
    # From the settings that the run wrote.
    folder = tmp_path / "run/config.toml"
    assert cli.main(["preview", "--config", str(folder), "--step", "2", "--clips", "4"]) == 0
    ((clips, mask),) = shown
    video, trained_mask = fed[2]
    for number, clip in enumerate(clips):
        assert torch.equal(clip.video.permute(3, 0, 1, 2), video[number])
    assert torch.equal(mask.visible_idx, trained_mask.visible_idx)
    assert torch.equal(mask.decode_idx, trained_mask.decode_idx)
    assert ", repeat 2" in clips[1].title


def test_flags_reach_the_clips(videos, monkeypatch):
    shown = []

    def keep(path, clips, mask, config, header):
        shown.append(clips)
        return path

    monkeypatch.setattr("vmae_fast.pictures.save_preview", keep)
    arguments = ["preview", str(videos), *SMALL, "--clips", "8"]
    for more in ([], ["--flip"], ["--seed", "5"], ["--batch-size", "3", "--step", "1"]):
        assert cli.main([*arguments, *more]) == 0
    plain, flipped, seeded, later = shown
    mirrored = [torch.equal(a.video.flip(2), b.video) for a, b in zip(plain, flipped, strict=True)]
    same = [torch.equal(a.video, b.video) for a, b in zip(plain, flipped, strict=True)]
    assert any(mirrored)
    assert all(m or s for m, s in zip(mirrored, same, strict=True))
    assert [clip.title for clip in seeded] != [clip.title for clip in plain]
    assert [clip.title for clip in later[:4]] == [clip.title for clip in plain[3:7]]


def test_preview_from_the_command_line(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (videos / "left/broken.mp4").write_text("no video")
    try:
        assert cli.main(["preview", str(videos), *SMALL, "--clips", "9"]) == 0
    finally:
        (videos / "left/broken.mp4").unlink()
    said = capsys.readouterr().out
    assert "labels from 8 class sub-folders" in said
    assert "2x4x4 = 32 tokens" in said
    assert "the encoder sees" in said
    assert "broken.mp4: Invalid data" in said
    assert "wrote preview.png: 9 clips of step 0" in said
    assert Image.open("preview.png").height > 9 * 3 * 128
    assert cli.main(["preview", str(tmp_path / "nothing")]) == 1
    assert "does not exist; name a folder" in capsys.readouterr().err
    assert cli.main(["preview", str(videos), "--clips", "0"]) == 1
