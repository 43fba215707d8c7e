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


def step_of(contender: str, precision: str) -> Callable[[], None]:
    """Forward and backward of the base model on two clips, V1 masks; gradients are dropped.

    Both read the same normalised float video, the only kind Hugging Face's takes.
    """
    torch.manual_seed(0)
    video = torch.randn(CLIPS, 3, 16, 224, 224)
    mask = Masking((8, 14, 14))(torch.arange(CLIPS))
    if contender == "ours":
        model: torch.nn.Module = VideoMAE("base")
        inputs: dict[str, torch.Tensor | Mask] = {"video": video, "mask": mask}
    else:
        import transformers

        config = transformers.VideoMAEConfig(use_mean_pooling=False, attn_implementation="sdpa")
        model = transformers.VideoMAEForPreTraining(config)
        pixels = video.transpose(1, 2).contiguous()
        inputs = {"pixel_values": pixels, "bool_masked_pos": mask.to_bool()}
        del video, mask

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**inputs).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


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
