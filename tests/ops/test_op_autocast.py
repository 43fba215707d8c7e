"""Ops under autocast to bf16: dtypes as documented, gradients as accurate as autocast allows."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate_as_eager, make_video, random_positions, relative_error

from vmae_fast import ops

LOW = torch.bfloat16
SIZE = (2, 4, 4)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def normal(*shape, seed=0, device="cpu"):
    """fp32, but such numbers as bf16 holds: casting them rounds nothing."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(LOW).float().to(device)


def embedding(device, pos_dtype=torch.float32):
    weight, bias = normal(24, 3, *SIZE, device=device), normal(24, seed=1, device=device)
    pos = normal(18, 24, seed=2, device=device).to(pos_dtype)
    leaves = [one.requires_grad_() for one in (weight, bias, pos)]
    return leaves, random_positions(4, 18, 11).to(device)


def conv3d_gathered(video, weight, bias, pos, idx):
    tokens = F.conv3d(video, weight, bias, stride=SIZE).flatten(2).transpose(1, 2) + pos
    return torch.stack([tokens[b, idx[b]] for b in range(len(tokens))])


@pytest.mark.parametrize("video_dtype", [torch.uint8, torch.float32, LOW], ids=str)
@pytest.mark.parametrize("pos_dtype", [torch.float32, LOW, None], ids=str)
def test_dtypes_of_tubelet_embed(video_dtype, pos_dtype, device):
    (weight, bias, pos), idx = embedding(device, pos_dtype or LOW)
    video = make_video((4, 3, 4, 12, 12), video_dtype).to(device)
    with torch.autocast(device.type, LOW):
        out = ops.tubelet_embed(video, weight, bias, None if pos_dtype is None else pos, idx)
    assert out.dtype == (torch.float32 if pos_dtype == torch.float32 else LOW)
    out.sum().backward()
    for leaf in (weight, bias, pos):
        assert leaf.grad is None if leaf is pos and pos_dtype is None else leaf.grad is not None
        assert leaf.grad is None or leaf.grad.dtype == leaf.dtype
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


def test_tubelet_embed_is_as_accurate_as_conv3d_under_autocast(device):
    leaves, idx = embedding(device)
    video = make_video((4, 3, 4, 12, 12), torch.float32).to(device)
    upstream = normal(4, 11, 24, seed=5, device=device)

    def run(function, kind):
        own = [leaf.detach().to(kind).requires_grad_() for leaf in leaves]
        with torch.autocast(device.type, LOW, enabled=kind == torch.float32):
            out = function(video.to(kind), *own, idx)
        return out, *torch.autograd.grad(out, own, upstream.to(kind))

    truth = run(conv3d_gathered, torch.float64)
    eager = run(conv3d_gathered, torch.float32)
    for triple in zip(run(ops.tubelet_embed, torch.float32), eager, truth, strict=True):
        assert_as_accurate_as_eager(*triple)


@pytest.mark.parametrize("name", ["weight", "bias", "pos"])
def test_gradients_of_tubelet_embed_are_added_up_in_fp32(name, device):
    """Nothing that goes in is rounded by bf16, so fp32 gradients should not look as if."""
    leaves, idx = embedding(device)
    video = normal(4, 3, 4, 12, 12, seed=3, device=device)
    upstream = normal(4, 11, 24, seed=5, device=device)
    with torch.autocast(device.type, LOW):
        out = ops.tubelet_embed(video, *leaves, idx)
    place = ["weight", "bias", "pos"].index(name)
    got = torch.autograd.grad(out, leaves, upstream)[place]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = conv3d_gathered(video.double(), *exact, idx)
    truth = torch.autograd.grad(out, exact, upstream.double())[place]
    assert got.dtype == torch.float32
    assert relative_error(got, truth) < 0.01 * relative_error(truth.to(LOW), truth)


def test_moving_tokens_keeps_dtypes(device):
    x, idx = normal(2, 9, 6, device=device), random_positions(2, 9, 4).to(device)
    mask_token, pos = normal(6, device=device), normal(9, 6, device=device)
    with torch.autocast(device.type, LOW):
        taken = ops.gather_tokens(x, idx)
        wide = ops.decoder_tokens(taken.to(LOW), mask_token, pos, idx, idx)
        low = ops.decoder_tokens(taken.to(LOW), mask_token.to(LOW), pos.to(LOW), idx, idx)
        placed = [ops.shared_tokens(taken.to(kind), pos.to(kind), idx) for kind in (LOW, pos.dtype)]
    assert (taken.dtype, wide.dtype, low.dtype) == (torch.float32, torch.float32, LOW)
    assert [one.dtype for one in placed] == [LOW, torch.float32]


def test_the_loss_of_low_predictions_is_fp32(device):
    video = make_video((2, 3, 4, 8, 8), torch.uint8).to(device)
    idx = random_positions(2, 8, 5).to(device)
    pred = normal(2, 5, 96, device=device).to(LOW).requires_grad_()
    with torch.autocast(device.type, LOW):
        loss = ops.masked_mse(pred, video, idx, SIZE)
    loss.backward()
    assert loss.dtype == torch.float32
    assert pred.grad.dtype == LOW
    exact = pred.detach().double().requires_grad_()
    truth = ops.masked_mse(exact, video, idx, SIZE)
    truth.backward()
    assert relative_error(loss, truth) < 1e-6
    assert relative_error(pred.grad, exact.grad) < torch.finfo(LOW).eps


def head(device):
    leaves = (normal(4, 7, 16, device=device), normal(96, 16, seed=1, device=device) / 4,
              normal(96, seed=2, device=device))  # fmt: skip
    idx = random_positions(4, 18, 7).to(device)
    return [leaf.requires_grad_() for leaf in leaves], idx


def test_linear_masked_mse_is_as_accurate_as_two_steps_under_autocast(device):
    leaves, idx = head(device)
    video = make_video((4, 3, 4, 12, 12), torch.uint8).to(device)

    def run(function, kind):
        own = [leaf.detach().to(kind).requires_grad_() for leaf in leaves]
        with torch.autocast(device.type, LOW, enabled=kind == torch.float32):
            loss = function(own)
        assert loss.dtype == kind
        return torch.autograd.grad(loss, own)

    def fused(own):
        return ops.linear_masked_mse(*own, video, idx, SIZE)

    def two_steps(own):
        return ops.masked_mse(F.linear(*own), video, idx, SIZE)

    got, eager = run(fused, torch.float32), run(two_steps, torch.float32)
    for triple in zip(got, eager, run(two_steps, torch.float64), strict=True):
        assert triple[0].dtype == torch.float32
        assert_as_accurate_as_eager(*triple)


@pytest.mark.parametrize("x_dtype", [torch.float32, LOW], ids=str)
def test_dtypes_of_linear_masked_mse(x_dtype, device):
    (x, weight, bias), idx = head(device)
    x = x.detach().to(x_dtype).requires_grad_()
    video = make_video((4, 3, 4, 12, 12), torch.uint8).to(device)
    with torch.autocast(device.type, LOW):
        loss = ops.linear_masked_mse(x, weight, bias, video, idx, SIZE)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [leaf.grad.dtype for leaf in (x, weight, bias)] == [x_dtype, *[torch.float32] * 2]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_gradients_of_linear_masked_mse_are_added_up_in_fp32(name, device):
    """Predictions of zero and targets that are multiples of 1/8: differences that bf16 holds."""
    (x, weight, bias), idx = head(device)
    leaves = (x, torch.zeros_like(weight), torch.zeros_like(bias))
    video = (normal(4, 3, 4, 12, 12, seed=4, device=device) * 8).round() / 8
    options = {"norm_pix": False, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    place = ["x", "weight", "bias"].index(name)

    def gradient(kind):
        own = [leaf.detach().to(kind).requires_grad_() for leaf in leaves]
        with torch.autocast(device.type, LOW, enabled=kind == torch.float32):
            loss = ops.linear_masked_mse(*own, video.to(kind), idx, SIZE, **options)
        return torch.autograd.grad(loss, own)[place]

    truth = gradient(torch.float64)
    rounded = relative_error(truth.to(LOW), truth)
    assert relative_error(gradient(torch.float32), truth) < 0.01 * rounded


ATTENTION = {
    "joint": lambda qkv: ops.attention(qkv, 2),
    "time": lambda qkv: ops.divided_attention(qkv, 2, (5, 7), "time"),
    "space": lambda qkv: ops.divided_attention(qkv[:, :34], 2, (3, 11), "space", class_token=True),
    "cross": lambda qkv: ops.cross_attention(qkv[:, :9, :64], qkv[..., 64:], 2),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_is_as_accurate_as_in_bf16(kind, device):
    """Autocast rounds the projections; the gradient comes back as wide as they were."""
    function = ATTENTION[kind]
    given = normal(4, 35, 3 * 64, device=device)

    def run(wide, autocast):
        qkv = given.to(wide).requires_grad_()
        with torch.autocast(device.type, LOW, enabled=autocast):
            out = function(qkv)
        upstream = normal(*out.shape, seed=5, device=device)
        return out, *torch.autograd.grad(out, qkv, upstream.to(out.dtype))

    got, low, truth = run(torch.float32, True), run(LOW, False), run(torch.float64, False)
    assert [x.dtype for x in got] == [LOW, torch.float32]
    assert torch.equal(got[0], low[0])
    assert relative_error(got[1], truth[1]) <= 1.01 * relative_error(low[1], truth[1])
    # One rounding of values, weights and output.
    assert relative_error(got[0], truth[0]) < torch.finfo(LOW).eps


def test_cross_attention_of_two_dtypes_under_autocast(device):
    """A norm's fp32 queries and a linear layer's bf16 keys, as autocast makes them."""
    q, kv = normal(2, 5, 64, device=device), normal(2, 7, 128, device=device)
    expected = ops.cross_attention(q.to(LOW), kv.to(LOW), 2)
    leaves = [q.requires_grad_(), kv.to(LOW).requires_grad_()]
    with torch.autocast(device.type, LOW):
        out = ops.cross_attention(*leaves, 2)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32, LOW]


def norms(device, dtypes=(torch.float32, LOW)):
    leaves = [normal(2, 5, 24, seed=n, device=device).to(dtypes[n]) for n in range(2)]
    leaves += [normal(24, seed=n, device=device) for n in (2, 3)]
    return [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("for_product", [True, False])
@pytest.mark.parametrize("stream", [torch.float32, LOW], ids=str)
def test_dtypes_of_norms(stream, for_product, device):
    """The residual stream keeps its dtype; the norm gets that of products where asked to."""
    leaves = norms(device, (stream, LOW))
    with torch.autocast(device.type, LOW):
        residual, y = ops.add_layer_norm(*leaves, for_product=for_product)
        alone = ops.layer_norm(leaves[0], *leaves[2:], for_product=for_product)
    assert residual.dtype == stream
    assert y.dtype == alone.dtype == (LOW if for_product else stream)
    (residual.sum() + y.sum() + alone.sum()).backward()
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    again = ops.layer_norm(leaves[0], *leaves[2:], for_product=True)
    assert again.dtype == stream


def test_norms_are_as_accurate_as_layer_norm_under_autocast(device):
    leaves = norms(device)
    upstream = [normal(2, 5, 24, seed=n, device=device) for n in (5, 6)]

    def run(function, kind):
        own = [leaf.detach().to(kind or leaf.dtype).requires_grad_() for leaf in leaves]
        with torch.autocast(device.type, LOW, enabled=kind is None):
            residual, y = function(*own)
        wanted = [u.to(out.dtype) for u, out in zip(upstream, (residual, y), strict=True)]
        return residual, y, *torch.autograd.grad((residual, y), own, wanted)

    def theirs(x, branch, weight, bias):
        residual = x + branch
        y = F.layer_norm(residual, (24,), weight, bias, 1e-6)
        return residual, y if x.dtype == torch.float64 else y.to(LOW)

    def ours(*own):
        return ops.add_layer_norm(*own, for_product=True)

    runs = run(ours, None), run(theirs, None), run(theirs, torch.float64)
    for triple in zip(*runs, strict=True):
        assert_as_accurate_as_eager(*triple)


def test_bias_gelu_keeps_the_dtype_of_what_comes_in(device):
    x, bias = normal(5, 24, device=device), normal(24, seed=1, device=device).requires_grad_()
    for dtype in (LOW, torch.float32):
        leaf = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast(device.type, LOW):
            y = ops.bias_gelu(leaf, bias)
        y.sum().backward()
        assert y.dtype == leaf.grad.dtype == dtype
        assert bias.grad.dtype == torch.float32
        truth = F.gelu(x.double() + bias.detach().double())
        assert relative_error(y, truth) < torch.finfo(dtype).eps


def test_attention_in_fp64_is_left_alone(device):
    qkv = normal(2, 7, 192, device=device).double()
    with torch.autocast(device.type, LOW):
        out = ops.attention(qkv, 2)
    assert out.dtype == torch.float64
    q, k, v = (x.unflatten(2, (2, 32)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
    expected = (q @ k.mT / 32**0.5).softmax(3) @ v
    assert relative_error(out, expected.transpose(1, 2).flatten(2)) < 1e-12


def test_fp64_is_left_alone(device):
    """As torch's own operations do under autocast."""
    leaves, idx = embedding(device)
    video = make_video((4, 3, 4, 12, 12), torch.float64).to(device)
    exact = [leaf.detach().double() for leaf in leaves]
    with torch.autocast(device.type, LOW):
        out = ops.tubelet_embed(video, *exact, idx)
    assert out.dtype == torch.float64
    assert relative_error(out, conv3d_gathered(video, *exact, idx)) < 1e-12


def test_compiled_under_autocast_is_eager(device):
    torch.compiler.reset()
    leaves, idx = embedding(device)
    video = make_video((4, 3, 4, 12, 12), torch.uint8).to(device)

    def function(*own):
        with torch.autocast(device.type, LOW):
            return ops.tubelet_embed(video, *own, idx)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        torch.autograd.grad(compiled(*leaves).square().sum(), leaves),
        torch.autograd.grad(function(*leaves).square().sum(), leaves),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
