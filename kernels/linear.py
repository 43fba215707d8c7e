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
        out = F.conv2d(_as_image(x), weight[:, :, None, None], bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def matmul_accumulated(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in ``dtype``, in one rounding from the sums where the library can."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def weight_gradient(grad_RO: Tensor, x_RI: Tensor) -> Tensor:
    """``grad.T @ x``, ``(out, in)`` in fp32 (fp64 for fp64), added up in it too."""
    if x_RI.device.type == "cpu" and x_RI.dtype in (torch.float16, torch.bfloat16):
        # Products of these give no more digits there than they take.
        grad_RO, x_RI = grad_RO.float(), x_RI.float()
    return rounded_weight_gradient(grad_RO, x_RI)


def rounded_weight_gradient(grad_RO: Tensor, x_RI: Tensor) -> Tensor:
    """As :func:`weight_gradient`, but on a CPU rounded once to the operands' dtype.

    For a gradient that is one such product: several are to be added up in fp32.
    """
    if _as_convolution(x_RI, grad_RO):
        kernel = x_RI.new_empty(grad_RO.shape[1], x_RI.shape[1], 1, 1)  # read for its shape only
        _, grad_weight, _ = torch.ops.aten.convolution_backward(
            _as_image(grad_RO), _as_image(x_RI), kernel, None,
            [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False],
        )  # fmt: skip
        return grad_weight.flatten(1)
    wide = torch.promote_types(x_RI.dtype, torch.float32)
    return matmul_accumulated(grad_RO.t(), x_RI, wide)


def _as_image(rows: Tensor) -> Tensor:
    """Rows of any leading shape as a channels-last image ``(1, width, rows, 1)``, not copied."""
    return rows.reshape(1, -1, 1, rows.shape[-1]).permute(0, 3, 1, 2)


def _as_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether a 1x1 convolution over channels-last rows, which copies nothing, is quicker.

    torch's CPU builds multiply fp32 matrices with MKL, which leaves the AVX-512 units of AMD
    processors unused; its convolutions go to oneDNN, which does not. Where there are none
    convolutions are as quick forward, and a third as quick for the weight's gradient. bf16 goes to
    oneDNN either way.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= _LEAST_ROWS * x.shape[-1]
        and _mkl_leaves_units_unused()
        and not torch.is_autocast_enabled("cpu")
    )


@lru_cache(maxsize=1)
def _mkl_leaves_units_unused() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
