"""Positions and the start of training."""

import math

import numpy as np
import pytest
import torch

from vmae_fast import VideoMAE
from vmae_fast.models.positions import sinusoid_table


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 2), (17, 6), (1568, 384), (5, 7)])
def test_sinusoid_table(num_tokens, width):
    expected = np.empty((num_tokens, width))
    for j in range(width):
        angle = np.arange(num_tokens) / np.power(10000.0, 2 * (j // 2) / width)
        expected[:, j] = np.sin(angle) if j % 2 == 0 else np.cos(angle)
    table = sinusoid_table(num_tokens, width)
    assert table.dtype == torch.float32
    # fp64 rounded once: at most half a unit in the last place of 1.
    assert np.abs(table.double().numpy() - expected).max() < 6e-8


def test_positions_are_not_in_the_state_dict():
    model = VideoMAE("tiny")
    assert not [name for name in model.state_dict() if "pos" in name]
    assert torch.equal(model.encoder.pos_embed, sinusoid_table(256, 128))
    assert torch.equal(model.decoder.pos_embed, sinusoid_table(256, 64))
    assert not model.encoder.pos_embed.requires_grad


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return VideoMAE("tiny", decoder_width=192, decoder_heads=3, decoder_depth=2)


def uniform_within(weight, bound):
    """All of it inside the bound, and spread over all of it."""
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(weight.mean().item()) < 5 * bound / math.sqrt(3 * weight.numel())


def test_linears_start_xavier_over_the_fused_qkv(fresh):
    linears = 0
    for stack in (fresh.encoder.blocks, fresh.decoder.blocks):
        for block in stack:
            width = block.norm1.normalized_shape[0]
            uniform_within(block.attn.qkv.weight, math.sqrt(6 / (width + 3 * width)))
            uniform_within(block.attn.proj.weight, math.sqrt(6 / (width + width)))
            uniform_within(block.mlp.fc1.weight, math.sqrt(6 / (width + 4 * width)))
            uniform_within(block.mlp.fc2.weight, math.sqrt(6 / (width + 4 * width)))
            linears += 4
    assert linears == 20
    uniform_within(fresh.decoder.head.weight, math.sqrt(6 / (192 + 2 * 8 * 8 * 3)))


def test_biases_start_at_zero_and_norms_at_one(fresh):
    seen = 0
    for name, parameter in fresh.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert (parameter == 0).all(), name
            seen += 1
    # Seven in each of five blocks, two norms, the pixel head.
    assert seen == 38


def test_the_rest_starts_as_published(fresh):
    # Conv3d and encoder_to_decoder: torch's default, uniform within 1 / sqrt(fan in).
    fan_in = 3 * 2 * 8 * 8
    uniform_within(fresh.encoder.patch_embed.weight, 1 / math.sqrt(fan_in))
    assert fresh.encoder.patch_embed.bias.abs().max() <= 1 / math.sqrt(fan_in)
    assert fresh.encoder.patch_embed.bias.std() > 0
    uniform_within(fresh.encoder_to_decoder.weight, 1 / math.sqrt(128))
    assert fresh.encoder_to_decoder.bias is None
    # A normal of 0.02 cut at one standard deviation has 0.54 of its spread.
    assert fresh.mask_token.abs().max() <= 0.02
    assert fresh.mask_token.std().item() == pytest.approx(0.54 * 0.02, rel=0.2)


def test_classifier_starts_like_other_linears():
    torch.manual_seed(0)
    model = VideoMAE("tiny", num_classes=50, decoder_depth=0, final_norm=False)
    uniform_within(model.classifier.head.weight, math.sqrt(6 / (128 + 50)))
    assert (model.classifier.head.bias == 0).all()


def test_drop_path_rises_linearly_with_depth():
    model = VideoMAE("tiny", depth=5, drop_path=0.2)
    rates = [block.drop_path.rate for block in model.encoder.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_layer_scale_starts_at_its_value():
    model = VideoMAE("tiny", init_values=0.01)
    gammas = [p for name, p in model.named_parameters() if "gamma" in name]
    assert len(gammas) == 2 * 4
    assert all((g == 0.01).all() for g in gammas)


def test_epsilons_reach_their_norms():
    model = VideoMAE("tiny", norm_eps=1e-3, decoder_norm_eps=1e-4)
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    assert {n.eps for b in blocks for n in (b.norm1, b.norm2)} == {1e-3}
    assert model.encoder.norm.eps == 1e-3
    assert model.decoder.norm.eps == 1e-4
    tuned = VideoMAE("tiny", num_classes=3, decoder_depth=0, final_norm=False, fc_norm_eps=1e-2)
    assert tuned.classifier.fc_norm.eps == 1e-2
    assert isinstance(tuned.encoder.norm, torch.nn.Identity)


def test_a_model_can_be_built_without_memory():
    with torch.device("meta"):
        model = VideoMAE("tiny", drop_path=0.1)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    real = VideoMAE("tiny", drop_path=0.1)
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (model, real)]
    assert shapes[0] == shapes[1]
