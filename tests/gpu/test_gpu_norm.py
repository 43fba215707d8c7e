"""Layer norm and GELU on a GPU: bf16, which the interpreter cannot do, at sizes that matter."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate_as_eager, relative_error

from vmae_fast import ops

LOW = torch.bfloat16
SIZES = {  # clips, tokens, width, inner width of the MLP
    "base_encoder": (64, 160, 768, 3072),
    "base_decoder": (8, 1568, 384, 1536),
    "giant_encoder": (16, 208, 1408, 6144),
    "odd": (3, 37, 131, 67),
}
STREAMS = [torch.float32, LOW]


def normal(*shape, dtype=torch.float32, device="cuda", seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def norm_inputs(size, stream, device):
    """x, branch, weight and bias; scale; gradients of the residual and of its norm."""
    batch, count, width, _ = size
    x = normal(batch, count, width, dtype=stream, device=device)
    branch = normal(batch, count, width, dtype=LOW, device=device, seed=1)
    weight, bias = (normal(width, device=device, seed=seed) for seed in (2, 3))
    scale = (torch.arange(batch, device=device) % 3) / 2
    upstream = [normal(batch, count, width, device=device, seed=seed) for seed in (4, 5)]
    return [x, branch, weight, bias], scale, upstream


def run(function, leaves, upstream, dtype=None):
    own = [leaf.to(dtype or leaf.dtype, copy=True).requires_grad_() for leaf in leaves]
    outs = function(*own)
    given = [one.to(dtype or LOW).to(out.dtype) for one, out in zip(upstream, outs, strict=True)]
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, own, given)


@pytest.mark.parametrize("stream", STREAMS, ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_add_layer_norm(size, stream, device):
    leaves, scale, upstream = norm_inputs(size, stream, device)
    upstream = [one.to(LOW) for one in upstream]

    def ours(*own):
        with torch.autocast(device.type, LOW):
            return ops.add_layer_norm(*own, branch_scale=scale, for_product=True)

    def eager(x, branch, weight, bias):
        residual = (x + scale[:, None, None].to(branch.dtype) * branch).to(x.dtype)
        y = F.layer_norm(residual.to(weight.dtype), weight.shape, weight, bias, 1e-6)
        return residual, y if x.dtype == torch.float64 else y.to(LOW)

    got = run(ours, leaves, upstream)
    assert [one.dtype for one in got] == [stream, LOW, stream, LOW, torch.float32, torch.float32]
    truth = run(eager, leaves, upstream, torch.float64)
    for triple in zip(got, run(eager, leaves, upstream), truth, strict=True):
        assert_as_accurate_as_eager(*triple)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_layer_norm_of_fp32(size, device):
    leaves, _, upstream = norm_inputs(size, torch.float32, device)
    leaves = [leaves[0] + 10, *leaves[2:]]

    def formula(x, weight, bias):
        centred = x - x.mean(2, keepdim=True)
        return (centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt() * weight + bias,)

    got = run(lambda *own: (ops.layer_norm(*own),), leaves, upstream[:1], None)
    truth = run(formula, leaves, [upstream[0].to(LOW)], torch.float64)
    # The mean is ten deviations: one digit of the seven is lost.
    for mine, true in zip(got, truth, strict=True):
        assert relative_error(mine, true) < 1e-5


@pytest.mark.parametrize("bias_dtype", STREAMS, ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_bias_gelu(size, bias_dtype, device):
    batch, count, _, inner = size
    x = normal(batch, count, inner, dtype=LOW, device=device)
    leaves = [x, normal(inner, dtype=bias_dtype, device=device, seed=1)]
    upstream = [normal(batch, count, inner, dtype=LOW, device=device, seed=2)]

    def formula(x, bias):
        z = x + bias
        return (z * torch.special.erfc(-z / math.sqrt(2)) / 2,)

    got = run(lambda *own: (ops.bias_gelu(*own),), leaves, upstream)
    eager = run(lambda x, bias: (F.gelu(x + bias.to(LOW)),), leaves, upstream)
    for triple in zip(got, eager, run(formula, leaves, upstream, torch.float64), strict=True):
        assert_as_accurate_as_eager(*triple)


@pytest.mark.parametrize("size", ["base_encoder", "odd"])
def test_the_same_bits_every_time(size, device):
    leaves, scale, upstream = norm_inputs(SIZES[size], LOW, device)
    bias = normal(SIZES[size][2], device=device, seed=6)

    def function(*own):
        residual, y = ops.add_layer_norm(*own[:4], branch_scale=scale)
        return residual, ops.bias_gelu(y, own[4])

    first = run(function, [*leaves, bias], upstream)
    for _ in range(3):
        for mine, other in zip(run(function, [*leaves, bias], upstream), first, strict=True):
            assert torch.equal(mine, other)


def test_more_values_than_32_bits_count(device, need_gib):
    """The last rows of 2^31 values and more are as they are alone."""
    need_gib(24)
    rows, width = (1 << 21) + 5, 1032
    x = torch.zeros(1, rows, width, dtype=LOW, device=device)
    x[:, -7:] = normal(1, 7, width, dtype=LOW, device=device)
    assert x.numel() > 2**31
    vectors = [normal(width, device=device, seed=seed) for seed in (1, 2)]
    with torch.no_grad(), ops.backend("triton"):
        for function in (
            lambda x: ops.layer_norm(x, *vectors),
            lambda x: ops.bias_gelu(x, vectors[0]),
        ):
            assert torch.equal(function(x)[:, -7:], function(x[:, -7:].clone()))
