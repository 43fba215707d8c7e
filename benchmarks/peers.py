"""One training step of ours, of the plain model and of Hugging Face's VideoMAE, on the same clips.

Run as a script it prints the peak memory of a step in a process of its own:

    python benchmarks/peers.py {ours,plain,huggingface} {fp32,bf16}
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain_videomae import PlainVideoMAE
from timing import peak_memory_bytes

from vmae_fast import VideoMAE

CLIPS = 2


# Hugging Face's class, by how it computes attention and whether it is compiled.
PEERS = {
    "huggingface_eager": ("eager", False),
    "huggingface": ("sdpa", False),
    "huggingface_compiled": ("sdpa", True),
}
# Its names of our settings.
_THEIRS = {
    "frames": "num_frames",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "decoder_width": "decoder_hidden_size",
    "decoder_depth": "decoder_num_hidden_layers",
    "decoder_heads": "decoder_num_attention_heads",
    "decoder_mlp_dim": "decoder_intermediate_size",
}


def step_of(
    contender: str, precision: str, *, device: str = "cpu", clips: int = CLIPS, **settings: Any
) -> Callable[[], None]:
    """Forward and backward of the base model on some clips, V1 masks; gradients are dropped.

    All read the same normalised float video, the only kind Hugging Face's takes.

    Args:
        contender: "ours", "plain" (attention by SDPA) or one of PEERS.
        precision: "fp32", or "bf16" for autocast.
        device: where.
        clips: how many.
        **settings: of the model where they are not base's.
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
    contender: str, device: str, clips: int, **settings: Any
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A contender's model, and what it is called with."""
    # Shapes and masks alone: a model of ours beside Hugging Face's would count as its memory.
    with torch.device("meta"):
        double = VideoMAE("base", **settings)
    config = double.config
    torch.manual_seed(0)
    shape = (clips, config.in_channels, config.frames, *config.size)
    video = torch.randn(shape, device=device)
    mask = double.masking(torch.arange(clips, device=device))
    if contender in PEERS:
        model = _huggingface(*PEERS[contender], **settings).to(device)
        pixels = video.transpose(1, 2).contiguous()
        return model, {"pixel_values": pixels, "bool_masked_pos": mask.to_bool()}
    ours = VideoMAE("base", **settings).to(device)
    model = PlainVideoMAE(ours, sdpa=True) if contender == "plain" else ours
    return model, {"video": video, "mask": mask}


def _huggingface(attention: str, compiled: bool, **settings: Any) -> torch.nn.Module:
    import transformers

    config = transformers.VideoMAEConfig(
        use_mean_pooling=False,
        attn_implementation=attention,
        **{_THEIRS[name]: value for name, value in settings.items()},
    )
    model = transformers.VideoMAEForPreTraining(config)
    if compiled:
        model.compile()
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


def peak_memory_mib(contender: str, precision: str) -> dict[str, float]:
    """Peak memory of a step, in a process of its own, above what is held with the model.

    Returns:
        ``tensors``: bytes that torch's allocator handed out at once, exact and repeatable.
        ``resident``: what the process took from the system over two steps, fragmentation and
        library buffers included; differs by some percent from run to run. Linux only (ru_maxrss
        would start at the peak of the process that started this one).
    """
    step = step_of(contender, precision)
    before = _status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    step()
    resident = _status_mib("VmHWM") - before
    tensors = peak_memory_bytes(step, torch.device("cpu")) / 2**20
    return {"tensors": tensors, "resident": resident}


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(peak_memory_mib(sys.argv[1], sys.argv[2])))
