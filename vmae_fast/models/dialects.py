"""Names and settings of MCG-NJU's and OpenGVLab's checkpoints, and their counterparts here.

What any dialect needs is here too; Hugging Face's is in :mod:`.huggingface`. Each turns a state
dict into ours and back. Names it does not know are left as they are, so that the strict comparison
afterwards lists them under the name the file has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .config import VideoMAEConfig

State = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written whole; the message lists why."""


class HeadsUnknown(CheckpointError):
    """Settings that cannot be inferred for want of the number of heads alone."""


# Heads of a block cannot be read off its weights. Where a file does not say, the published
# widths do: the encoders' head widths are 64, 64, 64, 80 and 88, the decoders' 64 (80 for V1's
# huge). Widths that no published model has need heads= from the caller.
_ENCODER_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}

# Settings that the shapes of a state dict show.
SHOWN_BY_SHAPES = (
    "width", "in_channels", "tubelet_size", "patch_size", "depth", "mlp_dim", "qkv_bias",
    "final_norm", "decoder_width", "decoder_mlp_dim", "decoder_depth", "num_classes",
)  # fmt: skip


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
            raise HeadsUnknown(
                f"the checkpoint does not say its number of heads and no published model has "
                f"{of} {values[of]}: pass {name}= (--{name.replace('_', '-')})"
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
    ours = {restem(name, stems): tensor for name, tensor in plain.items()}
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
    """Our names to MCG-NJU's and OpenGVLab's, and an ``args`` record with the grid.

    Raises:
        CheckpointError: the model's positions are interpolated, or its sizes are not square.
    """
    refuse_interpolated(config, "their code")
    stems = _VIDEOMAE_PRETRAINING if config.decoder_depth else _VIDEOMAE_FINETUNED
    back = [(ours, theirs) for theirs, ours in stems]
    spelt = {mine: theirs for theirs, mine in _VIDEOMAE_SPELT.items()}
    args: dict[str, Any] = {
        "num_frames": config.frames,
        "input_size": one_number("image_size", config.size),
        "mask_ratio": config.mask_ratio,
        "decoder_mask_ratio": config.decoder_mask_ratio,
        "normlize_target": config.norm_pix,
        **{
            theirs: spelt.get(getattr(config, mine), getattr(config, mine))
            for theirs, mine in _VIDEOMAE_KINDS.items()
        },
        **{name: getattr(config, name) for name in _VIDEOMAE_EXTRAS},
        # Also where it is None: then the weights are ours, and nothing is known to restrict them.
        "license": config.license,
    }
    return {restem(name, back): tensor for name, tensor in state.items()}, args


# ---- shared -------------------------------------------------------------------------------


def restem(name: str, stems: Any) -> str:
    """``name`` with the first of the stems it starts with replaced: pairs of (stem, by what)."""
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


def refuse_interpolated(config: VideoMAEConfig, who: str) -> None:
    """Raise a CheckpointError for a model whose tables are not those that ``who`` computes."""
    if config.positions_from is not None:
        raise CheckpointError(
            f"the positions are those of a grid of {config.positions_from} tokens interpolated to "
            f"{config.grid}, but {who} computes the plain table of {config.grid} and would give "
            "other outputs; the dialect 'vmae-fast' keeps them"
        )


def one_number(name: str, pair: tuple[int, ...]) -> int:
    """Height and width as one number; a CheckpointError where they differ."""
    if pair[0] != pair[1]:
        raise CheckpointError(
            f"{name} {pair} is not square, which this dialect cannot say; 'vmae-fast' can"
        )
    return pair[0]
