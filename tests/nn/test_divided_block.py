"""Divided attention as modules: against torch's attention, and Hugging Face's TimeSformer layer."""

import pytest
import torch
from helpers import EXACT_RTOL, randomise, relative_error
from torch import nn

from vmae_fast.nn import Attention, DividedAttention, DividedSpaceTimeBlock

T, H, W = GRID = (3, 2, 5)
S = H * W
WIDTH, HEADS, HIDDEN = 15, 3, 22


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def randomised(module):
    module = module.double()
    randomise(module)
    return module


class Along(nn.Module):
    """``nn.MultiheadAttention`` of sequences made by permuting, with the weights of ours."""

    def __init__(self, ours):
        super().__init__()
        self.axis, self.class_token = ours.axis, ours.class_token
        bias = ours.q_bias is not None
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
        weights = self.inner.state_dict()
        weights["in_proj_weight"] = ours.qkv.weight
        key = torch.zeros(WIDTH).double()
        whole = torch.cat([ours.q_bias, key, ours.v_bias]) if bias else key.repeat(3)
        weights["in_proj_bias"] = whole
        weights["out_proj.weight"], weights["out_proj.bias"] = ours.proj.weight, ours.proj.bias
        self.inner.load_state_dict(weights)

    def forward(self, x, grid):
        t, s = grid[0], (x.shape[1] - self.class_token) // grid[0]
        batch = len(x)
        tokens = x[:, int(self.class_token) :].reshape(batch, t, s, WIDTH)
        # (B, sequences, length, D)
        tokens = tokens.permute(0, 2, 1, 3) if self.axis == "time" else tokens
        count = tokens.shape[1]
        if self.class_token:
            first = x[:, None, :1].expand(batch, count, 1, WIDTH)
            tokens = torch.cat([first, tokens], dim=2)
        tokens = tokens.reshape(batch * count, -1, WIDTH)
        out, _ = self.inner(tokens, tokens, tokens, need_weights=False)
        out = out.reshape(batch, count, -1, WIDTH)
        grid_out = out[:, :, int(self.class_token) :]
        if self.axis == "time":
            grid_out = grid_out.permute(0, 2, 1, 3)
        grid_out = grid_out.reshape(batch, t * s, WIDTH)
        if not self.class_token:
            return grid_out
        return torch.cat([out[:, :, 0].mean(1, keepdim=True), grid_out], dim=1)

    def pairs(self, ours):
        """Gradients of ours beside its own."""
        yield ours.qkv.weight.grad, self.inner.in_proj_weight.grad
        yield ours.proj.weight.grad, self.inner.out_proj.weight.grad
        yield ours.proj.bias.grad, self.inner.out_proj.bias.grad
        if ours.q_bias is not None:
            query, _, value = self.inner.in_proj_bias.grad.chunk(3)
            yield ours.q_bias.grad, query
            yield ours.v_bias.grad, value


class Twin(nn.Module):
    """The block from torch's modules alone."""

    def __init__(self, ours, eps):
        super().__init__()
        self.class_token = ours.class_token
        self.temporal, self.spatial = Along(ours.temporal_attn), Along(ours.attn)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, eps=eps) for _ in range(3)).double()
        fc = ours.temporal_fc
        self.fc = nn.Linear(WIDTH, WIDTH) if isinstance(fc, nn.Linear) else nn.Identity()
        self.fc.double().load_state_dict(fc.state_dict())
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
        self.mlp.double()
        self.mlp[0].load_state_dict(ours.mlp.fc1.state_dict())
        self.mlp[2].load_state_dict(ours.mlp.fc2.state_dict())
        for mine, theirs in zip(self.norms, self.norms_of(ours), strict=True):
            mine.load_state_dict(theirs.state_dict())

    @staticmethod
    def norms_of(ours):
        return ours.temporal_norm1, ours.norm1, ours.norm2

    def forward(self, x, grid):
        first, tokens = x.tensor_split([int(self.class_token)], dim=1)
        tokens = tokens + self.fc(self.temporal(self.norms[0](tokens), grid))
        x = torch.cat([first, tokens], dim=1)
        x = x + self.spatial(self.norms[1](x), grid)
        return x + self.mlp(self.norms[2](x))

    def pairs(self, ours):
        """Gradients of ours beside its own."""
        yield from self.temporal.pairs(ours.temporal_attn)
        yield from self.spatial.pairs(ours.attn)
        modules = [*zip(self.norms_of(ours), self.norms, strict=True), (ours.mlp.fc1, self.mlp[0])]
        modules.append((ours.mlp.fc2, self.mlp[2]))
        if isinstance(self.fc, nn.Linear):
            modules.append((ours.temporal_fc, self.fc))
        for mine, theirs in modules:
            yield mine.weight.grad, theirs.weight.grad
            yield mine.bias.grad, theirs.bias.grad


def assert_twins(ours, twin, grid, num_tokens):
    """Values, gradient to the tokens and all parameters' gradients."""
    x, same = (normal(2, num_tokens, WIDTH).requires_grad_() for _ in range(2))
    got, expected = ours(x, grid), twin(same, grid)
    assert relative_error(got, expected) < EXACT_RTOL
    upstream = normal(*got.shape, seed=1)
    got.backward(upstream)
    expected.backward(upstream)
    pairs = [(x.grad, same.grad), *twin.pairs(ours)]
    assert len(pairs) == 1 + len(list(ours.parameters()))
    for mine, truth in pairs:
        assert relative_error(mine, truth) < EXACT_RTOL


@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("class_token", [False, True], ids=["grid", "class_token"])
@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("grid", [GRID, (T, S)], ids=str)
def test_divided_attention_is_multi_head_attention(grid, axis, class_token, qkv_bias):
    ours = DividedAttention(WIDTH, HEADS, axis, class_token=class_token, qkv_bias=qkv_bias)
    ours = randomised(ours)
    assert_twins(ours, Along(ours), grid, T * S + class_token)


@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("temporal_fc", [False, True], ids=["plain", "temporal_fc"])
@pytest.mark.parametrize("class_token", [False, True], ids=["grid", "class_token"])
@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_the_block(eps, class_token, temporal_fc, qkv_bias):
    kinds = {"class_token": class_token, "temporal_fc": temporal_fc, "qkv_bias": qkv_bias}
    ours = randomised(DividedSpaceTimeBlock(WIDTH, HEADS, HIDDEN, eps=eps, **kinds))
    assert_twins(ours, Twin(ours, eps), GRID, T * S + class_token)


def test_it_is_attention_where_there_is_one_sequence():
    """One row, or one position: all tokens attend to each other."""
    x = normal(2, 7, WIDTH)
    joint = randomised(Attention(WIDTH, HEADS))
    for axis, grid in (("time", (7, 1)), ("space", (1, 7))):
        ours = DividedAttention(WIDTH, HEADS, axis).double()
        ours.load_state_dict(joint.state_dict())
        assert relative_error(ours(x, grid), joint(x)) < EXACT_RTOL


# ---- Hugging Face -------------------------------------------------------------------------


def theirs_of(ours, eps):
    """TimesformerLayer with our weights; its key biases, which cancel, stay random."""
    from transformers import TimesformerConfig
    from transformers.models.timesformer.modeling_timesformer import TimesformerLayer

    config = TimesformerConfig(
        image_size=W * 4, patch_size=4, num_frames=T, hidden_size=WIDTH,
        num_attention_heads=HEADS, intermediate_size=HIDDEN, layer_norm_eps=eps,
        attention_type="divided_space_time",
    )  # fmt: skip
    theirs = randomised(TimesformerLayer(config, 0)).eval()
    with torch.no_grad():
        for mine, other in counterparts(ours, theirs):
            other.copy_(mine)
    return theirs


def counterparts(ours, theirs):
    """Every parameter of ours beside that (part) of theirs which stands for it."""
    attentions = (
        (ours.temporal_attn, theirs.temporal_attention),
        (ours.attn, theirs.attention),
    )
    for mine, other in attentions:
        query, _, value = other.attention.qkv.bias.chunk(3)
        yield mine.q_bias, query
        yield mine.v_bias, value
        yield mine.qkv.weight, other.attention.qkv.weight
        yield mine.proj.weight, other.output.dense.weight
        yield mine.proj.bias, other.output.dense.bias
    layers = (
        (ours.temporal_norm1, theirs.temporal_layernorm),
        (ours.temporal_fc, theirs.temporal_dense),
        (ours.norm1, theirs.layernorm_before),
        (ours.norm2, theirs.layernorm_after),
        (ours.mlp.fc1, theirs.intermediate.dense),
        (ours.mlp.fc2, theirs.output.dense),
    )
    for mine, other in layers:
        yield mine.weight, other.weight
        yield mine.bias, other.bias


def with_gradients(module):
    """Put every parameter's gradient in its place."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.grad)


def test_the_block_is_timesformers():
    eps = 1e-3
    ours = DividedSpaceTimeBlock(WIDTH, HEADS, HIDDEN, class_token=True, temporal_fc=True, eps=eps)
    ours = randomised(ours)
    theirs = theirs_of(ours, eps)
    assert len(list(counterparts(ours, theirs))) == len(list(ours.parameters()))
    x, same = (normal(2, 1 + T * S, WIDTH).requires_grad_() for _ in range(2))
    # Theirs is (h, w, t) order.
    number = torch.arange(T * S).view(T, S)
    order = torch.cat([torch.zeros(1).long(), 1 + number.t().flatten()])
    got, expected = ours(x, GRID), theirs(same[:, order])[0]
    assert expected.shape == got.shape
    assert relative_error(got[:, order], expected) < EXACT_RTOL
    upstream = normal(*got.shape, seed=1)
    got.backward(upstream)
    expected.backward(upstream[:, order])
    assert relative_error(x.grad, same.grad) < EXACT_RTOL
    with_gradients(ours)
    with_gradients(theirs)
    for mine, truth in counterparts(ours, theirs):
        assert relative_error(mine, truth) < EXACT_RTOL


# ---- how it starts and trains -------------------------------------------------------------


@pytest.mark.parametrize("temporal_fc", [False, True], ids=["plain", "temporal_fc"])
def test_it_can_start_as_space_alone(temporal_fc):
    torch.manual_seed(0)
    block = DividedSpaceTimeBlock(
        WIDTH, HEADS, HIDDEN, temporal_fc=temporal_fc, zero_init_temporal=True
    ).double()
    x = normal(2, T * S, WIDTH)
    out = block(x, GRID)
    space = x + block.attn(block.norm1(x), GRID)
    assert torch.equal(out, space + block.mlp(block.norm2(space)))
    upstream = normal(*out.shape, seed=1)
    out.backward(upstream)
    last = block.temporal_fc if temporal_fc else block.temporal_attn.proj
    assert last.weight.grad.norm() > 0
    assert last.bias.grad.norm() > 0
    assert block.temporal_attn.proj.weight.any() == temporal_fc
    assert not block.temporal_attn.qkv.weight.grad.any()
    # A step later the whole branch learns.
    with torch.no_grad():
        for parameter in block.parameters():
            parameter -= 0.1 * parameter.grad
    block.zero_grad()
    block(x, GRID).backward(upstream)
    for name, parameter in block.named_parameters():
        assert parameter.grad.any(), name


def test_it_does_not_unless_asked():
    block = DividedSpaceTimeBlock(WIDTH, HEADS, HIDDEN, temporal_fc=True)
    assert block.temporal_fc.weight.any()
    assert block.temporal_attn.proj.weight.any()


@pytest.mark.parametrize("class_token", [False, True], ids=["grid", "class_token"])
def test_drop_path(class_token):
    kinds = {"class_token": class_token, "temporal_fc": True}
    block = randomised(DividedSpaceTimeBlock(WIDTH, HEADS, HIDDEN, drop_path=0.5, **kinds))
    plain = DividedSpaceTimeBlock(WIDTH, HEADS, HIDDEN, **kinds).double()
    plain.load_state_dict(block.state_dict())
    clips = 128
    x = normal(clips, T * S + class_token, WIDTH)
    assert torch.equal(block.eval()(x, GRID), plain(x, GRID))
    torch.manual_seed(0)
    out = block.train()(x, GRID)
    # Each branch is left out or doubled for a whole clip, independently of the others.
    fits = [[] for _ in range(clips)]
    for time in (0, 2):
        tokens = x[:, int(class_token) :]
        branch = plain.temporal_attn(plain.temporal_norm1(tokens), GRID)
        h = torch.cat([x[:, : int(class_token)], tokens + time * plain.temporal_fc(branch)], dim=1)
        for space in (0, 2):
            g = h + space * plain.attn(plain.norm1(h), GRID)
            for mlp in (0, 2):
                y = g + mlp * plain.mlp(plain.norm2(g))
                for clip in range(clips):
                    if relative_error(out[clip], y[clip]) < EXACT_RTOL:
                        fits[clip].append((time, space, mlp))
    assert all(len(fit) == 1 for fit in fits)
    assert len({fit[0] for fit in fits}) == 8


ATTENTION = ["q_bias", "v_bias", "qkv.weight", "proj.weight", "proj.bias"]


def test_names_of_parameters():
    kinds = {"class_token": True, "temporal_fc": True}
    block = DividedSpaceTimeBlock(WIDTH, HEADS, HIDDEN, **kinds)
    layers = ["temporal_norm1", "temporal_fc", "norm1", "norm2", "mlp.fc1", "mlp.fc2"]
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    names += [f"{layer}.{name}" for layer in ("temporal_attn", "attn") for name in ATTENTION]
    assert sorted(block.state_dict()) == sorted(names)
    plain = DividedSpaceTimeBlock(WIDTH, HEADS, HIDDEN, qkv_bias=False)
    left_out = ("temporal_fc", "q_bias", "v_bias")
    expected = sorted(name for name in names if not any(part in name for part in left_out))
    assert sorted(plain.state_dict()) == expected
    assert sorted(DividedAttention(WIDTH, HEADS, "time").state_dict()) == sorted(ATTENTION)


def test_it_prints_what_it_attends():
    shown = repr(DividedSpaceTimeBlock(WIDTH, HEADS, HIDDEN, class_token=True))
    assert "axis=time, class_token=False" in shown
    assert "axis=space, class_token=True" in shown


def test_errors():
    with pytest.raises(ValueError, match="axis must be one of time, space, got 'joint'"):
        DividedAttention(WIDTH, HEADS, "joint")
    message = "width 15 is not a multiple of num_heads 4"
    with pytest.raises(ValueError, match=message):
        DividedAttention(WIDTH, 4, "time")
    with pytest.raises(ValueError, match=message):
        DividedSpaceTimeBlock(WIDTH, 4, HIDDEN)
    with pytest.raises(ValueError, match=r"drop path rate must be in \[0, 1\), got 1.0"):
        DividedSpaceTimeBlock(WIDTH, HEADS, HIDDEN, drop_path=1.0)
    block = DividedSpaceTimeBlock(WIDTH, HEADS, HIDDEN)
    with pytest.raises(ValueError, match=r"grid \(3, 2, 5\) holds 30 tokens, but there are 31"):
        block(torch.zeros(2, 31, WIDTH), GRID)
    with_token = DividedSpaceTimeBlock(WIDTH, HEADS, HIDDEN, class_token=True)
    with pytest.raises(ValueError, match=r"grid \(3, 10\) holds 30 tokens, but there are 29"):
        with_token(torch.zeros(2, 30, WIDTH), (3, 10))
