"""Kernels of layer norm and GELU, against their formulas in fp64."""

import math
import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import EAGER_FACTOR, relative_error

from vmae_fast.kernels import layer_norm as norms
from vmae_fast.kernels.bias_gelu import bias_gelu_backward_triton
from vmae_fast.ops import add_layer_norm, bias_gelu, layer_norm

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a GPU, or Triton's interpreter, in which test_interpreter.py runs this file",
        allow_module_level=True,
    )
pytestmark = [pytest.mark.usefixtures("kernels")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)

# Means of at most some hundred fp32 values: a few units in the last place.
FP32_RTOL = 1e-6
EPS = 1e-6

# Blocks are 1024 values in rows of at least 64: one value, primes, a block, one more, nothing.
CASES = {  # clips, tokens, width
    "one": (1, 1, 1),
    "primes": (3, 37, 13),
    "one_block": (2, 8, 64),
    "above_a_block": (1, 9, 65),
    "wide": (2, 5, 1408),
    "wider": (1, 3, 2049),
    "no_tokens": (2, 0, 8),
    "no_clips": (0, 9, 8),
}
GELUS = {  # rows, columns: blocks are 8 by 128, spans of 64 rows
    "one": (1, 1),
    "primes": (67, 13),
    "one_span": (64, 128),
    "above_a_span": (65, 129),
    "wide": (3, 296),
    "no_rows": (0, 8),
}


def normal(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


@dataclass
class Given:
    """What goes in; weights around 1 and fp32, as a module holds them."""

    x: torch.Tensor
    branch: torch.Tensor | None
    scale: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor
    grad_y: torch.Tensor
    grad_residual: torch.Tensor | None

    def of(self, dtype):
        wide = {k: None if v is None else v.to(dtype) for k, v in vars(self).items()}
        return Given(**wide)


def given_for(
    case, stream, low, device, branch=True, scale=True, part=1.0, residual=True, weights=None
):
    """Tensors of a case: x in the dtype of the residual stream, branch and gradients in low."""
    batch, count, width = case
    own = {"dtype": low, "device": device}
    wide = {"dtype": weights or torch.float32, "device": device}
    kept = math.ceil(count * part)
    # Not contiguous: clips and tokens as attention hands them back, and rows that were cut.
    return Given(
        normal(batch, count + 2, width + 3, dtype=stream, device=device)[:, 1:-1, :width],
        normal(count, batch, width, **own, seed=1).transpose(0, 1) if branch else None,
        (normal(2 * batch, **wide, seed=2)[::2].abs() if scale else None),
        normal(width, **wide, seed=3) / 4 + 1,
        normal(width, **wide, seed=4),
        normal(count, batch, width, **own, seed=5).transpose(0, 1),
        normal(batch, kept, 2 * width, dtype=stream, device=device, seed=6)[..., ::2]
        if residual
        else None,
    )


def definition(given, rounded, eps=EPS):
    """Residual, its norm, and gradients of x, branch, weight and bias, in fp64.

    The norm is that of the residual as it was rounded.
    """
    given = given.of(torch.float64)
    x = given.x
    scale = 1.0 if given.scale is None else given.scale[:, None, None]
    if given.branch is not None:
        x = x + scale * given.branch
    centred = rounded.double() - rounded.double().mean(2, keepdim=True)
    rstd = 1 / (centred.square().mean(2, keepdim=True) + eps).sqrt()
    normed = centred * rstd
    y = normed * given.weight + given.bias
    inner = given.grad_y * given.weight
    level, along = inner.mean(2, keepdim=True), (inner * normed).mean(2, keepdim=True)
    grad = rstd * (inner - level - normed * along)
    if given.grad_residual is not None:
        grad[:, grad.shape[1] - given.grad_residual.shape[1] :] += given.grad_residual
    sums = (given.grad_y * normed).sum((0, 1)), given.grad_y.sum((0, 1))
    return x, y, grad, scale * grad, *sums


def eager(given, stream, low):
    """The same by PyTorch's own operations in the dtypes at hand."""
    leaves = [given.x, given.branch, given.weight, given.bias]
    x, branch, weight, bias = (v if v is None else v.detach().requires_grad_() for v in leaves)
    residual = x * 1
    if branch is not None:
        scale = 1.0 if given.scale is None else given.scale[:, None, None]
        residual = (x + scale * branch).to(stream)
    y = F.layer_norm(residual, residual.shape[2:], weight.to(stream), bias.to(stream), EPS).to(low)
    upstream = [given.grad_y.to(low), given.grad_residual]
    outs = [y, residual]
    if given.grad_residual is None:
        upstream, outs = upstream[:1], outs[:1]
    else:
        outs[1] = residual[:, residual.shape[1] - given.grad_residual.shape[1] :]
    wanted = [leaf for leaf in (x, branch, weight, bias) if leaf is not None]
    found = list(torch.autograd.grad(outs, wanted, upstream))
    if branch is None:
        found.insert(1, None)
    return residual.detach(), y.detach(), *found


def assert_accurate(got, theirs, truth):
    """As close to fp64 as fp32 allows, or in less as eager PyTorch comes, twice."""
    for mine, other, true in zip(got, theirs, truth, strict=True):
        if mine is None:
            assert other is None
            continue
        assert mine.shape == true.shape
        if true.numel() == 0:
            continue
        bound = FP32_RTOL
        if mine.dtype != torch.float32:
            bound = EAGER_FACTOR * relative_error(other, true) + 1e-15
        assert relative_error(mine, true) <= bound


def kernels_on(given, low):
    """Forward and backward kernels, as definition() gives them, and the norm computed again."""
    branch_dtype = None if given.branch is None else given.branch.dtype
    vectors = (given.weight, given.bias, EPS)
    residual, y = norms.layer_norm_triton(given.x, given.branch, given.scale, *vectors, low)
    found = norms.layer_norm_backward_triton(
        given.grad_y, given.grad_residual, residual, given.scale, *vectors, branch_dtype, low
    )
    assert relative_error(found.y.nan_to_num(), y.nan_to_num()) <= torch.finfo(low).eps
    assert found.weight.dtype == found.bias.dtype == torch.float32
    return residual, y, found.x, found.branch, found.weight, found.bias


def compare(given, stream, low):
    got = kernels_on(given, low)
    assert [one.dtype for one in got[:3]] == [stream, low, stream]
    if given.branch is not None:
        assert got[3].dtype == low
    # Not wider than they are: what the kernels add up in fp32 shows in the fp32 bound.
    assert_accurate(got, eager(given, stream, low), definition(given, got[0]))
    return got


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_add_layer_norm(case, dtype, device):
    compare(given_for(case, dtype, dtype, device), dtype, dtype)


@pytest.mark.parametrize("case", ["primes", "above_a_block"])
def test_low_branches_on_a_wide_stream(case, device):
    """What autocast makes of it; the norm comes out in the dtype of products."""
    given = given_for(CASES[case], torch.float32, torch.float16, device)
    compare(given, torch.float32, torch.float16)


@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "alone"])
@pytest.mark.parametrize("part", [0.0, 0.4, None], ids=["none", "last", "no_gradient"])
def test_what_may_be_missing(scale, branch, part, dtype, device):
    """The branch, its scale, the gradient of the residual's first tokens, or all of it."""
    given = given_for(
        CASES["primes"], dtype, dtype, device,
        branch, scale and branch, part or 0.0, residual=part is not None, weights=dtype,
    )  # fmt: skip
    got = compare(given, dtype, dtype)
    if not branch:
        assert got[0].data_ptr() == given.x.data_ptr()
    elif not scale:
        # One tensor for both: nothing is written twice.
        assert got[3] is got[2]


def test_spans_of_several_blocks(monkeypatch, dtype, device):
    """Few programs, so that each takes its rows in turns, and the last has none for some."""
    given = given_for((3, 37, 70), dtype, dtype, device)
    one_turn = kernels_on(given, dtype)
    for name in ("_FORWARD_PROGRAMS", "_BACKWARD_PROGRAMS"):
        monkeypatch.setattr(norms, name, 5)
    for mine, other in zip(compare(given, dtype, dtype)[:4], one_turn[:4], strict=True):
        assert torch.equal(mine, other)


def test_a_large_mean(device):
    """Deviations of 1 around 1000, of which fp32 holds three digits less; squares would lose 6."""
    given = given_for((2, 5, 300), torch.float32, torch.float32, device, branch=False, scale=False)
    given.x = given.x + 1e3
    got, truth = kernels_on(given, torch.float32), definition(given, given.x)
    for place in (1, 2, 4):
        assert relative_error(got[place], truth[place]) < 1e3 * FP32_RTOL


def test_rows_of_one_value(dtype, device):
    """The variance is nothing, or what rounding makes of it."""
    given = given_for((2, 3, 13), dtype, dtype, device, branch=False, scale=False, residual=False)
    given.x = torch.full_like(given.x, 0.125)
    got, truth = kernels_on(given, dtype), definition(given, given.x)
    assert relative_error(got[1], truth[1]) < torch.finfo(dtype).eps
    # The reciprocal deviation is 1 / sqrt(eps).
    assert truth[2].abs().max() > 100
    assert relative_error(got[2], truth[2]) < 2 * torch.finfo(dtype).eps


def test_a_row_stays_in_its_row(device):
    """Values that are not finite show in their own row, and in no other."""
    given = given_for((2, 5, 13), torch.float32, torch.float32, device)
    before = kernels_on(given, torch.float32)
    for tensor in (given.x, given.grad_y):
        tensor[1, 2, 3] = float("nan")
    after = kernels_on(given, torch.float32)
    for mine, other in zip(after[:4], before[:4], strict=True):
        hit = mine.isnan().any(2)
        assert hit.nonzero().tolist() == [[1, 2]]
        assert torch.equal(mine[~hit], other[~hit])


def test_through_the_ops(dtype, device):
    """Public functions, with shapes and strides that kernels do not see."""
    stored = normal(7, 2, 3, 5, dtype=dtype, device=device).requires_grad_()
    x = stored.permute(1, 2, 3, 0)
    branch = normal(2, 3, 5, 7, dtype=dtype, device=device, seed=1).requires_grad_()
    weight, bias = (normal(7, dtype=dtype, device=device, seed=s).requires_grad_() for s in (2, 3))
    scale = torch.tensor([0.0, 1.5], device=device)
    upstream = [normal(2, 3, 5, 7, dtype=dtype, device=device, seed=s) for s in (4, 5)]
    outs = add_layer_norm(x, branch, weight, bias, EPS, branch_scale=scale)
    found = torch.autograd.grad(outs, (stored, branch, weight, bias), upstream)
    given = Given(
        x.detach().flatten(1, 2), branch.detach().flatten(1, 2), scale, weight.detach(),
        bias.detach(), upstream[1].flatten(1, 2), upstream[0].flatten(1, 2),
    )  # fmt: skip
    got = [*outs, found[0].permute(1, 2, 3, 0), found[1]]
    got = [one.flatten(1, 2) for one in got] + list(found[2:])
    assert_accurate(got, eager(given, dtype, dtype), definition(given, got[0]))
    alone = layer_norm(outs[0].detach(), weight, bias, EPS)
    assert torch.equal(alone, outs[1])


def gelu_definition(grad, x, bias):
    """Result, gradients of x and bias, in fp64."""
    z = x.double() if bias is None else x.double() + bias.double()
    below = 0.5 * torch.special.erfc(-z / math.sqrt(2))
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    grad_x = grad.double() * (below + z * density)
    return z * below, grad_x, grad_x.sum(0)


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("case", GELUS.values(), ids=GELUS)
def test_bias_gelu(case, has_bias, dtype, device):
    rows, width = case
    x = normal(rows + 1, width + 3, dtype=dtype, device=device)[1:, :width]
    bias = normal(width, dtype=dtype, device=device, seed=1) if has_bias else None
    grad = normal(width, rows, dtype=dtype, device=device, seed=2).t()
    truth = gelu_definition(grad, x, bias)
    leaves = [v.clone().requires_grad_() for v in (x, bias) if v is not None]

    def run(function):
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    theirs = run(lambda x, bias=None: F.gelu(x if bias is None else x + bias))
    assert_accurate(run(bias_gelu), theirs, truth[: len(theirs)])
    for keep in (True, False):
        grad_x, grad_bias, y = bias_gelu_backward_triton(grad, x, bias, keep)
        assert_accurate([y if keep else None, grad_x], [theirs[0] if keep else None, theirs[1]],
                        truth[:2])  # fmt: skip
        assert (grad_bias is not None) == has_bias
        assert grad_bias is None or grad_bias.dtype == torch.float32
        assert y is None or torch.equal(y, bias_gelu(x, bias))


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
def test_a_gelus_gradient_in_the_place_of_what_came_in(has_bias, dtype, device):
    x = normal(67, 131, dtype=dtype, device=device)
    bias = normal(131, dtype=dtype, device=device, seed=1) if has_bias else None
    stored = normal(67, 134, dtype=dtype, device=device, seed=2)
    given = {
        "dense": stored[:, :131].contiguous(),
        "cut": stored[:, :131],
        "transposed": stored[:, :131].t().contiguous().t(),
        "wide": stored[:, :131].to(torch.float32).contiguous(),
    }
    for name, grad in given.items():
        before = grad.clone()
        expected = bias_gelu_backward_triton(grad, x, bias, True)
        assert torch.equal(grad, before), name
        found = bias_gelu_backward_triton(grad, x, bias, True, overwrite=True)
        for got, truth in zip(found, expected, strict=True):
            assert (got is None) == (truth is None)
            assert got is None or torch.equal(got, truth)
        if grad.is_contiguous() and grad.dtype == dtype:
            assert found[0].data_ptr() == grad.data_ptr(), name
        else:
            assert torch.equal(grad, before), name


def test_a_wide_bias(device):
    """Of fp32 on fp16: it is not rounded before it is added."""
    x = normal(5, 13, dtype=torch.float16, device=device)
    bias = 1 + normal(13, dtype=torch.float32, device=device, seed=1) / 1e4
    truth, _, _ = gelu_definition(x, x, bias)
    rounded = truth.to(torch.float16)
    assert relative_error(bias_gelu(x, bias), truth) <= 1.01 * relative_error(rounded, truth)


def test_tails_of_the_gelu(device):
    """Nothing below, the identity above, and in between to a unit in the last place of z."""
    z = torch.linspace(-20, 20, 4001, dtype=torch.float64).to(device, torch.float32).view(1, -1)
    one = torch.ones_like(z)
    truth_y, truth_grad, _ = gelu_definition(one, z, None)
    grad_x, _, y = bias_gelu_backward_triton(one, z, None, True)
    bound = torch.finfo(torch.float32).eps * z.abs().clamp_min(1)
    for got, truth in ((y, truth_y), (grad_x, truth_grad)):
        assert ((got - truth).abs() <= bound).all()
    far = torch.tensor([[-1e30, -1e4, -20.0, 20.0, 1e4, 1e30]], device=device)
    grad_x, _, y = bias_gelu_backward_triton(torch.ones_like(far), far, None, True)
    assert torch.equal(y, far.clamp_min(0))
    assert torch.equal(grad_x, (far > 0).float())


def test_the_same_from_run_to_run(dtype, device):
    given = given_for((5, 37, 70), dtype, dtype, device)
    first, second = kernels_on(given, dtype), kernels_on(given, dtype)
    x = normal(130, 13, dtype=dtype, device=device)
    runs = [bias_gelu_backward_triton(x, x, given.bias[:13], True) for _ in range(2)]
    for a, b in zip((*first, *runs[0]), (*second, *runs[1]), strict=True):
        assert torch.equal(a, b)
