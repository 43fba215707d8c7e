"""The modules against the torch modules that they replace."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import EXACT_RTOL, make_video, random_positions, randomise, relative_error

from vmae_fast.nn import (
    MLP,
    Attention,
    DropPath,
    GatherVisible,
    JointSpaceTimeBlock,
    MaskedMSELoss,
    TubeletEmbed,
)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ---- tubelet embedding --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "tubelet"), [(3, (2, 4, 4)), (1, (1, 3, 5)), (5, (3, 2, 7))], ids=str
)
def test_tubelet_embed_is_a_conv3d(channels, tubelet):
    conv = nn.Conv3d(channels, 11, kernel_size=tubelet, stride=tubelet).double()
    embed = TubeletEmbed(channels, 11, tubelet, mean=(0.5,) * channels, std=(0.5,) * channels)
    embed = embed.double()
    embed.load_state_dict(conv.state_dict())
    assert isinstance(embed, nn.Conv3d)
    shape = (2, channels, *(n * p for n, p in zip((3, 2, 5), tubelet, strict=True)))
    video, pos = make_video(shape, torch.float64), normal(30, 11)
    tokens = conv(video).flatten(2).transpose(1, 2)
    assert relative_error(embed(video), tokens) < EXACT_RTOL
    idx = random_positions(2, 30, 7)
    expected = torch.stack([(tokens + pos)[b, idx[b]] for b in range(2)])
    assert relative_error(embed(video, pos, idx), expected) < EXACT_RTOL
    raw = make_video(shape, torch.uint8)
    expected = conv((raw.double() / 255 - 0.5) / 0.5).flatten(2).transpose(1, 2)
    assert relative_error(embed(raw), expected) < EXACT_RTOL


def test_tubelet_embed_starts_as_a_conv3d():
    torch.manual_seed(5)
    conv = nn.Conv3d(3, 7, kernel_size=(2, 4, 4), stride=(2, 4, 4))
    torch.manual_seed(5)
    embed = TubeletEmbed(3, 7, (2, 4, 4))
    for name, tensor in conv.state_dict().items():
        assert torch.equal(embed.state_dict()[name], tensor)


def test_gather_visible_is_boolean_indexing():
    x, idx = normal(3, 11, 7), random_positions(3, 11, 4).sort(dim=1).values
    visible = torch.zeros(3, 11, dtype=torch.bool).scatter_(1, idx, True)
    assert torch.equal(GatherVisible()(x, idx), x[visible].view(3, 4, 7))
    assert not GatherVisible().state_dict()


# ---- attention ----------------------------------------------------------------------------


def torch_attention(ours):
    """nn.MultiheadAttention with the same weights; its key bias is zero."""
    width = ours.proj.in_features
    theirs = nn.MultiheadAttention(width, ours.num_heads, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.zero_()
        if ours.q_bias is not None:
            theirs.in_proj_bias[:width] = ours.q_bias
            theirs.in_proj_bias[2 * width :] = ours.v_bias
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    return theirs


@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("num_tokens", "heads", "head_width"), [(1, 1, 1), (17, 3, 5), (29, 4, 8)])
def test_attention_is_multi_head_attention(num_tokens, heads, head_width, qkv_bias):
    width = heads * head_width
    ours = Attention(width, heads, qkv_bias=qkv_bias).double()
    randomise(ours)
    theirs = torch_attention(ours)
    inputs = [normal(2, num_tokens, width).requires_grad_() for _ in range(2)]
    upstream = normal(2, num_tokens, width, seed=1)
    got = ours(inputs[0])
    expected, _ = theirs(*[inputs[1]] * 3, need_weights=False)
    assert relative_error(got, expected) < EXACT_RTOL
    got.backward(upstream)
    expected.backward(upstream)
    pairs = [
        (inputs[0].grad, inputs[1].grad),
        (ours.qkv.weight.grad, theirs.in_proj_weight.grad),
        (ours.proj.weight.grad, theirs.out_proj.weight.grad),
        (ours.proj.bias.grad, theirs.out_proj.bias.grad),
    ]
    if qkv_bias:
        query, _, value = theirs.in_proj_bias.grad.chunk(3)
        # With one token the query's gradient is zero: compare both at once.
        both = torch.cat([ours.q_bias.grad, ours.v_bias.grad])
        pairs.append((both, torch.cat([query, value])))
    for mine, truth in pairs:
        assert relative_error(mine, truth) < EXACT_RTOL


def test_attention_without_bias_has_no_bias_parameters():
    names = {name for name, _ in Attention(8, 2, qkv_bias=False).named_parameters()}
    assert names == {"qkv.weight", "proj.weight", "proj.bias"}
    names = {name for name, _ in Attention(8, 2).named_parameters()}
    assert names == {"qkv.weight", "q_bias", "v_bias", "proj.weight", "proj.bias"}


def tail_equals_full(module, width, num_queries):
    """Outputs and all gradients of the last tokens, alone and cut from the full result."""
    results = []
    for alone in (True, False):
        x = normal(2, 13, width).requires_grad_()
        out = module(x, num_queries) if alone else module(x)[:, 13 - num_queries :]
        assert out.shape == (2, num_queries, width)
        module.zero_grad()
        upstream = normal(2, num_queries, width, seed=1)
        out.backward(upstream)
        grads = {name: p.grad.clone() for name, p in module.named_parameters()}
        results.append((out.detach(), x.grad, grads))
    (got, got_x, got_grads), (expected, expected_x, expected_grads) = results
    assert relative_error(got, expected) < EXACT_RTOL
    assert relative_error(got_x, expected_x) < EXACT_RTOL
    for name, truth in expected_grads.items():
        assert relative_error(got_grads[name], truth) < EXACT_RTOL, name


@pytest.mark.parametrize("num_queries", [1, 5, 12, 13])
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
def test_attention_of_the_last_tokens(num_queries, qkv_bias):
    attention = Attention(15, 3, qkv_bias=qkv_bias).double()
    randomise(attention)
    tail_equals_full(attention, 15, num_queries)


@pytest.mark.parametrize("num_queries", [1, 5, 13])
@pytest.mark.parametrize("init_values", [0.0, 0.3])
def test_block_of_the_last_tokens(num_queries, init_values):
    block = JointSpaceTimeBlock(15, 3, 22, init_values=init_values).double()
    randomise(block)
    tail_equals_full(block, 15, num_queries)


def test_attention_error_names_both_numbers():
    with pytest.raises(ValueError, match="width 10 is not a multiple of num_heads 3"):
        Attention(10, 3)


# ---- MLP and block ------------------------------------------------------------------------


def test_mlp_has_the_exact_gelu():
    mlp = MLP(7, 19).double()
    x = 3 * normal(2, 5, 7)
    hidden = x @ mlp.fc1.weight.t() + mlp.fc1.bias
    # Phi(x) from its definition by erf; the tanh form differs by 5e-4.
    hidden = hidden * 0.5 * (1 + torch.special.erf(hidden / math.sqrt(2)))
    expected = hidden @ mlp.fc2.weight.t() + mlp.fc2.bias
    assert relative_error(mlp(x), expected) < EXACT_RTOL


@pytest.mark.parametrize("init_values", [0.0, 0.1], ids=["plain", "layer_scale"])
@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_block(init_values, eps):
    width, heads = 12, 3
    block = JointSpaceTimeBlock(width, heads, 17, init_values=init_values, eps=eps).double()
    if init_values:
        for gamma in (block.gamma_1, block.gamma_2):
            assert torch.equal(gamma, torch.full((width,), 0.1).double())
    else:
        assert block.gamma_1 is None
        assert block.gamma_2 is None
    randomise(block)
    attention = torch_attention(block.attn)
    x = normal(2, 11, width).requires_grad_()

    def norm(value, layer):
        centred = value - value.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return centred / (variance + eps).sqrt() * layer.weight + layer.bias

    branch = norm(x, block.norm1)
    branch, _ = attention(branch, branch, branch, need_weights=False)
    h = x + (branch * block.gamma_1 if init_values else branch)
    branch = norm(h, block.norm2) @ block.mlp.fc1.weight.t() + block.mlp.fc1.bias
    branch = F.gelu(branch) @ block.mlp.fc2.weight.t() + block.mlp.fc2.bias
    expected = h + (branch * block.gamma_2 if init_values else branch)
    got = block(x)
    assert relative_error(got, expected) < EXACT_RTOL
    # The attention's own parameters stand under other names in its twin.
    parameters = dict(block.named_parameters())
    shared = [x, *(p for name, p in parameters.items() if not name.startswith("attn"))]
    mine, theirs = block.attn, attention
    own = [mine.qkv.weight, mine.proj.weight, mine.proj.bias, mine.q_bias, mine.v_bias]
    twins = [theirs.in_proj_weight, theirs.out_proj.weight, theirs.out_proj.bias]
    upstream = normal(2, 11, width, seed=1)
    grads = torch.autograd.grad(got, [*shared, *own], upstream)
    *truths, bias = torch.autograd.grad(expected, [*shared, *twins, theirs.in_proj_bias], upstream)
    query, _, value = bias.chunk(3)
    for gradient, truth in zip(grads, [*truths, query, value], strict=True):
        assert relative_error(gradient, truth) < EXACT_RTOL


def test_drop_path_drops_whole_clips_and_keeps_the_mean():
    torch.manual_seed(0)
    rate, clips = 0.3, 4000
    x = torch.ones(clips, 3, 5, dtype=torch.float64)
    out = DropPath(rate).train()(x)
    per_clip = out.flatten(1)
    assert (per_clip == per_clip[:, :1]).all()
    assert torch.equal(per_clip.unique(), torch.tensor([0, 1 / (1 - rate)], dtype=torch.float64))
    dropped = (per_clip[:, 0] == 0).double().mean().item()
    # Five standard deviations of a share of 4000.
    assert abs(dropped - rate) < 5 * math.sqrt(rate * (1 - rate) / clips)


def test_drop_path_in_eval_and_at_rate_zero_is_the_identity():
    x = normal(5, 3, 4)
    assert torch.equal(DropPath(0.9).eval()(x), x)
    assert torch.equal(DropPath(0.0).train()(x), x)
    assert torch.equal(x, normal(5, 3, 4))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_drop_path_error(rate):
    with pytest.raises(ValueError, match=rf"drop path rate must be in \[0, 1\), got {rate}"):
        DropPath(rate)


def test_block_with_drop_path():
    block = JointSpaceTimeBlock(8, 2, 16, drop_path=0.5).double()
    randomise(block)
    plain = JointSpaceTimeBlock(8, 2, 16).double()
    plain.load_state_dict(block.state_dict())
    x = normal(64, 5, 8)
    assert torch.equal(block.eval()(x), plain(x))
    torch.manual_seed(0)
    out = block.train()(x)
    attention = plain.attn(plain.norm1(x))
    seen = set()
    for clip in range(64):
        # Each branch is either left out or doubled, and independently of the other.
        fits = []
        for kept in (0, 1):
            h = x[clip] + 2 * kept * attention[clip]
            for kept_mlp in (0, 1):
                y = h + 2 * kept_mlp * plain.mlp(plain.norm2(h))
                if relative_error(out[clip], y) < EXACT_RTOL:
                    fits.append((kept, kept_mlp))
        assert len(fits) == 1
        seen.add(fits[0])
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


# ---- loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_mse_loss(norm_pix, reduction):
    video = make_video((2, 2, 4, 6, 8), torch.uint8)
    idx = random_positions(2, 8, 5)
    pred = normal(2, 5, 2 * 2 * 3 * 4)
    loss = MaskedMSELoss((2, 3, 4), norm_pix=norm_pix, reduction=reduction,
                         mean=(0.5, 0.4), std=(0.2, 0.3))  # fmt: skip
    # Tubelets by unfolding each dimension, as (pt, ph, pw, c).
    cells = video.double().div(255).unfold(2, 2, 2).unfold(3, 3, 3).unfold(4, 4, 4)
    target = cells.permute(0, 2, 3, 4, 5, 6, 7, 1).reshape(2, 8, 24, 2)
    if norm_pix:
        std, mean = torch.std_mean(target, dim=2, keepdim=True)
        target = (target - mean) / (std + 1e-6)
    target = torch.stack([target.flatten(2)[b, idx[b]] for b in range(2)])
    error = (pred - target).square().mean(dim=2)
    scored = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 1]], dtype=torch.float64)
    expected = error if reduction == "none" else error.mean()
    assert relative_error(loss(pred, video, idx), expected) < EXACT_RTOL
    expected = error if reduction == "none" else error[scored.bool()].mean()
    assert relative_error(loss(pred, video, idx, scored), expected) < EXACT_RTOL
    column = (1, 2, 1, 1, 1)
    mean = torch.tensor([0.5, 0.4], dtype=torch.float64).view(column)
    std = torch.tensor([0.2, 0.3], dtype=torch.float64).view(column)
    normalised = (video.double() / 255 - mean) / std
    assert relative_error(loss(pred, normalised, idx, scored), expected) < EXACT_RTOL
    assert not list(loss.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_masked_mse_loss_of_features(bias):
    video, idx = make_video((2, 3, 4, 6, 8), torch.uint8), random_positions(2, 8, 5)
    head = nn.Linear(9, 72, bias=bias).double()
    scored = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 1]], dtype=torch.float64)
    loss = MaskedMSELoss((2, 3, 4), norm_pix=False)
    gradients = []
    for of_features in (True, False):
        features = normal(2, 5, 9).requires_grad_()
        if of_features:
            value = loss.of_features(features, head, video, idx, scored)
        else:
            value = loss(head(features), video, idx, scored)
        leaves = (features, *head.parameters())
        gradients.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for got, expected in zip(*gradients, strict=True):
        assert relative_error(got, expected) < EXACT_RTOL


def test_masked_mse_loss_of_features_gives_no_single_tokens():
    loss = MaskedMSELoss((2, 3, 4), reduction="none")
    video, idx = make_video((2, 3, 4, 6, 8), torch.uint8), random_positions(2, 8, 5)
    with pytest.raises(ValueError, match="reduction='none'"):
        loss.of_features(torch.randn(2, 5, 9), nn.Linear(9, 72), video, idx)
