"""bias_gelu against its formula."""

import math

import pytest
import torch
from helpers import EXACT_RTOL, assert_as_accurate_as_eager, relative_error

from vmae_fast.kernels import bias_gelu as kernels
from vmae_fast.ops import bias_gelu


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def by_hand(x, bias=None):
    z = x if bias is None else x + bias
    return z * torch.special.erfc(-z / math.sqrt(2)) / 2


@pytest.mark.parametrize("shape", [(1,), (5, 13), (2, 3, 13), (2, 3, 2, 7)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("chunk", [20, 1 << 18])
def test_equals_the_formula(shape, has_bias, chunk, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_VALUES", chunk)
    stored = normal(*shape[::-1]).requires_grad_()
    x = stored.permute(*reversed(range(len(shape))))
    leaves = [stored] + ([normal(shape[-1], seed=1).requires_grad_()] if has_bias else [])
    got, expected = bias_gelu(x, *leaves[1:]), by_hand(x, *leaves[1:])
    assert got.shape == shape
    assert relative_error(got, expected) < EXACT_RTOL
    upstream = normal(*shape[::-1], seed=2).permute(*reversed(range(len(shape))))
    mine = torch.autograd.grad(got, leaves, upstream)
    for gradient, truth in zip(mine, torch.autograd.grad(expected, leaves, upstream), strict=True):
        assert relative_error(gradient, truth) < EXACT_RTOL


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, "low"], ids=str)
def test_as_accurate_as_eager_in_low_precision(low, bias_dtype):
    bias_dtype = low if bias_dtype == "low" else bias_dtype
    leaves = [normal(37, 24, dtype=low), normal(24, seed=1, dtype=bias_dtype)]
    upstream = normal(37, 24, seed=2, dtype=low)

    def run(function, dtype=None):
        own = [leaf.to(dtype or leaf.dtype, copy=True).requires_grad_() for leaf in leaves]
        out = function(*own)
        return out, *torch.autograd.grad(out, own, upstream.to(out.dtype))

    def eager(x, bias):
        return torch.nn.functional.gelu(x + bias.to(x.dtype))

    got, truth = run(bias_gelu), run(eager, torch.float64)
    for triple in zip(got, run(eager), truth, strict=True):
        assert_as_accurate_as_eager(*triple)
    # One rounding at the end.
    assert relative_error(got[0], truth[0]) <= 1.01 * relative_error(truth[0].to(low), truth[0])


def test_nothing_is_kept_but_the_input():
    x, bias = normal(5, 6).requires_grad_() * 1, normal(6, seed=1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda x: x):
        bias_gelu(x, bias)
    assert {one.data_ptr() for one in kept} == {x.data_ptr(), bias.data_ptr()}


@pytest.mark.parametrize("keep", [True, False])
def test_the_result_is_computed_again_where_asked_for(keep):
    x, bias = normal(5, 6, dtype=torch.float32), normal(6, seed=1, dtype=torch.float32)
    grad_x, grad_bias, y = kernels.bias_gelu_backward_reference(x, x, bias, keep)
    assert grad_x.shape == x.shape
    assert grad_bias.shape == bias.shape
    assert (y is not None) == keep
    assert y is None or torch.equal(y, bias_gelu(x, bias))


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_in_the_place_of_what_came_in(has_bias, dtype):
    x, bias = normal(37, 13, dtype=dtype), normal(13, seed=1, dtype=dtype) if has_bias else None
    stored = normal(13, 37, seed=2, dtype=dtype)
    for grad in (stored.t().contiguous(), stored.t(), stored.t().float().contiguous()):
        before = grad.clone()
        expected = kernels.bias_gelu_backward_reference(grad, x, bias, True)
        assert torch.equal(grad, before)
        found = kernels.bias_gelu_backward_reference(grad, x, bias, True, overwrite=True)
        for got, truth in zip(found, expected, strict=True):
            assert (got is None) == (truth is None)
            assert got is None or torch.equal(got, truth)
        in_place = found[0].data_ptr() == grad.data_ptr()
        # With a bias it goes by chunks in fp32, of which the gradient is not one.
        assert in_place == (grad.is_contiguous() and grad.dtype == dtype and not has_bias)
        assert in_place or torch.equal(grad, before)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (0,)], ids=str)
def test_nothing_at_all(shape):
    x, bias = torch.zeros(shape, requires_grad=True), torch.zeros(shape[-1], requires_grad=True)
    bias_gelu(x, bias).sum().backward()
    assert x.grad.shape == shape
    assert not bias.grad.any()


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.tensor(1.0), None, r"x must be \(..., I\), got a single number"),
        (torch.zeros(2, 3).long(), None, "x must be floating point, got torch.int64"),
        (torch.zeros(2, 3), torch.zeros(4), r"bias must be \(I,\) = \(3,\), got shape \(4,\)"),
        (torch.zeros(2, 3), torch.zeros(1, 3), r"bias must be .* got shape \(1, 3\)"),
        (torch.zeros(2, 3), torch.zeros(3).int(), "bias must be floating .* torch.int32"),
        (torch.zeros(2, 3), torch.zeros(3, device="meta"), "bias is on meta but x is on cpu; .*"),
    ],
)
def test_errors(x, bias, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        bias_gelu(x, bias)
