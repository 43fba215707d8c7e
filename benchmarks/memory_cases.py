"""Memory a clip of encoder-only and of dual masking, counted without running a step."""

from itertools import pairwise

import torch
from plain_videomae import by_head, plain_loss, positions, sdpa

from vmae_fast import VideoMAEConfig
from vmae_fast.plan.trace import published_loss, trace_step

# V2's decoders where the size's own are V1's (vmae_fast/models/config.py).
SIZES = {
    "base": {},
    "large": {"decoder_depth": 4},
    "huge": {"decoder_depth": 4, "decoder_width": 512, "decoder_heads": 8},
    "giant": {},
}
# Share of tokens that is not decoded.
MASKINGS = {"encoder_only": 0.0, "dual": 0.5}
# MB a clip, table of encoder-only against dual masking in VideoMAE V2 (arXiv 2303.16727).
PUBLISHED_MB = {
    "base": {"encoder_only": 631, "dual": 328},
    "giant": {"encoder_only": 1753, "dual": 1050},
}
# From eight clips on mask tokens are shared and the peak lies in activations, not in gradients.
CLIPS = (16, 32)
CHECKED_CLIPS = 64
MB = 10**6
BF16 = torch.bfloat16


def written_out_on_a_gpu(qkv, heads):
    """Attention as a softmax of a product, in the dtypes of autocast on a GPU.

    There softmax gives fp32, which the next product takes a narrow copy of; autocast on a CPU,
    under which steps are followed, leaves it narrow.
    """
    q, k, v = by_head(qkv, heads)
    logits = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    weights = logits.softmax(dim=3, dtype=torch.promote_types(q.dtype, torch.float32))
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def plain(attend):
    """The plain model's loss, in the form that a step is followed in."""

    def loss(model, video, mask):
        return plain_loss(dict(model.named_parameters()), model.config, video, mask, attend=attend)

    return loss


# By name: loss and autocast's dtype. All sizes, or those that are published, by two of them.
WAYS = {
    "ours, bf16": (published_loss, BF16),
    "plain, SDPA, bf16": (plain(sdpa), BF16),
    "plain, attention written out, bf16": (plain(written_out_on_a_gpu), BF16),
}
GROWTH = ("ours, bf16", "plain, attention written out, bf16")
SURE = ("base", "ours, bf16")


def row_of(size, way):
    """One model's memory a clip under both kinds of masking, in MB, and what dual masking saves."""
    # What our model shares hangs on the batch: in one size the slope is seen to stay.
    checked = (CHECKED_CLIPS,) if (size, way) == SURE else ()
    found = {name: per_clip(config_of(size, name), way, (*CLIPS, *checked)) for name in MASKINGS}
    row = {"size": size, "model": way}
    for number, what in enumerate(("peak", "kept")):
        alone, dual = (found[name][number] / MB for name in MASKINGS)
        row |= {f"{what}_encoder_only_mb": alone, f"{what}_dual_mb": dual}
        row |= {f"{what}_saved_mb": alone - dual, f"{what}_ratio": dual / alone}
    published = PUBLISHED_MB.get(size, {})
    row |= {f"published_{name}_mb": published.get(name) for name in MASKINGS}
    ratio = published["dual"] / published["encoder_only"] if published else None
    return row | {"published_ratio": ratio}


def config_of(size, masking, **settings):
    """A size with V2's decoder."""
    return VideoMAEConfig.of(size, **SIZES[size], decoder_mask_ratio=MASKINGS[masking], **settings)


def per_clip(config, way, batches):
    """Bytes that one clip more adds to the peak, and to what is kept for the backward pass.

    Raises:
        AssertionError: between other two of the batches it adds another number.
    """
    held = {batch: held_bytes(config, way, batch) for batch in batches}
    slopes = [
        tuple((b - a) / (more - few) for a, b in zip(held[few], held[more], strict=True))
        for few, more in pairwise(batches)
    ]
    assert all(slope == slopes[0] for slope in slopes), f"{way}: not constant: {slopes}"
    return slopes[0]


def held_bytes(config, way, batch):
    """Most at once during a step, and what is kept for its backward pass."""
    loss, dtype = WAYS[way]
    trace = traced(config, batch, loss, autocast_dtype=dtype)
    return trace.peak_bytes, trace.kept_bytes


def traced(config, batch, loss, **options):
    """A step followed, with the plain model's tables made before, else they would have no data."""
    for width in (config.width, config.decoder_width):
        positions(config.num_tokens, width, torch.device("cpu"))
    return trace_step(config, batch, loss=loss, **options)
