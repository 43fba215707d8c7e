"""CUDA graphs of the training step: recorded once, then launched whole for every step."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import torch

from vmae_fast.models import VideoMAE

from .config import ConfigError
from .distributed import Ranks

# Runs before recording: kernels are compiled, and libraries make their workspaces, in the first;
# PyTorch's documentation of CUDA graphs takes three.
WARM_UPS = 3


def _nothing() -> None:
    pass


class Capture(Protocol):
    """Records what a function does on the device.

    The function is run some times before; ``prepare`` runs before each of its runs, and is not
    recorded. Returns what does the same again: on the same memory, with the same host values.
    """

    def __call__(
        self, function: Callable[[], None], prepare: Callable[[], None] = _nothing
    ) -> Callable[[], None]: ...


class CudaCapture:
    """:class:`Capture` by CUDA graphs that share one pool of memory.

    Sharing is safe as they are launched in the order in which they were recorded, and what one
    leaves for the next is held by the parameters' gradients.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, function: Callable[[], None], prepare: Callable[[], None] = _nothing
    ) -> Callable[[], None]:
        """Warm up on a side stream and record there."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                prepare()
                function()
            prepare()
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are bound by the recording: the loader's thread goes on pinning
        # memory meanwhile.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            function()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return graph.replay


def choose_capture(setting: str, model: VideoMAE, ranks: Ranks) -> CudaCapture | None:
    """What records the steps of a run; None where they are launched op by op.

    Args:
        setting: "on", "off", or "auto": on where it can be.
        model: on its device.
        ranks: this process.

    Raises:
        ConfigError: it was asked for and cannot be.
    """
    if setting == "off":
        return None
    reason = why_not(model, ranks)
    if reason is None:
        return CudaCapture(ranks.device)
    if setting == "on":
        raise ConfigError(f"--cuda-graph on: {reason}")
    return None


def why_not(model: VideoMAE, ranks: Ranks) -> str | None:
    """Why a step cannot be recorded; None where it can."""
    if is_sharded(model):
        return "the model is sharded by FSDP, which gathers its weights at every layer"
    if ranks.world_size > 1:
        return f"gradients are exchanged between {ranks.world_size} processes, launched by DDP"
    if ranks.device.type != "cuda":
        return f"needs a CUDA device, the run is on {ranks.device}"
    if os.environ.get("VMAE_FAST_DEBUG", "0") not in ("", "0"):
        return "VMAE_FAST_DEBUG reads indices back to check them"
    return None


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP holds its parameters."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(
        isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()
    ) or any(isinstance(parameter, DTensor) for parameter in model.parameters())
