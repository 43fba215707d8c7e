"""Attention over up to 256 keys: a sequence's keys and values stay on the chip.

One program has all keys of one head and sequence and goes over its queries. The keys are cut into
parts that are powers of two, 160 into 128 + 32, so nothing is spent on padding beyond a multiple of
16. In the backward pass the gradients of keys and values stay on the chip too: five products of
matrices, everything read and written once, no atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from . import _launch
from ._launch import FLOAT_DTYPES, Row, jit, tl
from .attention_tiles import (
    HEAD_PARTS,
    LOG2_E,
    Results,
    Sequences,
    Three,
    add_product,
    as_constants,
    cast,
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
    """Up to how many keys a row of the table serves."""

    keys: int
    row: Row


_ROW = Row({"BLOCK_M": 32}, num_warps=8, num_stages=1)
_FORWARD = {(80, dtype, width): (Fit(256, _ROW),) for dtype in FLOAT_DTYPES for width in HEAD_PARTS}
_BACKWARD = _FORWARD


@jit
def _whole_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, class_out_ptr,
    num_queries, num_keys, heads, groups, step, stride,
    stride_q_clip, stride_q_token, stride_kv_clip, stride_kv_token, stride_out_clip, scale_log2,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, CLASS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All queries of one head and sequence over all its keys, BLOCK_M at a time.

    Grid: sequences x heads, heads fastest. Writes all of out, lse and class_out.
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
        rows = rows_kv + token_at(offs_n, group, step, stride, CLASS) * stride_kv_token
        k = k + (load_parts(k_ptr, rows, mask_n, True, K, K0, K1),)
        v = v + (load_parts(v_ptr, rows, mask_n, True, K, K0, K1),)
        start += PARTS[part]
    for start_m in range(0, num_queries, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < num_queries
        token_m = token_at(offs_m, group, step, stride, CLASS)
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
        class_rows = tl.zeros([BLOCK_M], dtype=tl.int64) + (sequence * heads + head) * K
        store_parts(
            out_ptr, class_out_ptr, rows, class_rows, mask_m, offs_m == 0,
            scaled(acc, (1.0 / total)[:, None]), K, K0, K1, CLASS,
        )  # fmt: skip
        lse = from_log2(top + tl.log2(total))
        tl.store(lse_ptr + (sequence * heads + head) * num_queries + offs_m, lse, mask=mask_m)


@jit
def _whole_attention_backward_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, class_out_ptr, lse_ptr,
    grad_q_ptr, grad_k_ptr, grad_v_ptr, class_grad_q_ptr, class_grad_k_ptr, class_grad_v_ptr,
    num_queries, num_keys, heads, groups, step, stride,
    stride_q_clip, stride_q_token, stride_kv_clip, stride_kv_token, stride_out_clip,
    stride_grad_q_clip, stride_grad_q_token, stride_grad_kv_clip, stride_grad_kv_token,
    scale, scale_log2,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, CLASS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All gradients of one head and sequence, over its queries BLOCK_M at a time.

    Grid: sequences x heads, heads fastest. Writes all of grad_q, grad_k and grad_v.
    """
    head, sequence = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    clip, group = sequence // groups, sequence % groups
    class_row = sequence * stride_grad_q_token + head * K
    q_ptr += clip * stride_q_clip + head * K
    rows_kv = clip * stride_kv_clip + head * K
    k, v, grad_k, grad_v = (), (), (), ()
    start = 0
    for part in tl.static_range(len(PARTS)):
        offs_n = start + tl.arange(0, PARTS[part])
        mask_n = offs_n < num_keys
        rows = rows_kv + token_at(offs_n, group, step, stride, CLASS) * stride_kv_token
        k = k + (load_parts(k_ptr, rows, mask_n, True, K, K0, K1),)
        v = v + (load_parts(v_ptr, rows, mask_n, True, K, K0, K1),)
        grad_k = grad_k + (zeros(PARTS[part], K0, K1),)
        grad_v = grad_v + (zeros(PARTS[part], K0, K1),)
        start += PARTS[part]
    for start_m in range(0, num_queries, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < num_queries
        is_class = offs_m == 0
        token_m = token_at(offs_m, group, step, stride, CLASS)
        q = load_parts(q_ptr, token_m * stride_q_token, mask_m, True, K, K0, K1)
        rows = clip * stride_out_clip + token_m * (heads * K) + head * K
        grad = load_parts(grad_ptr, rows, mask_m, True, K, K0, K1)
        out = load_parts(out_ptr, rows, mask_m, True, K, K0, K1)
        delta = row_products(out, grad)
        class_rows = tl.zeros([BLOCK_M], dtype=tl.int64)
        if CLASS:
            # The class token's output is the mean over sequences of its outputs in each.
            share = tl.where(is_class, 1.0 / groups, 1.0)
            own_rows = class_rows + (sequence * heads + head) * K
            own = load_parts(class_out_ptr, own_rows, mask_m & is_class, True, K, K0, K1)
            delta = tl.where(is_class, row_products(own, grad), delta) * share
            grad = cast(scaled(grad, share[:, None]), grad)
        # A query that is none has no weight.
        at = (sequence * heads + head) * num_queries + offs_m
        lse_log2 = to_log2(tl.load(lse_ptr + at, mask=mask_m, other=float("inf")))
        grad_q = zeros(BLOCK_M, K0, K1)
        next_k, next_v = (), ()
        start = 0
        for part in tl.static_range(len(PARTS)):
            # Keys that are none are zeros: their weight may be anything finite.
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
        store_parts(
            grad_q_ptr, class_grad_q_ptr, rows, class_rows + class_row, mask_m, is_class,
            scaled(grad_q, scale), K, K0, K1, CLASS,
        )  # fmt: skip
    start = 0
    for part in tl.static_range(len(PARTS)):
        offs_n = start + tl.arange(0, PARTS[part])
        mask_n = offs_n < num_keys
        token_n = token_at(offs_n, group, step, stride, CLASS)
        rows = clip * stride_grad_kv_clip + token_n * stride_grad_kv_token + head * K
        class_rows = tl.zeros([PARTS[part]], dtype=tl.int64) + class_row
        store_parts(
            grad_k_ptr, class_grad_k_ptr, rows, class_rows, mask_n, offs_n == 0,
            scaled(grad_k[part], scale), K, K0, K1, CLASS,
        )  # fmt: skip
        store_parts(
            grad_v_ptr, class_grad_v_ptr, rows, class_rows, mask_n, offs_n == 0, grad_v[part],
            K, K0, K1, CLASS,
        )  # fmt: skip
        start += PARTS[part]


def parts_of(num_keys: int) -> tuple[int, ...]:
    """Powers of two, the largest first, that add up to the next multiple of 16."""
    rest = -(-num_keys // _LEAST_PART) * _LEAST_PART
    return tuple(1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1)


def whole_attention(given: Three, results: Results, sequences: Sequences, scale: float) -> None:
    """Write the results; see :func:`.attention.attention_triton`."""
    (q, k, v), (out, class_out, lse) = given, results
    _launch.launch(
        _whole_attention_kernel, lse.shape[0] * q.shape[2], q, k, v, out, lse, class_out,
        *_lengths(q, k, out, lse, sequences), scale * LOG2_E,
        row=_row(_FORWARD, q, sequences), PARTS=parts_of(sequences.total),
        **as_constants(q.shape[3], sequences),
    )  # fmt: skip


def whole_attention_backward(
    grad: Tensor,
    given: Three,
    results: Results,
    grads: Three,
    class_grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    sequences: Sequences,
    scale: float,
) -> None:
    """Write grads and class_grads; see :func:`.attention.attention_backward_triton`."""
    (q, k, v), (out, class_out, lse) = given, results
    grad_q, grad_k, _ = grads
    _launch.launch(
        _whole_attention_backward_kernel, lse.shape[0] * q.shape[2],
        grad, q, k, v, out, class_out, lse, *grads, *class_grads,
        *_lengths(q, k, out, lse, sequences),
        grad_q.stride(0), grad_q.stride(1), grad_k.stride(0), grad_k.stride(1),
        scale, scale * LOG2_E,
        row=_row(_BACKWARD, q, sequences), PARTS=parts_of(sequences.total),
        **as_constants(q.shape[3], sequences),
    )  # fmt: skip


def _lengths(
    q: Tensor, k: Tensor, out: Tensor, lse: Tensor, sequences: Sequences
) -> tuple[int, ...]:
    return (
        lse.shape[2], sequences.total, q.shape[2], sequences.count, sequences.step,
        sequences.stride, q.stride(0), q.stride(1), k.stride(0), k.stride(1), out.stride(0),
    )  # fmt: skip


def whole_forward_fits(q: Tensor, sequences: Sequences) -> bool:
    """Whether :func:`whole_attention` has a table row for so many keys."""
    return _row(_FORWARD, q, sequences) is not None


def whole_backward_fits(q: Tensor, sequences: Sequences) -> bool:
    """Whether :func:`whole_attention_backward` has a table row for so many keys."""
    return _row(_BACKWARD, q, sequences) is not None


def _row(table: Any, q: Tensor, sequences: Sequences) -> Any:
    fits: Any = _launch.pick(table, q.device, q.dtype, q.shape[3])
    return next((fit.row for fit in fits if sequences.total <= fit.keys), None)
