"""The plain model of the benchmarks and VideoMAE: one loss, the same gradients."""

import pytest
import torch
from helpers import randomise
from plain_videomae import PlainVideoMAE, plain_loss, sdpa, written_out

from vmae_fast import VideoMAE, clip_keys
from vmae_fast.models import VideoMAEConfig

# fp64: rounding only, over a whole model.
RTOL = 1e-10
# Three clips of 4 x 6 x 6 tokens of 2 x 4 x 4 pixels.
SMALL = {
    "frames": 8, "image_size": 24, "patch_size": 4,
    "width": 24, "depth": 2, "heads": 3, "decoder_width": 20, "decoder_depth": 2,
    "decoder_heads": 2,
}  # fmt: skip
CASES = {
    "v1": {},
    "v2_0.5": {"decoder_mask_ratio": 0.5},
    "v2_0.75": {"decoder_mask_ratio": 0.75, "init_values": 0.1, "decoder_depth": 1},
    # As many scored tokens differ by clip: the mask has weights.
    "v2_random": {"decoder_mask_ratio": 0.5, "mask_kind": "random", "mask_ratio": 0.7},
    "v2_frame": {"decoder_mask_ratio": 0.25, "decoder_mask_kind": "frame"},
    "v2_frame_random": {
        "mask_kind": "frame",
        "decoder_mask_ratio": 0.3,
        "decoder_mask_kind": "random",
    },
    "layer_scale": {"init_values": 0.1, "norm_pix": False},
    "giant_like": {"mlp_dim": 105, "decoder_mlp_dim": 87, "norm_eps": 1e-3},
    "no_bias": {"qkv_bias": False, "final_norm": False, "decoder_norm_eps": 1e-4},
    "one_channel": {"in_channels": 1, "tubelet_size": 1, "frames": 4, "image_size": (24, 16)},
}


@pytest.mark.parametrize("pixels", ["uint8", "normalised"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_loss_and_gradients(settings, pixels):
    model = VideoMAE(VideoMAEConfig(**{**SMALL, **settings})).double()
    randomise(model)
    config = model.config
    generator = torch.Generator().manual_seed(1)
    shape = (3, config.in_channels, config.frames, *config.size)
    video = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if pixels == "normalised":
        video = (video.double() / 255).transpose(3, 4).contiguous().transpose(3, 4)
    mask = model.masking(clip_keys(0, 1, torch.arange(3)))
    assert (mask.scored is not None) == ("random" in settings.values())

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    attend = sdpa if pixels == "uint8" else written_out
    loss = plain_loss(weights, config, video, mask, attend=attend)
    loss.backward()
    got = model(video, mask).loss
    got.backward()

    assert abs(got - loss).item() < RTOL * loss.item()
    for name, parameter in model.named_parameters():
        truth = weights[name].grad
        assert truth.abs().max() > 0, name
        assert (parameter.grad - truth).abs().max() < RTOL * truth.abs().max(), name


def test_the_module_trains_the_parameters_of_the_model():
    model = VideoMAE(VideoMAEConfig(**SMALL))
    plain = PlainVideoMAE(model)
    assert {id(p) for p in plain.parameters()} == {id(p) for p in model.parameters()}
    video = torch.randint(0, 256, (2, 3, 8, 24, 24), dtype=torch.uint8)
    mask = plain.masking(clip_keys(0, 0, torch.arange(2)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = plain(video, mask).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_drop_path_is_refused():
    model = VideoMAE(VideoMAEConfig(**SMALL, drop_path=0.1))
    with pytest.raises(ValueError, match=r"drop_path=0\.1"):
        plain_loss(dict(model.named_parameters()), model.config, torch.empty(0), None)
