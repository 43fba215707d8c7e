"""Loss, gradients and features equal Hugging Face's, through their saved checkpoints."""

import pytest
import torch
import transformers
from helpers import PARITY_RTOL, hf_config, random_mask, randomise, relative_error

from vmae_fast import VideoMAE

CASES = {
    "norm_pix": {},
    "raw_pixels": {"norm_pix_loss": False},
    "no_bias": {"qkv_bias": False},
    "tubelet_1": {"tubelet_size": 1, "num_frames": 3},
    "tubelet_4": {"tubelet_size": 4, "num_frames": 16},
    "patch_14": {"patch_size": 14, "image_size": 42},
    "one_channel": {"num_channels": 1},
    "mean_pooling": {"use_mean_pooling": True},
    "eps": {"layer_norm_eps": 1e-3},
    "one_decoder_block": {"decoder_num_hidden_layers": 1},
    "tall": {"image_size": (48, 32)},
}


def their_model(tmp_path, dtype, **settings):
    torch.manual_seed(0)
    theirs = transformers.VideoMAEForPreTraining(hf_config(**settings))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    return theirs.to(dtype).eval()


def their_gradients(theirs):
    """Gradients under our names, by an independent reading of the published table."""
    mine = {}
    for name, parameter in theirs.named_parameters():
        grad = parameter.grad
        name = name.replace(
            "videomae.embeddings.patch_embeddings.projection", "encoder.patch_embed"
        )
        name = name.replace("videomae.layernorm", "encoder.norm")
        name = name.replace("videomae.encoder.layer", "encoder.blocks")
        name = name.replace("decoder.decoder_layers", "decoder.blocks")
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        name = name.replace("attention.output.dense", "attn.proj")
        name = name.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        name = name.replace("attention.attention.", "attn.")
        name = name.replace("query.bias", "q_bias").replace("value.bias", "v_bias")
        mine[name] = grad
    for name in [n for n in mine if n.endswith("query.weight")]:
        parts = [mine.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        mine[name.replace("query", "qkv")] = torch.cat(parts)
    return mine


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_loss_and_gradients(tmp_path, settings, dtype):
    theirs = their_model(tmp_path, dtype, **settings)
    ours = VideoMAE.from_pretrained(tmp_path).to(dtype)
    config = ours.config
    generator = torch.Generator().manual_seed(1)
    shape = (2, config.in_channels, config.frames, *config.size)
    video = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    num_masked = int(0.75 * config.num_tokens)
    mask = random_mask(2, config.num_tokens, num_masked)

    expected = theirs(video.transpose(1, 2), bool_masked_pos=mask)
    expected.loss.backward()
    got = ours(video, mask, return_pred=True)
    got.loss.backward()

    rtol = PARITY_RTOL[dtype]
    assert got.pred.shape == (2, num_masked, config.tubelet_values)
    assert relative_error(got.pred, expected.logits) < rtol
    assert abs(got.loss - expected.loss).item() < rtol * expected.loss.item()
    gradients = their_gradients(theirs)
    mine = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == mine.keys()
    for name, gradient in gradients.items():
        assert relative_error(mine[name], gradient) < rtol, name


@pytest.mark.parametrize("pooling", [False, True], ids=["norm", "no_norm"])
def test_encode_equals_their_features(tmp_path, pooling):
    theirs = their_model(tmp_path, torch.float64, use_mean_pooling=pooling)
    ours = VideoMAE.from_pretrained(tmp_path).double()
    video = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.videomae(video.transpose(1, 2)).last_hidden_state
        got = ours.encode(video)
    assert got.shape == (2, ours.config.num_tokens, ours.config.width)
    assert relative_error(got, expected) < PARITY_RTOL[torch.float64]


def test_bare_encoder_checkpoint(tmp_path):
    theirs = transformers.VideoMAEModel(hf_config())
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = VideoMAE.from_pretrained(tmp_path)
    video = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        expected = theirs.eval()(video.transpose(1, 2)).last_hidden_state
        assert relative_error(ours.encode(video), expected) < PARITY_RTOL[torch.float32]
    with pytest.raises(RuntimeError, match="no decoder"):
        ours(video)


@pytest.mark.parametrize("pooling", [True, False], ids=["mean", "first"])
def test_fine_tuned_logits(tmp_path, pooling):
    theirs = transformers.VideoMAEForVideoClassification(
        hf_config(num_labels=7, use_mean_pooling=pooling)
    )
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = VideoMAE.from_pretrained(tmp_path)
    video = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        expected = theirs.eval()(video.transpose(1, 2)).logits
        got = ours.classify(video)
    assert got.shape == (2, 7)
    assert relative_error(got, expected) < PARITY_RTOL[torch.float32]


def test_uint8_is_normalised_with_imagenet_statistics(tmp_path):
    theirs = their_model(tmp_path, torch.float64)
    ours = VideoMAE.from_pretrained(tmp_path).double()
    video = torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1, 1)
    mask = random_mask(2, ours.config.num_tokens, 48)
    normalised = (video.double() / 255 - mean) / std
    expected = theirs(normalised.transpose(1, 2), bool_masked_pos=mask).loss
    assert abs(ours(video, mask).loss - expected).item() < 1e-7 * expected.item()
