"""Which attention runs on a GPU: our kernels or one of PyTorch's, by a table.

On a CPU it is always PyTorch's own fused kernel, inside our op.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vmae_fast.kernels import _launch
from vmae_fast.kernels.attention import why_not
from vmae_fast.kernels.attention_tiles import Three

from . import _extension
from ._backend import chosen_backend
from ._checks import BackendError
from ._short_attention import takes

ATTENTION_KERNELS = ("auto", "triton", "cuda", "cudnn", "flash", "sdpa")

# Computed by our ops. "cuda" in the table means Triton where the extension cannot run.
_OURS = ("triton", "cuda")

# What PyTorch may run, best first. Where a call does not suit the first, the next takes it.
_ANY = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_BACKENDS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_ANY],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *_ANY],
}
# FlashAttention-2's backward pass has a mode without atomics, which torch's flag turns on.
_DETERMINISTIC = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Choice:
    """A row of the table: the kernel for up to so many keys a sequence.

    Attributes:
        target: compute capability as two digits; a row holds for later ones up to the next listed.
        value_bytes: 2 for fp16 and bf16, 4 for fp32.
        keys: the longest sequence that the row is for.
        kernel: one of ATTENTION_KERNELS.
        measured: file under benchmarks/results with the times of both that it rests on; "" where
            they are not yet measured.
    """

    target: int
    value_bytes: int
    keys: int
    kernel: str
    measured: str = ""


LONGEST = 1 << 62

# Not yet measured. Up to 256 keys PyTorch's kernels pad 160 tokens to 256, and each of ours reads
# and writes everything once. Beyond, published figures for head width 64 (FlashAttention-3, arXiv
# 2407.08608, and Triton's tutorial 06, on H100) put cuDNN first on Hopper and later, above all in
# the backward pass, where a kernel without atomics has 7 products to compute for cuDNN's 5.
CHOICES = (
    Choice(80, 2, 256, "triton"),
    Choice(80, 2, LONGEST, "flash"),
    Choice(90, 2, 256, "triton"),
    Choice(90, 2, LONGEST, "cudnn"),
    Choice(120, 2, 256, "triton"),
    Choice(120, 2, LONGEST, "flash"),
    # In fp32 longer ones spill registers.
    Choice(80, 4, 32, "triton"),
    Choice(80, 4, LONGEST, "sdpa"),
)


def _checked(name: str, source: str) -> str:
    if name not in ATTENTION_KERNELS:
        raise ValueError(f"{source} must be one of {', '.join(ATTENTION_KERNELS)}, got {name!r}")
    return name


# A plain global, not a context variable: the backward pass runs in threads of its own.
_chosen = _checked(os.environ.get("VMAE_FAST_ATTENTION", "auto"), "VMAE_FAST_ATTENTION")


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Choose what computes attention on GPUs, in all threads, while the context lasts.

    The environment variable ``VMAE_FAST_ATTENTION`` sets what holds outside of it;
    :func:`vmae_fast.ops.backend` "reference", "triton" and, for what its kernels take, "cuda" go
    before either. On a CPU it is PyTorch's own kernel, whatever is chosen here.

    Args:
        name: "auto" (a table by GPU, dtype and number of keys; under
            ``torch.use_deterministic_algorithms(True)`` never cuDNN, whose backward pass is not
            deterministic), "triton" (our kernels: an error where they do not take a head width),
            "cuda" (our CUDA C++ kernels for what they take, fp16 and bf16 in up to 256 tokens a
            sequence and head widths of 64, 80 and 88, without a class token; Triton's for the
            rest: an error where the extension is not built or cannot run),
            "cudnn", "flash" or "sdpa" (PyTorch's ``scaled_dot_product_attention`` with that
            backend first, or as PyTorch chooses).

    Raises:
        ValueError: no such kernel.

    Example:
        >>> import torch
        >>> from vmae_fast import ops
        >>> with ops.attention_kernel("flash"):
        ...     ops.attention(torch.randn(2, 5, 3 * 64), num_heads=1).shape
        torch.Size([2, 5, 64])
    """
    global _chosen
    before, _chosen = _chosen, _checked(name, "attention_kernel")
    try:
        yield
    finally:
        _chosen = before


def choose(q: Tensor, num_keys: int, *, dense: bool = True) -> str:
    """What computes attention: "op" (ours, which on a CPU is PyTorch's kernel) or one of SDPA's.

    Args:
        q: ``(B, T, H, K)``, in the dtype that is computed in.
        num_keys: of each sequence.
        dense: the sequences lie in memory as PyTorch's kernels take them; a copy otherwise.

    Raises:
        BackendError: a kernel was demanded that cannot run.
    """
    unsuited = why_not(q.shape[3])
    # On a meta device as on a CPU: the op is what has formulas for shapes and operations. Nothing
    # to attend is no case for a kernel.
    if q.device.type in ("cpu", "meta") or chosen_backend() == "triton" or 0 in q.shape:
        return "op"
    if chosen_backend() == "cuda" and takes(q.dtype, q.shape[3], num_keys):
        return "op"
    demanded = "sdpa" if chosen_backend() == "reference" else _chosen
    deterministic = torch.are_deterministic_algorithms_enabled()
    if demanded == "cudnn" and deterministic:
        raise BackendError(
            "attention_kernel cudnn is not deterministic in its backward pass, but "
            "torch.use_deterministic_algorithms(True) is on"
        )
    if q.dtype not in _launch.FLOAT_DTYPES:
        unsuited = str(q.dtype)
    target = _target(q.device.type, q.device.index)
    ours = not unsuited and target > 0
    if demanded in _OURS and not ours:
        raise BackendError(f"attention_kernel {demanded} cannot take {unsuited or q.device}")
    if demanded == "cuda" and (why := _extension.why_not(q.device)):
        raise BackendError(f"attention_kernel cuda cannot run: {why}")
    if demanded != "auto":
        return "op" if demanded in _OURS else demanded
    if not ours:
        return "sdpa"
    if deterministic or not dense:
        return "op"
    kernel = tabled(target, q.dtype, num_keys).kernel
    return "op" if kernel in _OURS else kernel


def prefers_cuda(q: Tensor, num_keys: int) -> bool:
    """Whether our kernels in CUDA C++ go before Triton's for a call that is ours to compute."""
    if _chosen != "auto" or q.device.type != "cuda":
        return _chosen == "cuda"
    target = _target(q.device.type, q.device.index)
    known = target > 0 and q.dtype in _launch.FLOAT_DTYPES
    return known and tabled(target, q.dtype, num_keys).kernel == "cuda"


def _target(kind: str, index: int | None) -> int:
    """Compute capability of a device as two digits, 0 where our kernels cannot run."""
    device = torch.device(kind if index is None else f"{kind}:{index}")
    return _launch.target_of(device) if _launch.available(device) else 0


# What torch.compiler.assume_constant_result does, without importing the compiler for it: asking a
# GPU for its capability cannot be traced.
_target._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tabled(target: int, dtype: torch.dtype, num_keys: int) -> Choice:
    """The table's row for a GPU, a dtype and a number of keys."""
    rows = [one for one in CHOICES if one.value_bytes == dtype.itemsize and one.target <= target]
    newest = max(one.target for one in rows)
    return next(one for one in rows if one.target == newest and num_keys <= one.keys)


def library_attention(qkv: Three, scale: float, kernel: str) -> Tensor:
    """``scaled_dot_product_attention``, differentiable.

    Args:
        qkv: ``(S, M, H, K)`` and twice ``(S, N, H, K)``.
        kernel: "cudnn", "flash" or "sdpa".

    Returns:
        ``(S, M, H, K)``.
    """
    q, k, v = (x.transpose(1, 2) for x in qkv)
    if torch.are_deterministic_algorithms_enabled():
        backends = _DETERMINISTIC
    elif kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    else:
        backends = _BACKENDS[kernel]
    with sdpa_kernel(backends, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
