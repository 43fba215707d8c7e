"""Which implementation of an op runs: Triton's or CUDA C++ on a GPU, else plain PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vmae_fast.kernels import _launch

from . import _extension
from ._checks import BackendError

BACKENDS = ("auto", "reference", "triton", "cuda")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# A plain global, not a context variable: the backward pass runs in threads of its own.
_chosen = _checked(os.environ.get("VMAE_FAST_BACKEND", "auto"), "VMAE_FAST_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of all ops, in all threads, while the context lasts.

    The environment variable ``VMAE_FAST_BACKEND`` sets what holds outside of it.

    Args:
        name: "auto" (Triton kernels on GPUs of compute capability 8.0 and later, for fp32, fp16
            and bf16; plain PyTorch elsewhere), "reference" (plain PyTorch everywhere), "triton"
            (an error where its kernels cannot run) or "cuda" (CUDA C++ kernels for the ops and
            arguments that one is written for, what "auto" takes for all others; an error in those
            ops where the extension is not built or cannot run on the device).

    Raises:
        ValueError: no such backend.

    Example:
        >>> import torch
        >>> from vmae_fast import ops
        >>> x, idx = torch.randn(1, 4, 8), torch.tensor([[2, 0]])
        >>> with ops.backend("reference"):
        ...     ops.gather_tokens(x, idx).shape
        torch.Size([1, 2, 8])
    """
    global _chosen
    before, _chosen = _chosen, _checked(name, "backend")
    try:
        yield
    finally:
        _chosen = before


def chosen_backend() -> str:
    """What :func:`backend` or the environment variable demands."""
    return _chosen


def backend_summary(extension: bool = True) -> str:
    """One line on what runs where, for people.

    Args:
        extension: also say of the CUDA C++ extension.
    """
    if _chosen == "reference":
        return "reference: plain PyTorch for every op, as VMAE_FAST_BACKEND demands"
    line = _triton_summary()
    return f"{line}; {extension_summary()}" if extension else line


def extension_summary() -> str:
    """One line on the CUDA C++ extension, for people."""
    return _extension.summary(_chosen)


def _triton_summary() -> str:
    if _launch.triton is None:
        return "reference: plain PyTorch for every op; triton is not installed"
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    served = [str(gpu) for gpu in gpus if _launch.available(gpu)]
    if not served:
        why = "the Triton kernels need a GPU of compute capability 8.0 or later"
        if _chosen == "triton":
            return f"none: VMAE_FAST_BACKEND demands triton, but {why}"
        return f"reference: plain PyTorch for every op; {why}"
    return (
        f"triton for token and loss ops on {', '.join(served)}; attention by triton or PyTorch's "
        "cuDNN or FlashAttention, whichever the length suits; PyTorch's own matrix products"
    )


def use_triton(
    *tensors: Tensor | None, dtype: torch.dtype | None = None, too_large: str = ""
) -> bool:
    """Whether Triton kernels are to run on these tensors.

    Args:
        *tensors: what the kernels read; the first one's device decides.
        dtype: what they compute in, where no tensor says it.
        too_large: what of the arguments the kernels cannot hold, in words; "" if they can.

    Raises:
        BackendError: Triton was demanded and cannot run.
    """
    if _chosen == "reference":
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    floats = [tensor.dtype for tensor in given if tensor.is_floating_point()]
    floats += [] if dtype is None else [dtype]
    wrong = [kind for kind in floats if kind not in _launch.FLOAT_DTYPES]
    device = given[0].device
    if not wrong and not too_large and _launch.available(device):
        return True
    if _chosen == "triton" and too_large:
        raise BackendError(f"backend triton cannot take {too_large}")
    if _chosen == "triton":
        raise BackendError(
            f"backend triton takes float32, float16 and bfloat16, got {wrong[0]}"
            if wrong
            else "backend triton needs a GPU of compute capability 8.0 or later (or "
            f"TRITON_INTERPRET=1 and tensors on the CPU), but the tensors are on {device}"
        )
    return False


def use_cuda(*tensors: Tensor | None, unsuited: str = "", preferred: bool = False) -> bool:
    """Whether a CUDA C++ kernel is to run on these tensors.

    Args:
        *tensors: what the kernel reads; the first one's device decides.
        unsuited: what of the call the kernel does not take, in words; "" if it takes it.
        preferred: a table puts the kernel first for this call: then "auto" takes it as well.

    Raises:
        BackendError: it was demanded and cannot run, or it was built and cannot be loaded.
    """
    if _chosen in ("reference", "triton"):
        return False
    device = next(tensor.device for tensor in tensors if tensor is not None)
    if _chosen == "auto" and device.type == "cuda":
        # One that was built and cannot be loaded shows, whether or not this call wants it.
        _extension.extension()
    if _chosen == "auto" and (unsuited or not preferred):
        return False
    why = _extension.why_not(device)
    if why and _chosen == "cuda":
        raise BackendError(f"backend cuda cannot run on {device}: {why}")
    return not why and not unsuited
