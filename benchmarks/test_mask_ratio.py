"""What masking saves: a step's time, operations and memory by the share of tokens that is hidden.

The encoder alone, forward and backward over its visible tokens, and the whole model: masks drawn,
forward, backward, no optimiser, whose time no mask changes. Base in bf16 autocast on a GPU, on a
CPU small in fp32 with one clip. V1: whatever is hidden is decoded, so that the decoder always reads
all tokens. plot_mask_ratio.py draws what is kept.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import flops
import torch
from rows import DEVICE, rounded
from step_cases import flops_run, in_turn, release
from timing import Timing, ceilings, peak_memory_bytes, time_ways
from torch.utils.flop_counter import FlopCounterMode

from vmae_fast import VideoMAE, VideoMAEConfig, clip_keys
from vmae_fast.plan import FLOP_PER_MAC, published_macs

CUDA = DEVICE.type == "cuda"
SIZE, CLIPS, DTYPE = ("base", 64, torch.bfloat16) if CUDA else ("small", 1, torch.float32)
RATIOS = (0.0, 0.15, 0.5, 0.75, 0.9, 0.95)
# On a CPU, where a round of all takes some 20 seconds on two cores.
ROUNDS = 2


def test_mask_ratio(benchmark, record):
    figures, cheapest = measure()
    record("mask_ratio", figures)
    benchmark.extra_info.update(figures)

    def and_wait():
        cheapest()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(and_wait, rounds=3, warmup_rounds=1)


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        size: of SIZES.
        clips: of a batch; halved until they fit.
        dtype: bfloat16 is autocast's, the residual stream stays in fp32.
        more: settings of the model where they are not the size's.
    """

    size: str = SIZE
    clips: int = CLIPS
    dtype: torch.dtype = DTYPE
    more: dict[str, object] = field(default_factory=dict)

    def config(self, ratio):
        """The model's; at 0 a tube mask hides the least that it can, one position a row."""
        _, h, w = VideoMAEConfig.of(self.size, **self.more).grid
        # A little more than 1 / (h * w), which rounding may make none.
        return VideoMAEConfig.of(self.size, **self.more, mask_ratio=ratio or 1.25 / (h * w))

    def autocast(self):
        """Context of a forward pass."""
        low = self.dtype != torch.float32
        return torch.autocast(DEVICE.type, self.dtype) if low else nullcontext()


def measure(setting=None):
    """The figures, and the quickest step, to be called again."""
    setting = setting or Setting()
    asked = setting.clips
    while True:
        try:
            encoder_ms, step_ms, peaks, how, cheapest = run(setting)
            break
        except torch.OutOfMemoryError:
            if setting.clips == 1:
                raise
        # Out of the handler, whose traceback holds what did not fit.
        setting = Setting(setting.size, setting.clips // 2, setting.dtype, setting.more)
        release(DEVICE)
    full = setting.config(0)
    frames, (height, width) = full.frames, full.size
    clips = f"{setting.clips} clip{'s' if setting.clips > 1 else ''} of {frames}x{height}x{width}"
    fewer = "" if setting.clips == asked else f" ({asked} do not fit)"
    hidden = full.num_tokens - full.masking.num_visible
    rows = [
        row_of(setting, ratio, encoder_ms[ratio], step_ms[ratio], peaks[ratio]) for ratio in RATIOS
    ]
    for row in rows:
        row["encoder_speedup"] = rows[0]["encoder_ms"] / row["encoder_ms"]
        row["step_speedup"] = rows[0]["step_ms"] / row["step_ms"]
    figures = {
        "title": f"Time and operations by mask ratio, {setting.size}",
        "what": (
            f"{setting.size}, {clips}{fewer}, {str(setting.dtype).removeprefix('torch.')}: the "
            "encoder alone and the whole model, forward and backward, by the share of tokens "
            "hidden under tube masks; at 0 the encoder alone sees all tokens, but a whole step "
            f"needs something to reconstruct, and hides {hidden} of {full.num_tokens} tokens"
        ),
        "timed_by": how,
        "ceilings": ceilings(DEVICE),
        "ratios": rows,
    }
    return rounded(figures), cheapest


def run(setting):
    """Milliseconds of encoder and step, and the step's peak bytes, by ratio; how; a quick step."""
    torch.manual_seed(0)
    with DEVICE:
        model = VideoMAE(setting.config(0))
    config = model.config
    # As a decoder's memory comes.
    shape = (setting.clips, config.frames, *config.size, config.in_channels)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE).permute(0, 4, 1, 2, 3)
    keys = clip_keys(0, 0, torch.arange(setting.clips, device=DEVICE))
    steps = {
        ratio: partial(step, setting, model, setting.config(ratio).masking, video, keys)
        for ratio in RATIOS
    }
    encoders = {
        ratio: partial(encode, setting, model, visible_of(setting, ratio, keys), video)
        for ratio in RATIOS
    }
    # Each is called twice here, which warms up the encoder too.
    peaks = {ratio: peak_memory_bytes(one, DEVICE) for ratio, one in steps.items()}
    encoder_times = timed(encoders)
    # The memory of six recordings.
    release(DEVICE)
    step_times = timed(steps)
    hows = {timing.how for timing in [*encoder_times.values(), *step_times.values()]}
    return (
        {ratio: timing.time_ms for ratio, timing in encoder_times.items()},
        {ratio: timing.time_ms for ratio, timing in step_times.items()},
        peaks,
        " and ".join(sorted(hows)),
        steps[RATIOS[-1]],
    )


def visible_of(setting, ratio, keys):
    """Indices of what the encoder sees; None at 0, for all."""
    return setting.config(ratio).masking(keys).visible_idx if ratio else None


def step(setting, model, masking, video, keys):
    """Gradients of a whole step."""
    with setting.autocast():
        loss = model(video, masking(keys)).loss
    return torch.autograd.grad(loss, list(model.parameters()))


def encode(setting, model, visible_idx, video):
    """Gradients of the encoder alone."""
    with setting.autocast():
        tokens = model.encoder(video, visible_idx)
    # What comes in from a decoder is as large, and costs nothing to make.
    upstream = torch.ones((), dtype=tokens.dtype, device=tokens.device).expand_as(tokens)
    return torch.autograd.grad(tokens, list(model.encoder.parameters()), upstream)


def timed(calls):
    """A timing of each call, interleaved; on CUDA of a recorded one, without launches."""
    if not CUDA:
        each_ms = in_turn(calls, ROUNDS)
        return {name: Timing(time_ms, "perf_counter") for name, time_ms in each_ms.items()}
    # One input: a step moves many times what L2 holds.
    return time_ways({name: lambda _, one=one: one for name, one in calls.items()}, [None], DEVICE)


def row_of(setting, ratio, encoder_ms, step_ms, peak_bytes):
    """One row of the table, speed-ups left out."""
    config, clips = setting.config(ratio), setting.clips
    visible = config.masking.num_visible
    step_gflop = flops_run(config, clips) / 1e9
    row = {
        "ratio": ratio,
        "visible": visible if ratio else config.num_tokens,
        "step_visible": visible,
        "encoder_ms": encoder_ms,
        "step_ms": step_ms,
        # As they are run, and of a whole step also as the papers count them.
        "encoder_gflop": encoder_flops(setting, ratio) / 1e9,
        "step_gflop": step_gflop,
        "step_papers_gflop": FLOP_PER_MAC * clips * published_macs(config) / 1e9,
        "step_tflop_per_s": step_gflop / step_ms,
    }
    best = ceilings(DEVICE)
    if best.get("matmul_dtype") == str(setting.dtype).removeprefix("torch."):
        share = row["step_tflop_per_s"] / best["matmul_tflop_per_s"]
        row["step_percent_of_matmul"] = 100 * share
    return row | {"step_peak_mib": peak_bytes / 2**20}


def encoder_flops(setting, ratio):
    """Operations of :func:`encode`, counted on tensors without data."""
    config = setting.config(ratio)
    model = flops.model_of(config)
    video, mask = flops.batch_of(config, setting.clips)
    with FlopCounterMode(display=False) as counter:
        model.encoder(video, mask.visible_idx if ratio else None).sum().backward()
    return counter.get_total_flops()
