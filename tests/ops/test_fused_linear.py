"""Norm or GELU together with the linear layer after it: numbers, what is kept, dtypes, errors."""

import math

import pytest
import torch
from helpers import EXACT_RTOL, assert_as_accurate_as_eager, relative_error
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from vmae_fast import ops

LOW = torch.bfloat16
B, N, D, O = 3, 7, 12, 5  # noqa: E741
EPS = 1e-3


def normal(*shape, seed=0, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_(grad)


def norm_of(x, weight, bias):
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / (variance + EPS).sqrt() * weight + bias


def gelu_of(x):
    return x * 0.5 * (1 + torch.special.erf(x / math.sqrt(2)))


def norm_leaves(rows=O, bias=True):
    x = normal(B, N, D, seed=1)
    vectors = [normal(D, seed=2), normal(D, seed=3)]
    return x, *vectors, normal(rows, D, seed=4), normal(rows, seed=5) if bias else None


def assert_equal(got, expected, leaves, seed=9):
    """Results and gradients of all leaves for random upstream gradients."""
    upstream = [normal(*one.shape, seed=seed + i, grad=False) for i, one in enumerate(expected)]
    leaves = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(got, leaves, upstream)
    truths = torch.autograd.grad(expected, leaves, upstream)
    for one, truth in zip([*got, *grads], [*expected, *truths], strict=True):
        assert one.shape == truth.shape
        assert relative_error(one, truth) < EXACT_RTOL


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("layout", ["contiguous", "slice", "transposed"])
def test_layer_norm_linear(bias, layout):
    x, *vectors, weight, linear_bias = norm_leaves(bias=bias)
    given = {
        "contiguous": lambda: x,
        "slice": lambda: torch.cat([x, x], dim=1)[:, N - 2 : N + 3],
        "transposed": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
    }[layout]()
    got = ops.layer_norm_linear(given, *vectors, EPS, weight, linear_bias)
    expected = norm_of(given, *vectors) @ weight.t()
    expected = expected if linear_bias is None else expected + linear_bias
    assert_equal([got], [expected], [x, *vectors, weight, linear_bias])


@pytest.mark.parametrize("scaled", [True, False], ids=["drop_path", "all"])
def test_add_layer_norm_linear(scaled):
    x, *vectors, weight, bias = norm_leaves()
    branch, scale = normal(B, N, D, seed=6), torch.tensor([0.0, 1.25, 1.25]).double()
    got = ops.add_layer_norm_linear(
        x, branch, *vectors, EPS, weight, bias, branch_scale=scale if scaled else None
    )
    residual = x + (branch * scale.view(-1, 1, 1) if scaled else branch)
    expected = residual, norm_of(residual, *vectors) @ weight.t() + bias
    assert_equal(got, expected, [x, branch, *vectors, weight, bias])


def test_a_residual_that_nothing_reads_and_an_output_that_nothing_reads():
    x, *vectors, weight, bias = norm_leaves()
    branch = normal(B, N, D, seed=6)
    for used in (0, 1):
        got = ops.add_layer_norm_linear(x, branch, *vectors, EPS, weight, bias)[used]
        residual = x + branch
        expected = (residual, norm_of(residual, *vectors) @ weight.t() + bias)[used]
        assert_equal([got], [expected], [x, branch])


@pytest.mark.parametrize("num_queries", [1, 3, N])
@pytest.mark.parametrize("added", [True, False], ids=["added", "alone"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_queries_of_the_last_tokens(num_queries, added, bias):
    x, *vectors, weight, linear_bias = norm_leaves(3 * D, bias)
    branch = normal(B, N, D, seed=6) if added else None
    got = ops.add_layer_norm_query_key_value(
        x, branch, *vectors, EPS, weight, linear_bias, num_queries
    )
    residual = x + branch if added else x
    qkv = norm_of(residual, *vectors) @ weight.t()
    qkv = qkv if linear_bias is None else qkv + linear_bias
    first = N - num_queries
    expected = residual[:, first:], qkv[:, first:, :D], qkv[..., D:]
    assert_equal(got, expected, [x, branch, *vectors, weight, linear_bias])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(B, N, D), (D,), (N, D), (B, 0, D)], ids=str)
def test_bias_gelu_linear(bias, shape):
    x, weight = normal(*shape), normal(O, D, seed=1)
    inner, outer = (normal(D, seed=2), normal(O, seed=3)) if bias else (None, None)
    got = ops.bias_gelu_linear(x, inner, weight, outer)
    hidden = gelu_of(x + inner if bias else x)
    expected = hidden @ weight.t() + outer if bias else hidden @ weight.t()
    assert_equal([got], [expected], [x, weight, inner, outer])


# Enough rows for the CPU's chunks and for its quicker products, and a few more.
def test_many_rows():
    x, branch = normal(2, 1500, 256), normal(2, 1500, 256, seed=1)
    vectors, weight = [normal(256, seed=2), normal(256, seed=3)], normal(96, 256, seed=4)
    inner, outer = normal(96, seed=5), normal(64, 96, seed=6)
    leaves = [x, branch, *vectors, weight, inner, outer]

    def fused(x, branch, norm_weight, norm_bias, weight, inner, outer):
        given = (x, branch, norm_weight, norm_bias, EPS, weight)
        residual, hidden = ops.add_layer_norm_linear(*given)
        return residual, ops.bias_gelu_linear(hidden, inner, outer)

    def plain(x, branch, norm_weight, norm_bias, weight, inner, outer):
        residual = x + branch
        hidden = norm_of(residual, norm_weight, norm_bias) @ weight.t() + inner
        return residual, gelu_of(hidden) @ outer.t()

    assert_equal(fused(*leaves), plain(*leaves), leaves)

    def gradients(function, dtype):
        own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        residual, out = function(*own)
        return torch.autograd.grad(residual.sum() + out.square().sum(), own)

    truths = gradients(plain, torch.float64)
    for got, truth in zip(gradients(fused, torch.float32), truths, strict=True):
        assert relative_error(got, truth) < 1e-5


def kept_by(function):
    """Shapes and dtypes of what is kept, and the result."""
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = function()
    return sorted((tuple(t.shape), t.dtype) for t in kept), out


def test_only_the_residual_is_kept():
    x, *vectors, weight, bias = (leaf.detach().float() for leaf in norm_leaves())
    weight.requires_grad_()
    branch = torch.randn(B, N, D)
    own = [((D,), torch.float32)] * 2 + [((O, D), LOW), ((B, N, D), torch.float32)]
    with torch.autocast("cpu", LOW):
        alone, _ = kept_by(lambda: ops.layer_norm_linear(x, *vectors, EPS, weight, bias))
        added, _ = kept_by(lambda: ops.add_layer_norm_linear(x, branch, *vectors, EPS, weight))
        gelu, _ = kept_by(lambda: ops.bias_gelu_linear(x, None, weight, bias))
    assert alone == added == sorted(own, key=lambda one: one[0])
    # Row by row, in the dtype computed in.
    assert gelu == [((O, D), LOW), ((B * N, D), LOW)]


@pytest.mark.parametrize("stream", [torch.float32, LOW], ids=str)
def test_autocast(stream, device):
    leaves = [one.detach().to(LOW).to(torch.float32).to(device) for one in norm_leaves()]
    branch = normal(B, N, D, seed=6, grad=False).to(LOW).to(device)
    outer = normal(D, O, seed=7, grad=False).to(LOW).float().to(device)
    upstream = [normal(B, N, D, seed=8 + i, grad=False).to(device) for i in range(2)]

    def fused(x, branch, norm_weight, norm_bias, weight, bias, outer):
        given = (x.to(stream) if x.dtype == torch.float32 else x, branch)
        residual, hidden = ops.add_layer_norm_linear(*given, norm_weight, norm_bias, EPS, weight)
        return residual, ops.bias_gelu_linear(hidden, bias, outer)

    def eager(x, branch, norm_weight, norm_bias, weight, bias, outer):
        residual = (x.to(stream) if x.dtype == torch.float32 else x) + branch
        y = torch.nn.functional.layer_norm(residual.to(x.dtype), (D,), norm_weight, norm_bias, EPS)
        hidden = torch.nn.functional.linear(y, weight, bias)
        hidden = torch.nn.functional.gelu(hidden)
        return residual, torch.nn.functional.linear(hidden, outer)

    def run(function, dtype):
        own = [leaves[0], branch, *leaves[1:], outer]
        own = [one.to(dtype) if one is not branch or dtype == torch.float64 else one for one in own]
        own = [one.detach().requires_grad_() for one in own]
        with torch.autocast(device.type, LOW, enabled=dtype == torch.float32):
            residual, out = function(*own)
        assert dtype == torch.float64 or (residual.dtype, out.dtype) == (stream, LOW)
        grads = torch.autograd.grad(
            (residual, out),
            own,
            [up.to(one.dtype) for up, one in zip(upstream, (residual, out), strict=True)],
        )
        return residual, out, *grads

    truth, plain = run(eager, torch.float64), run(eager, torch.float32)
    for triple in zip(run(fused, torch.float32), plain, truth, strict=True):
        assert_as_accurate_as_eager(*triple)


def test_a_frozen_weight_costs_no_product():
    x, *vectors, weight, bias = norm_leaves()
    for frozen, products in ((False, 3), (True, 2)):
        weight.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            ops.layer_norm_linear(x, *vectors, EPS, weight, bias).sum().backward()
        assert counter.get_total_flops() == products * 2 * B * N * D * O
        with FlopCounterMode(display=False) as counter:
            ops.bias_gelu_linear(x, None, weight).sum().backward()
        assert counter.get_total_flops() == products * 2 * B * N * D * O
        assert (weight.grad is None) == frozen or not frozen
        weight.grad = None


def test_operations_of_queries_of_the_last_tokens():
    x, *vectors, weight, bias = norm_leaves(3 * D)
    with FlopCounterMode(display=False) as counter:
        found = ops.add_layer_norm_query_key_value(x, x, *vectors, EPS, weight, bias, 2)
        sum(one.sum() for one in found).backward()
    assert counter.get_total_flops() == 3 * 2 * B * (2 * D + N * 2 * D) * D


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(N, D)}, r"x must be \(B, N, D\), got shape \(7, 12\)"),
        ({"x": torch.zeros(B, N, D).int()}, "x must be floating point, got torch.int32"),
        ({"branch": torch.zeros(B, N, 1)}, r"branch must be .* \(3, 7, 12\), got \(3, 7, 1\)"),
        ({"norm_weight": torch.zeros(D + 1)}, r"weight must be \(D,\) = \(12,\)"),
        ({"weight": torch.zeros(O, D + 1)}, r"weight must be \(O, D\) with D=12, .*\(5, 13\)"),
        ({"weight": torch.zeros(O, D).int()}, "weight must be floating point"),
        ({"bias": torch.zeros(O + 1)}, r"bias must be \(O,\) = \(5,\), got shape \(6,\)"),
        ({"branch_scale": torch.zeros(B + 1)}, r"branch_scale must be \(B,\) = \(3,\)"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"weight": torch.zeros(O, D, device="meta")}, "weight is on meta but x is on cpu"),
    ],
)
def test_errors(change, message):
    given = {
        "x": torch.zeros(B, N, D),
        "branch": torch.zeros(B, N, D),
        "norm_weight": torch.zeros(D),
        "norm_bias": torch.zeros(D),
        "eps": EPS,
        "weight": torch.zeros(O, D),
        "bias": torch.zeros(O),
    }
    with pytest.raises(ValueError, match=message):
        ops.add_layer_norm_linear(**given | change)


def test_errors_of_queries_and_gelu():
    x, vector, weight = torch.zeros(B, N, D), torch.zeros(D), torch.zeros(3 * D, D)
    for count in (0, N + 1):
        with pytest.raises(ValueError, match=rf"num_queries must be from 1 to N .* got {count}"):
            ops.add_layer_norm_query_key_value(x, None, vector, vector, EPS, weight, None, count)
    with pytest.raises(ValueError, match=r"weight must be \(3 \* D, D\), got shape \(24, 12\)"):
        ops.add_layer_norm_query_key_value(x, None, vector, vector, EPS, weight[D:], None, 2)
    with pytest.raises(ValueError, match="with the same I"):
        ops.bias_gelu_linear(x, None, weight.t())
    with pytest.raises(ValueError, match=r"gelu_bias must be \(12,\), got shape \(3,\)"):
        ops.bias_gelu_linear(x, vector[:3], weight)
    with pytest.raises(ValueError, match=r"bias must be \(36,\), got shape \(12,\)"):
        ops.bias_gelu_linear(x, None, weight, vector)
    with pytest.raises(ValueError, match=r"x is torch.float64 but weight is torch.float32"):
        ops.bias_gelu_linear(x.double(), None, weight)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_gradients_are_summed_over_tokens_only_for_a_bias(monkeypatch, bias):
    # On a GPU fc1 has none: its bias is added with GELU, and the sum would be one more pass.
    summed = []

    def column_sum(grad):
        summed.append(grad.shape)
        return grad.flatten(0, 1).sum(dim=0)

    monkeypatch.setattr("vmae_fast.kernels.layer_norm_linear.column_sum_reference", column_sum)
    x, *given = (normal(2, N, D), normal(D, seed=2), normal(D, seed=3), normal(O, D, seed=4))
    out = ops.layer_norm_linear(x, *given[:2], EPS, given[2], normal(O, seed=5) if bias else None)
    out.backward(torch.ones_like(out))
    assert len(summed) == bias
