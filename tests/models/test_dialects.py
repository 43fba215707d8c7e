"""Checkpoints of other code: MCG-NJU's and OpenGVLab's names, Hugging Face's classes."""

import argparse
import json

import pytest
import torch
import transformers
from helpers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PARITY_RTOL,
    hf_config,
    make_video,
    random_mask,
    randomise,
    relative_error,
)
from safetensors.torch import load_file, save_file

from vmae_fast import CheckpointError, VideoMAE

RTOL = PARITY_RTOL[torch.float32]
ARGS = argparse.Namespace(
    num_frames=8, input_size=32, mask_ratio=0.75, model="pretrain_videomae_base_patch16_224",
    lr=1.5e-4, opt_betas=[0.9, 0.95], distributed=True, device="cuda", resume="",
)  # fmt: skip
HEADS = {"heads": 4, "decoder_heads": 3}


def video_of(model, batch=2):
    config = model.config
    return make_video((batch, config.in_channels, config.frames, *config.size), torch.float32)


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# ---- MCG-NJU's and OpenGVLab's names ------------------------------------------------------


def published_names(theirs):
    """A Hugging Face model's tensors under the published names, by the table in FACTS.md."""
    pretraining = "mask_token" in theirs.state_dict()
    prefix = "encoder." if pretraining else ""
    table = [
        ("videomae.embeddings.patch_embeddings.projection", f"{prefix}patch_embed.proj"),
        ("videomae.encoder.layer.", f"{prefix}blocks."),
        ("videomae.layernorm", f"{prefix}norm"),
        ("decoder.decoder_layers.", "decoder.blocks."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        # transformers 5 names them otherwise in memory.
        ("attention.attention.query.bias", "attn.q_bias"),
        ("attention.attention.value.bias", "attn.v_bias"),
        ("attention.attention.", "attn."),
        ("classifier.", "head."),
    ]
    named = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in table:
            name = name.replace(old, new)
        named[name] = tensor.clone()
    for name in [n for n in named if n.endswith("attn.query.weight")]:
        rows = [named.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        named[name.replace("query", "qkv")] = torch.cat(rows)
    return named


def their_pretraining(**settings):
    theirs = transformers.VideoMAEForPreTraining(hf_config(layer_norm_eps=1e-6, **settings))
    randomise(theirs)
    # The published code has 1e-6 everywhere; Hugging Face fixes this one at 1e-5.
    theirs.decoder.norm.eps = 1e-6
    return theirs.eval()


def their_fine_tuned():
    config = hf_config(layer_norm_eps=1e-6, use_mean_pooling=True, num_labels=7)
    theirs = transformers.VideoMAEForVideoClassification(config)
    randomise(theirs)
    theirs.fc_norm.eps = 1e-6
    return theirs.eval()


def assert_same_pretraining(ours, theirs):
    video = video_of(ours)
    mask = random_mask(2, ours.config.num_tokens, 48)
    with torch.no_grad():
        expected = theirs(video.transpose(1, 2), bool_masked_pos=mask)
        got = ours.eval()(video, mask, return_pred=True)
    assert relative_error(got.pred, expected.logits) < RTOL
    assert relative_error(got.loss, expected.loss) < RTOL


CONTAINERS = {
    "model": lambda state, args: {"model": state, "args": args, "epoch": 3, "scaler": {"a": 1.0}},
    "module": lambda state, args: {"module": state, "args": args, "lr": [0.1]},
    "state_dict": lambda state, args: {"state_dict": state, "args": args},
    "bare": lambda state, args: state,
}
PREFIXES = ["", "module.", "_orig_mod.", "backbone.", "module._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_pretraining_checkpoint(tmp_path, container, prefix):
    theirs = their_pretraining()
    state = {prefix + name: tensor for name, tensor in published_names(theirs).items()}
    torch.save(CONTAINERS[container](state, ARGS), tmp_path / "file.pth")
    said = {"frames": 8, "image_size": 32} if container == "bare" else {}
    ours = VideoMAE.from_pretrained(tmp_path / "file.pth", **HEADS, **said)
    assert ours.config.frames == 8
    assert ours.config.image_size == (32, 32)
    assert ours.config.norm_eps == ours.config.decoder_norm_eps == 1e-6
    assert ours.config.mask_ratio == (0.9 if container == "bare" else 0.75)
    assert_same_pretraining(ours, theirs)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_fine_tuned_checkpoint(tmp_path, container, prefix):
    theirs = their_fine_tuned()
    state = {prefix + name: tensor for name, tensor in published_names(theirs).items()}
    assert prefix + "fc_norm.weight" in state
    assert prefix + "norm.weight" not in state
    torch.save(CONTAINERS[container](state, ARGS), tmp_path / "file.pth")
    said = {"frames": 8, "image_size": 32} if container == "bare" else {}
    ours = VideoMAE.from_pretrained(tmp_path / "file.pth", heads=4, **said).eval()
    assert ours.decoder is None
    assert not ours.config.final_norm
    assert ours.config.num_classes == 7
    assert ours.config.fc_norm_eps == 1e-6
    video = video_of(ours)
    with torch.no_grad():
        expected = theirs(video.transpose(1, 2)).logits
        assert relative_error(ours.classify(video), expected) < RTOL


@pytest.mark.parametrize("args", [ARGS, vars(ARGS), None], ids=["namespace", "dict", "none"])
def test_args_of_any_kind(tmp_path, args):
    theirs = their_pretraining(qkv_bias=False, tubelet_size=1)
    torch.save({"model": published_names(theirs), "args": args}, tmp_path / "file.pth")
    said = {} if args else {"frames": 8, "image_size": 32}
    ours = VideoMAE.from_pretrained(tmp_path / "file.pth", **HEADS, **said)
    assert not ours.config.qkv_bias
    assert ours.config.tubelet == (1, 8, 8)
    assert ours.config.grid == (8, 4, 4)
    assert_same_pretraining(ours, theirs)


def test_settings_in_args_are_taken(tmp_path):
    args = argparse.Namespace(
        num_frames=8, input_size=32, mask_ratio=0.8, decoder_mask_ratio=0.5, normlize_target=False,
        mask_type="random", decoder_mask_type="run_cell",
    )  # fmt: skip
    torch.save({"model": published_names(their_pretraining()), "args": args}, tmp_path / "f.pth")
    config = VideoMAE.from_pretrained(tmp_path / "f.pth", **HEADS).config
    assert (config.mask_ratio, config.decoder_mask_ratio, config.norm_pix) == (0.8, 0.5, False)
    assert (config.mask_kind, config.decoder_mask_kind) == ("random", "running_cell")
    # The caller has the last word on what does not change the weights' meaning.
    other = VideoMAE.from_pretrained(tmp_path / "f.pth", **HEADS, mask_ratio=0.5, norm_pix=True)
    assert (other.config.mask_ratio, other.config.norm_pix) == (0.5, True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"frames": 16}, r"trained with frames=8 \(asked for 16\), a grid of \(4, 4, 4\)"),
        ({"image_size": 64}, r"trained with image_size=\(32, 32\) \(asked for \(64, 64\)\)"),
    ],
)
def test_another_grid_than_in_args_is_an_error(tmp_path, override, message):
    torch.save({"model": published_names(their_pretraining()), "args": ARGS}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=message):
        VideoMAE.from_pretrained(tmp_path / "f.pth", **HEADS, **override)


@pytest.mark.parametrize("override", [{"patch_size": 4}, {"tubelet_size": 1}], ids=str)
def test_another_tubelet_than_the_weights_is_an_error(tmp_path, override):
    torch.save({"model": published_names(their_pretraining()), "args": ARGS}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=r"patch_embed|patch_size|tubelet_size"):
        VideoMAE.from_pretrained(tmp_path / "f.pth", **HEADS, **override)


def test_heads_that_nobody_says(tmp_path):
    torch.save({"model": published_names(their_pretraining()), "args": ARGS}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="heads and no published model has width 48: pass h"):
        VideoMAE.from_pretrained(tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="decoder_width 36: pass decoder_heads="):
        VideoMAE.from_pretrained(tmp_path / "f.pth", heads=4)


@pytest.mark.parametrize(
    ("width", "heads", "decoder_width", "decoder_heads"),
    [(384, 6, 192, 3), (768, 12, 384, 6), (1024, 16, 512, 8), (1280, 16, 640, 8)],
)
def test_heads_of_published_widths(tmp_path, width, heads, decoder_width, decoder_heads):
    config = hf_config(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=1, intermediate_size=8,
        decoder_hidden_size=decoder_width, decoder_num_attention_heads=decoder_heads,
        decoder_num_hidden_layers=1, decoder_intermediate_size=8,
    )  # fmt: skip
    theirs = transformers.VideoMAEForPreTraining(config)
    torch.save({"model": published_names(theirs), "args": ARGS}, tmp_path / "f.pth")
    ours = VideoMAE.from_pretrained(tmp_path / "f.pth")
    assert (ours.config.heads, ours.config.decoder_heads) == (heads, decoder_heads)


def test_layer_scale_in_a_published_file(tmp_path):
    state = published_names(their_pretraining())
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in state if n.endswith("norm1.weight")]:
        width = state[name].shape
        for gamma in ("gamma_1", "gamma_2"):
            state[name.replace("norm1.weight", gamma)] = torch.rand(width, generator=generator)
    torch.save({"model": state, "args": ARGS}, tmp_path / "f.pth")
    ours = VideoMAE.from_pretrained(tmp_path / "f.pth", **HEADS)
    assert torch.equal(ours.encoder.blocks[1].gamma_2, state["encoder.blocks.1.gamma_2"])


def test_a_strange_tensor_in_a_published_file(tmp_path):
    state = published_names(their_pretraining())
    state["encoder.rel_pos_bias"] = torch.zeros(3)
    del state["encoder.blocks.1.attn.v_bias"]
    torch.save({"model": state, "args": ARGS}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError) as caught:
        VideoMAE.from_pretrained(tmp_path / "f.pth", **HEADS)
    assert "encoder.rel_pos_bias" in str(caught.value)
    assert "encoder.blocks.1.attn.v_bias" in str(caught.value)


# ---- writing the published names ----------------------------------------------------------

SMALL = {
    "frames": 4, "image_size": 16, "patch_size": 8,
    "width": 24, "depth": 2, "heads": 3, "mlp_dim": 37,
    "decoder_width": 20, "decoder_depth": 2, "decoder_heads": 2, "decoder_mlp_dim": 31,
}  # fmt: skip
FINE_TUNED = {"decoder_depth": 0, "num_classes": 5, "final_norm": False}


def small_model(**settings):
    model = VideoMAE("tiny", **{**SMALL, **settings})
    randomise(model)
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mask_ratio": 0.75, "decoder_mask_ratio": 0.5, "norm_pix": False},
        {
            "mask_kind": "random",
            "mask_ratio": 0.75,
            "decoder_mask_ratio": 0.3,
            "decoder_mask_kind": "random",
        },
        {"qkv_bias": False},
        {"in_channels": 1, "patch_size": (8, 4)},
        FINE_TUNED,
        {"decoder_depth": 0},
    ],
    ids=str,
)
def test_published_round_trip(tmp_path, settings):
    model = small_model(**settings)
    file = tmp_path / "file.pth"
    assert model.save_pretrained(file, dialect="videomae") == file
    content = torch.load(file, weights_only=True)
    assert content["args"]["num_frames"] == 4
    assert content["args"]["input_size"] == 16
    names = set(content["model"])
    if model.decoder is not None:
        assert {"encoder.patch_embed.proj.weight", "encoder.blocks.0.attn.qkv.weight",
                "encoder.norm.bias", "decoder.blocks.1.mlp.fc2.bias", "mask_token",
                "encoder_to_decoder.weight", "decoder.head.bias"} <= names  # fmt: skip
        assert content["model"]["mask_token"].shape == (1, 1, 20)
    else:
        assert {"patch_embed.proj.weight", "blocks.1.attn.proj.weight"} <= names
        assert not [name for name in names if name.startswith(("encoder.", "classifier."))]
    if settings is FINE_TUNED:
        assert {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} <= names
    again = VideoMAE.from_pretrained(file)
    assert same_weights(again, model)
    fields = ("frames", "image_size", "patch_size", "heads", "mask_ratio", "decoder_mask_ratio",
              "mask_kind", "decoder_mask_kind", "norm_pix", "qkv_bias", "final_norm",
              "num_classes", "decoder_depth")  # fmt: skip
    if model.decoder is None:
        fields = [f for f in fields if "mask" not in f and f != "norm_pix"]
    for field in fields:
        assert getattr(again.config, field) == getattr(model.config, field), field


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_eps": 1e-2},
        {"decoder_norm_eps": 1e-2},
        {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)},
        {**FINE_TUNED, "fc_norm_eps": 1e-2},
    ],
    ids=["norm_eps", "decoder_norm_eps", "statistics", "fc_norm_eps"],
)
@pytest.mark.parametrize("dialect", ["videomae", "huggingface"])
def test_settings_survive_or_are_refused(tmp_path, dialect, settings):
    """A file that loads and computes something else would be a silent loss."""
    # What each dialect has unless told otherwise.
    eps = 1e-5 if dialect == "huggingface" else 1e-6
    model = small_model(**{"decoder_norm_eps": eps, "fc_norm_eps": eps, **settings})
    path = tmp_path / "file.pth"
    try:
        model.save_pretrained(path, dialect=dialect)
    except CheckpointError:
        return
    again = VideoMAE.from_pretrained(path).eval()
    video = make_video((2, 3, 4, 16, 16), torch.uint8)
    with torch.no_grad():
        if model.decoder is None:
            got, expected = again.classify(video), model.classify(video)
        else:
            mask = random_mask(2, model.config.num_tokens, 4)
            got, expected = (m(video, mask, return_pred=True).pred for m in (again, model))
    assert relative_error(got, expected) < RTOL


def test_published_names_cannot_say_a_tall_image(tmp_path):
    with pytest.raises(CheckpointError, match=r"image_size \(24, 16\) is not square"):
        small_model(image_size=(24, 16)).save_pretrained(tmp_path / "f.pth", dialect="videomae")
    assert not (tmp_path / "f.pth").exists()


# ---- reading Hugging Face -----------------------------------------------------------------


def test_sharded_checkpoint(tmp_path):
    theirs = their_pretraining()
    theirs.decoder.norm.eps = 1e-5
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_pretraining(VideoMAE.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("sharded", [False, True], ids=["one", "sharded"])
def test_pytorch_bin_checkpoint(tmp_path, sharded):
    theirs = their_pretraining()
    theirs.decoder.norm.eps = 1e-5
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if sharded:
        names = sorted(state)
        weight_map = {n: f"pytorch_model-0000{1 + i % 3}-of-00003.bin" for i, n in enumerate(names)}
        for shard in set(weight_map.values()):
            part = {n: state[n] for n in names if weight_map[n] == shard}
            torch.save(part, tmp_path / shard)
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_pretraining(VideoMAE.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("on_disk", ["q_bias", "query.bias"])
def test_either_name_of_the_query_bias(tmp_path, on_disk):
    theirs = their_pretraining()
    theirs.decoder.norm.eps = 1e-5
    theirs.save_pretrained(tmp_path)
    spelt = {"q_bias": ("q_bias", "v_bias"), "query.bias": ("query.bias", "value.bias")}[on_disk]
    state = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        for written in ("q_bias", "query.bias"):
            name = name.replace(f"attention.attention.{written}", f"attention.attention.{spelt[0]}")
        for written in ("v_bias", "value.bias"):
            name = name.replace(f"attention.attention.{written}", f"attention.attention.{spelt[1]}")
        state[name] = tensor
    assert sum(on_disk in name for name in state) == 5
    save_file(state, tmp_path / "model.safetensors")
    assert_same_pretraining(VideoMAE.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("spelling", ["qkv_bias", "qv_bias"])
def test_either_spelling_of_the_bias_setting(tmp_path, spelling):
    """transformers 4.57 writes the first, 5 the second."""
    their_pretraining(qkv_bias=False).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    said = [settings.pop(name) for name in ("qkv_bias", "qv_bias") if name in settings]
    assert said == [False]
    settings[spelling] = False
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert not VideoMAE.from_pretrained(tmp_path).config.qkv_bias


def test_settings_left_out_have_their_defaults(tmp_path):
    """config.json may hold only what differs from the class."""
    model = transformers.VideoMAEModel(
        transformers.VideoMAEConfig(
            num_hidden_layers=1, num_attention_heads=6, hidden_size=24, intermediate_size=8
        )
    )
    randomise(model)
    model.save_pretrained(tmp_path)
    least = {"model_type": "videomae", "num_hidden_layers": 1, "num_attention_heads": 6,
             "hidden_size": 24, "intermediate_size": 8}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(least))
    config = VideoMAE.from_pretrained(tmp_path).config
    assert config.grid == (8, 14, 14)
    assert config.norm_eps == 1e-12
    assert not config.final_norm


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        (
            lambda s: s.pop("videomae.encoder.layer.1.attention.attention.key.weight"),
            ["encoder.blocks.1.attn.qkv.weight", "1 missing", "2 unexpected"],
        ),
        (lambda s: s.pop("mask_token"), ["unexpected", "decoder.blocks.0.attn.proj.weight"]),
        (
            lambda s: s.update({"videomae.encoder.layer.9.output.dense.bias": torch.zeros(48)}),
            ["encoder.blocks.9", "1 unexpected"],
        ),
        (
            lambda s: s.update({"decoder.head.bias": torch.zeros(3)}),
            ["decoder.head.bias: (3,) in the file, (384,) in the model"],
        ),
    ],
    ids=["no_key", "no_mask_token", "extra_layer", "reshaped"],
)
def test_strict_about_theirs(tmp_path, change, listed):
    their_pretraining().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        VideoMAE.from_pretrained(tmp_path)
    for part in listed:
        assert part in str(caught.value)


def test_processor_statistics_are_taken(tmp_path):
    their_pretraining().save_pretrained(tmp_path)
    assert VideoMAE.from_pretrained(tmp_path).config.mean == IMAGENET_MEAN
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    config = VideoMAE.from_pretrained(tmp_path).config
    assert config.mean == (0.5, 0.4, 0.3)
    assert config.std == (0.1, 0.2, 0.3)


# ---- writing Hugging Face -----------------------------------------------------------------

EXPORTS = {
    "pretraining": ({}, transformers.VideoMAEForPreTraining),
    "raw_pixels": ({"norm_pix": False}, transformers.VideoMAEForPreTraining),
    "no_bias": ({"qkv_bias": False}, transformers.VideoMAEForPreTraining),
    "no_final_norm": ({"final_norm": False}, transformers.VideoMAEForPreTraining),
    "one_channel": ({"in_channels": 1}, transformers.VideoMAEForPreTraining),
    "classifier": (FINE_TUNED, transformers.VideoMAEForVideoClassification),
    "first_token_classifier": (
        {**FINE_TUNED, "final_norm": True}, transformers.VideoMAEForVideoClassification,
    ),
    "encoder": ({"decoder_depth": 0}, transformers.VideoMAEModel),
    "encoder_no_norm": (
        {"decoder_depth": 0, "final_norm": False}, transformers.VideoMAEModel,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "their_class"), EXPORTS.values(), ids=EXPORTS)
def test_transformers_loads_what_we_write(tmp_path, settings, their_class):
    ours = small_model(decoder_norm_eps=1e-5, fc_norm_eps=1e-5, **settings)
    ours.save_pretrained(tmp_path, dialect="huggingface")
    theirs, info = their_class.from_pretrained(tmp_path, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(problem), (problem, info[problem])
    theirs.eval()
    assert theirs.config.layer_norm_eps == 1e-6
    assert theirs.config.num_frames == 4
    assert theirs.config.architectures == [their_class.__name__]
    video = video_of(ours)
    with torch.no_grad():
        if ours.decoder is not None:
            mask = random_mask(2, ours.config.num_tokens, 5)
            expected = ours(video, mask, return_pred=True)
            got = theirs(video.transpose(1, 2), bool_masked_pos=mask)
            assert relative_error(got.logits, expected.pred) < RTOL
            assert relative_error(got.loss, expected.loss) < RTOL
        elif ours.classifier is not None:
            got = theirs(video.transpose(1, 2)).logits
            assert relative_error(got, ours.classify(video)) < RTOL
            assert theirs.config.num_labels == 5
        else:
            got = theirs(video.transpose(1, 2)).last_hidden_state
            assert relative_error(got, ours.encode(video)) < RTOL
    assert same_weights(VideoMAE.from_pretrained(tmp_path), ours)


def test_published_epsilon_agrees_about_as_well(tmp_path):
    """Theirs is fixed at 1e-5 before the pixel head, the published one is 1e-6."""
    ours = small_model()
    ours.save_pretrained(tmp_path, dialect="huggingface")
    theirs = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path).eval()
    video = video_of(ours)
    mask = random_mask(2, ours.config.num_tokens, 5)
    with torch.no_grad():
        expected = ours(video, mask, return_pred=True)
        got = theirs(video.transpose(1, 2), bool_masked_pos=mask)
    # (1e-5 - 1e-6) / (2 * variance), with variances of 0.2 and more here.
    assert RTOL / 10 < relative_error(got.logits, expected.pred) < 3 * RTOL
    assert relative_error(got.loss, expected.loss) < RTOL


def test_qkv_rows_are_in_order(tmp_path):
    ours = small_model()
    ours.save_pretrained(tmp_path, dialect="huggingface")
    state = load_file(tmp_path / "model.safetensors")
    qkv = ours.encoder.blocks[0].attn.qkv.weight
    stem = "videomae.encoder.layer.0.attention.attention"
    for part, rows in zip(("query", "key", "value"), qkv.chunk(3), strict=True):
        assert torch.equal(state[f"{stem}.{part}.weight"], rows)
    # Names that both transformers 4.57 and 5 read.
    assert torch.equal(state[f"{stem}.q_bias"], ours.encoder.blocks[0].attn.q_bias)
    assert torch.equal(state[f"{stem}.v_bias"], ours.encoder.blocks[0].attn.v_bias)
    assert f"{stem}.k_bias" not in state


def test_processor_holds_imagenet_statistics(tmp_path):
    small_model().save_pretrained(tmp_path, dialect="huggingface")
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == list(IMAGENET_MEAN)
    assert processor["image_std"] == list(IMAGENET_STD)
    assert processor["size"] == {"shortest_edge": 16}
    assert processor["crop_size"] == {"height": 16, "width": 16}
    assert processor["image_processor_type"] == "VideoMAEImageProcessor"


def test_their_classes_have_no_layer_scale(tmp_path):
    with pytest.raises(CheckpointError, match="no layer scale"):
        small_model(init_values=0.1).save_pretrained(tmp_path / "x", dialect="huggingface")
    with pytest.raises(CheckpointError, match=r"patch_size \(8, 4\) is not square"):
        small_model(patch_size=(8, 4)).save_pretrained(tmp_path / "x", dialect="huggingface")
    assert not (tmp_path / "x").exists()


def test_a_model_with_decoder_and_classifier_is_refused_or_loads_whole(tmp_path):
    """No class of theirs has both."""
    ours = small_model(num_classes=5, final_norm=False)
    try:
        ours.save_pretrained(tmp_path, dialect="huggingface")
    except CheckpointError:
        return
    _, info = transformers.VideoMAEForVideoClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["unexpected_keys"]


def test_their_checkpoint_through_ours_and_back(tmp_path):
    theirs = their_pretraining()
    theirs.save_pretrained(tmp_path / "theirs")
    VideoMAE.from_pretrained(tmp_path / "theirs").save_pretrained(
        tmp_path / "again", dialect="huggingface"
    )
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
