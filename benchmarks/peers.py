"""One training step of ours and of Hugging Face's VideoMAE, on the same weights and clips.

Run as a script it prints the peak memory of a step in a process of its own:

    python benchmarks/peers.py {ours,huggingface} {fp32,bf16}
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import peak_memory_bytes

from vmae_fast import Mask, Masking, VideoMAE

CLIPS = 2


# Hugging Face's class, by how it computes attention and whether it is compiled.
PEERS = {
    "huggingface_eager": ("eager", False),
    "huggingface": ("sdpa", False),
    "huggingface_compiled": ("sdpa", True),
}


def step_of(
    contender: str, precision: str, *, device: str = "cpu", clips: int = CLIPS, **size: int
) -> Callable[[], None]:
    """Forward and backward of the base model on some clips, V1 masks; gradients are dropped.

    All read the same normalised float video, the only kind Hugging Face's takes.

    Args:
        contender: "ours" or one of PEERS.
        precision: "fp32", or "bf16" for autocast.
        device: where.
        clips: how many.
        size: ``depth`` and ``decoder_depth`` where they are not base's.
    """
    torch.manual_seed(0)
    video = torch.randn(clips, 3, 16, 224, 224, device=device)
    mask = Masking((8, 14, 14))(torch.arange(clips, device=device))
    if contender == "ours":
        model: torch.nn.Module = VideoMAE("base", **size).to(device)
        inputs: dict[str, torch.Tensor | Mask] = {"video": video, "mask": mask}
    else:
        model = _huggingface(*PEERS[contender], **size).to(device)
        pixels = video.transpose(1, 2).contiguous()
        inputs = {"pixel_values": pixels, "bool_masked_pos": mask.to_bool()}
        del video, mask
    kind = torch.device(device).type

    def step() -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**inputs).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def _huggingface(attention: str, compiled: bool, **size: int) -> torch.nn.Module:
    import transformers

    names = {"depth": "num_hidden_layers", "decoder_depth": "decoder_num_hidden_layers"}
    config = transformers.VideoMAEConfig(
        use_mean_pooling=False,
        attn_implementation=attention,
        **{names[name]: value for name, value in size.items()},
    )
    model = transformers.VideoMAEForPreTraining(config)
    if compiled:
        model.compile()
    return model


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
