"""The command line as a user types it."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vmae_fast import VideoMAE, cli, ops
from vmae_fast.data import synthetic_videos
from vmae_fast.pictures import NORM_PIX_NOTE


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return synthetic_videos(tmp_path_factory.mktemp("videos"), count=8, size=40, frames=24)


SMALL = [
    "--model", "tiny", "--frames", "4", "--image-size", "32", "--stride", "2", "--batch-size", "4",
    "--steps", "4", "--warmup-steps", "1", "--lr", "1e-3", "--workers", "0", "--device", "cpu",
]  # fmt: skip


def run(*args, capsys):
    """Exit status and output of a command in this process."""
    try:
        status = cli.main([str(arg) for arg in args])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_pretrain_then_reconstruct(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    status, text = run(
        "pretrain", *SMALL, "--data", videos, "--out", out, "--val", "0.2", capsys=capsys
    )
    assert status == 0, text
    assert "held-out loss" in text
    assert "predicting zeros for the same tubelets" in text
    for name in ("checkpoints/step-00000004", "metrics.jsonl", "loss_curve.png"):
        assert str(out / name) in text
        assert (out / name).exists()
    with Image.open(out / "reconstruction.png") as sheet:
        assert min(sheet.size) > 300

    video = next(videos.rglob("*.mp4"))
    status, text = run("reconstruct", out, video, "--out", tmp_path / "seen", capsys=capsys)
    assert status == 0, text
    with Image.open(tmp_path / "seen.png") as sheet:
        assert sheet.width > 400
    with av.open(str(tmp_path / "seen.mp4")) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 4
    # Three panels of 128 pixels side by side, a label above, the note on statistics below.
    assert frames[0].width == 3 * 128
    assert frames[0].height > 24 + 128 + 20
    status, text = run(
        "reconstruct", out / "checkpoints/step-00000004", video, "--gif", capsys=capsys
    )
    assert status == 0, text
    with Image.open(f"{video.stem}-reconstruction.gif") as moving:
        assert moving.n_frames == 4


def test_the_note_is_in_the_picture(tmp_path):
    """The caption is drawn where targets are normalised, and not where they are not."""
    import torch

    from vmae_fast.pictures import reconstruct, save_contact_sheet

    heights = []
    for norm_pix in (True, False):
        model = VideoMAE("tiny", norm_pix=norm_pix)
        video = torch.randint(0, 256, (3, 8, 64, 64), dtype=torch.uint8)
        picture = reconstruct(model, video)
        assert picture.note == (NORM_PIX_NOTE if norm_pix else "")
        sheet = save_contact_sheet(tmp_path / f"{norm_pix}.png", [picture])
        with Image.open(sheet) as drawn:
            strip = np.asarray(drawn.convert("L"))[-30:]
            heights.append((strip < 128).sum())
    assert heights[0] > 1.5 * heights[1] > 0


def test_visible_tokens_are_shown_unchanged():
    import torch

    from vmae_fast.pictures import reconstruct

    video = torch.randint(0, 256, (3, 8, 64, 64), dtype=torch.uint8)
    picture = reconstruct(VideoMAE("tiny"), video, seed=3)
    same = (picture.masked == picture.original).all(dim=-1)
    cells = same.view(8, 8, 8, 8, 8).all(dim=4).all(dim=2)
    # 7 of 64 positions stay visible in every frame; a random patch is hardly ever all grey.
    assert cells.sum(dim=(1, 2)).tolist() == [7] * 8
    assert torch.equal(
        picture.reconstructed.view(8, 8, 8, 8, 8, 3).transpose(2, 3)[cells],
        picture.original.view(8, 8, 8, 8, 8, 3).transpose(2, 3)[cells],
    )
    assert not torch.equal(picture.reconstructed, picture.original)


def test_a_perfect_prediction_reconstructs_the_original(monkeypatch):
    """Un-normalising is the inverse of the target: predicting it gives the pixels back."""
    import torch

    from vmae_fast import ops
    from vmae_fast.pictures import reconstruct

    model = VideoMAE("tiny")
    video = torch.randint(0, 256, (3, 8, 64, 64), dtype=torch.uint8)
    forward = VideoMAE.forward

    def perfect(self, batch, mask, *, return_pred):
        output = forward(self, batch, mask, return_pred=True)
        target = ops.pixel_targets(batch, mask.target_idx, self.config.tubelet)
        return output._replace(pred=target)

    monkeypatch.setattr(VideoMAE, "forward", perfect)
    picture = reconstruct(model, video)
    assert torch.equal(picture.reconstructed, picture.original)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pretrain", "--data", "nowhere"], "nowhere"),
        (["pretrain", "--config", "nowhere.toml"], "no config file at nowhere.toml"),
        (["pretrain", "--resume"], "--resume needs --out"),
        (["pretrain", "--model", "bsae"], "did you mean 'base'"),
        (["pretrain", *SMALL, "--batch-size", "5", "--repeats", "2"], "not a multiple of repeats"),
        (["pretrain", *SMALL, "--image-size", "100"], "96 or 104 would do"),
        (["pretrain", *SMALL, "--mask-ratio", "1"], "at least one must stay visible"),
        (["pretrain", *SMALL, "--device", "tpu9"], "--device tpu9: torch knows no such device"),
        (["pretrain", *SMALL, "--init", "nowhere"], "no checkpoint at nowhere"),
        (["pretrain", *SMALL, "--cuda-graph", "on"], "--cuda-graph on: needs a CUDA device"),
        (["pretrain", *SMALL, "--residual", "bf16"], "goes with --precision bf16"),
        (["reconstruct", "nowhere", "x.mp4"], "no video at x.mp4"),
        (["trian"], "no command 'trian'"),
    ],
)
def test_mistakes_are_one_message(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = run(*args, capsys=capsys)
    assert status in (1, 2)
    assert message in text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_says_what_is_looked_for(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no video")
    status, text = run("pretrain", "--data", tmp_path, capsys=capsys)
    assert status == 1
    assert "mp4, mkv" in text


def test_unknown_flags_name_the_nearest(capsys):
    status, text = run("pretrain", "--batch-sise", "8", capsys=capsys)
    assert status == 2
    assert "--batch-size" in text


def test_reconstruct_names_a_broken_video(tmp_path, capsys):
    VideoMAE("tiny").save_pretrained(tmp_path / "model")
    video = tmp_path / "broken.mp4"
    video.write_bytes(b"\0" * 100)
    status, text = run("reconstruct", tmp_path / "model", video, capsys=capsys)
    assert status == 1
    assert "broken.mp4" in text


def test_defaults(monkeypatch, capsys):
    """No model, config or init: the tiny recipe; a model named: V1's numbers."""
    import vmae_fast.train

    seen = []

    def remember(config):
        seen.append(config)
        raise vmae_fast.train.RunError("enough")

    monkeypatch.setattr(vmae_fast.train, "pretrain", remember)
    for args in (
        [],
        ["--model", "base"],
        ["--config", "v2-base", "--steps", "5"],
        ["--config=tiny", "--no-cache"],
        ["--data", "mine", "--epochs", "3", "--base-lr", "1e-3"],
    ):
        run("pretrain", *args, capsys=capsys)
    tiny, base, v2, streamed, own = seen
    assert (tiny.model.model, tiny.optim.steps, tiny.optim.batch_size) == ("tiny", 1000, 16)
    assert (base.model.model, base.optim.epochs, base.optim.base_lr) == ("base", 800, 1.5e-4)
    assert (v2.model.decoder_mask_ratio, v2.optim.steps, v2.data.repeats) == (0.5, 5, 4)
    assert (tiny.loading.cache, streamed.loading.cache) == (True, False)
    # One's own folder is not held in memory, and flags win over the recipe's settings.
    assert (own.model.model, own.loading.cache, own.run.target) == ("tiny", False, None)
    assert (own.optim.steps, own.optim.epochs) == (None, 3)
    assert (own.optim.lr, own.optim.base_lr) == (None, 1e-3)


def test_plan(tmp_path, capsys):
    flags = ["--model", "tiny", "--batch-size", "8", "--gpu", "l4", "--gpus", "2"]
    picture = tmp_path / "plan.png"
    status, text = run(
        "plan", *flags, "--clips", "1e4", "--epochs", "3", "--plot", "--out", picture, capsys=capsys
    )
    assert status == 0
    for words in ("2 x L4", "largest batch", "not yet measured", "GPU-hours", str(picture)):
        assert words in text
    # Three epochs of 1e4 clips by two GPUs with eight clips each.
    assert f"{3e4 / 16:,.0f} steps" in text
    with Image.open(picture) as drawn:
        assert drawn.width > 500
        # Bars in colours, not an empty page.
        assert len(drawn.convert("RGB").getcolors(maxcolors=1 << 20)) > 20

    status, text = run("plan", "--config", "tiny", "--frames", "16", capsys=capsys)
    assert status == 0
    assert "16x64x64" in text
    assert "the run" not in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu", "h300"], "gpu must be one of"),
        (["--batch-size", "0"], "batch must be at least 1"),
        (["--epochs", "-1"], "epochs must be above 0"),
        (["--image-size", "65"], "image height=65 is not a multiple of patch_size=8"),
        (["--mask-ratio", "1.5"], "mask ratio 1.5 hides"),
        (["--results", "nowhere"], "no folder of results at nowhere"),
        (["--plot", "--out", "nowhere/plan.png"], "nowhere"),
    ],
)
def test_plan_errors_are_one_line(flags, words, capsys):
    status, text = run("plan", "--model", "tiny", *flags, capsys=capsys)
    assert status == 1
    (line,) = [line for line in text.splitlines() if line.startswith("vmae-fast: ")]
    assert words in line


def test_help_and_env(capsys):
    for args in ([], ["--help"], *([one, "--help"] for one in ("pretrain", "plan", "reconstruct"))):
        status, text = run(*args, capsys=capsys)
        assert status == (0 if args else 2)
        assert "usage" in text
    assert cli.main(["--version"]) == 0
    status, text = run("env", capsys=capsys)
    assert status == 0
    for word in ("vmae-fast", "torch", "triton", "PyAV", "backends", "extension  ", "cpu"):
        assert word in text


def test_installed_command_runs():
    program = Path(sys.executable).with_name("vmae-fast")
    done = subprocess.run([program, "env"], capture_output=True, text=True, check=True)
    assert "decoders" in done.stdout


def test_a_backend_that_cannot_run_is_one_line(monkeypatch, capsys):
    def compute(args):
        with ops.backend("cuda"):
            ops.masked_mse(
                torch.zeros(1, 1, 6),
                torch.zeros(1, 3, 1, 1, 2),
                torch.zeros(1, 1).long(),
                (1, 1, 2),
            )

    monkeypatch.setattr("vmae_fast.commands.env.run", compute)
    assert cli.main(["env"]) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("vmae-fast: backend cuda cannot run on cpu: ")
    assert "\n" not in line
