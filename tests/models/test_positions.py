"""Positions on a grid other than the trained one: only on request, and from the trained table."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import make_video, random_mask, randomise, relative_error

from vmae_fast import CheckpointError, VideoMAE, VideoMAEConfig
from vmae_fast.models.positions import interpolate_table, position_table, sinusoid_table

SMALL = {
    "frames": 4, "image_size": 32, "patch_size": 8,
    "width": 24, "depth": 2, "heads": 3, "decoder_width": 20, "decoder_depth": 2,
    "decoder_heads": 2, "mask_ratio": 0.75,
}  # fmt: skip
TRAINED = (2, 4, 4)


def small_model(**settings):
    model = VideoMAE("tiny", **{**SMALL, **settings})
    randomise(model)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    small_model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# ---- the table ----------------------------------------------------------------------------


def test_the_same_grid_is_the_same_table():
    table = sinusoid_table(2 * 3 * 5, 12)
    assert torch.equal(interpolate_table(table, (2, 3, 5), (2, 3, 5)), table)
    config = VideoMAEConfig.of("tiny", positions_from=(4, 8, 8))
    assert config.positions_from is None
    assert torch.equal(position_table(config, 12), sinusoid_table(256, 12))


def test_a_constant_table_stays_constant():
    row = torch.randn(7)
    out = interpolate_table(row.expand(2 * 3 * 4, 7).contiguous(), (2, 3, 4), (5, 2, 9))
    torch.testing.assert_close(out, row.expand(90, 7), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_linear_table_is_exact_between_the_outer_centres(axis):
    """A cell's centre lies at (i + 1/2) / length; beyond the outermost centres the value stays."""
    trained, grid = (4, 5, 6), (8, 7, 9)
    places = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in trained], indexing="ij")
    table = places[axis].reshape(-1, 1).float()
    out = interpolate_table(table, trained, grid).view(*grid)
    here = (torch.arange(grid[axis], dtype=torch.float64) + 0.5) * trained[axis] / grid[axis] - 0.5
    expected = here.clamp(0, trained[axis] - 1)
    shape = [1, 1, 1]
    shape[axis] = grid[axis]
    torch.testing.assert_close(
        out.double(), expected.view(shape).expand(grid), rtol=1e-6, atol=1e-6
    )


def test_by_hand():
    """Two rows to four: centres at -1/4, 1/4, 3/4, 5/4 of the way from the first to the second."""
    out = interpolate_table(torch.tensor([[0.0, 8.0], [4.0, 0.0]]), (2, 1, 1), (4, 1, 1))
    assert out.tolist() == [[0.0, 8.0], [1.0, 6.0], [3.0, 2.0], [4.0, 0.0]]


def test_more_frames_are_linear_along_time():
    """What V2's fine-tuning does with another number of frames, written out here."""
    t, h, w, width = 8, 3, 5, 16
    table = sinusoid_table(t * h * w, width)
    along_time = table.view(t, h * w, width).permute(1, 2, 0)
    linear = F.interpolate(along_time, size=12, mode="linear", align_corners=False)
    expected = linear.permute(2, 0, 1).reshape(-1, width)
    torch.testing.assert_close(
        interpolate_table(table, (t, h, w), (12, h, w)), expected, rtol=1e-6, atol=1e-6
    )


def test_t_major_order_is_kept():
    """Interpolated over space only, each row of tubelets comes from its own row."""
    rows = torch.tensor([10.0, 20.0, 30.0]).repeat_interleave(4).unsqueeze(1)
    out = interpolate_table(rows, (3, 2, 2), (3, 5, 4)).view(3, 20)
    for row, value in zip(out, (10.0, 20.0, 30.0), strict=True):
        torch.testing.assert_close(row, torch.full((20,), value))


# ---- on request ---------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{"frames": 8}, {"image_size": 48}], ids=str)
def test_not_without_being_asked(saved, asked):
    with pytest.raises(CheckpointError, match=r"positions mean something else.*interpolate_posi"):
        VideoMAE.from_pretrained(saved, **asked)
    # The tubelet is the shape of a weight: no interpolation would help.
    with pytest.raises(CheckpointError, match="trained with patch_size") as caught:
        VideoMAE.from_pretrained(saved, patch_size=4, interpolate_positions=True)
    assert "--interpolate" not in str(caught.value)


@pytest.mark.parametrize(
    "asked", [{"frames": 8}, {"image_size": 48}, {"frames": 6, "image_size": 40}], ids=str
)
def test_both_tables_follow(saved, asked):
    model = VideoMAE.from_pretrained(saved, **asked, interpolate_positions=True).eval()
    config = model.config
    assert config.positions_from == TRAINED
    for part, width in ((model.encoder, 24), (model.decoder, 20)):
        expected = interpolate_table(sinusoid_table(32, width), TRAINED, config.grid)
        assert torch.equal(part.pos_embed, expected)
        assert part.pos_embed.dtype == torch.float32
    video = make_video((2, 3, config.frames, *config.size), torch.float32)
    assert model.encode(video).shape == (2, config.num_tokens, 24)
    assert model(video).loss.isfinite()


def test_the_trained_grid_asked_for_changes_nothing(saved):
    model = VideoMAE.from_pretrained(saved, frames=4, interpolate_positions=True)
    assert model.config.positions_from is None
    assert torch.equal(model.encoder.pos_embed, small_model().encoder.pos_embed)


def test_kept_when_saved_and_never_interpolated_twice(saved, tmp_path):
    first = VideoMAE.from_pretrained(saved, frames=12, interpolate_positions=True)
    first.save_pretrained(tmp_path / "first")
    assert json.loads((tmp_path / "first" / "config.json").read_text())["model"][
        "positions_from"
    ] == list(TRAINED)
    again = VideoMAE.from_pretrained(tmp_path / "first")
    assert again.config == first.config
    assert torch.equal(again.encoder.pos_embed, first.encoder.pos_embed)

    second = VideoMAE.from_pretrained(tmp_path / "first", frames=8, interpolate_positions=True)
    direct = VideoMAE.from_pretrained(saved, frames=8, interpolate_positions=True)
    assert torch.equal(second.encoder.pos_embed, direct.encoder.pos_embed)
    assert torch.equal(second.decoder.pos_embed, direct.decoder.pos_embed)

    back = VideoMAE.from_pretrained(tmp_path / "first", frames=4, interpolate_positions=True)
    assert back.config == small_model().config
    assert torch.equal(back.decoder.pos_embed, small_model().decoder.pos_embed)
    with pytest.raises(CheckpointError, match="trained with frames=12"):
        VideoMAE.from_pretrained(tmp_path / "first", frames=8)


@pytest.mark.parametrize("dialect", ["huggingface", "videomae"])
def test_other_dialects_would_compute_the_plain_table(saved, tmp_path, dialect):
    model = VideoMAE.from_pretrained(saved, frames=8, interpolate_positions=True)
    with pytest.raises(CheckpointError, match=r"grid of \(2, 4, 4\) .*interpolated to \(4, 4, 4\)"):
        model.save_pretrained(tmp_path / "out.pth", dialect=dialect)
    assert not (tmp_path / "out.pth").exists()


def test_a_file_that_does_not_say_its_grid(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "file.pth", dialect="videomae")
    weights = torch.load(tmp_path / "file.pth", weights_only=True)["model"]
    torch.save({"model": weights}, tmp_path / "file.pth")
    said = {"heads": 3, "decoder_heads": 2, "image_size": 32}
    with pytest.raises(CheckpointError, match=r"does not say on which grid.*positions_from="):
        VideoMAE.from_pretrained(
            tmp_path / "file.pth", frames=8, interpolate_positions=True, **said
        )
    with pytest.raises(CheckpointError, match="goes with interpolate_positions=True"):
        VideoMAE.from_pretrained(tmp_path / "file.pth", frames=8, positions_from=TRAINED, **said)
    wide = VideoMAE.from_pretrained(
        tmp_path / "file.pth", frames=8, interpolate_positions=True, positions_from=TRAINED, **said
    )
    expected = interpolate_table(sinusoid_table(32, 24), TRAINED, (4, 4, 4))
    assert torch.equal(wide.encoder.pos_embed, expected)


@pytest.mark.parametrize("wide", [True, False], ids=["interpolating", "plainly"])
def test_a_grid_that_contradicts_the_checkpoint(saved, wide):
    with pytest.raises(CheckpointError, match=r"trained on a grid of \(2, 4, 4\)"):
        VideoMAE.from_pretrained(saved, positions_from=(8, 14, 14), interpolate_positions=wide)


@pytest.mark.parametrize("grid", [(2, 4), (0, 4, 4), (2, 4, 4, 4)], ids=str)
def test_a_grid_that_is_none(grid):
    with pytest.raises(ValueError, match=r"positions_from must be a grid of tokens \(t, h, w\)"):
        VideoMAEConfig.of("tiny", positions_from=grid)


# ---- that it makes sense ------------------------------------------------------------------


def test_a_still_clip_looks_the_same_for_longer(saved):
    """Of a clip in which nothing moves, a longer grid should make what the trained one made; the
    longer grid's own table tells the model that it looks elsewhere."""
    model = small_model()
    clip = make_video((2, 3, 1, 32, 32), torch.float32).repeat(1, 1, 4, 1, 1)
    truth = model.encode(clip).view(2, 2, 16, 24).repeat_interleave(4, dim=1).flatten(1, 2)
    interpolated = VideoMAE.from_pretrained(saved, frames=16, interpolate_positions=True).eval()
    plain = VideoMAE("tiny", **{**SMALL, "frames": 16}).eval()
    plain.load_state_dict(interpolated.state_dict())
    longer = clip.repeat(1, 1, 4, 1, 1)
    errors = [relative_error(m.encode(longer), truth) for m in (interpolated, plain)]
    # 0.07 and 0.34 when this was written.
    assert errors[0] < 0.15
    assert errors[0] < 0.5 * errors[1]


def test_shared_mask_tokens_have_the_interpolated_positions(saved):
    """The decoder's first block computes mask tokens once for each position: a batch large enough
    to share them gives what clips one by one give."""
    model = VideoMAE.from_pretrained(saved, frames=8, interpolate_positions=True).eval()
    video = make_video((6, 3, 8, 32, 32), torch.float32)
    mask = random_mask(6, 64, 48)
    assert 6 * 48 > model.decoder.pos_embed.shape[0] >= 48
    with torch.no_grad():
        whole = model(video, mask, return_pred=True).pred
        alone = [model(video[i : i + 1], mask[i : i + 1], return_pred=True).pred for i in range(6)]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-4, atol=1e-5)
