"""Linear layer: the library's GEMM, by whichever of its paths is quicker on this processor."""

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Above it is 1.3 to 2 times quicker; below, 0.7 to 1.4 times, from run to run, so left alone:
# benchmarks/test_linear_cpu.py.
_LEAST_ROWS = 1024


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` over the last dimension."""
    if _as_convolution(x, weight):
        rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        out = F.conv2d(rows, weight[:, :, None, None], bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def _as_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether a 1x1 convolution over channels-last rows, which copies nothing, is quicker.

    torch's CPU builds multiply fp32 matrices with MKL, which leaves the wide vector units of AMD
    processors unused; its convolutions go to oneDNN, which does not. bf16 goes to oneDNN either
    way.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= _LEAST_ROWS * x.shape[-1]
        and _mkl_on_amd()
        and not torch.is_autocast_enabled("cpu")
    )


@lru_cache(maxsize=1)
def _mkl_on_amd() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
