"""Names and settings of checkpoints written by other code, and their counterparts here.

Each dialect turns a state dict into ours and back. Names it does not know are left as they
are, so that the strict comparison afterwards lists them under the name the file has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import VideoMAEConfig

State = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written whole; the message lists why."""


# Heads of a block cannot be read off its weights. Where a file does not say, the published
# widths do: the encoders' head widths are 64, 64, 64, 80 and 88, the decoders' 64 (80 for V1's
# huge). Widths that no published model has need heads= from the caller.
_ENCODER_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}


def infer_config(state: Mapping[str, Tensor], hints: dict[str, Any]) -> VideoMAEConfig:
    """Settings from the shapes of a state dict in our names; hints add what shapes do not say.

    Raises:
        CheckpointError: a tensor that decides the shapes is missing, or the heads are unknown.
    """
    patch = _required(state, "encoder.patch_embed.weight")
    if patch.dim() != 5:
        raise CheckpointError(
            f"the patch embedding's weight must be (D, C, pt, ph, pw), got {tuple(patch.shape)}: "
            "this is no video model"
        )
    width, in_channels, pt, ph, pw = patch.shape
    values: dict[str, Any] = {
        "width": width,
        "in_channels": in_channels,
        "tubelet_size": pt,
        "patch_size": (ph, pw),
        "depth": _depth(state, "encoder"),
        "mlp_dim": _required(state, "encoder.blocks.0.mlp.fc1.weight").shape[0],
        "heads": _ENCODER_HEADS.get(width),
        "qkv_bias": "encoder.blocks.0.attn.q_bias" in state,
        "init_values": 1.0 if "encoder.blocks.0.gamma_1" in state else 0.0,
        "final_norm": "encoder.norm.weight" in state,
        "decoder_depth": _depth(state, "decoder"),
        "num_classes": len(state.get("classifier.head.weight", ())),
    }
    if values["decoder_depth"]:
        decoder_width = _required(state, "encoder_to_decoder.weight").shape[0]
        values |= {
            "decoder_width": decoder_width,
            "decoder_mlp_dim": _required(state, "decoder.blocks.0.mlp.fc1.weight").shape[0],
            "decoder_heads": _DECODER_HEADS.get(decoder_width),
        }
    values |= hints
    for name in ("heads", "decoder_heads"):
        if values.get(name, 1) is None:
            of = "width" if name == "heads" else "decoder_width"
            raise CheckpointError(
                f"the checkpoint does not say its number of heads and no published model has "
                f"{of} {values[of]}: pass {name}="
            )
    return VideoMAEConfig(**values)


# ---- MCG-NJU/VideoMAE and OpenGVLab/VideoMAEv2 --------------------------------------------

_VIDEOMAE_ENCODER = (
    ("patch_embed.proj.", "encoder.patch_embed."),
    ("blocks.", "encoder.blocks."),
    ("norm.", "encoder.norm."),
)
_VIDEOMAE_FINETUNED = (
    *_VIDEOMAE_ENCODER,
    ("fc_norm.", "classifier.fc_norm."),
    ("head.", "classifier.head."),
)
_VIDEOMAE_PRETRAINING = (("encoder.patch_embed.proj.", "encoder.patch_embed."),)
# Kinds of masks by the names in their args; where they spell one otherwise.
_VIDEOMAE_KINDS = {"mask_type": "mask_kind", "decoder_mask_type": "decoder_mask_kind"}
_VIDEOMAE_SPELT = {"run_cell": "running_cell"}
# What the function depends on and neither their weights nor their args say. Their code has one
# value for each; models that differ are read back here as they were.
_VIDEOMAE_EXTRAS = (
    "heads",
    "decoder_heads",
    "norm_eps",
    "decoder_norm_eps",
    "fc_norm_eps",
    "image_mean",
    "image_std",
)


def from_videomae(
    state: Mapping[str, Tensor], args: Mapping[str, Any]
) -> tuple[State, dict[str, Any]]:
    """MCG-NJU's or OpenGVLab's names to ours, and the settings their ``args`` record."""
    plain = {_strip_wrappers(name): tensor for name, tensor in state.items()}
    pretraining = any(name.startswith("encoder.") for name in plain)
    stems = _VIDEOMAE_PRETRAINING if pretraining else _VIDEOMAE_FINETUNED
    ours = {_restem(name, stems): tensor for name, tensor in plain.items()}
    wanted = {
        "num_frames": "frames",
        "input_size": "image_size",
        "mask_ratio": "mask_ratio",
        "decoder_mask_ratio": "decoder_mask_ratio",
        # Spelt so in the published scripts.
        "normlize_target": "norm_pix",
        # Not theirs: what we add when we write their format, see to_videomae.
        **{name: name for name in _VIDEOMAE_EXTRAS},
    }
    hints = {mine: args[theirs] for theirs, mine in wanted.items() if args.get(theirs) is not None}
    for theirs, mine in _VIDEOMAE_KINDS.items():
        if args.get(theirs) is not None:
            hints[mine] = _VIDEOMAE_SPELT.get(args[theirs], args[theirs])
    if not pretraining:
        # The rest is about pretraining.
        kept = ("frames", "image_size", *_VIDEOMAE_EXTRAS)
        hints = {name: value for name, value in hints.items() if name in kept}
    return ours, hints


def to_videomae(
    state: Mapping[str, Tensor], config: VideoMAEConfig
) -> tuple[State, dict[str, Any]]:
    """Our names to MCG-NJU's and OpenGVLab's, and an ``args`` record with the grid."""
    stems = _VIDEOMAE_PRETRAINING if config.decoder_depth else _VIDEOMAE_FINETUNED
    back = [(ours, theirs) for theirs, ours in stems]
    spelt = {mine: theirs for theirs, mine in _VIDEOMAE_SPELT.items()}
    args: dict[str, Any] = {
        "num_frames": config.frames,
        "input_size": _one_number("image_size", config.size),
        "mask_ratio": config.mask_ratio,
        "decoder_mask_ratio": config.decoder_mask_ratio,
        "normlize_target": config.norm_pix,
        **{
            theirs: spelt.get(getattr(config, mine), getattr(config, mine))
            for theirs, mine in _VIDEOMAE_KINDS.items()
        },
        **{name: getattr(config, name) for name in _VIDEOMAE_EXTRAS},
    }
    return {_restem(name, back): tensor for name, tensor in state.items()}, args


# ---- Hugging Face -------------------------------------------------------------------------

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
        raise CheckpointError(f"config.json is of a {config.get('model_type')!r}, not a videomae")
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
        raise CheckpointError("Hugging Face's VideoMAE has no layer scale (init_values)")
    if config.decoder_depth and config.num_classes:
        raise CheckpointError("Hugging Face has no class with both a decoder and a classifier")
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
        "image_size": _one_number("image_size", config.size),
        "patch_size": _one_number("patch_size", config.tubelet[1:]),
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
    name = _restem(name, _HF_STEMS)
    stem, inner = _split_block(name)
    if not stem:
        return name
    for memory, disk in _HF_MEMORY_NAMES:
        inner = inner.replace(f"attention.attention.{memory}", f"attention.attention.{disk}")
    return stem + _restem(inner, _HF_BLOCK)


def _to_hf_name(name: str) -> str:
    stem, inner = _split_block(name)
    if stem:
        inner = _restem(inner, [(ours, theirs) for theirs, ours in _HF_BLOCK])
    return _restem(stem + inner, [(ours, theirs) for theirs, ours in _HF_STEMS])


def _split_block(name: str) -> tuple[str, str]:
    match = re.match(r"((?:en|de)coder\.blocks\.\d+\.)(.*)", name)
    return (match[1], match[2]) if match else ("", name)


def _hf_size(value: int | list[int]) -> int | tuple[int, int]:
    return value if isinstance(value, int) else (value[0], value[1])


# ---- shared -------------------------------------------------------------------------------


def _restem(name: str, stems: Any) -> str:
    for stem, replacement in stems:
        if name.startswith(stem):
            return str(replacement) + name[len(stem) :]
    return name


def _strip_wrappers(name: str) -> str:
    wrappers = ("module.", "_orig_mod.", "backbone.")
    while name.startswith(wrappers):
        name = name.split(".", 1)[1]
    return name


def _required(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise CheckpointError(
            f"missing {name}, which decides the model's shape: is this a VideoMAE checkpoint? "
            f"It holds {len(state)} tensors, the first {sorted(state)[:5]}"
        )
    return state[name]


def _depth(state: Mapping[str, Tensor], stack: str) -> int:
    indices = {int(m[1]) for name in state if (m := re.match(rf"{stack}\.blocks\.(\d+)\.", name))}
    return max(indices, default=-1) + 1


def _tuple(value: Any) -> tuple[float, ...] | None:
    return None if value is None else tuple(value)


def _one_number(name: str, pair: tuple[int, ...]) -> int:
    if pair[0] != pair[1]:
        raise CheckpointError(f"{name} {pair} is not square, which this dialect cannot say")
    return pair[0]
