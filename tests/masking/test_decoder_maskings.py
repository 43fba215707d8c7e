"""Frame masks, and decoder masks by frame and at random: counts, definitions, chance, errors."""

import itertools
import math

import pytest
import torch

from vmae_fast import Masking, clip_keys

GRID_14 = (8, 14, 14)
# Pairs of encoder and decoder kind whose number of scored tokens differs by clip.
WEIGHTED = [
    ("tube", "random"),
    ("random", "frame"),
    ("random", "random"),
    ("frame", "frame"),
    ("frame", "random"),
]


def keys(count):
    return clip_keys(0, 0, torch.arange(count))


def booleans(mask):
    """``(B, N)`` booleans: what the encoder sees, and what is decoded."""
    seen, decoded = torch.zeros(2, mask.batch_size, mask.num_tokens, dtype=torch.bool)
    return seen.scatter_(1, mask.visible_idx, True), decoded.scatter_(1, mask.decode_idx, True)


def by_row(tokens, grid):
    """``(B, t, h * w)``: tokens by the row of tubelets that they are in."""
    return tokens.view(len(tokens), grid[0], grid[1] * grid[2])


def assert_whole_rows(tokens, grid, count):
    """Each clip holds ``count`` rows of tubelets entirely, and nothing of the others."""
    rows = by_row(tokens, grid)
    assert (rows.all(dim=2) == rows.any(dim=2)).all()
    assert (rows.all(dim=2).sum(dim=1) == count).all()


# ---- counts and definitions ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "ratio", "rows_seen"),
    [(GRID_14, 0.9, 1), (GRID_14, 0.5, 4), ((16, 14, 14), 0.9, 2), ((3, 5, 7), 0.5, 2)],
)
def test_frame_masks_hide_whole_rows(grid, ratio, rows_seen):
    masking = Masking(grid, "frame", ratio)
    mask = masking(keys(16))
    seen, decoded = booleans(mask)
    assert_whole_rows(seen, grid, rows_seen)
    assert torch.equal(decoded, ~seen)
    assert masking.num_visible == mask.visible_idx.shape[1] == rows_seen * grid[1] * grid[2]
    assert masking.num_decoded == mask.decode_idx.shape[1] == mask.num_scored
    assert masking.num_unscored == 0
    assert mask.scored is None
    assert (mask.visible_idx.diff(dim=1) > 0).all()
    assert (mask.decode_idx.diff(dim=1) > 0).all()
    assert mask.visible_idx.dtype == mask.decode_idx.dtype == torch.int64
    # Not the same rows in each clip.
    assert by_row(seen, grid).any(dim=2).unique(dim=0).shape[0] > 1


@pytest.mark.parametrize(
    ("grid", "decoder_ratio", "rows_decoded", "unscored"),
    [
        (GRID_14, 0.5, 4, 80),
        (GRID_14, 0.75, 2, 40),
        # int(0.3 * 8) = 2 rows left out; odd sizes, which running cell refuses.
        (GRID_14, 0.3, 6, 120),
        ((3, 5, 7), 0.5, 2, 8),
    ],
)
def test_frame_decoder_under_tubes(grid, decoder_ratio, rows_decoded, unscored):
    masking = Masking(grid, "tube", 0.9, decoder_ratio, "frame")
    mask = masking(keys(32))
    seen, decoded = booleans(mask)
    assert_whole_rows(decoded, grid, rows_decoded)
    assert masking.num_decoded == mask.decode_idx.shape[1] == rows_decoded * grid[1] * grid[2]
    assert masking.num_unscored == unscored
    assert mask.num_scored == masking.num_decoded - unscored
    assert mask.scored is None
    for clip in range(32):
        # Seen ones first, unseen ones after, ascending within both.
        head, tail = (
            (decoded[clip] & wanted[clip]).nonzero().flatten() for wanted in (seen, ~seen)
        )
        assert torch.equal(mask.decode_idx[clip], torch.cat([head, tail]))
        assert torch.equal(mask.target_idx[clip], tail)
        assert len(head) == unscored


@pytest.mark.parametrize("decoder_ratio", [0.5, 0.75])
@pytest.mark.parametrize("grid", [GRID_14, (3, 4, 6)])
def test_running_cell_under_frames_scores_as_many_in_each_clip(grid, decoder_ratio):
    """Unlike under tubes, whether or not four divides the rows."""
    masking = Masking(grid, "frame", 0.6, decoder_ratio)
    mask = masking(keys(32))
    seen, decoded = booleans(mask)
    unscored = (seen & decoded).sum(dim=1)
    assert (unscored == masking.num_unscored).all()
    assert mask.scored is None
    assert torch.equal(mask.target_idx, positions(decoded & ~seen))


def positions(tokens):
    """Of booleans with as many in each clip: ascending positions."""
    return tokens.nonzero()[:, 1].view(len(tokens), -1)


@pytest.mark.parametrize(
    ("grid", "decoder_ratio", "decoded_count"),
    [(GRID_14, 0.5, 784), (GRID_14, 0.75, 392), (GRID_14, 0.89, 173), ((3, 5, 7), 0.33, 71)],
)
@pytest.mark.parametrize("kind", ["tube", "random"])
def test_random_decoder_counts(grid, kind, decoder_ratio, decoded_count):
    masking = Masking(grid, kind, 0.9, decoder_ratio, "random")
    mask = masking(keys(16))
    _, decoded = booleans(mask)
    assert masking.num_decoded == mask.decode_idx.shape[1] == decoded_count
    # As many distinct ones.
    assert (decoded.sum(dim=1) == decoded_count).all()
    assert decoded.unique(dim=0).shape[0] == 16


@pytest.mark.parametrize("grid", [(8, 4, 5), GRID_14], ids=str)
@pytest.mark.parametrize(("kind", "decoder_kind"), WEIGHTED)
def test_scored_weights_where_counts_differ(grid, kind, decoder_kind):
    masking = Masking(grid, kind, 0.6, 0.3, decoder_kind)
    count = 256
    mask = masking(keys(count))
    seen, decoded = booleans(mask)
    assert masking.num_unscored is None
    assert mask.num_scored == mask.decode_idx.shape[1] == masking.num_decoded
    assert torch.equal(mask.decode_idx, positions(decoded))
    assert torch.equal(mask.scored, (~seen).gather(1, mask.decode_idx).float())
    assert mask.scored_count() == (decoded & ~seen).sum()
    counts = mask.scored.sum(dim=1)
    assert counts.unique().numel() > 1
    assert counts.min() > 0
    # Each of the seen is decoded as often as chance says.
    n, visible = masking.num_tokens, masking.num_visible
    mean = visible * masking.num_decoded / n
    unscored = masking.num_decoded - counts.double()
    assert abs(unscored.mean() - mean) < 5 * unscored.std() / math.sqrt(count)


def test_decode_part_of_foreign_visible_tokens():
    visible = torch.tensor([[0, 5, 9], [1, 2, 3]])
    for decoder_kind in ("frame", "random"):
        masking = Masking((4, 2, 4), "tube", 0.9, 0.5, decoder_kind)
        mask = masking.decode_part(visible, keys(2), static=False)
        assert mask.decode_idx.shape == (2, 16)
        for clip in range(2):
            expected = ~torch.isin(mask.decode_idx[clip], visible[clip])
            assert torch.equal(mask.scored[clip], expected.float())


def test_the_decoder_of_v1_takes_no_notice_of_the_kind():
    mine, plain = (
        Masking(GRID_14, "tube", 0.9, 0.0, kind)(keys(4)) for kind in ("frame", "running_cell")
    )
    assert torch.equal(mine.decode_idx, plain.decode_idx)


def test_golden_masks():
    key = clip_keys(0, 0, torch.tensor([0, 1]))
    frames = Masking((6, 1, 2), "frame", 0.5)(key)
    assert frames.visible_idx.tolist() == [[4, 5, 6, 7, 8, 9], [6, 7, 8, 9, 10, 11]]
    by_frame = Masking((4, 2, 2), "tube", 0.5, 0.5, "frame")(key)
    assert by_frame.num_scored == 4
    assert by_frame.decode_idx.tolist() == [[2, 3, 6, 7, 0, 1, 4, 5], [6, 7, 14, 15, 4, 5, 12, 13]]
    scattered = Masking((4, 2, 2), "tube", 0.75, 0.5, "random")(key)
    assert scattered.decode_idx.tolist() == [
        [0, 2, 3, 4, 5, 9, 10, 11],
        [0, 3, 6, 9, 10, 11, 13, 15],
    ]


# ---- uniformity and independence ----------------------------------------------------------


def assert_chance(hits, trials, share):
    """Counts of independent trials are as far from their mean as chance brings them."""
    z = (hits.double() - trials * share) / math.sqrt(trials * share * (1 - share))
    assert z.abs().max() < 5


def test_rows_and_tokens_are_chosen_uniformly():
    count, grid = 4096, (8, 2, 3)
    key = keys(count)
    seen, rows = booleans(Masking(grid, "frame", 0.7, 0.3, "frame")(key))
    _, tokens = booleans(Masking(grid, "tube", 0.7, 0.3, "random")(key))
    # int(0.7 * 8) = 5 hidden, int(0.3 * 8) = 2 and int(0.3 * 48) = 14 left out.
    assert_chance(by_row(seen, grid)[:, :, 0].sum(dim=0), count, 3 / 8)
    assert_chance(by_row(rows, grid)[:, :, 0].sum(dim=0), count, 6 / 8)
    assert_chance(tokens.sum(dim=0), count, 34 / 48)
    # Two rows are decoded together as often as chance says: 6 of 8, then 5 of 7.
    decoded_rows = by_row(rows, grid)[:, :, 0].double()
    together = decoded_rows.t() @ decoded_rows
    pairs = together[~torch.eye(8, dtype=torch.bool)]
    assert_chance(pairs, count, 6 / 8 * 5 / 7)


@pytest.mark.parametrize("decoder_kind", ["frame", "random", "running_cell"])
@pytest.mark.parametrize("kind", ["tube", "random", "frame"])
def test_what_is_decoded_is_independent_of_what_is_seen(kind, decoder_kind):
    """Above all where both choose from as many things: they must not be chosen alike."""
    count, grid = 4096, (8, 2, 2)
    # Half or more is decoded, so that there is something to score.
    ratio = 0.5 if decoder_kind == "running_cell" else 0.25
    masking = Masking(grid, kind, 0.5, ratio, decoder_kind)
    seen, decoded = booleans(masking(keys(count)))
    joint = seen.double().t() @ decoded.double()
    assert_chance(joint.flatten(), count, 0.5 * (1 - ratio))


# ---- errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((GRID_14, "frame", 1.0), "mask ratio 1.0 hides 8 of 8 rows of tubelets; at least one"),
        ((GRID_14, "frame", 0.1), "mask ratio 0.1 hides 0 of 8 rows of tubelets"),
        (((1, 14, 14), "frame", 0.9), "mask ratio 0.9 hides 0 of 1 rows of tubelets"),
        (
            (GRID_14, "tube", 0.9, 0.5, "cell"),
            r"decoder mask kind must be one of \('running_cell', 'frame', 'random'\), got 'cell'",
        ),
        # Said too where nothing is decoded by it.
        ((GRID_14, "tube", 0.9, 0.0, "cell"), "decoder mask kind must be one of"),
        ((GRID_14, "tube", 0.9, 0.6), 'decoder mask kinds "frame" and "random" take any'),
        (
            (GRID_14, "tube", 0.9, 0.1, "frame"),
            "decoder mask ratio 0.1 leaves out 0 of 8 rows of tubelets; at least one must be left",
        ),
        ((GRID_14, "tube", 0.9, 1.0, "frame"), "ratio 1.0 leaves out 8 of 8 rows of tubelets"),
        ((GRID_14, "tube", 0.9, -0.5, "frame"), "ratio -0.5 leaves out -4 of 8 rows"),
        ((GRID_14, "tube", 0.9, 1.0, "random"), "ratio 1.0 leaves out 1568 of 1568 tokens"),
        ((GRID_14, "tube", 0.9, 0.0001, "random"), "ratio 0.0001 leaves out 0 of 1568 tokens"),
        (
            (GRID_14, "tube", 0.9, 0.9, "random"),
            "ratio 0.9 decodes 157 tokens, but the encoder sees 160 of its own under tube masks: "
            "a clip may be left with none to score; more must be decoded than seen",
        ),
        ((GRID_14, "frame", 0.5, 0.5, "frame"), "decodes 784 .* sees 784 of its own under frame"),
        ((GRID_14, "random", 0.5, 0.5, "frame"), "decodes 784 .* sees 784 .* under random masks"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Masking(*settings)


def test_what_is_allowed_always_scores_something():
    """By all pairs of choices on a small grid, where a bad one would come up."""
    grid, ratios = (4, 2, 2), (0.25, 0.5, 0.75)
    kinds = itertools.product(("tube", "random", "frame"), ratios, ratios, ("frame", "random"))
    made = 0
    for kind, ratio, decoder_ratio, decoder_kind in kinds:
        try:
            masking = Masking(grid, kind, ratio, decoder_ratio, decoder_kind)
        except ValueError:
            continue
        seen, decoded = booleans(masking(keys(512)))
        assert (decoded & ~seen).any(dim=1).all()
        made += 1
    assert made >= 20
