"""One training step of ours, of the plain model and of Hugging Face's, on the same clips."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from plain_videomae import PlainVideoMAE, sdpa

from vmae_fast import VideoMAE, VideoMAEConfig

CLIPS = 2


# Hugging Face's class, by how it computes attention and what of it is compiled. Blocks of one
# shape are compiled once, the whole model block by block: many times as long for a deep one.
PEERS = {
    "huggingface_eager": ("eager", None),
    "huggingface": ("sdpa", None),
    "huggingface_compiled": ("sdpa", "model"),
    "huggingface_compiled_blocks": ("sdpa", "blocks"),
}
# Our settings by its names. It has square tubelets only.
_THEIRS: dict[str, Callable[[VideoMAEConfig], Any]] = {
    "num_frames": lambda config: config.frames,
    "image_size": lambda config: config.size,
    "num_channels": lambda config: config.in_channels,
    "patch_size": lambda config: config.tubelet[1],
    "tubelet_size": lambda config: config.tubelet_size,
    "hidden_size": lambda config: config.width,
    "num_hidden_layers": lambda config: config.depth,
    "num_attention_heads": lambda config: config.heads,
    "intermediate_size": lambda config: config.encoder_hidden,
    "decoder_hidden_size": lambda config: config.decoder_width,
    "decoder_num_hidden_layers": lambda config: config.decoder_depth,
    "decoder_num_attention_heads": lambda config: config.decoder_heads,
    "decoder_intermediate_size": lambda config: config.decoder_hidden,
    "qv_bias": lambda config: config.qkv_bias,
    "layer_norm_eps": lambda config: config.norm_eps,
    "norm_pix_loss": lambda config: config.norm_pix,
}


def step_of(
    contender: str, precision: str, *, device: str = "cpu", clips: int = CLIPS, **settings: Any
) -> Callable[[], None]:
    """Forward and backward of a model on some clips; gradients are dropped.

    All read the same normalised float video, the only kind Hugging Face's takes.

    Args:
        contender: "ours", "plain" (attention by SDPA) or one of PEERS.
        precision: "fp32", or "bf16" for autocast.
        device: where.
        clips: how many.
        **settings: as of :func:`made`.
    """
    model, inputs = made(contender, device, clips, **settings)

    def step() -> None:
        with autocast(device, precision):
            loss = model(**inputs).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def training_step_of(
    contender: str, precision: str, *, device: str, clips: int, **settings: Any
) -> Callable[[], None]:
    """As :func:`step_of`, and torch's fused AdamW."""
    model, inputs = made(contender, device, clips, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()

    return step


def autocast(device: str, precision: str) -> torch.autocast:
    """Context of a forward pass."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def made(
    contender: str, device: str, clips: int, *, size: str | VideoMAEConfig = "base", **settings: Any
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A contender's model, and what it is called with.

    Args:
        contender: as of :func:`step_of`.
        device: where.
        clips: how many.
        size: of SIZES, or a config.
        **settings: of the model where they are not the size's.

    Raises:
        ValueError: Hugging Face's class does not do what the settings say.
    """
    config = VideoMAEConfig.of(size, **settings)
    torch.manual_seed(0)
    video = torch.randn(clips, config.in_channels, config.frames, *config.size, device=device)
    mask = config.masking(torch.arange(clips, device=device))
    if contender in PEERS:
        model = _huggingface(config, device, *PEERS[contender])
        pixels = video.transpose(1, 2).contiguous()
        return model, {"pixel_values": pixels, "bool_masked_pos": mask.to_bool()}
    with torch.device(device):
        ours = VideoMAE(config)
    model = PlainVideoMAE(ours, attend=sdpa) if contender == "plain" else ours
    return model, {"video": video, "mask": mask}


def _huggingface(
    config: VideoMAEConfig, device: str, attention: str, compiled: str | None
) -> torch.nn.Module:
    import transformers
    from transformers.models.videomae import modeling_videomae

    if config.decoder_mask_ratio:
        raise ValueError("Hugging Face's class has no decoder masking (decoder_mask_ratio)")
    theirs = transformers.VideoMAEConfig(
        use_mean_pooling=False,
        attn_implementation=attention,
        **{name: of(config) for name, of in _THEIRS.items()},
    )
    # Made value by value in Python, which takes seconds, and only read: once for all peers.
    table = modeling_videomae.get_sinusoid_encoding_table
    if not hasattr(table, "cache_info"):
        modeling_videomae.get_sinusoid_encoding_table = cache(table)
    # There from the start: on a CPU weights for a giant take long to draw.
    with torch.device(device):
        model = transformers.VideoMAEForPreTraining(theirs)
    kind = modeling_videomae.VideoMAELayer
    blocks = [module for module in model.modules() if isinstance(module, kind)]
    for module in {None: [], "model": [model], "blocks": blocks}[compiled]:
        module.compile()
    return model


def saved_bytes(contender: str, precision: str, *, clips: int = CLIPS, **settings: Any) -> int:
    """Bytes that the forward pass keeps for the backward pass, on the CPU.

    Each memory counts once and whole, whatever part of it is kept; parameters and inputs do not
    count, copies of parameters in autocast's dtype do.
    """
    model, inputs = made(contender, "cpu", clips, **settings)
    mask = inputs["mask"]
    given = [*model.parameters(), *model.buffers()]
    given += [inputs["video"], mask.visible_idx, mask.decode_idx]
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    # Holding them keeps their addresses from being given to another tensor.
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with autocast("cpu", precision):
            loss = model(**inputs).loss
        size = sum(storage.nbytes() for storage in kept.values())
        del loss
    return size
