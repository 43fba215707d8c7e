"""What masks cover: counts of tokens by model, and how evenly the kinds of masks cover a clip.

Both tables are counted from drawn masks, which are the same on every device; plot_masks.py draws
the second. Drawing masks is timed too, by the bytes of the indices that it writes.
"""

import pytest
import torch
from mask_coverage import CASES, coverage, keys_of, strip, token_counts
from rows import DEVICE, evaluation, rounded, row_of, timed
from timing import num_sets

from vmae_fast import SIZES, VideoMAEConfig, clip_keys

# Clips that the coverage is a mean over, and clips of a batch.
CLIPS, BATCH = 4096, 64
# The clip in the picture: by chance the first one decodes every second frame, as if by rule.
SHOWN = 1
FRAMES = (16, 32)
DECODER_RATIO = 0.5
# Tokens and visible tokens of a clip by model and frames; None where there is no figure. Sources:
# VideoMAE (arXiv 2203.12602) and VideoMAE V2 (arXiv 2303.16727), and of visible ones what their
# public mask generators keep, the same whole number of positions at each time.
PUBLISHED = {
    ("base", 16): (1568, 160),
    ("giant", 16): (2048, 208),
    ("base", 32): (3136, None),
}


@pytest.mark.counted
def test_token_counts(benchmark, record):
    key = keys_of(BATCH, DEVICE)
    sizes = [size for size in SIZES if size != "tiny"]
    counts = [counts_of(size, frames, key) for frames in FRAMES for size in sizes]
    figures = {
        "title": "Tokens of a clip",
        "what": (
            f"distinct tokens of a clip that are seen, decoded and scored under 90% tubes, counted "
            f"from {BATCH} drawn masks; V1 decodes what is not seen, V2's running cell half of all"
        ),
        "counts": counts,
    }
    record("token_counts", rounded(figures), kind="published")
    benchmark.extra_info.update(rounded(figures))
    checked = 0
    for row in counts:
        for figure in ("tokens", "visible"):
            if row[f"published_{figure}"] is not None:
                assert row[figure] == row[f"published_{figure}"], row
                checked += 1
    assert checked == sum(figure is not None for both in PUBLISHED.values() for figure in both)
    draw_in_rounds(benchmark, VideoMAEConfig.of("base", decoder_mask_ratio=DECODER_RATIO).masking)


def counts_of(size, frames, key):
    """One row of the table."""
    v1 = VideoMAEConfig.of(size, frames=frames)
    v2 = VideoMAEConfig.of(size, frames=frames, decoder_mask_ratio=DECODER_RATIO)
    first, second = token_counts(v1, key), token_counts(v2, key)
    tokens, visible = PUBLISHED.get((size, frames), (None, None))
    every = first["visible"] + first["decoded"]
    return {
        "model": size,
        "frames": frames,
        "grid": "x".join(map(str, v1.grid)),
        "tokens": every,
        "published_tokens": tokens,
        "visible": first["visible"],
        "published_visible": visible,
        "visible_percent": 100 * first["visible"] / every,
        "v1_decoded": first["decoded"],
        "v2_decoded": second["decoded"],
        "v2_scored": second["scored"],
        "v2_scored_percent": 100 * second["scored"] / every,
    }


@pytest.mark.counted
def test_mask_coverage(benchmark, record):
    grid, key = VideoMAEConfig().grid, keys_of(CLIPS, DEVICE)
    shape = "x".join(map(str, grid))
    figures = {
        "title": "How evenly masks cover a clip",
        "what": (
            f"of {shape} tokens, those that the encoder sees, or the decoder decodes under 90% "
            "tubes: the spread (standard deviation over mean) of their number over rows and "
            "columns of patches, over time and over positions, the least and the most of a row, "
            "column or time step that is covered, and positions covered at no time; "
            f"means over {CLIPS:,} clips. Frames are whole: 90% hide 7 of 8 time steps"
        ),
        "coverage": [coverage(case, grid, key) for case in CASES],
        "drawn": {
            "grid": list(grid),
            "clips": CLIPS,
            "strips": {f"{case.of} {case.label}": strip(case, grid, key[SHOWN]) for case in CASES},
        },
    }
    record("mask_coverage", rounded(figures), kind="published")
    benchmark.extra_info.update(rounded(figures))
    draw_in_rounds(benchmark, CASES[-1].masking(grid))


def draw_in_rounds(benchmark, masking):
    """Give pytest-benchmark the drawing of a batch's masks to time."""
    key = keys_of(BATCH, DEVICE)

    def draw():
        masking(key)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(draw, rounds=3, warmup_rounds=1)


def test_drawing(finish_rows):
    grid = VideoMAEConfig().grid
    what = f"masks of {BATCH} clips of {'x'.join(map(str, grid))} tokens, drawn from their keys"
    rows = [measure(case, grid) for case in CASES]
    first, key = CASES[0].masking(grid), keys_of(BATCH, DEVICE)
    finish_rows("masks", what, rows, lambda: first(key))


def measure(case, grid):
    """A row: time of drawing, and bytes of the indices and weights written."""
    masking = case.masking(grid)
    index_bytes = written_bytes(masking(keys_of(BATCH, DEVICE)))
    sets = [
        clip_keys(0, epoch, torch.arange(BATCH, device=DEVICE))
        for epoch in range(num_sets(index_bytes, DEVICE))
    ]
    times = timed({"ours": evaluation(masking, ())}, sets, index_bytes)
    name = f"draw {case.of} {case.label}"
    return row_of(name, evaluation, times["ours"], times["copy"], {}, index_bytes)


def written_bytes(mask):
    """Bytes of a mask's tensors."""
    tensors = (mask.visible_idx, mask.decode_idx, mask.scored)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
