"""Published sizes, settings and their errors."""

import json

import pytest
import torch

from vmae_fast import SIZES, Masking, VideoMAE, VideoMAEConfig


@pytest.mark.parametrize(
    ("size", "millions"), [("base", 86), ("large", 304), ("huge", 632), ("giant", 1011)]
)
def test_published_encoder_parameters(size, millions):
    with torch.device("meta"):
        model = VideoMAE(size)
    count = sum(p.numel() for p in model.encoder.parameters())
    depth, width, _, hidden, patch, *_ = PUBLISHED[size]
    # Weights of qkv and proj, biases of q, v and proj; the MLP; two norms.
    block = 4 * width**2 + 3 * width + 2 * width * hidden + hidden + width + 4 * width
    assert count == depth * block + (3 * 2 * patch**2 + 1) * width + 2 * width
    # Giant's 1,011.6 is published cut, the others rounded.
    assert abs(count / 1e6 - millions) < 0.7


# depth, width, heads, hidden, patch, decoder width, heads, depth, hidden, tokens
PUBLISHED = {
    "small": (12, 384, 6, 1536, 16, 192, 3, 4, 768, 1568),
    "base": (12, 768, 12, 3072, 16, 384, 6, 4, 1536, 1568),
    "large": (24, 1024, 16, 4096, 16, 512, 8, 12, 2048, 1568),
    "huge": (32, 1280, 16, 5120, 16, 640, 8, 12, 2560, 1568),
    "giant": (40, 1408, 16, 6144, 14, 512, 8, 4, 2234, 2048),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    c = VideoMAEConfig.of(size)
    got = (
        c.depth, c.width, c.heads, c.encoder_hidden, c.tubelet[1],
        c.decoder_width, c.decoder_heads, c.decoder_depth, c.decoder_hidden, c.num_tokens,
    )  # fmt: skip
    assert got == PUBLISHED[size]
    assert c.tubelet[0] == 2
    assert c.frames == 16
    assert c.size == (224, 224)
    assert c.mask_ratio == 0.9
    assert c.norm_pix
    assert c.norm_eps == 1e-6


def test_sizes_are_all_named():
    assert set(SIZES) == {"tiny", *PUBLISHED}


def test_a_configs_parameters_are_the_models():
    model = VideoMAE("tiny", width=24, heads=3, mlp_dim=37, decoder_width=20, decoder_heads=5,
                     decoder_mlp_dim=23, in_channels=2, patch_size=(8, 16))  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["encoder.patch_embed.weight"] == (24, 2, 2, 8, 16)
    assert shapes["encoder.blocks.2.mlp.fc1.weight"] == (37, 24)
    assert shapes["decoder.blocks.0.mlp.fc2.weight"] == (20, 23)
    assert shapes["decoder.head.weight"] == (2 * 2 * 8 * 16, 20)
    assert shapes["mask_token"] == (1, 1, 20)
    assert model.config.grid == (4, 8, 4)
    assert model.config.num_tokens == 128
    assert model.config.tubelet_values == 512
    assert {b.attn.num_heads for b in model.encoder.blocks} == {3}
    assert {b.attn.num_heads for b in model.decoder.blocks} == {5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 15}, "frames=15 is not a multiple of tubelet_size=2; 14 or 16 would do"),
        ({"frames": 1}, "frames=1 is not a multiple of tubelet_size=2; 2 would do"),
        (
            {"image_size": 225},
            "image height=225 is not a multiple of patch_size=16; 224 or 240 would do",
        ),
        (
            {"image_size": (224, 100)},
            "image width=100 is not a multiple of patch_size=16; 96 or 112 would do",
        ),
        ({"patch_size": (16, 15)}, "image width=224 is not a multiple of patch_size=15; 210 or"),
        ({"width": 770}, "width=770 is not a multiple of heads=12; 768 or 780 would do"),
        (
            {"decoder_width": 383},
            "decoder_width=383 is not a multiple of decoder_heads=6; 378 or 384 would do",
        ),
        ({"patch_size": 0}, "patch_size=0"),
        ({"decoder_heads": 0}, "decoder_heads=0"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"image_mean": (0.5,)}, "image_mean must hold one value for each of 3 channels, got 1"),
        ({"image_std": (0.5,) * 4}, "image_std must hold one value for each of 3 .* got 4"),
        ({"decoder_depth": -1}, "decoder_depth .*-1"),
        ({"mlp_dim": 0}, "mlp_dim .*0"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        VideoMAEConfig.of("base", **settings)


def test_unknown_size_and_settings():
    with pytest.raises(ValueError, match=r"size must be one of tiny, small, base.*got 'basic'"):
        VideoMAE("basic")
    with pytest.raises(TypeError, match=r"unknown model settings \['num_frames'\].*'frames'"):
        VideoMAE("tiny", num_frames=4)
    with pytest.raises(TypeError, match=r"unknown model settings \['size'\]|multiple values"):
        VideoMAEConfig.of(VideoMAEConfig(), **{"size": 3})
    with pytest.raises(ValueError, match=r"unknown model settings \['dept'\]"):
        VideoMAEConfig.from_dict({"dept": 3})


def test_dict_round_trip_through_json():
    config = VideoMAEConfig.of(
        "small", image_size=(96, 64), in_channels=2, image_mean=(0.1, 0.2), image_std=(0.3, 0.4),
        mlp_dim=100, mask_kind="random", decoder_mask_ratio=0.4, decoder_mask_kind="frame",
        drop_path=0.1,
    )  # fmt: skip
    assert VideoMAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    default = VideoMAEConfig()
    assert VideoMAEConfig.from_dict(json.loads(json.dumps(default.to_dict()))) == default
    assert hash(VideoMAEConfig.from_dict(default.to_dict())) == hash(default)


def test_a_dict_from_before_a_setting_takes_its_default():
    """Checkpoints written before decoders had kinds of masks hold the running cell's."""
    older = VideoMAEConfig(decoder_mask_ratio=0.5).to_dict()
    del older["decoder_mask_kind"]
    config = VideoMAEConfig.from_dict(older)
    assert config.masking == Masking((8, 14, 14), "tube", 0.9, 0.5, "running_cell")


def test_masking_follows_the_settings():
    config = VideoMAEConfig.of(
        "giant", mask_kind="random", mask_ratio=0.8, decoder_mask_ratio=0.6,
        decoder_mask_kind="frame",
    )  # fmt: skip
    assert config.masking == Masking((8, 16, 16), "random", 0.8, 0.6, "frame")
    # Settings that fit no mask are refused where one is asked for.
    wrong = VideoMAEConfig(decoder_mask_ratio=0.6)
    with pytest.raises(ValueError, match=r"decoder mask ratio must be 0, 0\.5 or 0\.75"):
        _ = wrong.masking


def test_overrides_of_a_config():
    config = VideoMAEConfig.of("small", frames=4)
    other = VideoMAEConfig.of(config, depth=3)
    assert (other.frames, other.depth, other.width) == (4, 3, 384)
    assert VideoMAE(config, depth=1, image_size=32).config.image_size == (32, 32)


def test_statistics_follow_the_channels():
    assert VideoMAEConfig().mean == (0.485, 0.456, 0.406)
    assert VideoMAEConfig().std == (0.229, 0.224, 0.225)
    grey = VideoMAEConfig(in_channels=1)
    assert (grey.mean, grey.std) == ((0.0,), (1.0,))
    assert VideoMAEConfig(in_channels=2, image_mean=[0.5, 0.4]).mean == (0.5, 0.4)


def test_statistics_of_another_number_of_channels_are_asked_for():
    with pytest.raises(ValueError, match="image_mean must hold one value for each of 1 channels"):
        VideoMAEConfig.of(VideoMAEConfig(), in_channels=1)
    other = VideoMAEConfig.of(VideoMAEConfig(), in_channels=1, image_mean=None, image_std=None)
    assert other == VideoMAEConfig(in_channels=1)
