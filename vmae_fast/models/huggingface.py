"""Hugging Face's VideoMAE: its names and settings, and their counterparts here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import VideoMAEConfig
from .dialects import CheckpointError, State, one_number, refuse_interpolated, restem

_HF_STEMS = (
    ("videomae.embeddings.patch_embeddings.projection.", "encoder.patch_embed."),
    ("videomae.encoder.layer.", "encoder.blocks."),
    ("videomae.layernorm.", "encoder.norm."),
    ("decoder.decoder_layers.", "decoder.blocks."),
    ("fc_norm.", "classifier.fc_norm."),
    ("classifier.", "classifier.head."),
)
_HF_BLOCK = (
    ("attention.attention.q_bias", "attn.q_bias"),
    ("attention.attention.v_bias", "attn.v_bias"),
    ("attention.output.dense.", "attn.proj."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)
_HF_QKV = tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value"))
# transformers 5 holds these names in memory and writes the ones above; either may be on disk.
_HF_MEMORY_NAMES = (("query.bias", "q_bias"), ("value.bias", "v_bias"))
# What their config has no word for; a checkpoint of theirs gets our defaults.
LACKS = (
    "mask_kind", "mask_ratio", "decoder_mask_ratio", "decoder_mask_kind", "drop_path",
    "positions_from",
)  # fmt: skip
# LayerNorm's default in torch, which their decoder.norm and fc_norm keep whatever the config.
_HF_FIXED_EPS = 1e-5


def from_huggingface(
    state: Mapping[str, Tensor], config: Mapping[str, Any], processor: Mapping[str, Any]
) -> tuple[State, VideoMAEConfig]:
    """Hugging Face's names to ours, with the settings their config.json holds.

    ``processor`` is their preprocessor_config.json, or empty: its mean and std are what uint8
    video is normalised with.

    Raises:
        CheckpointError: a setting this package has no counterpart for.
    """
    if config.get("model_type") != "videomae":
        raise CheckpointError(
            f"config.json is of a {config.get('model_type')!r}, not a videomae; name a checkpoint "
            "of a VideoMAE"
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"hidden_act {config['hidden_act']!r} is not supported, only 'gelu'")
    ours = {_from_hf_name(name): tensor for name, tensor in state.items()}
    for block in sorted({m[1] for n in ours if (m := re.match(r"(.*blocks\.\d+\.)attention", n))}):
        parts = [block + part for part in _HF_QKV]
        # A part alone cannot be joined; left as it is, it is listed as unexpected.
        if all(part in ours for part in parts):
            ours[f"{block}attn.qkv.weight"] = torch.cat([ours.pop(part) for part in parts])

    def get(name: str, default: Any) -> Any:
        value = config.get(name)
        return default if value is None else value

    classes = len(ours.get("classifier.head.weight", ()))
    # Their class defaults hold where config.json leaves a setting out.
    settings = VideoMAEConfig(
        frames=get("num_frames", 16),
        image_size=_hf_size(get("image_size", 224)),
        in_channels=get("num_channels", 3),
        patch_size=_hf_size(get("patch_size", 16)),
        tubelet_size=get("tubelet_size", 2),
        width=get("hidden_size", 768),
        depth=get("num_hidden_layers", 12),
        heads=get("num_attention_heads", 12),
        mlp_dim=get("intermediate_size", 3072),
        decoder_width=get("decoder_hidden_size", 384),
        decoder_depth=get("decoder_num_hidden_layers", 4) if "mask_token" in ours else 0,
        decoder_heads=get("decoder_num_attention_heads", 6),
        decoder_mlp_dim=get("decoder_intermediate_size", 1536),
        qkv_bias=get("qv_bias", get("qkv_bias", True)),
        norm_eps=get("layer_norm_eps", 1e-12),
        decoder_norm_eps=_HF_FIXED_EPS,
        fc_norm_eps=_HF_FIXED_EPS,
        final_norm=not get("use_mean_pooling", True),
        num_classes=classes,
        norm_pix=get("norm_pix_loss", True),
        image_mean=_tuple(processor.get("image_mean")),
        image_std=_tuple(processor.get("image_std")),
    )
    return ours, settings


def to_huggingface(
    state: Mapping[str, Tensor], config: VideoMAEConfig
) -> tuple[State, dict[str, Any], dict[str, Any]]:
    """Our names to Hugging Face's, with their config.json and preprocessor_config.json.

    Raises:
        CheckpointError: the model has a setting that their classes do not.
    """
    if config.init_values:
        raise CheckpointError(
            "Hugging Face's VideoMAE has no layer scale (init_values); the dialects 'vmae-fast' "
            "and 'videomae' do"
        )
    if config.decoder_depth and config.num_classes:
        raise CheckpointError(
            "Hugging Face has no class with both a decoder and a classifier; without the decoder "
            "(--encoder-only) it can be written"
        )
    refuse_interpolated(config, "Hugging Face's class")
    for name, used in (
        ("decoder_norm_eps", config.decoder_depth),
        ("fc_norm_eps", config.num_classes and not config.final_norm),
    ):
        # From 1e-6, the originals', outputs change by some 1e-5; from anything else by more.
        if used and not 1e-6 <= getattr(config, name) <= _HF_FIXED_EPS:
            raise CheckpointError(
                f"{name} {getattr(config, name)} would silently become Hugging Face's fixed "
                f"{_HF_FIXED_EPS}"
            )
    theirs: State = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.weight"):
            block = _to_hf_name(name.removesuffix("attn.qkv.weight"))
            for part, rows in zip(_HF_QKV, tensor.chunk(3), strict=True):
                theirs[block + part] = rows.contiguous()
        else:
            theirs[_to_hf_name(name)] = tensor
    kind = "ForPreTraining" if config.decoder_depth else "Model"
    if config.num_classes:
        kind = "ForVideoClassification"
    if kind == "Model":
        theirs = {name.removeprefix("videomae."): tensor for name, tensor in theirs.items()}
    settings: dict[str, Any] = {
        "architectures": [f"VideoMAE{kind}"],
        "model_type": "videomae",
        "image_size": one_number("image_size", config.size),
        "patch_size": one_number("patch_size", config.tubelet[1:]),
        "num_channels": config.in_channels,
        "num_frames": config.frames,
        "tubelet_size": config.tubelet_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.encoder_hidden,
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "qkv_bias": config.qkv_bias,
        "use_mean_pooling": not config.final_norm,
        "norm_pix_loss": config.norm_pix,
        "torch_dtype": "float32",
        # No setting of theirs: transformers keeps it, and writes it again.
        "license": config.license,
    }
    if config.decoder_depth:
        settings |= {
            "decoder_num_attention_heads": config.decoder_heads,
            "decoder_hidden_size": config.decoder_width,
            "decoder_num_hidden_layers": config.decoder_depth,
            "decoder_intermediate_size": config.decoder_hidden,
        }
    if config.num_classes:
        settings["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_classes)}
        settings["label2id"] = {f"LABEL_{i}": i for i in range(config.num_classes)}
    processor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "size": {"shortest_edge": min(config.size)},
        "crop_size": {"height": config.size[0], "width": config.size[1]},
    }
    return theirs, settings, processor


def _from_hf_name(name: str) -> str:
    if name.startswith(("embeddings.", "encoder.layer.", "layernorm.")):
        name = "videomae." + name
    name = restem(name, _HF_STEMS)
    stem, inner = _split_block(name)
    if not stem:
        return name
    for memory, disk in _HF_MEMORY_NAMES:
        inner = inner.replace(f"attention.attention.{memory}", f"attention.attention.{disk}")
    return stem + restem(inner, _HF_BLOCK)


def _to_hf_name(name: str) -> str:
    stem, inner = _split_block(name)
    if stem:
        inner = restem(inner, [(ours, theirs) for theirs, ours in _HF_BLOCK])
    return restem(stem + inner, [(ours, theirs) for theirs, ours in _HF_STEMS])


def _split_block(name: str) -> tuple[str, str]:
    match = re.match(r"((?:en|de)coder\.blocks\.\d+\.)(.*)", name)
    return (match[1], match[2]) if match else ("", name)


def _hf_size(value: int | list[int]) -> int | tuple[int, int]:
    return value if isinstance(value, int) else (value[0], value[1])


def _tuple(value: Any) -> tuple[float, ...] | None:
    return None if value is None else tuple(value)
