"""Linear layer: both ways of computing it against float64."""

import pytest
import torch
from helpers import relative_error

from vmae_fast import nn as vnn
from vmae_fast import ops
from vmae_fast.kernels import linear as kernel


@pytest.fixture(params=[True, False], ids=["convolution", "matmul"])
def way(request, monkeypatch):
    """Force the way; returns a function that tells whether it was taken."""
    monkeypatch.setattr(kernel, "_mkl_leaves_units_unused", lambda: request.param)
    taken = []
    conv2d = torch.nn.functional.conv2d

    def watched(*args):
        taken.append(True)
        return conv2d(*args)

    monkeypatch.setattr(kernel.F, "conv2d", watched)
    return lambda: bool(taken) == request.param


@pytest.mark.parametrize("shape", [(1025, 7), (3, 400, 12), (2, 513, 2, 5)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
def test_equals_float64(way, shape, has_bias):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(11, shape[-1], requires_grad=True)
    bias = torch.randn(11, requires_grad=True) if has_bias else None
    upstream = torch.randn(*shape[:-1], 11)
    out = ops.linear(x, weight, bias)
    out.backward(upstream)
    assert way()
    truth = x.detach().double() @ weight.detach().double().T
    if bias is not None:
        truth = truth + bias.detach().double()
    flat, rows = upstream.double().flatten(0, -2), x.detach().double().flatten(0, -2)
    assert relative_error(out, truth) < 1e-6
    assert relative_error(x.grad, upstream.double() @ weight.detach().double()) < 1e-6
    assert relative_error(weight.grad, flat.T @ rows) < 1e-6
    assert weight.grad.stride() == weight.stride()
    if bias is not None:
        assert relative_error(bias.grad, flat.sum(0)) < 1e-6


def test_rows_that_are_not_contiguous(way):
    x = torch.randn(9, 2000).T
    weight = torch.randn(4, 18)[:, ::2]
    assert relative_error(ops.linear(x, weight), x.double() @ weight.double().T) < 1e-6
    assert way()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_stay_with_matmul(monkeypatch, dtype):
    monkeypatch.setattr(kernel, "_mkl_leaves_units_unused", lambda: True)
    monkeypatch.setattr(kernel.F, "conv2d", None)
    x, weight = torch.randn(1030, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    assert ops.linear(x, weight).dtype == dtype
    assert ops.linear(torch.zeros(0, 8, dtype=dtype), weight).shape == (0, 4)


def test_autocast_computes_in_bf16(monkeypatch):
    monkeypatch.setattr(kernel, "_mkl_leaves_units_unused", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(torch.randn(1030, 8), torch.randn(4, 8)).dtype == torch.bfloat16


def test_module_is_torchs():
    theirs = torch.nn.Linear(6, 5)
    ours = vnn.Linear(6, 5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 6)
    assert torch.equal(ours(x), theirs(x))


def test_errors_name_the_shapes():
    with pytest.raises(ValueError, match=r"got shapes \(2, 3\) and \(4, 5\)"):
        ops.linear(torch.zeros(2, 3), torch.zeros(4, 5))
