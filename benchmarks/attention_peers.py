"""What one would write in plain PyTorch instead of the attention ops.

All start from the packed projections and end with heads side by side, so taking q, k and v apart
and, in the backward pass, putting their gradients together is part of their time. Shapes: S
sequences, M queries and N keys in each, H heads of width K.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F
from attention_cases import AttentionBatch, Case
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import deterministic as determinism

# softmax(q k^T / sqrt(K)) v of (S, H, M, K) and twice (S, H, N, K).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Flash attention with PyTorch's flag for determinism, see :func:`deterministic`.
DETERMINISTIC = "sdpa_deterministic"
SDPA = (*_BACKENDS, DETERMINISTIC)
# Whose backward pass adds nothing up in an order that differs from run to run.
REPEATABLE = (DETERMINISTIC, "flex", "eager")


def peers_of(case: Case, *, flex: bool = False) -> dict[str, Callable[[AttentionBatch], Tensor]]:
    """By name, functions of a batch; the one called DETERMINISTIC is to run under the flag."""
    attends: dict[str, Attend] = {
        name: partial(pinned, kernel) for name, kernel in _BACKENDS.items()
    }
    attends |= {DETERMINISTIC: attends["sdpa_flash"], "eager": eager}
    peers = {name: partial(_packed, attend) for name, attend in attends.items()}
    if flex:
        peers["flex"] = flex_attention
    return peers


def pinned(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``scaled_dot_product_attention`` with this backend or an error."""
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the M x N matrix in memory."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's flag, which the backward pass reads too; without filling memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = determinism.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    determinism.fill_uninitialized_memory = False
    try:
        yield
    finally:
        determinism.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def flex_attention(batch: AttentionBatch) -> Tensor:
    """FlexAttention, compiled together with what surrounds it."""
    import torch._functorch.config as functorch

    # Donated buffers forbid a second backward pass after one forward pass, which is what is timed.
    with functorch.patch(donated_buffer=False):
        return _compiled_flex()(batch.qkv, batch.case.heads)


@cache
def _compiled_flex() -> Callable[[Tensor, int], Tensor]:
    return torch.compile(flex_on_packed, dynamic=False)


def flex_on_packed(qkv: Tensor, heads: int) -> Tensor:
    """What :func:`flex_attention` compiles."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    return joined(flex(*heads_of(qkv, heads, 3)))


def heads_of(x: Tensor, heads: int, count: int) -> tuple[Tensor, ...]:
    """``(S, N, count * H * K)`` as so many ``(S, H, N, K)``, without a copy.

    Unbound where they lie, so that the backward pass stacks their gradients straight into place.
    """
    return tuple(one.transpose(1, 2) for one in x.unflatten(2, (count, heads, -1)).unbind(2))


def joined(out: Tensor) -> Tensor:
    """``(S, H, M, K)`` as ``(S, M, H * K)``."""
    return out.transpose(1, 2).flatten(2)


def _packed(attend: Attend, batch: AttentionBatch) -> Tensor:
    """An attention of heads as one of packed projections; divided by moving tokens, if at all."""
    case = batch.case
    if case.queries:
        q_and_kv = (*heads_of(batch.q, case.heads, 1), *heads_of(batch.kv, case.heads, 2))
        return joined(attend(*q_and_kv))
    tokens, sequences = {
        "": ("b n x", "b n x"),
        "time": ("b (n s) x", "(b s) n x"),
        "space": ("b (t n) x", "(b t) n x"),
    }[case.axis]
    sizes = {"b": case.clips, "n": case.keys}
    qkv = rearrange(batch.qkv, f"{tokens} -> {sequences}", **sizes)
    out = joined(attend(*heads_of(qkv, case.heads, 3)))
    return rearrange(out, f"{sequences} -> {tokens}", **sizes)
