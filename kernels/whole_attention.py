"""Attention over up to 256 keys: a sequence's keys and values stay on the chip.

One program has all keys of one head and sequence and goes over its queries. The keys are cut into
parts that are powers of two, 160 into 128 + 32, so nothing is spent on padding beyond a multiple of
16. In the backward pass the gradients of keys and values stay on the chip too: five products of
matrices, everything read and written once, no atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _launch
from ._launch import Row, jit, tl
from .attention_tiles import (
    HEAD_PARTS,
    LOG2_E,
    Results,
    Sequences,
    Three,
    add_product,
    as_constants,
    from_log2,
    inner,
    load_parts,
    row_products,
    scaled,
    store_parts,
    to_log2,
    token_at,
    zeros,
)

# A part of keys is a side of a matrix product, whose sides are at least so long.
_LEAST_PART = 16


class Fit(NamedTuple):
    """A row of the tables, and up to how many keys it serves."""

    keys: int
    row: Row


def _table(fits: dict[tuple[int, int], Fit]) -> dict[tuple[int, Any, int], Fit]:
    """Fits by target, dtype and head width, from those of 16-bit dtypes; fp32 has none."""
    return {
        (target, dtype, width): fit
        for (target, width), fit in fits.items()
        for dtype in (torch.float16, torch.bfloat16)
    }


# As many keys as leave no register spilt in Triton 3.6 and 3.9. Not yet measured.
_QUERIES_32 = Row({"BLOCK_M": 32}, num_warps=4, num_stages=1)
_QUERIES_64 = Row({"BLOCK_M": 64}, num_warps=4, num_stages=1)
_QUERIES_32_WIDE = Row({"BLOCK_M": 32}, num_warps=8, num_stages=1)
_QUERIES_64_WIDE = Row({"BLOCK_M": 64}, num_warps=8, num_stages=1)
_BEFORE_HOPPER = {32: Fit(256, _QUERIES_32), 64: Fit(256, _QUERIES_32)}
_BEFORE_HOPPER |= dict.fromkeys((80, 88), Fit(160, _QUERIES_64_WIDE))
_BEFORE_HOPPER |= {128: Fit(160, _QUERIES_32_WIDE)}
_FORWARD = _table(
    {(target, width): fit for target in (80, 120) for width, fit in _BEFORE_HOPPER.items()}
    | {(90, width): Fit(256 if width <= 64 else 192, _QUERIES_64) for width in HEAD_PARTS}
    | {(100, width): Fit(256, _QUERIES_64) for width in (32, 64)}
    | {(100, width): Fit(208, _QUERIES_64_WIDE) for width in (80, 88, 128)}
)
_BACKWARD_BEFORE_HOPPER = Fit(160, Row({"BLOCK_M": 32}, num_warps=8, num_stages=1))
_BACKWARD = _table(
    {
        (80, 64): _BACKWARD_BEFORE_HOPPER,
        (90, 64): Fit(160, Row({"BLOCK_M": 32}, num_warps=8, num_stages=2)),
        (120, 64): _BACKWARD_BEFORE_HOPPER,
    }
)


@jit
def _whole_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    num_queries, num_keys, heads, groups, step, stride,
    stride_q_clip, stride_q_token, stride_kv_clip, stride_kv_token, stride_out_clip, scale_log2,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All queries of one head and sequence over all its keys, BLOCK_M at a time.

    Grid: sequences x heads, heads fastest. Writes all of out and lse.
    """
    head, sequence = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    clip, group = sequence // groups, sequence % groups
    q_ptr += clip * stride_q_clip + head * K
    rows_kv = clip * stride_kv_clip + head * K
    k, v = (), ()
    start = 0
    for part in tl.static_range(len(PARTS)):
        offs_n = start + tl.arange(0, PARTS[part])
        mask_n = offs_n < num_keys
        rows_n = rows_kv + token_at(offs_n, group, step, stride, False) * stride_kv_token
        k = k + (load_parts(k_ptr, rows_n, mask_n, True, K, K0, K1),)
        v = v + (load_parts(v_ptr, rows_n, mask_n, True, K, K0, K1),)
        start += PARTS[part]
    for start_m in range(0, num_queries, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < num_queries
        token_m = token_at(offs_m, group, step, stride, False)
        q = load_parts(q_ptr, token_m * stride_q_token, mask_m, True, K, K0, K1)
        logits = ()
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        start = 0
        for part in tl.static_range(len(PARTS)):
            valid = start + tl.arange(0, PARTS[part]) < num_keys
            here = tl.where(valid[None, :], inner(q, k[part]) * scale_log2, float("-inf"))
            logits = logits + (here,)
            top = tl.maximum(top, tl.max(here, axis=1))
            start += PARTS[part]
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = zeros(BLOCK_M, K0, K1)
        for part in tl.static_range(len(PARTS)):
            weights = tl.exp2(logits[part] - top[:, None])
            total += tl.sum(weights, axis=1)
            acc = add_product(acc, weights.to(q[0].dtype), v[part])
        rows = clip * stride_out_clip + token_m * (heads * K) + head * K
        store_parts(out_ptr, rows, mask_m, scaled(acc, (1.0 / total)[:, None]), K, K0, K1)
        lse = from_log2(top + tl.log2(total))
        tl.store(lse_ptr + (sequence * heads + head) * num_queries + offs_m, lse, mask=mask_m)


@jit
def _whole_attention_backward_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr,
    num_queries, num_keys, heads, groups, step, stride,
    stride_q_clip, stride_q_token, stride_kv_clip, stride_kv_token, stride_out_clip,
    stride_grad_q_clip, stride_grad_q_token, stride_grad_kv_clip, stride_grad_kv_token,
    scale, scale_log2,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All gradients of one head and sequence, over its queries BLOCK_M at a time.

    Grid: sequences x heads, heads fastest. Writes all of grad_q, grad_k and grad_v.
    """
    head, sequence = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    clip, group = sequence // groups, sequence % groups
    q_ptr += clip * stride_q_clip + head * K
    rows_kv = clip * stride_kv_clip + head * K
    k, v, grad_k, grad_v = (), (), (), ()
    start = 0
    for part in tl.static_range(len(PARTS)):
        offs_n = start + tl.arange(0, PARTS[part])
        mask_n = offs_n < num_keys
        rows_n = rows_kv + token_at(offs_n, group, step, stride, False) * stride_kv_token
        k = k + (load_parts(k_ptr, rows_n, mask_n, True, K, K0, K1),)
        v = v + (load_parts(v_ptr, rows_n, mask_n, True, K, K0, K1),)
        grad_k = grad_k + (zeros(PARTS[part], K0, K1),)
        grad_v = grad_v + (zeros(PARTS[part], K0, K1),)
        start += PARTS[part]
    for start_m in range(0, num_queries, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < num_queries
        token_m = token_at(offs_m, group, step, stride, False)
        q = load_parts(q_ptr, token_m * stride_q_token, mask_m, True, K, K0, K1)
        rows = clip * stride_out_clip + token_m * (heads * K) + head * K
        grad = load_parts(grad_ptr, rows, mask_m, True, K, K0, K1)
        out = load_parts(out_ptr, rows, mask_m, True, K, K0, K1)
        delta = row_products(out, grad)
        at = (sequence * heads + head) * num_queries + offs_m
        # A query that is none has no weight.
        lse_log2 = to_log2(tl.load(lse_ptr + at, mask=mask_m, other=float("inf")))
        grad_q = zeros(BLOCK_M, K0, K1)
        next_k, next_v = (), ()
        start = 0
        for part in tl.static_range(len(PARTS)):
            # A key that is none would weigh exp(-lse), which may be infinite.
            valid = start + tl.arange(0, PARTS[part]) < num_keys
            weights = tl.exp2(inner(q, k[part]) * scale_log2 - lse_log2[:, None])
            weights = tl.where(valid[None, :], weights, 0.0)
            grad_logits = weights * (inner(grad, v[part]) - delta[:, None])
            low = grad_logits.to(q[0].dtype)
            weights = tl.trans(weights.to(q[0].dtype))
            next_v = next_v + (add_product(grad_v[part], weights, grad),)
            next_k = next_k + (add_product(grad_k[part], tl.trans(low), q),)
            grad_q = add_product(grad_q, low, k[part])
            start += PARTS[part]
        grad_k, grad_v = next_k, next_v
        rows = clip * stride_grad_q_clip + token_m * stride_grad_q_token + head * K
        store_parts(grad_q_ptr, rows, mask_m, scaled(grad_q, scale), K, K0, K1)
    start = 0
    for part in tl.static_range(len(PARTS)):
        offs_n = start + tl.arange(0, PARTS[part])
        mask_n = offs_n < num_keys
        token_n = token_at(offs_n, group, step, stride, False)
        rows_n = clip * stride_grad_kv_clip + token_n * stride_grad_kv_token + head * K
        store_parts(grad_k_ptr, rows_n, mask_n, scaled(grad_k[part], scale), K, K0, K1)
        store_parts(grad_v_ptr, rows_n, mask_n, grad_v[part], K, K0, K1)
        start += PARTS[part]


def parts_of(num_keys: int) -> tuple[int, ...]:
    """Powers of two, the largest first, that add up to the next multiple of 16."""
    rest = -(-num_keys // _LEAST_PART) * _LEAST_PART
    return tuple(1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1)


def whole_forward_row(q: Tensor, sequences: Sequences) -> Row | None:
    """The table's row for so many keys, None where they do not stay on the chip."""
    return _row(_FORWARD, q, sequences)


def whole_backward_row(q: Tensor, sequences: Sequences) -> Row | None:
    """As :func:`whole_forward_row`, of the backward pass."""
    return _row(_BACKWARD, q, sequences)


def _row(table: Any, q: Tensor, sequences: Sequences) -> Row | None:
    fit = _launch.find(table, q.device, q.dtype, q.shape[3])
    fits = fit is not None and sequences.total <= fit.keys and not sequences.class_token
    return fit.row if fits else None


def whole_attention(
    row: Row, given: Three, results: Results, sequences: Sequences, scale: float
) -> None:
    """Write the results; see :func:`.attention.attention_triton`."""
    (q, k, v), (out, _, lse) = given, results
    _launch.launch(
        _whole_attention_kernel, lse.shape[0] * q.shape[2], q, k, v, out, lse,
        *_lengths(q, k, out, lse, sequences), scale * LOG2_E,
        row=row, PARTS=parts_of(sequences.total), **as_constants(q.shape[3]),
    )  # fmt: skip


def whole_attention_backward(
    row: Row,
    grad: Tensor,
    given: Three,
    results: Results,
    grads: Three,
    class_grads: tuple[Tensor | None, ...],
    sequences: Sequences,
    scale: float,
) -> None:
    """Write grads; see :func:`.attention.attention_backward_triton`."""
    (q, k, v), (out, _, lse) = given, results
    grad_q, grad_k, _ = grads
    _launch.launch(
        _whole_attention_backward_kernel, lse.shape[0] * q.shape[2],
        grad, q, k, v, out, lse, *grads, *_lengths(q, k, out, lse, sequences),
        grad_q.stride(0), grad_q.stride(1), grad_k.stride(0), grad_k.stride(1),
        scale, scale * LOG2_E,
        row=row, PARTS=parts_of(sequences.total), **as_constants(q.shape[3]),
    )  # fmt: skip


def _lengths(
    q: Tensor, k: Tensor, out: Tensor, lse: Tensor, sequences: Sequences
) -> tuple[int, ...]:
    return (
        lse.shape[2], sequences.total, q.shape[2], sequences.count, sequences.step,
        sequences.stride, q.stride(0), q.stride(1), k.stride(0), k.stride(1), out.stride(0),
    )  # fmt: skip
