"""Kernels of tubelet_embed, both ways forward, against Conv3d and indexing in fp64."""

import os

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EAGER_FACTOR,
    IMAGENET_MEAN,
    IMAGENET_STD,
    make_video,
    random_positions,
    relative_error,
)

from vmae_fast.kernels import tubelet_embed as kernel
from vmae_fast.ops import tubelet_embed

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a GPU, or Triton's interpreter, in which test_interpreter.py runs this file",
        allow_module_level=True,
    )
pytestmark = [pytest.mark.usefixtures("kernels")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)

# Sums of up to some thousand products, in fp32.
FP32_RTOL = 1e-5
# Of the output for uint8 video, against normalising in fp32 and rounding to the weight's dtype.
UINT8_FACTOR = 1.1
# Of so few values the rounding errors do not average out: each may be off by a unit.
FEW = 32

# Blocks are 8 tubelets of 256 values to copy, 16 tokens of 128 columns to finish, and 32 x 32 or
# 128 x 128 of 32 or 64 values to multiply: one, primes, a block, one more than a block, nothing.
CASES = {  # batch, channels, tubelet, grid, taken, width
    "one_pixel": (1, 1, (1, 1, 1), (1, 1, 1), 1, 1),
    "odd": (2, 2, (3, 3, 5), (1, 2, 3), 5, 7),
    "one_channel": (2, 1, (1, 8, 8), (2, 2, 3), 7, 24),
    "videomae": (2, 3, (2, 16, 16), (2, 2, 1), 3, 8),
    "patch_14": (1, 3, (2, 14, 14), (1, 2, 2), 3, 40),
    "patch_32": (1, 1, (1, 32, 32), (1, 1, 2), 1, 8),
    "seven_channels": (3, 7, (4, 3, 5), (1, 3, 2), 2, 13),
    "above_a_large_block": (3, 1, (1, 3, 3), (2, 5, 5), 43, 33),
    "none_taken": (2, 3, (2, 4, 4), (2, 2, 2), 0, 8),
    "no_clips": (0, 3, (2, 4, 4), (2, 2, 2), 5, 8),
}
# Folding takes a program for each column: for video that needs none.
WIDE = {
    "one_block": (2, 4, (1, 8, 8), (1, 2, 2), 4, 128),
    "above_a_block": (1, 1, (1, 1, 257), (1, 17, 2), 17, 129),
    "wide": (1, 3, (1, 2, 2), (1, 2, 2), 2, 384),
}


@pytest.fixture(params=kernel.FORWARD_WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(kernel, "forward_way", request.param)
    return request.param


class Inputs:
    """What one case is given: leaves as tensors of ``dtype``, the rest as it is."""

    def __init__(self, case, kind, layout, form, dtype, device):
        batch, channels, tubelet, grid, count, width = (CASES | WIDE)[case]
        shape = (batch, channels, *(n * p for n, p in zip(grid, tubelet, strict=True)))
        self.video = make_layout(shape, torch.uint8 if kind == "uint8" else dtype, layout, device)
        self.mean = tuple(0.3 + 0.1 * c for c in range(channels))
        self.std = tuple(0.2 + 0.05 * c for c in range(channels))
        num_tokens = grid[0] * grid[1] * grid[2]
        generator = torch.Generator().manual_seed(1)
        self.weight, self.bias, self.pos = (
            torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
            for size in ((width, channels, *tubelet), (width,), (num_tokens, width))
        )
        self.idx = None
        if form is not None:
            self.idx = random_positions(batch, num_tokens, count).to(device)
        if form == "int32_slice":
            wide = torch.full((batch, 3 + 2 * count), 7 * num_tokens, dtype=torch.int32)
            self.idx, every = wide.to(device)[:, 3::2], self.idx
            self.idx.copy_(every)

    def normalised(self):
        """In fp64."""
        if self.video.is_floating_point():
            return self.video.double()
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device=self.video.device).view(1, -1, 1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (self.video.double() / 255 - mean) / std


def make_layout(shape, dtype, layout, device):
    if layout != "expanded":
        return make_video(shape, dtype, layout).to(device, memory_format=torch.preserve_format)
    return make_video((1, *shape[1:]), dtype).to(device).expand(shape)


def conv3d_gathered(video, weight, bias, pos, idx):
    """The published computation: embed everything, add positions, keep some."""
    tokens = F.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if pos is not None:
        tokens = tokens + pos
    if idx is None:
        return tokens
    return torch.stack([tokens[b, idx[b].long()] for b in range(len(tokens))])


def compare(inputs, bias=True, pos=True, gradients=True, uint8_factor=EAGER_FACTOR):
    """Output and every gradient; the upstream gradient is random and not contiguous."""
    floating = inputs.video.is_floating_point()
    given = [inputs.weight, inputs.bias if bias else None, inputs.pos if pos else None]
    dtype = inputs.weight.dtype
    promoted = torch.promote_types(dtype, inputs.pos.dtype) if pos else dtype
    count = inputs.pos.shape[0] if inputs.idx is None else inputs.idx.shape[1]
    shape = (count, len(inputs.video), len(inputs.weight))
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    upstream = upstream.to(inputs.video.device, promoted).transpose(0, 1)

    def run(function, video, kind=None, **keywords):
        own = [
            None if x is None else x.detach().to(kind or x.dtype, copy=True).requires_grad_()
            for x in given
        ]
        video = video.detach().requires_grad_(floating)
        out = function(video, *own, inputs.idx, **keywords)
        leaves = [x for x in own if x is not None] + [video] * floating
        if not gradients:
            return (out,)
        return out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))

    got = run(tubelet_embed, inputs.video, mean=inputs.mean, std=inputs.std)
    assert got[0].shape == upstream.shape
    assert got[0].dtype == promoted
    if upstream.numel() == 0:
        assert not any(gradient.any() for gradient in got[1:])
        return
    truth = run(conv3d_gathered, inputs.normalised(), torch.float64)
    eager = run(conv3d_gathered, inputs.normalised().to(dtype))
    for place, (mine, theirs, true) in enumerate(zip(got, eager, truth, strict=True)):
        assert mine.shape == true.shape
        assert mine.dtype == theirs.dtype
        bound = FP32_RTOL
        if dtype != torch.float32:
            factor = EAGER_FACTOR if floating or place > 0 else uint8_factor
            bound = factor * relative_error(theirs, true) + 1e-15
            bound = max(bound, torch.finfo(dtype).eps if mine.numel() <= FEW else 0)
        assert relative_error(mine, true) <= bound, f"number {place} of output and gradients"


@pytest.mark.parametrize(
    ("case", "kind"),
    [*((case, "floating") for case in CASES | WIDE), *((case, "uint8") for case in CASES)],
)
def test_tubelet_embed(case, kind, way, dtype, device):
    # What comes after is the same for both ways.
    compare(Inputs(case, kind, "decoder", "int32_slice", dtype, device), gradients=way == "rows")


@pytest.mark.parametrize(
    ("layout", "form"),
    [("contiguous", None), ("cropped", "int64"), ("expanded", None), ("expanded", "int64")],
)
@pytest.mark.parametrize("kind", ["uint8", "floating"])
def test_layouts(layout, form, kind, way, dtype, device):
    compare(Inputs("odd", kind, layout, form, dtype, device), gradients=way == "rows")


@pytest.mark.parametrize(
    ("bias", "pos"),
    [(False, False), (True, False), (False, True)],
    ids=["neither", "bias", "fp32_position"],
)
@pytest.mark.parametrize("kind", ["uint8", "floating"])
def test_bias_and_position(kind, bias, pos, way, dtype, device):
    """A position table of a wider dtype gives the result and the gradients its dtype."""
    inputs = Inputs("odd", kind, "contiguous", "int64", dtype, device)
    inputs.pos = inputs.pos.float()
    compare(inputs, bias=bias, pos=pos, gradients=way == "rows")


@pytest.mark.parametrize("kind", ["uint8", "floating"])
def test_parameters_that_are_not_contiguous(kind, way, dtype, device):
    inputs = Inputs("odd", kind, "contiguous", "int64", dtype, device)
    inputs.weight = inputs.weight.transpose(0, 4).contiguous().transpose(0, 4)
    inputs.bias = inputs.bias[:1].expand(7)
    inputs.pos = inputs.pos.t().contiguous().t()
    given = (inputs.weight, inputs.bias, inputs.pos)
    got = tubelet_embed(inputs.video, *given, inputs.idx, mean=inputs.mean, std=inputs.std)
    dense = [x.contiguous() for x in given]
    expected = tubelet_embed(inputs.video, *dense, inputs.idx, mean=inputs.mean, std=inputs.std)
    assert torch.equal(got, expected)
    truth = conv3d_gathered(inputs.normalised(), *(x.double() for x in given), inputs.idx)
    assert relative_error(got, truth) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], indirect=True, ids=str)
@pytest.mark.parametrize(
    ("levels", "pos"),
    [((0, 256), True), ((0, 60), True), ((200, 256), True), ((0, 256), False)],
    ids=["noise", "dark", "bright", "no_position"],
)
def test_uint8_is_as_accurate_as_normalising_first(levels, pos, way, dtype, device):
    """Over enough values for the ratio of two errors to mean something."""
    inputs = Inputs("videomae", "uint8", "contiguous", None, dtype, device)
    generator = torch.Generator().manual_seed(4)
    video = torch.randint(*levels, (3, 3, 2, 64, 32), generator=generator, dtype=torch.uint8)
    inputs.video = video.to(device)
    inputs.mean, inputs.std = IMAGENET_MEAN, IMAGENET_STD
    inputs.weight, inputs.bias, inputs.pos = (
        (scale * torch.randn(shape, generator=generator)).to(device, dtype)
        for scale, shape in ((0.02, (40, 3, 2, 8, 8)), (0.1, (40,)), (0.7, (32, 40)))
    )
    compare(inputs, pos=pos, gradients=False, uint8_factor=UINT8_FACTOR)


def test_grey_video(way, dtype, device):
    """Its normalised values are small differences of large numbers."""
    inputs = Inputs("odd", "uint8", "contiguous", None, dtype, device)
    inputs.video = 105 + inputs.video // 16
    compare(inputs, pos=False, gradients=False)


def test_video_of_the_mean(dtype, device, monkeypatch):
    """What is left of it is nearly nothing, and must not be the rounding of the folded weight.

    The other way forward rounds its product, where the library does not give it in fp32.
    """
    monkeypatch.setattr(kernel, "forward_way", "one_kernel")
    inputs = Inputs("odd", "uint8", "contiguous", None, dtype, device)
    for channel, mean in enumerate(inputs.mean):
        inputs.video[:, channel] = round(255 * mean)
    inputs.pos = torch.zeros_like(inputs.pos, dtype=torch.float32)
    # 255 * mean is next to a whole number: fp32 has few digits left of the difference.
    inputs.mean = tuple(mean + 1e-3 for mean in inputs.mean)
    compare(inputs, bias=False, gradients=False)


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [
        *((name, kind) for name in ("weight", "bias", "pos") for kind in ("uint8", "floating")),
        ("video", "floating"),
    ],
)
def test_one_gradient_alone(wanted, kind, device):
    inputs = Inputs("odd", kind, "decoder", "int32_slice", torch.float32, device)
    both = []
    for function in (tubelet_embed, conv3d_gathered):
        ours = function is tubelet_embed
        video = inputs.video if ours else inputs.normalised()
        given = {"weight": inputs.weight, "bias": inputs.bias, "pos": inputs.pos, "video": video}
        if not ours:
            given = {name: tensor.double() for name, tensor in given.items()}
        leaf = given[wanted] = given[wanted].detach().requires_grad_()
        keywords = {"mean": inputs.mean, "std": inputs.std} if ours else {}
        arguments = [given[name] for name in ("video", "weight", "bias", "pos")]
        out = function(*arguments, inputs.idx, **keywords)
        both.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    assert relative_error(*both) < FP32_RTOL


@pytest.mark.parametrize("kind", ["uint8", "floating"])
def test_the_same_from_run_to_run(kind, way, dtype, device):
    inputs = Inputs("odd", kind, "decoder", "int64", dtype, device)

    def run():
        leaves = [x.detach().requires_grad_() for x in (inputs.weight, inputs.bias, inputs.pos)]
        out = tubelet_embed(inputs.video, *leaves, inputs.idx, mean=inputs.mean, std=inputs.std)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out) / 3)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
