"""Attention within short sequences by the CUDA C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmae_fast.kernels.attention_tiles import Results, Sequences, Three

from . import _extension

DTYPES = (torch.float16, torch.bfloat16)
HEAD_WIDTHS = (64, 80, 88)
LONGEST = 256
# What the kernels move at once, bytes.
_ALIGNMENT = 16


def takes(dtype: torch.dtype, head_width: int, num_keys: int) -> bool:
    """Whether there is a kernel for them, whatever the device."""
    return dtype in DTYPES and head_width in HEAD_WIDTHS and num_keys <= LONGEST


def unsuited(given: Three, sequences: Sequences) -> str:
    """What of a forward pass the kernels do not take, in words; "" if they take it.

    Args:
        given: q, k and v, ``(B, T, H, K)`` each.
        sequences: how the tokens form them.
    """
    q, k, v = given
    if q.dtype not in DTYPES:
        return f"{q.dtype}"
    if q.shape[3] not in HEAD_WIDTHS:
        return f"heads of width {q.shape[3]}"
    if sequences.class_token:
        return "a class token"
    if sequences.total > LONGEST:
        return f"sequences of {sequences.total} tokens"
    if q.shape[1] != k.shape[1] or not q.stride() == k.stride() == v.stride():
        return "queries apart from keys and values"
    return "memory that is not aligned to 16 bytes" if _misaligned(given) else ""


def unsuited_backward(grad: Tensor, given: Three, grads: Three, sequences: Sequences) -> str:
    """As :func:`unsuited`, of a backward pass; arguments as in :func:`short_attention_backward`."""
    why = unsuited(given, sequences)
    if not why and not grads[0].stride() == grads[1].stride() == grads[2].stride():
        return "gradients apart from each other"
    if not why and _misaligned((grad, *grads)):
        return "memory that is not aligned to 16 bytes"
    return why


def _misaligned(tensors: tuple[Tensor, ...]) -> bool:
    return any(
        x.data_ptr() % _ALIGNMENT or any(s * x.itemsize % _ALIGNMENT for s in x.stride()[:2])
        for x in tensors
    )


def fits(q: Tensor, sequences: Sequences, *, backward: bool) -> bool:
    """Whether the device's shared memory holds what a pass needs of a sequence."""
    device = -1 if q.device.type == "cpu" else q.device.index
    module = _extension.extension()
    return bool(module.short_attention_fits(sequences.total, q.shape[3], backward, device))


def short_attention(given: Three, sequences: Sequences, scale: float) -> Results:
    """As :func:`vmae_fast.kernels.attention.attention_triton`."""
    q = given[0]
    lse = q.new_empty(
        q.shape[0] * sequences.count, q.shape[2], sequences.total, dtype=torch.float32
    )
    results = Results(q.new_empty(q.shape), None, lse)
    _call("short_attention", (*given, results.out, lse), sequences, scale)
    return results


def short_attention_backward(
    grad: Tensor,
    given: Three,
    results: Results,
    grads: Three,
    sequences: Sequences,
    scale: float,
) -> None:
    """As :func:`vmae_fast.kernels.attention.attention_backward_triton`; does without the output."""
    tensors = (grad, *given, results.lse, *grads)
    _call("short_attention_backward", tensors, sequences, scale)


def _call(name: str, tensors: tuple[Tensor, ...], sequences: Sequences, scale: float) -> None:
    kernel: Any = getattr(_extension.extension(), name)
    views = [_extension.view(x) for x in tensors]
    of = (sequences.count, sequences.length, sequences.step, sequences.stride)
    kernel(*views, *of, scale, _extension.stream_of(tensors[0].device))
