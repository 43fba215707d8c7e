"""The masked losses written out from the published target, and how far from it one may be."""

from __future__ import annotations

from typing import ClassVar

import torch
from helpers import EAGER_FACTOR, make_video, random_positions, relative_error

from vmae_fast.ops import linear_masked_mse, masked_mse

# Losses come in fp32 whatever the predictions' dtype; so do gradients for fp32 predictions.
FP32_RTOL = 1e-5


class LossInputs:
    """What one case is given; ``keywords`` for the ops."""

    # By their names: batch, channels, tubelet, grid, tokens.
    cases: ClassVar[dict[str, tuple]] = {}

    def __init__(self, case, kind, device, layout="decoder", form="int32_slice", norm_pix=True):
        batch, channels, tubelet, grid, count = self.cases[case]
        shape = (batch, channels, *(n * p for n, p in zip(grid, tubelet, strict=True)))
        video_dtype = torch.uint8 if kind == "uint8" else kind
        if layout == "expanded":
            self.video = make_video((1, *shape[1:]), video_dtype).to(device).expand(shape)
        else:
            self.video = make_video(shape, video_dtype, layout).to(device)
        self.idx = random_positions(batch, grid[0] * grid[1] * grid[2], count).to(device)
        if form == "int32_slice":
            wide = torch.full((batch, 3 + 2 * count), 10**6, dtype=torch.int32, device=device)
            wide[:, 3::2] = self.idx
            self.idx = wide[:, 3::2]
        self.tubelet, self.values = tubelet, channels * tubelet[0] * tubelet[1] * tubelet[2]
        self.keywords = {
            "norm_pix": norm_pix,
            "mean": tuple(0.3 + 0.1 * c for c in range(channels)),
            "std": tuple(0.2 + 0.05 * c for c in range(channels)),
        }

    def random(self, *shape, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(self.video.device, dtype)

    def scored(self):
        """Weights that are not all alike, none of them for some tokens."""
        weights = torch.arange(self.idx.numel(), device=self.video.device) % 4
        return weights.view(self.idx.shape).float()

    def target(self, dtype=torch.float64):
        """Cut out token by token: (pt ph pw c), normalised channel by channel."""
        if self.video.dtype == torch.uint8:
            pixels = self.video.to(dtype) / 255
        else:
            mean, std = (
                torch.tensor(self.keywords[name], dtype=dtype, device=self.video.device)
                for name in ("mean", "std")
            )
            column = (1, -1, 1, 1, 1)
            pixels = self.video.to(dtype) * std.view(column) + mean.view(column)
        pt, ph, pw = self.tubelet
        h, w = self.video.shape[3] // ph, self.video.shape[4] // pw
        clips = []
        for clip, positions in zip(pixels, self.idx.tolist(), strict=True):
            for n in positions:
                frame, top, left = n // (h * w) * pt, n // w % h * ph, n % w * pw
                block = clip[:, frame : frame + pt, top : top + ph, left : left + pw].flatten(1)
                if self.keywords["norm_pix"]:
                    std = block.var(dim=1, correction=1, keepdim=True).sqrt()
                    block = (block - block.mean(dim=1, keepdim=True)) / (std + 1e-6)
                clips.append(block.t().flatten())
        return torch.stack(clips).view(*self.idx.shape, -1)


def assert_accurate(got, eager, truth):
    """As close to the fp64 truth as fp32 allows, or in less as eager PyTorch comes, twice."""
    for place, (mine, theirs, true) in enumerate(zip(got, eager, truth, strict=True)):
        assert mine.shape == true.shape
        assert mine.dtype == theirs.dtype
        bound = FP32_RTOL
        if mine.dtype != torch.float32:
            bound = EAGER_FACTOR * relative_error(theirs, true) + 1e-15
        assert relative_error(mine, true) <= bound, f"number {place} of loss and gradients"


def check_masked_mse(inputs, dtype, scored=None, reduction="mean", layout="contiguous"):
    batch, count = inputs.idx.shape
    stored = inputs.random(batch, count, inputs.values, dtype=dtype)
    if layout == "transposed":
        stored = inputs.random(batch, inputs.values, count, dtype=dtype)
    stored.requires_grad_()
    pred = stored if layout == "contiguous" else stored.transpose(1, 2)
    loss = masked_mse(
        pred, inputs.video, inputs.idx, inputs.tubelet,
        scored=scored, reduction=reduction, **inputs.keywords,
    )  # fmt: skip
    assert loss.dtype == torch.float32
    # Large, so that gradients in half precision are not made of subnormals.
    size = float(
        inputs.values if reduction == "none" else max(inputs.values * inputs.idx.numel(), 1)
    )
    upstream = size * inputs.random(*loss.shape, dtype=torch.float32, seed=1)
    (mine,) = torch.autograd.grad(loss, stored, upstream)
    if inputs.idx.numel() == 0:
        assert mine.shape == stored.shape
        return

    def run(kind):
        own = stored.detach().to(kind).requires_grad_()
        values = own if layout == "contiguous" else own.transpose(1, 2)
        wide = torch.promote_types(kind, torch.float32)
        out = (values.to(wide) - inputs.target(wide)).square().mean(dim=2)
        if reduction == "mean":
            weight = torch.ones_like(out) if scored is None else scored.to(wide)
            out = (out * weight).sum() / weight.sum()
        return out, *torch.autograd.grad(out, own, upstream.to(out.dtype))

    assert_accurate((loss, mine), run(dtype), run(torch.float64))


def check_linear_masked_mse(inputs, dtype, width=24, bias=True, scored=None):
    batch, count = inputs.idx.shape
    leaves = [
        inputs.random(batch, count, width, dtype=dtype),
        inputs.random(inputs.values, width, dtype=dtype, seed=1) / width**0.5,
        inputs.random(inputs.values, dtype=dtype, seed=2) if bias else None,
    ]
    upstream = 0.5 * inputs.idx.numel() * inputs.values

    def run(function, kind=None):
        own = [
            None if leaf is None else leaf.to(kind or dtype, copy=True).requires_grad_()
            for leaf in leaves
        ]
        loss = function(*own)
        given = [leaf for leaf in own if leaf is not None]
        return loss, *torch.autograd.grad(loss, given, torch.full_like(loss, upstream))

    def fused(*own):
        return linear_masked_mse(
            *own, inputs.video, inputs.idx, inputs.tubelet, scored=scored, **inputs.keywords
        )

    def eager(*own):
        values = torch.nn.functional.linear(*own)
        wide = torch.promote_types(values.dtype, torch.float32)
        out = (values.to(wide) - inputs.target(wide)).square().mean(dim=2)
        weight = torch.ones_like(out) if scored is None else scored.to(wide)
        return (out * weight).sum() / weight.sum()

    got = run(fused)
    assert got[0].dtype == torch.float32
    if inputs.idx.numel() == 0:
        assert [one.shape for one in got[1:]] == [one.shape for one in leaves if one is not None]
        return
    truth, low = run(eager, torch.float64), run(eager)
    # The loss is a mean over predictions rounded to dtype, errors of which average out by luck.
    if dtype != torch.float32:
        assert relative_error(got[0], truth[0]) < torch.finfo(dtype).eps
        got, low, truth = got[1:], low[1:], truth[1:]
    assert_accurate(got, low, truth)
