"""layer_norm and add_layer_norm against their formula, token by token."""

import pytest
import torch
from helpers import EXACT_RTOL, assert_as_accurate_as_eager, relative_error

from vmae_fast.ops import add_layer_norm, backend, layer_norm

EPS = 1e-3  # large enough to show where it is left out


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def by_hand(x, weight, bias, eps=EPS):
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred**2).sum(-1, keepdim=True) / x.shape[-1]
    return centred / (variance + eps).sqrt() * weight + bias


def vectors(width, dtype=torch.float64):
    made = normal(width, seed=1, dtype=dtype), normal(width, seed=2, dtype=dtype)
    return [one.requires_grad_() for one in made]


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 13), (2, 3, 13), (2, 3, 2, 13)], ids=str)
@pytest.mark.parametrize("layout", ["dense", "every_second"])
def test_layer_norm(shape, layout):
    stored = normal(*shape[:-1], 2 * shape[-1]).requires_grad_()
    x = stored[..., ::2] if layout == "every_second" else stored[..., : shape[-1]].contiguous()
    before = x.detach().clone()
    leaves = [stored, *vectors(shape[-1])]
    got, expected = layer_norm(x, *leaves[1:], EPS), by_hand(x, *leaves[1:])
    assert got.shape == shape
    assert relative_error(got, expected) < EXACT_RTOL
    upstream = normal(*shape, seed=3)
    mine = torch.autograd.grad(got, leaves, upstream, retain_graph=True)
    for gradient, truth in zip(mine, torch.autograd.grad(expected, leaves, upstream), strict=True):
        assert (gradient - truth).norm() <= EXACT_RTOL * max(truth.norm(), 1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(3, 13), (3, 5, 13), (3, 2, 5, 7)], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("used", ["both", "residual", "norm"])
def test_add_layer_norm(shape, scaled, used):
    stored = normal(*shape[::-1], seed=4).requires_grad_()
    branch = normal(*shape, seed=5).requires_grad_()
    x = stored.permute(*reversed(range(len(shape))))
    scale = torch.tensor([0.0, 1.25, -2.0], dtype=torch.float64) if scaled else None
    leaves = [stored, branch, *vectors(shape[-1])]
    got = add_layer_norm(x, branch, *leaves[2:], EPS, branch_scale=scale)
    added = x + branch if scale is None else x + branch * scale.view(-1, *[1] * (len(shape) - 1))
    expected = (added, by_hand(added, *leaves[2:]))
    upstream = [
        normal(*shape, seed=6),
        normal(*shape[::-1], seed=7).permute(*reversed(range(len(shape)))),
    ]
    kept = {"both": (0, 1), "residual": (0,), "norm": (1,)}[used]
    for place in (0, 1):
        assert got[place].shape == shape
        assert relative_error(got[place], expected[place]) < EXACT_RTOL

    def gradients(outs):
        return torch.autograd.grad(
            [outs[place] for place in kept], leaves, [upstream[place] for place in kept],
            allow_unused=True,
        )  # fmt: skip

    for gradient, truth in zip(gradients(got), gradients(expected), strict=True):
        assert (gradient is None) == (truth is None)
        assert truth is None or relative_error(gradient, truth) < EXACT_RTOL


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", ["x", "branch", "both", "vectors"])
def test_as_accurate_as_eager_in_low_precision(low, wide):
    """On any mix of dtypes the residual is added in fp32, and each result rounded once."""
    dtypes = {
        "x": (torch.float32, low, low),
        "branch": (low, torch.float32, low),
        "both": (torch.float32, torch.float32, low),
        "vectors": (low, low, torch.float32),
    }[wide]
    x, branch = normal(2, 9, 24, dtype=dtypes[0]), normal(2, 9, 24, seed=5, dtype=dtypes[1])
    scale = normal(2, seed=8, dtype=torch.float32)
    upstream = [normal(2, 9, 24, seed=s, dtype=dtypes[0]) for s in (6, 7)]
    leaves = [one.requires_grad_() for one in (x, branch)] + vectors(24, dtypes[2])

    def eager(x, branch, weight, bias):
        residual = (x + scale[:, None, None].to(branch.dtype) * branch).to(x.dtype)
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return residual, torch.nn.functional.layer_norm(residual, (24,), weight, bias, EPS)

    def ours(*own):
        return add_layer_norm(*own, EPS, branch_scale=scale)

    def run(function, dtype=None):
        own = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
        outs = function(*own)
        return *outs, *torch.autograd.grad(outs, own, [u.to(outs[0].dtype) for u in upstream])

    for triple in zip(run(ours), run(eager), run(eager, torch.float64), strict=True):
        assert_as_accurate_as_eager(*triple)


def kept_for(function):
    """What is saved for the backward pass, leaf or not."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda x: x):
        out = function()
    return kept, out


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_kept_but_the_residual(low):
    x, branch = normal(2, 9, 24, dtype=torch.float32), normal(2, 9, 24, seed=5, dtype=low)
    x, branch = x.requires_grad_() * 1, branch.requires_grad_() * 1
    weight, bias = vectors(24, torch.float32)
    scale = torch.ones(2)
    with torch.autocast("cpu", torch.bfloat16):
        kept, (residual, y) = kept_for(
            lambda: add_layer_norm(x, branch, weight, bias, branch_scale=scale, for_product=True)
        )
    assert y.dtype == torch.bfloat16
    large = [one for one in kept if one.numel() > 24]
    assert [one.data_ptr() for one in large] == [residual.data_ptr()]
    kept, y = kept_for(lambda: layer_norm(x, weight, bias))
    large = [one for one in kept if one.numel() > 24]
    assert [one.data_ptr() for one in large] == [x.data_ptr()]


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (0, 8)], ids=str)
def test_nothing_at_all(shape):
    x, branch = (torch.zeros(shape, requires_grad=True) for _ in range(2))
    leaves = vectors(8, torch.float32)
    outs = (*add_layer_norm(x, branch, *leaves), layer_norm(x, *leaves))
    assert [out.shape for out in outs] == [shape] * 3
    sum(out.sum() for out in outs).backward()
    assert x.grad.shape == branch.grad.shape == shape
    assert not any(leaf.grad.any() for leaf in leaves)


def test_the_same_from_run_to_run():
    x, branch = normal(5, 37, 24, dtype=torch.float32), normal(5, 37, 24, dtype=torch.float32)
    leaves = [x.requires_grad_(), branch.requires_grad_(), *vectors(24, torch.float32)]

    def run():
        outs = add_layer_norm(*leaves)
        return *outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_large_rows_are_the_references(monkeypatch):
    """What the kernels cannot hold: said where they are demanded."""
    monkeypatch.setattr("vmae_fast.kernels._launch.available", lambda device: True)
    x, (weight, bias) = torch.zeros(2, 3, 4097), vectors(4097, torch.float32)
    assert torch.equal(layer_norm(x, weight, bias), bias.expand(2, 3, -1))
    message = "^backend triton cannot take rows of more than 4096 values, got 4097$"
    with backend("triton"), pytest.raises(RuntimeError, match=message):
        layer_norm(x, weight, bias)


GOOD = {
    "x": torch.zeros(2, 3, 4),
    "branch": torch.zeros(2, 3, 4),
    "weight": torch.ones(4),
    "bias": torch.zeros(4),
    "branch_scale": torch.ones(2),
}
WRONG = [
    ("x", torch.zeros(2, 3, 0), r"x must be .* D of at least 1, got shape \(2, 3, 0\)"),
    ("x", torch.tensor(1.0), r"x must be .* got shape \(\)"),
    ("x", torch.zeros(2, 3, 4, dtype=torch.int64), "x must be floating point, got torch.int64"),
    ("weight", torch.zeros(5), r"weight must be \(D,\) = \(4,\), got shape \(5,\)"),
    ("weight", torch.zeros(4).int(), "weight must be floating point, got torch.int32"),
    ("bias", torch.zeros(1, 4), r"bias must be \(D,\) = \(4,\), got shape \(1, 4\)"),
    ("bias", torch.zeros(4, device="meta"), "bias is on meta but x is on cpu; move one of them"),
    ("eps", 0.0, "eps must be positive, got 0.0"),
]
WRONG_TO_ADD = [
    ("x", torch.zeros(4), r"x must be \(B, ..., D\) .* got shape \(4,\)"),
    ("branch", torch.zeros(3, 4), r"branch must be of x's shape \(2, 3, 4\), got \(3, 4\)"),
    ("branch", torch.zeros(2, 3, 4).long(), "branch must be floating point, got torch.int64"),
    ("branch", GOOD["x"].to("meta"), "branch is on meta but x is on cpu; move one of them"),
    ("branch_scale", torch.ones(3), r"branch_scale must be \(B,\) = \(2,\), got shape \(3,\)"),
    ("branch_scale", torch.ones(2).bool(), "branch_scale must be floating .* torch.bool"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_layer_norm_errors(name, value, message):
    given = {place: GOOD[place] for place in ("x", "weight", "bias")}
    with pytest.raises(ValueError, match=f"^{message}$"):
        layer_norm(**{**given, name: value})


@pytest.mark.parametrize(("name", "value", "message"), WRONG[2:] + WRONG_TO_ADD)
def test_add_layer_norm_errors(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        add_layer_norm(**{**GOOD, name: value})
