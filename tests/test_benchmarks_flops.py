"""The counted tables: operations against formulas written out here, tables and their pictures."""

import json

import flops
import plot
import pytest
import report
import test_flops_tables as tables
import torch
from flops import EMBED, FLOP_PER_MAC, HEAD
from plain_videomae import PlainVideoMAE
from torch.utils.flop_counter import FlopCounterMode

from vmae_fast import VideoMAE, VideoMAEConfig, ops

# 4 x 4 x 4 tokens, of which 16 are visible.
SMALL = {
    "frames": 8, "image_size": 32, "patch_size": 8, "mask_ratio": 0.75,
    "width": 24, "depth": 2, "heads": 2, "mlp_dim": 40,
    "decoder_width": 16, "decoder_depth": 3, "decoder_heads": 2, "decoder_mlp_dim": 48,
}  # fmt: skip
TOKENS, VISIBLE, VALUES = 64, 16, 3 * 2 * 8 * 8
WIDTH, HIDDEN, NARROW, NARROW_HIDDEN = 24, 40, 16, 48
# Decoded and scored tokens, by settings of decoder masking. Under random masks as many are scored
# as differs by clip, so that the head computes all.
CASES = {
    "none": ({}, 48, 48),
    "running_cell": ({"decoder_mask_ratio": 0.5}, 32, 24),
    "random": ({"decoder_mask_ratio": 0.5, "decoder_mask_kind": "random"}, 32, 32),
}
# Of a batch that shares mask tokens, and of one clip, which has fewer than there are positions.
CLIPS = (5, 1)


def linears(width, hidden, tokens, queries=None):
    """Multiply-adds of a block's linear layers; of queries and all after attention so many."""
    queries = tokens if queries is None else queries
    return 2 * tokens * width**2 + 2 * queries * width**2 + 2 * queries * width * hidden


def plain_by_hand(decoded):
    """Multiply-adds for a clip by item: of linear layers, and of attention."""
    tokens = VISIBLE + decoded
    block = linears(NARROW, NARROW_HIDDEN, tokens), 2 * tokens**2 * NARROW
    encoder = 2 * linears(WIDTH, HIDDEN, VISIBLE), 2 * 2 * VISIBLE**2 * WIDTH
    items = [
        (TOKENS * VALUES * WIDTH, 0), encoder, (VISIBLE * WIDTH * NARROW, 0), block, block, block,
        (decoded * NARROW * VALUES, 0),
    ]  # fmt: skip
    return dict(zip(flops.ITEMS, items, strict=True))


def ours_by_hand(decoded, scored, clips):
    """As :func:`plain_by_hand`, without what ours leaves out."""
    tokens, items = VISIBLE + decoded, plain_by_hand(decoded)
    items[EMBED] = VISIBLE * VALUES * WIDTH, 0
    linear, attention = items[flops.FIRST]
    if clips * decoded > TOKENS:
        # Queries, keys and values of mask tokens: one for each position, whatever the clips.
        linear += 3 * NARROW**2 * (TOKENS / clips - decoded)
    items[flops.FIRST] = linear, attention
    linear = linears(NARROW, NARROW_HIDDEN, tokens, scored)
    items[flops.LAST] = linear, 2 * scored * tokens * NARROW
    items[HEAD] = scored * NARROW * VALUES, 0
    return items


def forward_operations(items):
    return {item: FLOP_PER_MAC * sum(macs) for item, macs in items.items()}


def step_operations(items, attention_products):
    """Two further products for each of a linear layer, but no gradient of the video."""
    found = sum(3 * linear + attention_products / 2 * pairs for linear, pairs in items.values())
    return FLOP_PER_MAC * (found - items[EMBED][0])


def case(name):
    """A model without data, and its decoded and scored tokens."""
    settings, decoded, scored = CASES[name]
    return flops.model_of(VideoMAEConfig(**SMALL, **settings)), decoded, scored


@pytest.mark.parametrize("name", CASES)
def test_forward_passes_by_item(name):
    model, decoded, scored = case(name)
    by_hand = forward_operations(plain_by_hand(decoded))
    assert flops.plain_forward(model, 2) == by_hand
    assert flops.plain_forward(model, 2, ops.attention) == by_hand
    for clips in CLIPS:
        expected = forward_operations(ours_by_hand(decoded, scored, clips))
        assert flops.our_forward(model, clips) == pytest.approx(expected)


def test_steps():
    model, decoded, scored = case("running_cell")
    # Two products forward; backward four, or five where the weights are computed again.
    for attend, products in ((None, 6), (ops.attention, 7)):
        plain = PlainVideoMAE(model, **({"attend": attend} if attend else {}))
        by_hand = step_operations(plain_by_hand(decoded), products)
        assert flops.step(plain, model.config, 2) == by_hand
    for clips in CLIPS:
        by_hand = step_operations(ours_by_hand(decoded, scored, clips), 7)
        assert flops.step(model, model.config, clips) == pytest.approx(by_hand)


def test_as_much_is_counted_of_a_step_on_data():
    config = VideoMAEConfig(**SMALL, decoder_mask_ratio=0.5)
    real = VideoMAE(config)
    video = torch.randint(0, 256, (5, 3, 8, 32, 32), dtype=torch.uint8)
    for build in (PlainVideoMAE, lambda model: model):
        with FlopCounterMode(display=False) as counter:
            build(real)(video, config.masking(torch.arange(5))).loss.backward()
        double = build(flops.model_of(config))
        assert flops.step(double, config, 5) == counter.get_total_flops() / 5


# ---- joint against divided ----------------------------------------------------------------

# Squares of the width in the projections: those of two attentions where it is divided.
SQUARES = {"joint": 4, "divided": 8, "space": 4}


def pairs_of(kind, t, positions):
    space = t * positions**2
    return {"joint": (t * positions) ** 2, "divided": space + positions * t**2, "space": space}[
        kind
    ]


@pytest.mark.parametrize("kind", flops.ATTENTIONS)
def test_attention_and_a_block(kind):
    pairs = pairs_of(kind, 3, 16)
    assert flops.attention_flops(kind, 3, 16, WIDTH, 2) == (4 * pairs * WIDTH, 10 * pairs * WIDTH)
    found = flops.block_flops(kind, 3, VideoMAEConfig(**SMALL))
    assert found == {
        "patch embedding": 0,
        "linear layers": 2 * 3 * 16 * (SQUARES[kind] * WIDTH**2 + 2 * WIDTH * HIDDEN),
        "attention": 4 * pairs * WIDTH,
    }


@pytest.mark.parametrize("kind", flops.ATTENTIONS)
def test_an_encoder(kind):
    # Four frames a tubelet: half as many tokens, whose embedding costs as much.
    config = VideoMAEConfig(**SMALL | {"tubelet_size": 4})
    found, parameters = flops.encoder_flops(kind, config)
    block = flops.block_flops(kind, 2, config)
    assert found == {
        "patch embedding": 2 * TOKENS * VALUES * WIDTH,
        "linear layers": 2 * block["linear layers"],
        "attention": 2 * block["attention"],
    }
    double = flops.model_of(config, decoder_depth=0)
    # The final norm is not of a block.
    whole = sum(p.numel() for p in double.parameters()) - 2 * WIDTH
    # Projections with biases on all but the keys, and another norm.
    another = 4 * WIDTH**2 + 3 * WIDTH + 2 * WIDTH if kind == "divided" else 0
    assert parameters == whole + 2 * another
    if kind == "joint":
        with FlopCounterMode(display=False) as counter:
            double.encode(flops.batch_of(config, 1)[0])
        assert sum(found.values()) == counter.get_total_flops()


# ---- tables and pictures ------------------------------------------------------------------


class Benchmark:
    """In pytest-benchmark's place: calls once."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, call, **_):
        call()


def recorded(benchmark, folder):
    """The figures of a benchmark, which are written to a folder as well."""
    found = {}

    def record(name, figures, kind):
        file = folder / kind / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        environment = {"date": "2026-01-02", "commit": "abc", "torch": "2.11", "device": "x"}
        file.write_text(json.dumps({"environment": environment, **figures}))
        found.update(file=file, **figures)

    benchmark(Benchmark(), record)
    return found


@pytest.fixture
def masking_table(monkeypatch, tmp_path):
    """The table of decoder masking, of a short model in base's place."""
    config = VideoMAEConfig.of("small", frames=8, image_size=64, depth=2)
    model_of = flops.model_of
    monkeypatch.setattr(flops, "model_of", lambda _, **more: model_of(config, **more))
    gmacs = sum(tables.gmacs(flops.plain_forward(flops.model_of("base"), 2)).values())
    masked = tables.Masked("base", "none", 0.0, gmacs)
    monkeypatch.setattr(tables, "PUBLISHED_MASKING", (masked,))
    monkeypatch.setattr(tables, "ITEMISED", (masked,))
    return recorded(tables.test_flops_decoder_masking, tmp_path)


def not_blank(picture):
    """Whether many shades of colour are on it."""
    plt = pytest.importorskip("matplotlib.pyplot")
    pixels = torch.from_numpy(plt.imread(picture))[..., :3].flatten(0, 1)
    coloured = (pixels.amax(1) - pixels.amin(1)) > 0.2
    return coloured.float().mean().item() > 0.01 and len(pixels[coloured].unique(dim=0)) > 5


def test_the_table_of_decoder_masking(masking_table):
    kept = masking_table
    (row,), (step,) = kept["forward"], kept["step"]
    items = kept["by_item"]["base, none"]
    assert row["plain_gmac"] == pytest.approx(sum(items["plain"].values()), abs=1e-3)
    assert row["ours_over_plain"] == pytest.approx(
        sum(items["ours"].values()) / sum(items["plain"].values()), abs=1e-3
    )
    assert step["ours_gmac"] < step["plain_gmac"] < step["plain_with_fused_attention_gmac"]
    assert [one["item"] for one in kept["items"]] == list(flops.ITEMS)
    assert "| base | none |" in report.render(kept["file"].parents[1])
    plot_flops = pytest.importorskip("plot_flops", exc_type=ModuleNotFoundError)
    assert not_blank(plot_flops.draw(kept["file"]))
    _, axes = plot_flops.plt.subplots()
    plot_flops.draw_bars(axes, "base", kept["forward"], kept["by_item"])
    plot_flops.plt.close()
    tops = {round(bar.get_y() + bar.get_height(), 9) for bar in axes.patches}
    assert {round(sum(items[name].values()), 9) for name in ("plain", "ours")} <= tops
    (marks,) = [line for line in axes.get_lines() if line.get_label() == "published"]
    assert marks.get_ydata() == [row["published_gmac"]]


def test_a_figure_far_from_the_published_one_is_an_error():
    plain = {"item": 2e9}
    near, far = tables.Masked("base", "none", 0.0, 1.004), tables.Masked("base", "none", 0.0, 1.006)
    tables.check_masking([tables.forward_row(near, plain, {"item": 1.9e9})])
    for masked, ours in ((far, 1.9e9), (near, 2e9)):
        with pytest.raises(AssertionError):
            tables.check_masking([tables.forward_row(masked, plain, {"item": ours})])


def test_the_table_of_pairs(tmp_path, monkeypatch):
    kept = recorded(tables.test_attention_pairs, tmp_path)
    last = {row["attention"]: row for row in kept["alone"] if row["t"] == 16}
    assert last["joint"]["pairs_m"] == 9.834
    assert last["divided"]["over_joint"] == 0.0676
    assert {row["tokens"] for row in kept["encoders"]} == {3136}
    plot_flops = pytest.importorskip("plot_flops", exc_type=ModuleNotFoundError)
    (picture,) = plot.main(tmp_path)
    assert not_blank(picture)
    _, axes = plot_flops.plt.subplots()
    plot_flops.draw_encoders(axes, kept["encoders"])
    plot_flops.plt.close()
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches]
    assert max(tops) == pytest.approx(max(row["gflop"] for row in kept["encoders"]), rel=1e-3)
    monkeypatch.setitem(tables.PUBLISHED_PAIRS, "space", ("0.616", "0.06"))
    with pytest.raises(AssertionError):
        tables.check_pairs(kept["alone"])
