"""Multi-head attention on packed projections: what it is, and which Triton kernel computes it.

Shapes: x (B, T, H, K), q, k or v of B clips of T tokens, H heads of width K. A clip holds G
sequences of N tokens that attend to each other: one of all tokens in joint attention, one for
every position (along time) or every row (across space) of its grid in divided attention. S = B * G
sequences, M queries and N keys in each (M differs from N in cross attention alone).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attention_tiles import HEAD_PARTS, Results, Sequences, Three
from .packed_attention import (
    packed_attention,
    packed_attention_backward,
    packed_backward_row,
    packed_forward_row,
)
from .tiled_attention import tiled_attention, tiled_attention_backward
from .whole_attention import (
    whole_attention,
    whole_attention_backward,
    whole_backward_row,
    whole_forward_row,
)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``softmax(q k^T * scale) v`` per head.

    Args:
        q: ``(S, M, H, K)``; k and v ``(S, N, H, K)``.

    Returns:
        ``(S, M, H, K)``, and the log-sum-exp of the logits ``(S, H, M)``, fp32 or fp64.
    """
    q_SHMK, k_SHNK, v_SHNK = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and q.numel():
        # PyTorch's fused kernel, called by name for the log-sum-exp it makes.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_SHMK, k_SHNK, v_SHNK, scale=scale
        )
        return out.transpose(1, 2), lse
    logits = q_SHMK.to(_wide(q)) @ k_SHNK.to(_wide(q)).transpose(2, 3) * scale
    lse = logits.logsumexp(3)
    out = (logits - lse.unsqueeze(3)).exp() @ v_SHNK.to(_wide(q))
    return out.transpose(1, 2).to(q.dtype), lse


def attention_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Three:
    """Gradients of q, k and v, shaped as they are, from that of :func:`attention_reference`."""
    given = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
    if q.device.type == "cpu" and q.numel():
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, lse, 0.0, False, scale=scale
        )
        grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
        return grad_q, grad_k, grad_v
    wide_grad, wide_q, wide_k, wide_v, wide_out = (x.to(_wide(q)) for x in given)
    weights = (wide_q @ wide_k.transpose(2, 3) * scale - lse.unsqueeze(3)).exp()
    delta = (wide_grad * wide_out).sum(3, keepdim=True)
    grad_logits = weights * (wide_grad @ wide_v.transpose(2, 3) - delta) * scale
    grad_q, grad_k, grad_v = (
        x.transpose(1, 2).to(q.dtype)
        for x in (
            grad_logits @ wide_k,
            grad_logits.transpose(2, 3) @ wide_q,
            weights.transpose(2, 3) @ wide_grad,
        )
    )
    return grad_q, grad_k, grad_v


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def split(x: Tensor, sequences: Sequences, class_rows: Tensor | None = None) -> Tensor:
    """Tokens ``(B, T, ...)`` as sequences ``(S, N, ...)``, the class token first in each.

    Args:
        class_rows: ``(B, G, ...)``, what each sequence has of its own for the class token; x's
            token 0 where None.
    """
    if sequences.is_joint:
        return x
    grid = x[:, 1:] if sequences.class_token else x
    if sequences.stride == 1:
        grid = grid.unflatten(1, (sequences.count, sequences.length))
    else:
        grid = grid.unflatten(1, (sequences.length, sequences.count)).transpose(1, 2)
    if sequences.class_token:
        if class_rows is None:
            class_rows = x[:, :1].expand(-1, sequences.count, *x.shape[2:])
        grid = torch.cat([class_rows.unsqueeze(2).to(x.dtype), grid], dim=2)
    return grid.flatten(0, 1)


def merge(x: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor | None]:
    """:func:`split` back: the grid's tokens, and ``(B, G, ...)`` for the class token or None."""
    if sequences.is_joint:
        return x, None
    grid, class_rows = x.unflatten(0, (-1, sequences.count)), None
    if sequences.class_token:
        class_rows, grid = grid[:, :, 0], grid[:, :, 1:]
    return (grid if sequences.stride == 1 else grid.transpose(1, 2)).flatten(1, 2), class_rows


def attention_in_sequences_reference(given: Three, sequences: Sequences, scale: float) -> Results:
    """What :func:`attention_triton` returns, by :func:`attention_reference`."""
    q, k, v = (split(x, sequences) for x in given)
    out, lse = attention_reference(q, k, v, scale)
    tokens, class_out = merge(out, sequences)
    if class_out is not None:
        class_out = class_out.to(_wide(q)).contiguous()
        tokens = torch.cat([class_out.mean(1, keepdim=True).to(q.dtype), tokens], dim=1)
    return Results(tokens.contiguous(), class_out, lse.contiguous())


def attention_in_sequences_backward_reference(
    grad: Tensor,
    given: Three,
    results: Results,
    grads: Three,
    sequences: Sequences,
    scale: float,
) -> None:
    """What :func:`attention_backward_triton` writes, by :func:`attention_backward_reference`."""
    out, class_out, lse = results
    own_grad = None
    if class_out is not None:
        # The class token's output is the mean over sequences of its outputs in each.
        own_grad = (grad[:, :1] / sequences.count).expand(class_out.shape)
    q, k, v = (split(x, sequences) for x in given)
    grad, out = split(grad, sequences, own_grad), split(out, sequences, class_out)
    found = attention_backward_reference(grad, q, k, v, out, lse, scale)
    for x, into in zip(found, grads, strict=True):
        tokens, class_rows = merge(x, sequences)
        if class_rows is not None:
            tokens = torch.cat([class_rows.sum(1, keepdim=True), tokens], dim=1)
        into.copy_(tokens)


def why_not(head_width: int) -> str:
    """What of a head width the Triton kernels do not take, in words; "" where they do."""
    if head_width in HEAD_PARTS:
        return ""
    return f"heads of width {head_width}, only of {', '.join(map(str, HEAD_PARTS))}"


def attention_triton(given: Three, sequences: Sequences, scale: float) -> Results:
    """Attention within the sequences of each clip.

    Args:
        given: q, k and v, ``(B, T, H, K)`` each, heads dense in memory, tokens and clips at any
            distance; k and v at the same ones. In joint attention q may have other tokens.
        sequences: how the tokens form them.
        scale: factor on the logits, positive.
    """
    q = given[0]
    batch, num_tokens, heads, head_width = q.shape
    num_queries = num_tokens if sequences.is_joint else sequences.total
    lse = q.new_empty(batch * sequences.count, heads, num_queries, dtype=torch.float32)
    class_out = None
    if sequences.class_token:
        class_out = q.new_empty(batch, sequences.count, heads, head_width, dtype=torch.float32)
    results = Results(q.new_empty(q.shape), class_out, lse)
    run = _forward_for(given, num_queries, sequences)
    run(given, results, sequences, scale)
    if class_out is not None:
        results.out[:, 0] = class_out.mean(1)
    return results


def attention_backward_triton(
    grad: Tensor,
    given: Three,
    results: Results,
    grads: Three,
    sequences: Sequences,
    scale: float,
) -> None:
    """Write the gradients of q, k and v.

    Args:
        grad: ``(B, T, H, K)``, contiguous, of out.
        given: as :func:`attention_triton` had it.
        results: as it returned them.
        grads: where to, shaped as q, k and v; those of k and v at the same distances, and all
            three with a class token.
    """
    q, class_out = given[0], results.class_out
    class_grads = None
    own: tuple[Tensor | None, ...] = (None, None, None)
    if class_out is not None:
        # Rows as far apart as those of the packed gradient.
        class_grads = q.new_empty(*class_out.shape[:2], 3, *q.shape[2:], dtype=torch.float32)
        own = class_grads.unbind(2)
    run = _backward_for(given, results.lse.shape[2], sequences, grads)
    run(grad, given, results, grads, own, sequences, scale)
    if class_grads is not None:
        for into, total in zip(grads, class_grads.sum(1).unbind(1), strict=True):
            into[:, 0] = total


def _forward_for(given: Three, num_queries: int, sequences: Sequences) -> Any:
    """The launcher for these lengths."""
    q, k, _ = given
    packed = packed_forward_row(q, sequences)
    if packed is not None and num_queries == sequences.total and q.stride() == k.stride():
        return partial(packed_attention, packed)
    whole = whole_forward_row(q, sequences)
    return tiled_attention if whole is None else partial(whole_attention, whole)


def _backward_for(given: Three, num_queries: int, sequences: Sequences, grads: Three) -> Any:
    """The launcher of the backward pass, which need not be of the same kind."""
    q, k, _ = given
    packed = packed_backward_row(q, sequences)
    alike = q.stride() == k.stride() and grads[0].stride() == grads[1].stride()
    if packed is not None and num_queries == sequences.total and alike:
        return partial(packed_attention_backward, packed)
    whole = whole_backward_row(q, sequences)
    if whole is not None:
        return partial(whole_attention_backward, whole)
    return tiled_attention_backward
