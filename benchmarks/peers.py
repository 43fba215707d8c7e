"""One training step of ours and of Hugging Face's VideoMAE, on the same weights and clips.

Run as a script it prints the peak memory of a step in a process of its own:

    python benchmarks/peers.py {ours,huggingface} {fp32,bf16}
"""

import resource
import sys
from collections.abc import Callable

import torch
import transformers

from vmae_fast import VideoMAE

CLIPS = 2


def step_of(contender: str, precision: str) -> Callable[[], None]:
    """Forward and backward of the base model on two clips, V1 masks; gradients are dropped.

    Both read the same normalised float video, the only kind Hugging Face's takes.
    """
    torch.manual_seed(0)
    ours = VideoMAE("base")
    video = torch.randn(CLIPS, 3, 16, 224, 224)
    mask = ours.masking(torch.arange(CLIPS))
    model: torch.nn.Module = ours
    forward: Callable[[], torch.Tensor]
    if contender == "ours":

        def forward() -> torch.Tensor:
            return ours(video, mask).loss
    else:
        del ours
        config = transformers.VideoMAEConfig(use_mean_pooling=False, attn_implementation="sdpa")
        model = transformers.VideoMAEForPreTraining(config)
        pixels, hidden = video.transpose(1, 2).contiguous(), mask.to_bool()
        del video

        def forward() -> torch.Tensor:
            return model(pixels, bool_masked_pos=hidden).loss

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = forward()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def peak_memory_mib(contender: str, precision: str) -> float:
    """Peak resident memory of this process over a step, above what it held before it."""
    step = step_of(contender, precision)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    print(peak_memory_mib(sys.argv[1], sys.argv[2]))
