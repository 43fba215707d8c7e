"""Floating-point operations that the counter finds: those of matrix products, nothing else."""

import pytest
import torch
from helpers import make_video, random_mask, random_positions
from torch.utils.flop_counter import FlopCounterMode

import vmae_fast
from vmae_fast import ops
from vmae_fast.nn import DividedSpaceTimeBlock

B, V, D, E = 2, 5, 10, 7
SIZE = (2, 4, 4)
P = 3 * 2 * 4 * 4
NUM_TOKENS = 12


def counted(function):
    """Operations by name: of the ops of this package, and of everything."""
    with FlopCounterMode(display=False) as counter:
        function()
    found = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    return {name.removeprefix("vmae_fast."): n for name, n in found.items() if n}


def video_of(kind):
    return make_video((B, 3, 4, 8, 12), torch.uint8 if kind == "uint8" else torch.float32)


@pytest.mark.parametrize("kind", ["uint8", "floating"])
@pytest.mark.parametrize("indexed", [True, False], ids=["some", "all"])
def test_tubelet_embed(kind, indexed):
    video = video_of(kind).requires_grad_(kind == "floating")
    weight = torch.randn(D, 3, *SIZE, requires_grad=True)
    idx = random_positions(B, NUM_TOKENS, V) if indexed else None
    product = 2 * B * (V if indexed else NUM_TOKENS) * P * D
    products = 2 if kind == "floating" else 1
    found = counted(lambda: ops.tubelet_embed(video, weight, visible_idx=idx).sum().backward())
    assert found == {
        "tubelet_embed": product,
        "tubelet_embed_backward": products * product,
    }
    frozen = weight.detach()
    found = counted(lambda: ops.tubelet_embed(video.detach(), frozen, visible_idx=idx))
    assert found == {"tubelet_embed": product}


def test_gradients_of_bias_and_position_cost_no_product():
    bias = torch.zeros(D, requires_grad=True)
    pos = torch.zeros(NUM_TOKENS, D, requires_grad=True)
    weight = torch.randn(D, 3, *SIZE)
    found = counted(
        lambda: ops.tubelet_embed(video_of("uint8"), weight, bias, pos).sum().backward()
    )
    assert found == {"tubelet_embed": 2 * B * NUM_TOKENS * P * D}


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("x", "weight", "bias"), ()], ids=str)
def test_linear_masked_mse(wanted):
    """Gradients are computed on the way forward: all of them, if any."""
    leaves = {"x": torch.randn(B, V, E), "weight": torch.randn(P, E), "bias": torch.randn(P)}
    for name in wanted:
        leaves[name].requires_grad_()
    idx = random_positions(B, NUM_TOKENS, V)

    def step():
        loss = ops.linear_masked_mse(*leaves.values(), video_of("uint8"), idx, SIZE)
        if wanted:
            loss.backward()

    product = 2 * B * V * P * E
    assert counted(step) == {"linear_masked_mse": (3 if wanted else 1) * product}
    with torch.no_grad():
        loss = counted(
            lambda: ops.linear_masked_mse(*leaves.values(), video_of("uint8"), idx, SIZE)
        )
    assert loss == {"linear_masked_mse": product}


# Per pair of query and key and value of width: 2 for the logit, 2 for the output; and 2 for each
# of the five products of the backward pass.
FORWARD, BACKWARD = 4, 10
HEADS = 2


def on_meta(*shape):
    return torch.empty(shape, device="meta", requires_grad=True)


def assert_counts(found, name, pairs, width):
    assert found == {
        name: FORWARD * B * pairs * width,
        f"{name}_backward": BACKWARD * B * pairs * width,
    }


def test_joint_attention():
    qkv = torch.randn(B, NUM_TOKENS, 3 * D, requires_grad=True)
    found = counted(lambda: ops.attention(qkv, HEADS).sum().backward())
    assert_counts(found, "attention", NUM_TOKENS**2, D)
    found = counted(lambda: ops.attention(qkv.detach(), HEADS))
    assert found == {"attention": FORWARD * B * NUM_TOKENS**2 * D}


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_cross_attention(wanted):
    """All products of the backward pass run, whichever gradient is asked for."""
    q = torch.randn(B, V, D, requires_grad=wanted[0])
    kv = torch.randn(B, NUM_TOKENS, 2 * D, requires_grad=wanted[1])
    found = counted(lambda: ops.cross_attention(q, kv, HEADS).sum().backward())
    assert_counts(found, "cross_attention", V * NUM_TOKENS, D)


@pytest.mark.parametrize("class_token", [0, 1], ids=["grid", "class_token"])
@pytest.mark.parametrize(("axis", "count", "length"), [("time", 4, 3), ("space", 3, 4)])
def test_divided_attention(axis, count, length, class_token):
    qkv = torch.randn(B, 12 + class_token, 3 * D, requires_grad=True)

    def both():
        kinds = {"class_token": bool(class_token)}
        ops.divided_attention(qkv, HEADS, (3, 2, 2), axis, **kinds).sum().backward()

    assert_counts(counted(both), "divided_attention", count * (length + class_token) ** 2, D)


def test_the_literatures_table():
    """Pairs at 16 rows of 14 x 14 tokens, in millions: on tensors without data."""
    grid, num_tokens, width = (16, 14, 14), 3136, 768
    qkv = on_meta(1, num_tokens, 3 * width)

    def millions(function):
        return sum(counted(function).values()) / (FORWARD * width) / 1e6

    joint = millions(lambda: ops.attention(qkv, 12))
    time, space = (
        millions(lambda axis=axis: ops.divided_attention(qkv, 12, grid, axis))
        for axis in ops.ATTENTION_AXES
    )
    assert round(joint, 2) == 9.83
    assert round(time + space, 3) == 0.665
    assert round(space, 3) == 0.615


def test_a_divided_block():
    t, s, width, hidden = 4, 6, 16, 40
    with torch.device("meta"):
        block = DividedSpaceTimeBlock(width, HEADS, hidden, temporal_fc=True)
    found = counted(lambda: block(on_meta(B, t * s, width), (t, s)).sum().backward())
    pairs = s * t**2 + t * s**2
    assert found.pop("divided_attention") == FORWARD * B * pairs * width
    assert found.pop("divided_attention_backward") == BACKWARD * B * pairs * width
    # The linear layers: two of 3 D + D, temporal_fc, and the MLP; twice as much backward.
    weights = (2 * 4 + 1) * width**2 + 2 * width * hidden
    assert sum(found.values()) == 3 * 2 * B * t * s * weights


def test_the_others_multiply_no_matrices():
    x, idx = torch.randn(B, NUM_TOKENS, D, requires_grad=True), random_positions(B, NUM_TOKENS, V)
    assert counted(lambda: ops.gather_tokens(x, idx).sum().backward()) == {}
    visible, mask_token = torch.randn(B, V, D), torch.randn(D, requires_grad=True)
    pos = torch.randn(NUM_TOKENS, D)
    made = counted(lambda: ops.decoder_tokens(visible, mask_token, pos, idx, idx).sum().backward())
    assert made == {}
    assert counted(lambda: ops.shared_tokens(x[:, :V], x[0], idx).sum().backward()) == {}
    vectors = torch.ones(D), torch.zeros(D)
    assert counted(lambda: sum(ops.add_layer_norm(x, x, *vectors)).sum().backward()) == {}
    assert counted(lambda: ops.bias_gelu(ops.layer_norm(x, *vectors)).sum().backward()) == {}
    pred = torch.randn(B, V, P, requires_grad=True)
    assert counted(lambda: ops.masked_mse(pred, video_of("uint8"), idx, SIZE).backward()) == {}


def test_a_whole_model():
    model = vmae_fast.VideoMAE("tiny")
    config = model.config
    video = make_video((B, 3, config.frames, *config.image_size), torch.uint8)
    mask = vmae_fast.Mask.from_bool(random_mask(B, config.num_tokens, config.num_tokens - 31))
    found = counted(lambda: model(video, mask).loss.backward())
    values = 3 * config.tubelet_size * config.patch_size[0] * config.patch_size[1]
    embedding = 2 * B * 31 * values * config.width
    assert found["tubelet_embed"] == found["tubelet_embed_backward"] == embedding
    head = 2 * B * (config.num_tokens - 31) * values * config.decoder_width
    assert found["linear_masked_mse"] == 3 * head
    # The decoder's last block has queries for the masked tokens only.
    pairs = config.depth * 31**2 * config.width
    pairs += (config.decoder_depth - 1) * config.num_tokens**2 * config.decoder_width
    assert found["attention"] == FORWARD * B * pairs
    assert found["attention_backward"] == BACKWARD * B * pairs
    pairs = (config.num_tokens - 31) * config.num_tokens * config.decoder_width
    assert found["cross_attention"] == FORWARD * B * pairs
    assert found["cross_attention_backward"] == BACKWARD * B * pairs
    assert "aten.convolution" not in found
