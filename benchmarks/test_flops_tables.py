"""Two published tables, counted again: decoder masking, and joint against divided attention.

Counted are matrix products, those of attention included, on shapes without data (flops.py), so that
the figures are the same on every device. plot_flops.py draws what is kept.
"""

from typing import NamedTuple

import flops
import pytest
import torch
from flops import ATTENTIONS, FLOP_PER_MAC, FLOP_PER_PAIR, ITEMS
from plain_videomae import PlainVideoMAE, written_out
from rows import DEVICE, rounded

from vmae_fast import VideoMAEConfig, ops

# Clips that share what mask tokens have in common: as many as test_step_gpu.py takes of base.
CLIPS = 64
# Of the published figure, which may count more than products.
MOST_OFF_PERCENT = 0.5


class Masked(NamedTuple):
    """A pretraining with decoder masking, and what was published of it."""

    size: str
    kind: str
    ratio: float
    gmacs: float

    @property
    def label(self):
        """The decoder's masking in words."""
        return f"{self.kind.replace('_', ' ')} {self.ratio:.0%}" if self.ratio else "none"

    @property
    def model(self):
        """The model without data; 90% tubes hide tokens from the encoder."""
        settings = {"decoder_mask_kind": self.kind} if self.ratio else {}
        return flops.model_of(self.size, decoder_mask_ratio=self.ratio, **settings)


# GMACs of a forward pass over a clip. Source: VideoMAE V2 (arXiv 2303.16727), tables of decoder
# masking (base) and of dual masking against masking in the encoder alone (giant).
PUBLISHED_MASKING = (
    Masked("base", "none", 0.0, 35.48),
    Masked("base", "frame", 0.5, 25.87),
    Masked("base", "random", 0.5, 25.87),
    Masked("base", "running_cell", 0.5, 25.87),
    Masked("base", "running_cell", 0.75, 21.06),
    Masked("giant", "none", 0.0, 263.93),
    Masked("giant", "running_cell", 0.5, 241.61),
)
ITEMISED = (PUBLISHED_MASKING[0], PUBLISHED_MASKING[3])

# Millions of pairs of query and key in a clip of 16 rows of 14 x 14 tokens, and their share of
# joint attention's, as quoted of the schemes that TimeSformer (arXiv 2102.05095) compares.
PUBLISHED_PAIRS = {
    "joint": ("9.83", "1.00"),
    "divided": ("0.665", "0.07"),
    "space": ("0.615", "0.06"),
}
PUBLISHED_T = 16
ROWS = (4, 8, 16)
BASE = VideoMAEConfig.of("base")
# Both make 16 rows of tubelets.
INPUTS = {"32 frames, 2 a tubelet": (32, 2), "64 frames, 4 a tubelet": (64, 4)}


@pytest.mark.counted
def test_flops_decoder_masking(benchmark, record):
    counted = {masked: forward_of(masked.model) for masked in PUBLISHED_MASKING}
    figures = {
        "title": "FLOPs of decoder masking",
        "what": (
            "GMACs a clip, counted from the models (a multiply-add is one MAC), 90% tube masks for "
            "the encoder; published by VideoMAE V2; plain is the model as one would write it, ours "
            f"is VideoMAE in a batch of {CLIPS} clips; a step is a forward and a backward pass, in "
            "which written-out attention makes four products and fused attention, ours included, "
            "five, since it keeps no weights; giant's decoder has MLPs 2234 wide, which ours pads "
            "to 2240"
        ),
        "forward": [forward_row(masked, *each) for masked, each in counted.items()],
        "step": [step_row(masked) for masked in PUBLISHED_MASKING],
        "items": [row for masked in ITEMISED for row in item_rows(masked.label, *counted[masked])],
        "by_item": {
            f"{masked.size}, {masked.label}": {"plain": gmacs(plain), "ours": gmacs(ours)}
            for masked, (plain, ours) in counted.items()
        },
    }
    benchmark.extra_info.update(figures)
    record("flops_decoder_masking", figures, kind="published")
    model = flops.model_of("base")
    benchmark.pedantic(lambda: flops.our_forward(model, CLIPS), rounds=3)
    check_masking(figures["forward"])


def check_masking(rows):
    """The plain model multiplies as much as was published, and ours less."""
    for row in rows:
        assert abs(row["plain_off_percent"]) < MOST_OFF_PERCENT, row
        assert row["ours_gmac"] < row["plain_gmac"], row


def forward_of(model):
    """Operations by item of the plain model and of ours; the plain one's by either attention."""
    plain = flops.plain_forward(model, CLIPS, written_out)
    assert plain == flops.plain_forward(model, CLIPS, ops.attention)
    return plain, flops.our_forward(model, CLIPS)


def forward_row(masked, plain, ours):
    """A configuration's forward pass beside the published figure."""
    plain, ours = sum(gmacs(plain).values()), sum(gmacs(ours).values())
    return {
        "model": masked.size,
        "decoder_masking": masked.label,
        "published_gmac": masked.gmacs,
        "plain_gmac": round(plain, 3),
        "plain_off_percent": round(100 * (plain / masked.gmacs - 1), 3),
        "ours_gmac": round(ours, 3),
        "ours_over_plain": round(ours / plain, 3),
    }


def step_row(masked):
    """A configuration's forward and backward pass."""
    model = masked.model
    plain, fused, ours = (
        flops.step(one, model.config, CLIPS) / FLOP_PER_MAC / 1e9
        for one in (PlainVideoMAE(model), PlainVideoMAE(model, attend=ops.attention), model)
    )
    return {
        "model": masked.size,
        "decoder_masking": masked.label,
        "plain_gmac": round(plain, 3),
        "plain_with_fused_attention_gmac": round(fused, 3),
        "ours_gmac": round(ours, 3),
        "ours_over_plain": round(ours / plain, 3),
        "ours_over_plain_with_fused_attention": round(ours / fused, 3),
    }


def item_rows(label, plain, ours):
    """A configuration's forward pass part by part."""
    plain, ours = gmacs(plain), gmacs(ours)
    return [
        {
            "decoder_masking_of_base": label,
            "item": item,
            "plain_gmac": round(plain[item], 3),
            "ours_gmac": round(ours[item], 3),
            "ours_over_plain": round(ours[item] / plain[item], 3),
        }
        for item in ITEMS
    ]


def gmacs(operations):
    """Billions of multiply-adds."""
    return {item: count / FLOP_PER_MAC / 1e9 for item, count in operations.items()}


@pytest.mark.counted
def test_attention_pairs(benchmark, record):
    figures = {
        "title": "Pairs and FLOPs of joint and divided attention",
        "what": (
            "attention over t x 14 x 14 tokens, counted from the ops and blocks of a base-size "
            "encoder without masks, a clip, forward unless named backward; a multiply-add is two "
            "operations; a divided block has queries, keys, values and output projections of two "
            "attentions, 16 squares of the width in linear layers where the others have 12, and no "
            "further layer between them; space alone never looks along time"
        ),
        "alone": [row for t in ROWS for row in alone_rows(t)],
        "blocks": [row for t in ROWS for row in block_rows(t)],
        "encoders": [row for given in INPUTS for row in encoder_rows(given)],
    }
    benchmark.extra_info.update(figures)
    record("attention_pairs", rounded(figures), kind="published")
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    qkv = torch.randn(1, ROWS[0] * 14 * 14, 3 * BASE.width, device=DEVICE, dtype=dtype)

    def both():
        for axis in ops.ATTENTION_AXES:
            ops.divided_attention(qkv, BASE.heads, (ROWS[0], 14, 14), axis)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(both, rounds=3, warmup_rounds=1)
    check_pairs(figures["alone"])


def check_pairs(rows):
    """Pairs and shares are the published ones, rounded as those are."""
    for row in rows:
        if row["t"] == PUBLISHED_T:
            pairs, share = PUBLISHED_PAIRS[row["attention"]]
            assert as_printed(row["pairs_m"], pairs) == pairs
            assert as_printed(row["over_joint"], share) == share


def as_printed(value, published):
    """A number with as many decimals as a published one."""
    return f"{value:.{len(published.partition('.')[2])}f}"


def alone_rows(t):
    """The attentions on t rows, without projections."""
    positions = BASE.num_tokens // BASE.grid[0]
    found = {
        kind: flops.attention_flops(kind, t, positions, BASE.width, BASE.heads)
        for kind in ATTENTIONS
    }
    pairs = {kind: forward / (FLOP_PER_PAIR * BASE.width) for kind, (forward, _) in found.items()}
    return [
        {
            "t": t,
            "attention": kind,
            "tokens": t * positions,
            "pairs_m": pairs[kind] / 1e6,
            "over_joint": pairs[kind] / pairs["joint"],
            "published_pairs_m": PUBLISHED_PAIRS[kind][0] if t == PUBLISHED_T else None,
            "published_over_joint": PUBLISHED_PAIRS[kind][1] if t == PUBLISHED_T else None,
            "forward_gflop": found[kind][0] / 1e9,
            "backward_gflop": found[kind][1] / 1e9,
        }
        for kind in ATTENTIONS
    ]


def block_rows(t):
    """A whole encoder block with each of the attentions."""
    found = {kind: flops.block_flops(kind, t, BASE) for kind in ATTENTIONS}
    whole = {kind: sum(by_sort.values()) for kind, by_sort in found.items()}
    return [
        {
            "t": t,
            "block": kind,
            "attention_gflop": found[kind]["attention"] / 1e9,
            "linear_gflop": found[kind]["linear layers"] / 1e9,
            "gflop": whole[kind] / 1e9,
            "over_joint": whole[kind] / whole["joint"],
        }
        for kind in ATTENTIONS
    ]


def encoder_rows(given):
    """A whole encoder with each of the attentions, for one of the inputs."""
    frames, tubelet = INPUTS[given]
    config = VideoMAEConfig.of("base", frames=frames, tubelet_size=tubelet)
    found = {kind: flops.encoder_flops(kind, config) for kind in ATTENTIONS}
    whole = {kind: sum(by_sort.values()) for kind, (by_sort, _) in found.items()}
    return [
        {
            "input": given,
            "encoder": kind,
            "tokens": config.num_tokens,
            "parameters_m": found[kind][1] / 1e6,
            **{
                f"{sort.replace(' ', '_')}_gflop": count / 1e9
                for sort, count in found[kind][0].items()
            },
            "gflop": whole[kind] / 1e9,
            "over_joint": whole[kind] / whole["joint"],
        }
        for kind in ATTENTIONS
    ]
