"""Tensors of more than 2^31 elements: offsets that 32 bits do not hold.

What is far into a tensor is compared with the reference on that part alone.
"""

import pytest
import torch
from helpers import relative_error

from vmae_fast import ops

# Elements that every large tensor here exceeds.
LIMIT = 2**31
# base's grid, widths and tubelets.
GRID, WIDTH, DECODER_WIDTH, TUBELET, VALUES = (8, 14, 14), 768, 384, (2, 16, 16), 1536
NUM_TOKENS = 8 * 14 * 14
# bf16 against bf16 by other roads: see BACKEND_RTOL in test_gpu_ops.py.
RTOL = 3e-2


def clips_beyond(per_clip):
    """So many clips that the last one lies beyond the limit."""
    return LIMIT // per_clip + 2


def normal(device, *shape):
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def orders(batch, device):
    """A random permutation of the tokens for each clip, int32."""
    return torch.rand(batch, NUM_TOKENS, device=device).argsort(dim=1).int()


def pixels(shape, device):
    return torch.randint(0, 256, shape, device=device, dtype=torch.uint8)


def video_shape(batch):
    return (batch, 3, *(n * p for n, p in zip(GRID, TUBELET, strict=True)))


@pytest.fixture(autouse=True)
def triton_everywhere(device):
    torch.manual_seed(0)
    with ops.backend("triton"):
        yield


def reference(function, *inputs):
    """Output and gradient function of a small part, by plain PyTorch."""
    with ops.backend("reference"):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        out = function(*inputs)

        def gradients(upstream):
            with ops.backend("reference"):
                return torch.autograd.grad(out, inputs, upstream)

        return out.detach(), gradients


def test_gather_tokens(device, need_gib):
    need_gib(20)
    batch = clips_beyond((NUM_TOKENS - 1) * WIDTH)
    x = normal(device, batch, NUM_TOKENS, WIDTH).requires_grad_()
    idx = orders(batch, device)[:, 1:]
    out = ops.gather_tokens(x, idx)
    assert out.numel() > LIMIT
    upstream = normal(device, *out.shape)
    (grad,) = torch.autograd.grad(out, x, upstream)
    for clip in (slice(0, 1), slice(batch - 1, batch)):
        expected, gradients = reference(lambda x, i=idx[clip]: ops.gather_tokens(x, i), x[clip])
        assert torch.equal(out[clip], expected)
        assert torch.equal(grad[clip], gradients(upstream[clip])[0])


def test_decoder_tokens(device, need_gib):
    need_gib(14)
    batch = clips_beyond(NUM_TOKENS * DECODER_WIDTH)
    order = orders(batch, device)
    seen, unseen = order[:, :160], order[:, 160:]
    visible = normal(device, batch, 160, DECODER_WIDTH)
    rest = [normal(device, DECODER_WIDTH), normal(device, NUM_TOKENS, DECODER_WIDTH)]
    inputs = [tensor.requires_grad_() for tensor in (visible, *rest)]
    out = ops.decoder_tokens(*inputs, seen, unseen)
    assert out.numel() > LIMIT
    # Zero but for the last clip: then the sums over clips are that clip's.
    upstream = torch.zeros_like(out)
    upstream[-1] = normal(device, *out.shape[1:])
    grads = torch.autograd.grad(out, inputs, upstream)
    expected, gradients = reference(
        lambda x, mask_token, pos: ops.decoder_tokens(x, mask_token, pos, seen[-1:], unseen[-1:]),
        visible[-1:], *rest,
    )  # fmt: skip
    assert relative_error(out[-1:], expected) < RTOL
    grad_visible, *sums = gradients(upstream[-1:])
    assert torch.equal(grads[0][-1:], grad_visible)
    assert not grads[0][:-1].any()
    for got, truth in zip(grads[1:], sums, strict=True):
        assert relative_error(got, truth) < RTOL


def check_last_clip(function_of, tensors, parameters):
    """Results and gradients, where no other clip has an upstream gradient.

    Args:
        function_of: some clips: a function of their part of the tensors, and of the parameters.
        tensors: ``(B, ...)``.
        parameters: whose gradients are sums over clips.
    """
    inputs = [tensor.requires_grad_() for tensor in (*tensors, *parameters)]
    outs = function_of(slice(None))(*inputs)
    assert all(out.numel() > LIMIT for out in outs)
    upstream = torch.zeros_like(outs[0])
    upstream[-1] = normal(upstream.device, *upstream.shape[1:])
    grads = torch.autograd.grad(outs, inputs, [upstream] * len(outs))
    last = slice(-1, None)
    with ops.backend("reference"):
        own = [tensor[last].detach().requires_grad_() for tensor in tensors]
        own += [parameter.detach().requires_grad_() for parameter in parameters]
        expected = function_of(last)(*own)
        truths = torch.autograd.grad(expected, own, [upstream[last]] * len(outs))
    for out, truth in zip(outs, expected, strict=True):
        assert relative_error(out[last], truth) < RTOL
    for place, (got, truth) in enumerate(zip(grads, truths, strict=True)):
        if place < len(tensors):
            assert not got[:-1].any()
            got = got[last]
        assert relative_error(got, truth) < RTOL


def test_shared_tokens(device, need_gib):
    need_gib(14)
    batch = clips_beyond(NUM_TOKENS * DECODER_WIDTH)
    unseen = orders(batch, device)[:, 160:]
    check_last_clip(
        lambda clips: lambda *given: (ops.shared_tokens(*given, unseen[clips]),),
        [normal(device, batch, 160, DECODER_WIDTH)],
        [normal(device, NUM_TOKENS, DECODER_WIDTH)],
    )


def test_add_layer_norm(device, need_gib):
    """Of rows alone, forward, there is one more in test_gpu_norm.py; as of GELU."""
    need_gib(40)
    batch = clips_beyond(NUM_TOKENS * WIDTH)
    scale = torch.rand(batch, device=device) + 0.5
    check_last_clip(
        lambda clips: lambda *given: ops.add_layer_norm(*given, branch_scale=scale[clips]),
        [normal(device, batch, NUM_TOKENS, WIDTH) for _ in range(2)],
        [normal(device, WIDTH) for _ in range(2)],
    )


def test_bias_gelu(device, need_gib):
    need_gib(22)
    batch = clips_beyond(NUM_TOKENS * 4 * WIDTH)
    check_last_clip(
        lambda clips: lambda *given: (ops.bias_gelu(*given),),
        [normal(device, batch, NUM_TOKENS, 4 * WIDTH)],
        [normal(device, 4 * WIDTH)],
    )


def test_masked_mse(device, need_gib):
    need_gib(22)
    batch = clips_beyond(NUM_TOKENS * VALUES)
    video, idx = pixels(video_shape(batch), device), orders(batch, device)
    pred = normal(device, batch, NUM_TOKENS, VALUES).requires_grad_()
    assert min(pred.numel(), video.numel()) > LIMIT
    loss = ops.masked_mse(pred, video, idx, TUBELET, reduction="none")
    upstream = torch.randn_like(loss)
    (grad,) = torch.autograd.grad(loss, pred, upstream)
    for clip in (slice(0, 1), slice(batch - 1, batch)):
        expected, gradients = reference(
            lambda pred, v=video[clip], i=idx[clip]: ops.masked_mse(
                pred, v, i, TUBELET, reduction="none"
            ),
            pred[clip],
        )
        assert relative_error(loss[clip], expected) < 1e-5
        assert relative_error(grad[clip], gradients(upstream[clip])[0]) < RTOL


def test_linear_masked_mse(device, need_gib):
    need_gib(8)
    features = 64
    batch = clips_beyond(NUM_TOKENS * VALUES)
    video, idx = pixels(video_shape(batch), device), orders(batch, device)
    x = normal(device, batch, NUM_TOKENS, features)
    head = [normal(device, VALUES, features) / features**0.5, normal(device, VALUES)]
    inputs = [tensor.requires_grad_() for tensor in (x, *head)]
    # Only the last clip counts, but every prediction is made.
    scored = torch.zeros(batch, NUM_TOKENS, device=device)
    scored[-1] = torch.rand(NUM_TOKENS, device=device)
    loss = ops.linear_masked_mse(*inputs, video, idx, TUBELET, scored=scored)
    grads = torch.autograd.grad(loss, inputs)
    expected, gradients = reference(
        lambda *given: ops.linear_masked_mse(
            *given, video[-1:], idx[-1:], TUBELET, scored=scored[-1:]
        ),
        x[-1:], *head,
    )  # fmt: skip
    assert relative_error(loss, expected) < 1e-3
    grad_x, *sums = gradients(torch.ones_like(expected))
    assert not grads[0][:-1].any()
    for got, truth in zip((grads[0][-1:], *grads[1:]), (grad_x, *sums), strict=True):
        assert relative_error(got, truth) < RTOL


# Of each attention: tokens a clip (queries first), heads, what is called on the inputs.
ATTENTION = {
    "whole": ((160,), 12, lambda qkv: ops.attention(qkv, 12)),
    "tiled": ((NUM_TOKENS,), 6, lambda qkv: ops.attention(qkv, 6)),
    "cross": ((301, NUM_TOKENS), 6, lambda q, kv: ops.cross_attention(q, kv, 6)),
    "time": ((NUM_TOKENS,), 6, lambda qkv: ops.divided_attention(qkv, 6, GRID, "time")),
    "space": (
        (1 + NUM_TOKENS,), 6,
        lambda qkv: ops.divided_attention(qkv, 6, GRID, "space", class_token=True),
    ),
}  # fmt: skip


def check_attention(function, inputs, parts):
    """Values and gradients of parts, each a view of inputs and results as (B, T, columns)."""
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = function(*inputs)
    upstream = normal(out.device, *out.shape)
    grads = torch.autograd.grad(out, inputs, upstream)
    for part, of_part in parts:
        expected, gradients = reference(of_part, *(part(tensor) for tensor in inputs))
        assert relative_error(part(out), expected) < RTOL
        for got, truth in zip(grads, gradients(part(upstream)), strict=True):
            assert relative_error(part(got), truth) < RTOL


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(device, need_gib, name):
    """Some have more than 65,535 programs too, the most that other axes of a grid hold."""
    need_gib(24)
    lengths, heads, function = ATTENTION[name]
    columns = [3] if len(lengths) == 1 else [1, 2]
    width = 64 * heads
    batch = clips_beyond(lengths[-1] * columns[-1] * width)
    inputs = [normal(device, batch, n, c * width) for n, c in zip(lengths, columns, strict=True)]
    assert inputs[-1].numel() > LIMIT
    clips = (lambda tensor: tensor[:1], lambda tensor: tensor[-1:])
    check_attention(function, inputs, [(clip, function) for clip in clips])


@pytest.mark.parametrize("axis", ["time", "space"])
def test_divided_attention_of_one_clip(device, need_gib, axis):
    """Rows, or positions, beyond the limit within a clip."""
    need_gib(24)
    heads, width, length, last = 2, 64, 7, 301
    count = LIMIT // (3 * width * length) + 1000
    grid = (length, count) if axis == "time" else (count, length)
    qkv = normal(device, 1, length * count, 3 * width)
    assert qkv.numel() > LIMIT

    def of(grid):
        return lambda qkv: ops.divided_attention(qkv, heads, grid, axis)

    def end(tensor):
        rows = tensor.unflatten(1, grid)
        return (rows[:, :, -last:] if axis == "time" else rows[:, -last:]).flatten(1, 2)

    short = (length, last) if axis == "time" else (last, length)
    check_attention(of(grid), [qkv], [(end, of(short))])


@pytest.mark.parametrize(
    ("name", "batch", "gib"), [("time", 2**20 + 3, 48), ("whole", 2**20 + 3, 90)]
)
def test_more_programs_than_2_to_the_21(device, need_gib, name, batch, gib):
    """Two heads: sixteen positions of two rows a clip, or sequences of 65 tokens."""
    need_gib(gib)
    num_tokens = 32 if name == "time" else 65

    def function(qkv):
        if name == "time":
            return ops.divided_attention(qkv, 2, (2, 16), "time")
        return ops.attention(qkv, 2)

    qkv = normal(device, batch, num_tokens, 3 * 64)
    clips = (lambda tensor: tensor[:3], lambda tensor: tensor[-5:])
    check_attention(function, [qkv], [(clip, function) for clip in clips])


# One clip: places beyond the limit within it. Channels are further apart than the limit too.
SIDE = 2048
FRAMES = 2 * (LIMIT // (2 * SIDE * SIDE) + 2)
# Rows of tubelets at the end that are compared.
LAST = 3


def last_rows(device):
    """Positions in the last rows of tubelets of a long clip, and the same within those rows."""
    per_row = (SIDE // TUBELET[1]) * (SIDE // TUBELET[2])
    inside = torch.randperm(LAST * per_row, device=device)[:301].unsqueeze(0)
    return inside + (FRAMES // TUBELET[0] - LAST) * per_row, inside


def end_of(video):
    return video[:, :, -LAST * TUBELET[0] :]


def test_tubelet_embed_of_pixels(device, need_gib):
    need_gib(14)
    width = 64
    video = pixels((1, 2, FRAMES, SIDE, SIDE), device)
    assert video.stride(1) > LIMIT
    idx, inside = last_rows(device)
    per_row = (SIDE // TUBELET[1]) * (SIDE // TUBELET[2])
    num_tokens = FRAMES // TUBELET[0] * per_row
    weight = normal(device, width, 2, *TUBELET) / 32
    inputs = [weight, normal(device, width), normal(device, num_tokens, width)]
    statistics = {"mean": (0.4, 0.5), "std": (0.2, 0.3)}
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = ops.tubelet_embed(video, *inputs, idx, **statistics)
    upstream = normal(device, *out.shape)
    grads = torch.autograd.grad(out, inputs, upstream)
    expected, gradients = reference(
        lambda *given: ops.tubelet_embed(end_of(video), *given, inside, **statistics),
        *inputs[:2], inputs[2][-LAST * per_row :],
    )  # fmt: skip
    assert relative_error(out, expected) < RTOL
    *parameters, positions = gradients(upstream)
    for got, truth in zip(grads[:2], parameters, strict=True):
        assert relative_error(got, truth) < RTOL
    assert torch.equal(grads[2][-LAST * per_row :], positions)
    assert not grads[2][: -LAST * per_row].any()


def test_tubelet_embed_of_a_floating_video(device, need_gib):
    need_gib(12)
    width = 64
    video = normal(device, 1, 1, FRAMES, SIDE, SIDE).requires_grad_()
    assert video.numel() > LIMIT
    idx, inside = last_rows(device)
    weight = normal(device, width, 1, *TUBELET) / 23
    out = ops.tubelet_embed(video, weight, None, None, idx)
    upstream = normal(device, *out.shape)
    (grad,) = torch.autograd.grad(out, video, upstream)
    expected, gradients = reference(
        lambda video: ops.tubelet_embed(video, weight, None, None, inside), end_of(video)
    )
    assert relative_error(out, expected) < RTOL
    assert relative_error(end_of(grad), gradients(upstream)[0]) < RTOL
    assert not grad[:, :, : -LAST * TUBELET[0]].any()
