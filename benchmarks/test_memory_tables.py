"""Memory a clip of encoder-only and of dual masking, beside VideoMAE V2's table.

Counted by following a step on tensors without data, so the same on every device: the slope over the
batch of what is kept for the backward pass, and of the most that is held at once. What the tracer
says is then compared with what a step really takes: on a GPU of whole training steps, on a CPU of
forward and backward of a small model.
"""

import gc
from itertools import pairwise

import pytest
import torch
from peers import saved_bytes
from plain_videomae import PlainVideoMAE, by_head, plain_loss, positions, sdpa
from rows import DEVICE, rounded
from step_cases import StepCase, training_step
from timing import peak_memory_bytes

from vmae_fast import VideoMAE, VideoMAEConfig
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
CHECKED_CLIPS, CHECKED_DEPTH = 64, 12
MB = 10**6
BF16 = torch.bfloat16
# How far the tracer may be from what is measured, in percent.
AIM_PERCENT = 10
WARM_UPS = 2
# What can be run on a CPU in seconds.
SMALL = {"width": 384, "heads": 6, "decoder_width": 192, "decoder_heads": 3, "depth": 4}
SMALL_CLIPS = 2
NOT_STATED = (
    "how the paper measured is not stated, so what is kept for the backward pass and the peak of a "
    "step are both shown, and the ratios are what to compare"
)


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


def test_dual_masking(benchmark, record):
    rows = [
        row_of(size, way) for way in WAYS for size in (SIZES if way in GROWTH else PUBLISHED_MB)
    ]
    figures = {
        "what": "memory a clip of encoder-only and of dual masking, V2's decoders, counted; "
        "VideoMAE V2's figures (arXiv 2303.16727) beside them",
        "unit": "MB = 10^6 bytes; the paper prints M",
        "note": NOT_STATED,
        "a_clip": rounded(rows),
    }
    for row in rows:
        assert row["peak_ratio"] < 1
        assert row["kept_ratio"] < 1
    record("memory_dual_masking", figures, kind="published")
    first = config_of("base", "dual")
    benchmark.pedantic(lambda: held_bytes(first, "ours, bf16", CLIPS[0]), rounds=1)


def row_of(size, way):
    """One model's memory a clip under both kinds of masking, in MB, and what dual masking saves."""
    found = {name: per_clip(config_of(size, name), way) for name in MASKINGS}
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


def per_clip(config, way, clips=CLIPS, checked=CHECKED_CLIPS):
    """Bytes that one clip more adds to the peak, and to what is kept for the backward pass.

    Raises:
        AssertionError: between the larger two batches it adds another number.
    """
    # What our model shares hangs on the batch; in one size the slope is seen to stay.
    sure = way.startswith("ours") and config.depth == CHECKED_DEPTH
    batches = (*clips, checked) if sure else clips
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


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: whole training steps")
def test_measured_on_a_gpu(benchmark, record):
    rows, left_out = [], []
    for size in SIZES:
        try:
            rows.append(measured_row(size))
        except torch.OutOfMemoryError:
            left_out.append(size)
        release()
    figures = {
        "what": "memory a clip of encoder-only and of dual masking, V2's decoders, measured: a "
        "whole training step, launched, bf16 autocast, fp32 residual stream; and as counted",
        "clips": list(CLIPS),
        "unit": "MB = 10^6 bytes",
        "did_not_fit": left_out,
        "a_clip": rounded(rows),
    }
    record("memory_dual_masking_measured", figures)
    benchmark.pedantic(torch.cuda.synchronize, rounds=1)


def measured_row(size):
    """Measured slopes of the peak, and how far the tracer's are, and its peaks, in percent."""
    row = {"size": size, "model": "ours, bf16"}
    for masking in MASKINGS:
        config = config_of(size, masking)
        peaks = [measured_peak(size, config, clips) for clips in CLIPS]
        traces = [held_bytes(config, "ours, bf16", clips)[0] for clips in CLIPS]
        few, more = CLIPS
        slope, expected = ((b - a) / (more - few) for a, b in (peaks, traces))
        row |= {
            f"peak_{masking}_mb": slope / MB,
            f"{masking}_counted_percent_off": 100 * (expected / slope - 1),
            f"{masking}_peak_counted_percent_off": 100 * (traces[1] / peaks[1] - 1),
        }
    alone, dual = (row[f"peak_{masking}_mb"] for masking in MASKINGS)
    return row | {"peak_saved_mb": alone - dual, "peak_ratio": dual / alone}


def measured_peak(size, config, clips):
    """Most bytes that a training step makes at once: activations and gradients, no weights."""
    release()
    settings = SIZES[size] | {"decoder_mask_ratio": config.decoder_mask_ratio}
    case = StepCase(f"memory {size}", size, clips, ("launched",), settings=settings)
    # Nothing is recorded: the step is launched.
    step = training_step(case, "launched", "fp32", clips, DEVICE, capture=None)
    for _ in range(WARM_UPS):
        step()
    torch.cuda.synchronize()
    # Gradients of the step before are held here, and dropped when the next one begins.
    before = torch.cuda.memory_allocated() - gradient_bytes(config)
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gradient_bytes(config):
    """Of all parameters, in fp32."""
    with torch.device("meta"):
        return 4 * sum(p.numel() for p in VideoMAE(config).parameters())


def release():
    """Hand unused memory back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU whole training steps are measured")
def test_measured_on_a_cpu(benchmark, record):
    rows = [small_row(name, ratio) for name in ("ours", "plain") for ratio in MASKINGS.values()]
    figures = {
        "what": f"a step of {SMALL_CLIPS} clips of 16x224x224, fp32, width {SMALL['width']} and "
        f"{SMALL['depth']} blocks: memory as counted without running it, and as measured",
        "unit": "MB = 10^6 bytes",
        "steps": rounded(rows),
    }
    record("memory_dual_masking_measured", figures)
    for row in rows:
        assert abs(row["kept_percent_off"]) < AIM_PERCENT
        assert abs(row["peak_percent_off"]) < AIM_PERCENT
    benchmark.pedantic(lambda: small_row("ours", 0.0), rounds=1)


def small_row(name, decoder_ratio, clips=SMALL_CLIPS, **settings):
    """Counted and measured memory of one model's step on a CPU."""
    settings = SMALL | settings | {"decoder_mask_ratio": decoder_ratio}
    config = VideoMAEConfig.of("base", **settings)
    loss = published_loss if name == "ours" else plain(sdpa)
    trace = traced(config, clips, loss)
    # The video is a float one there, as Hugging Face's class must have it.
    of_float = traced(config, clips, loss, backward=False, video_dtype=torch.float32)
    kept = saved_bytes(name, "fp32", clips=clips, **settings)
    peak = peak_memory_bytes(cpu_step(name, config, clips), torch.device("cpu"))
    return {
        "model": name,
        "decoder_mask_ratio": decoder_ratio,
        "kept_mb": kept / MB,
        "kept_percent_off": 100 * (of_float.kept_bytes / kept - 1),
        "peak_mb": peak / MB,
        "peak_percent_off": 100 * (trace.peak_bytes / peak - 1),
    }


def cpu_step(name, config, clips):
    """Forward and backward on uint8 clips as a decoder leaves them; gradients are dropped."""
    ours = VideoMAE(config)
    model = ours if name == "ours" else PlainVideoMAE(ours, attend=sdpa)
    shape = (clips, config.frames, *config.size, config.in_channels)
    video = torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    mask = ours.masking(torch.arange(clips))

    def step():
        model(video, mask).loss.backward()
        model.zero_grad(set_to_none=True)

    return step
