"""Tables of masks: counts and coverage by hand, the picture, and that the benchmarks run."""

import json
from types import SimpleNamespace

import mask_coverage
import numpy as np
import plot
import plot_masks
import pytest
import test_mask_tables
import torch
from mask_coverage import CASES, Case
from PIL import Image

from vmae_fast import Mask, VideoMAEConfig

TINY = (2, 2, 4)


def test_coverage_of_a_clip_by_hand():
    covered = torch.tensor([
        [[1, 1, 0, 0],
         [0, 0, 0, 0]],
        [[1, 0, 0, 0],
         [0, 0, 0, 1]],
    ]).bool()  # fmt: skip
    figures = mask_coverage.evenness(covered[None])
    # Rows hold 3 and 1, columns 2, 1, 0 and 1, both times 2 of 8; three positions are never seen.
    assert figures == {
        "rows_spread": pytest.approx(1 / 2),
        "rows_least_and_most_percent": pytest.approx([100 / 8, 300 / 8]),
        "columns_spread": pytest.approx(0.5**0.5),
        "columns_least_and_most_percent": pytest.approx([0, 50]),
        "time_spread": 0,
        "time_least_and_most_percent": [25, 25],
        # Eight positions: one twice, two once; mean 1/2, variance (2.25 + 2 / 4 + 5 / 4) / 8 = 1/2.
        "positions_spread": pytest.approx(0.5**0.5 / 0.5),
        "positions_never_covered": 5,
    }
    # Two clips: the mean of both.
    both = mask_coverage.evenness(torch.stack([covered, torch.ones(TINY).bool()]))
    assert both["rows_spread"] == pytest.approx(1 / 4)
    assert both["rows_least_and_most_percent"] == pytest.approx([56.25, 68.75])
    assert both["positions_never_covered"] == 2.5


def by_name(rows):
    return {f"{row['of']} {row['mask']}": row for row in rows}


def test_coverage_of_the_kinds():
    """What must hold of each: a running cell is even in every way, others along some axes only."""
    grid, key = (8, 4, 6), mask_coverage.keys_of(64, torch.device("cpu"))
    rows = by_name(mask_coverage.coverage(case, grid, key) for case in CASES)
    assert rows["encoder tube 90%"]["tokens"] == 8 * (24 - 21)
    assert rows["encoder tube 90%"]["time_spread"] == 0
    assert rows["encoder tube 90%"]["positions_never_covered"] == 21
    frame = rows["encoder frame 90%"]
    assert frame["time_least_and_most_percent"] == [0, 100]
    # One of eight: mean 1/8, variance 7/64.
    assert frame["time_spread"] == pytest.approx(7**0.5)
    assert frame["rows_spread"] == frame["columns_spread"] == frame["positions_spread"] == 0
    for share, name in ((0.5, "running cell 50%"), (0.25, "running cell 75%")):
        cell = rows[f"decoder {name}"]
        assert cell["tokens"] == 192 * share
        spreads = [figure for name, figure in cell.items() if name.endswith("_spread")]
        assert spreads == [0, 0, 0, 0]
        assert cell["time_least_and_most_percent"] == [100 * share] * 2
    scattered = rows["decoder random 50%"]
    assert scattered["tokens"] == 96
    assert min(scattered[f"{name}_spread"] for name in ("rows", "columns", "time")) > 0.05


def test_counts_are_of_distinct_tokens():
    key = mask_coverage.keys_of(4, torch.device("cpu"))
    settings = {"frames": 16, "image_size": 56, "patch_size": 14}
    counts = mask_coverage.token_counts(VideoMAEConfig(**settings), key)
    # 8 x 4 x 4 tokens: int(0.9 * 16) = 14 positions hidden at each time.
    assert counts == {"visible": 16, "decoded": 112, "scored": 112}
    counts = mask_coverage.token_counts(VideoMAEConfig(**settings, decoder_mask_ratio=0.5), key)
    assert counts == {"visible": 16, "decoded": 64, "scored": 56}
    twice = Mask(torch.tensor([[1, 1, 3]]), torch.tensor([[0]]), 4, 1)
    assert mask_coverage.as_booleans(twice.visible_idx, twice).tolist() == [[0, 1, 0, 1]]
    varying = VideoMAEConfig(**settings, mask_kind="random", decoder_mask_ratio=0.5)
    with pytest.raises(ValueError, match="clips differ in how many tokens are scored"):
        mask_coverage.token_counts(varying, key)


def test_a_row_of_counts_beside_what_is_published():
    key = mask_coverage.keys_of(2, torch.device("cpu"))
    row = test_mask_tables.counts_of("giant", 16, key)
    assert row == {
        "model": "giant", "frames": 16, "grid": "8x16x16", "tokens": 2048, "published_tokens": 2048,
        "visible": 208, "published_visible": 208, "visible_percent": 100 * 208 / 2048,
        "v1_decoded": 1840, "v2_decoded": 1024, "v2_scored": 920,
        "v2_scored_percent": 100 * 920 / 2048,
    }  # fmt: skip
    assert test_mask_tables.counts_of("small", 32, key)["published_visible"] is None


def test_a_strip_says_what_is_seen_decoded_and_scored():
    key = mask_coverage.keys_of(3, torch.device("cpu"))
    case, grid = Case("decoder", "frame", 0.5), (2, 2, 10)
    mask = case.masking(grid)(key)
    lines = mask_coverage.strip(case, grid, key[1])
    signs = "".join(lines)
    assert [len(line) for line in lines] == [20, 20]
    head, tail = mask.decode_idx[1].split([2, 18])
    assert {signs[at] for at in head} == {"o"}
    assert {signs[at] for at in tail} == {"#"}
    assert (signs.count("o"), signs.count("#"), signs.count(".")) == (2, 18, 20)
    seen = "".join(mask_coverage.strip(Case("encoder", "tube", 0.9), grid, key[1]))
    assert [at for at, sign in enumerate(seen) if sign == "#"] == mask.visible_idx[1].tolist()
    assert seen.count("#") + seen.count(".") == 40


def kept(grid=(4, 4, 6)):
    """What a result file holds, of a small grid."""
    key = mask_coverage.keys_of(8, torch.device("cpu"))
    return {
        "environment": {"device": "a device", "torch": "2"},
        "title": "Masks",
        "coverage": [mask_coverage.coverage(case, grid, key) for case in CASES],
        "drawn": {
            "grid": list(grid),
            "clips": 8,
            "strips": {
                f"{case.of} {case.label}": mask_coverage.strip(case, grid, key[0]) for case in CASES
            },
        },
    }


def test_the_picture_is_drawn_from_the_file_alone(tmp_path, monkeypatch):
    file = tmp_path / "published" / "mask_coverage.json"
    file.parent.mkdir()
    file.write_text(json.dumps(kept()))
    figures, save = [], plot_masks.save
    monkeypatch.setattr(
        plot_masks, "save", lambda figure, to: (figures.append(figure), save(figure, to))[1]
    )
    (written,) = plot.main(tmp_path)
    (figure,) = figures
    strips, bars = figure.axes[::4], [figure.axes[start::4] for start in (1, 2, 3)]
    names = [axes.get_ylabel() for axes in strips]
    assert names[0] == "encoder:\ntube 90%\n12 tokens"
    assert names[3] == "decoder:\nrunning cell 50%\n48 tokens"
    # Of a running cell half of each row is decoded.
    assert [bar.get_height() for bar in bars[0][3].patches] == [50] * 4
    assert sorted(bar.get_height() for bar in bars[2][4].patches) == [0, 0, 100, 100]
    picture = np.asarray(strips[4].images[0].get_array())
    # Four time steps of 6 patches with a gap between them, the first one's left upper patch first.
    assert picture.shape == (4, 4 * 6 + 3, 3)
    sign = json.loads(file.read_text())["drawn"]["strips"]["decoder frame 50%"][0][0]
    expected = plot_masks.to_rgb(plot_masks.COLOURS["decoder"][sign])
    assert picture[0, 0].tolist() == list(expected)
    with Image.open(written) as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    assert drawn.size[0] > 1500
    # Each colour of the legend shows in the patches too, not in its box alone.
    for colour in plot_masks.LEGEND:
        rgb = np.round(255 * np.array(plot_masks.to_rgb(colour)))
        assert (pixels == rgb).all(axis=2).sum() > 2000, colour


def test_time_is_drawn_from_left_to_right():
    clip = np.array([list("#..."), list("..#.")]).reshape(TINY[0], 2, 2)
    axes = plot_masks.plt.figure().add_subplot()
    plot_masks.draw_strip(axes, clip, plot_masks.COLOURS["encoder"])
    dark = np.asarray(axes.images[0].get_array())[:, :, 0] < 0.5
    assert np.argwhere(dark).tolist() == [[0, 0], [1, 3]]
    assert plot_masks.percent_over(clip, "time").tolist() == [25, 25]
    assert plot_masks.percent_over(clip, "rows").tolist() == [25, 25]
    assert plot_masks.percent_over(clip, "columns").tolist() == [50, 0]
    plot_masks.plt.close("all")


def test_what_the_benchmarks_keep(monkeypatch):
    """Run as pytest runs them, over fewer clips; the tables are filed as published."""
    monkeypatch.setattr(test_mask_tables, "CLIPS", 512)
    found, called = {}, []
    benchmark = SimpleNamespace(pedantic=lambda call, **_: called.append(call()), extra_info={})

    def record(name, figures, kind=None):
        found[name, kind] = json.loads(json.dumps(figures))

    def finish_rows(name, what, rows, call):
        record(name, {"what": what, "rows": rows})
        called.append(call())

    test_mask_tables.test_token_counts(benchmark, record)
    test_mask_tables.test_mask_coverage(benchmark, record)
    test_mask_tables.test_drawing(finish_rows)
    assert len(called) == 3

    counts = found["token_counts", "published"]["counts"]
    assert len(counts) == 10
    by_model = {(row["model"], row["frames"]): row for row in counts}
    base = by_model["base", 16]
    assert (base["visible"], base["v2_decoded"], base["v2_scored"]) == (160, 784, 704)
    assert by_model["base", 32]["tokens"] == 3136

    kept = found["mask_coverage", "published"]
    assert "means over 512 clips" in kept["what"]
    assert kept["drawn"]["clips"] == 512
    rows = by_name(kept["coverage"])
    assert list(rows) == list(kept["drawn"]["strips"])
    # Under tubes 20 of 196 positions are seen, always.
    assert rows["encoder tube 90%"]["positions_never_covered"] == 176
    # Chance: int(0.9 * 1568) = 1411 of 1568 are hidden; a position's 8 tokens all are at 0.9^8.
    never = rows["encoder random 90%"]["positions_never_covered"]
    assert never == pytest.approx(196 * 0.9**8, rel=0.02)

    by_op = {row["op"]: row for row in found["masks", None]["rows"]}
    assert len(by_op) == len(CASES)
    assert all(row["time_ms"] > 0 and row["percent_of_copy"] > 0 for row in by_op.values())
    written = {op: row["bytes"] for op, row in by_op.items()}
    assert written["draw encoder tube 90%"] == 64 * 1568 * 8
    assert written["draw decoder frame 50%"] == 64 * (160 + 784) * 8
    # Those with weights write one of four bytes for each decoded token.
    assert written["draw decoder random 50%"] == 64 * ((160 + 784) * 8 + 784 * 4)


def test_a_figure_that_is_not_the_published_one_fails(monkeypatch):
    wrong = {**test_mask_tables.PUBLISHED, ("giant", 16): (2048, 205)}
    monkeypatch.setattr(test_mask_tables, "PUBLISHED", wrong)
    kept = []
    with pytest.raises(AssertionError, match="205"):
        test_mask_tables.test_token_counts(
            SimpleNamespace(extra_info={}), lambda *given, **_: kept.append(given)
        )
    # What was counted is kept all the same.
    assert kept[0][0] == "token_counts"
