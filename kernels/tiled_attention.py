"""Attention in tiles, for sequences of any length: softmax on the way, no N x N matrix.

Shapes: q (B, T, H, K) with M queries, k and v with N keys a sequence, S = B * G sequences, as in
attention.py. The backward pass computes the weights anew from the log-sum-exp, twice: once by
blocks of queries, once by blocks of keys. Each gradient is so written by one program, without
atomics: seven products of matrices where adding up in place would take five.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import _launch
from ._launch import Row, cdiv, jit, tl
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
    store_with_class,
    to_log2,
    token_at,
    zeros,
)


def _table(
    before_hopper: dict[int, Row], since_hopper: dict[int, Row]
) -> dict[tuple[int, Any, int], Row]:
    """Rows by target, dtype and head width, from those of 16-bit dtypes by head width."""
    rows = {(80, torch.float32, width): _FP32 for width in HEAD_PARTS}
    for dtype, width in product((torch.float16, torch.bfloat16), HEAD_PARTS):
        rows[80, dtype, width] = before_hopper[width]
        rows[90, dtype, width] = since_hopper[width]
        # The last without Hopper's or the data centre Blackwell's matrix units.
        rows[120, dtype, width] = before_hopper[width]
    return rows


# fp32 is for checking: its products run on no matrix unit, and spill registers.
_FP32 = Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=1)
# The largest tiles around those of Triton's own example that spill no register in Triton 3.6 and
# 3.9, on sm_80 with products of 16 columns by mma.sync, from sm_90 on by larger instructions. Not
# yet measured.
_FORWARD = _table(
    dict.fromkeys(HEAD_PARTS, Row({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2)),
    dict.fromkeys(HEAD_PARTS, Row({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=2)),
)
_QUERY_GRADIENT = _table(
    dict.fromkeys((32, 64), Row({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2))
    | dict.fromkeys((80, 88), Row({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=2))
    | {128: Row({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=2)},
    dict.fromkeys(HEAD_PARTS, Row({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2)),
)
_KEY_VALUE_GRADIENT = _table(
    dict.fromkeys((32, 64), Row({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=4, num_stages=2))
    | dict.fromkeys((80, 88), Row({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=8, num_stages=2))
    | {128: Row({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=8, num_stages=2)},
    dict.fromkeys(HEAD_PARTS, Row({"BLOCK_M": 32, "BLOCK_N": 128}, num_warps=8, num_stages=3))
    | {128: Row({"BLOCK_M": 32, "BLOCK_N": 128}, num_warps=8, num_stages=2)},
)


@jit
def _place(program, blocks, heads, groups):
    """Block, head, clip (int64) and sequence of it; blocks fastest, so that keys stay in cache."""
    sequence = program // (blocks * heads)
    clip = (sequence // groups).to(tl.int64)
    return program % blocks, program // blocks % heads, clip, sequence % groups


@jit
def _online_step(
    q, top, total, acc, k_ptr, v_ptr, rows, valid, scale_log2, MASKED: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
):  # fmt: skip
    """One block of keys: running maximum (in log2), sum of weights, weighted sum of values."""
    k = load_parts(k_ptr, rows, valid, MASKED, K, K0, K1)
    logits = inner(q, k)
    if MASKED:
        logits = tl.where(valid[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=1) * scale_log2)
    weights = tl.exp2(logits * scale_log2 - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    v = load_parts(v_ptr, rows, valid, MASKED, K, K0, K1)
    acc = add_product(scaled(acc, shrink[:, None]), weights.to(v[0].dtype), v)
    return new_top, total, acc


@jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, class_out_ptr,
    num_queries, num_keys, heads, groups, step, stride,
    stride_q_clip, stride_q_token, stride_kv_clip, stride_kv_token, stride_out_clip, scale_log2,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, CLASS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head and sequence over all its keys, BLOCK_N at a time.

    Grid: sequences x heads x query blocks, blocks fastest. Writes all of out, lse and class_out.
    """
    blocks = tl.cdiv(num_queries, BLOCK_M)
    block, head, clip, group = _place(tl.program_id(0), blocks, heads, groups)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_queries
    token_m = token_at(offs_m, group, step, stride, CLASS)
    q_ptr += clip * stride_q_clip + head * K
    k_ptr += clip * stride_kv_clip + head * K
    v_ptr += clip * stride_kv_clip + head * K
    q = load_parts(q_ptr, token_m * stride_q_token, mask_m, True, K, K0, K1)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = zeros(BLOCK_M, K0, K1)
    whole = num_keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        rows = token_at(offs_n, group, step, stride, CLASS) * stride_kv_token
        top, total, acc = _online_step(
            q, top, total, acc, k_ptr, v_ptr, rows, offs_n < num_keys, scale_log2, False, K, K0, K1
        )
    if whole < num_keys:
        offs_n = whole + tl.arange(0, BLOCK_N)
        rows = token_at(offs_n, group, step, stride, CLASS) * stride_kv_token
        top, total, acc = _online_step(
            q, top, total, acc, k_ptr, v_ptr, rows, offs_n < num_keys, scale_log2, True, K, K0, K1
        )
    is_class = offs_m == 0
    sequence = clip * groups + group
    class_rows = tl.zeros_like(token_m) + (sequence * heads + head) * K
    rows = clip * stride_out_clip + token_m * (heads * K) + head * K
    store_with_class(
        out_ptr, class_out_ptr, rows, class_rows, mask_m, is_class,
        scaled(acc, (1.0 / total)[:, None]), K, K0, K1, CLASS,
    )  # fmt: skip
    at = (sequence * heads + head) * num_queries + offs_m
    tl.store(lse_ptr + at, from_log2(top + tl.log2(total)), mask=mask_m)


@jit
def _query_gradient_step(
    q, grad, lse_log2, delta, grad_q, k_ptr, v_ptr, rows, valid, scale_log2, MASKED: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
):  # fmt: skip
    """Add what one block of keys gives to the gradient of a block of queries."""
    k = load_parts(k_ptr, rows, valid, MASKED, K, K0, K1)
    v = load_parts(v_ptr, rows, valid, MASKED, K, K0, K1)
    weights = tl.exp2(inner(q, k) * scale_log2 - lse_log2[:, None])
    if MASKED:
        weights = tl.where(valid[None, :], weights, 0.0)
    grad_logits = weights * (inner(grad, v) - delta[:, None])
    return add_product(grad_q, grad_logits.to(k[0].dtype), k)


@jit
def _query_gradient_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, class_out_ptr, lse_ptr, delta_ptr,
    grad_q_ptr, class_grad_q_ptr,
    num_queries, num_keys, heads, groups, step, stride,
    stride_q_clip, stride_q_token, stride_kv_clip, stride_kv_token, stride_out_clip,
    stride_grad_q_clip, stride_grad_q_token, scale, scale_log2,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, CLASS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries of one head and sequence, over all its keys; also delta.

    Grid: sequences x heads x query blocks, blocks fastest. Writes all of grad_q and delta, the
    inner products of out and its gradient, which the other kernel reads.
    """
    blocks = tl.cdiv(num_queries, BLOCK_M)
    block, head, clip, group = _place(tl.program_id(0), blocks, heads, groups)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_queries
    is_class = offs_m == 0
    sequence = clip * groups + group
    token_m = token_at(offs_m, group, step, stride, CLASS)
    rows_out = clip * stride_out_clip + token_m * (heads * K) + head * K
    class_row = (sequence * heads + head) * K
    out = load_parts(out_ptr, rows_out, mask_m, True, K, K0, K1)
    grad = load_parts(grad_ptr, rows_out, mask_m, True, K, K0, K1)
    delta = row_products(out, grad)
    if CLASS:
        # The class token's output is the mean over sequences of its outputs in each.
        share = tl.where(is_class, 1.0 / groups, 1.0)
        class_rows = tl.zeros_like(token_m) + class_row
        own = load_parts(class_out_ptr, class_rows, mask_m & is_class, True, K, K0, K1)
        delta = tl.where(is_class, row_products(own, grad), delta) * share
        grad = cast(scaled(grad, share[:, None]), grad)
    at = (sequence * heads + head) * num_queries + offs_m
    tl.store(delta_ptr + at, delta, mask=mask_m)
    lse_log2 = to_log2(tl.load(lse_ptr + at, mask=mask_m, other=0.0))
    q_ptr += clip * stride_q_clip + head * K
    k_ptr += clip * stride_kv_clip + head * K
    v_ptr += clip * stride_kv_clip + head * K
    q = load_parts(q_ptr, token_m * stride_q_token, mask_m, True, K, K0, K1)
    grad_q = zeros(BLOCK_M, K0, K1)
    whole = num_keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        rows = token_at(offs_n, group, step, stride, CLASS) * stride_kv_token
        grad_q = _query_gradient_step(
            q, grad, lse_log2, delta, grad_q, k_ptr, v_ptr, rows, offs_n < num_keys, scale_log2,
            False, K, K0, K1,
        )  # fmt: skip
    if whole < num_keys:
        offs_n = whole + tl.arange(0, BLOCK_N)
        rows = token_at(offs_n, group, step, stride, CLASS) * stride_kv_token
        grad_q = _query_gradient_step(
            q, grad, lse_log2, delta, grad_q, k_ptr, v_ptr, rows, offs_n < num_keys, scale_log2,
            True, K, K0, K1,
        )  # fmt: skip
    rows = clip * stride_grad_q_clip + token_m * stride_grad_q_token + head * K
    class_rows = tl.zeros_like(token_m) + sequence * stride_grad_q_token + head * K
    store_with_class(
        grad_q_ptr, class_grad_q_ptr, rows, class_rows, mask_m, is_class, scaled(grad_q, scale),
        K, K0, K1, CLASS,
    )  # fmt: skip


@jit
def _key_value_gradient_step(
    k, v, grad_k, grad_v, q_ptr, grad_ptr, lse_ptr, delta_ptr, offs_m, num_queries,
    group, groups, step, stride, stride_q_token, stride_out_token, scale_log2,
    MASKED: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, CLASS: tl.constexpr,
):  # fmt: skip
    """Add what one block of queries gives to the gradients of a block of keys and values."""
    mask_m = offs_m < num_queries
    token_m = token_at(offs_m, group, step, stride, CLASS)
    q = load_parts(q_ptr, token_m * stride_q_token, mask_m, MASKED, K, K0, K1)
    grad = load_parts(grad_ptr, token_m * stride_out_token, mask_m, MASKED, K, K0, K1)
    if CLASS:
        grad = cast(scaled(grad, tl.where(offs_m == 0, 1.0 / groups, 1.0)[:, None]), grad)
    # A query that is none has no weight.
    lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf"))
    delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
    weights = tl.exp2(inner(k, q) * scale_log2 - to_log2(lse)[None, :])
    grad_v = add_product(grad_v, weights.to(grad[0].dtype), grad)
    grad_logits = weights * (inner(v, grad) - delta[None, :])
    grad_k = add_product(grad_k, grad_logits.to(q[0].dtype), q)
    return grad_k, grad_v


@jit
def _key_value_gradient_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr,
    grad_k_ptr, grad_v_ptr, class_grad_k_ptr, class_grad_v_ptr,
    num_queries, num_keys, heads, groups, step, stride,
    stride_q_clip, stride_q_token, stride_kv_clip, stride_kv_token, stride_out_clip,
    stride_grad_kv_clip, stride_grad_kv_token, scale, scale_log2,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, CLASS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one head and sequence, over all its queries.

    Grid: sequences x heads x key blocks, blocks fastest. Writes all of grad_k and grad_v.
    """
    blocks = tl.cdiv(num_keys, BLOCK_N)
    block, head, clip, group = _place(tl.program_id(0), blocks, heads, groups)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_keys
    token_n = token_at(offs_n, group, step, stride, CLASS)
    sequence = clip * groups + group
    stride_out_token = heads * K
    q_ptr += clip * stride_q_clip + head * K
    grad_ptr += clip * stride_out_clip + head * K
    lse_ptr += (sequence * heads + head) * num_queries
    delta_ptr += (sequence * heads + head) * num_queries
    rows = clip * stride_kv_clip + token_n * stride_kv_token + head * K
    k = load_parts(k_ptr, rows, mask_n, True, K, K0, K1)
    v = load_parts(v_ptr, rows, mask_n, True, K, K0, K1)
    grad_k = zeros(BLOCK_N, K0, K1)
    grad_v = zeros(BLOCK_N, K0, K1)
    whole = num_queries // BLOCK_M * BLOCK_M
    for start in range(0, whole, BLOCK_M):
        grad_k, grad_v = _key_value_gradient_step(
            k, v, grad_k, grad_v, q_ptr, grad_ptr, lse_ptr, delta_ptr,
            start + tl.arange(0, BLOCK_M), num_queries,
            group, groups, step, stride, stride_q_token, stride_out_token, scale_log2,
            False, K, K0, K1, CLASS,
        )  # fmt: skip
    if whole < num_queries:
        grad_k, grad_v = _key_value_gradient_step(
            k, v, grad_k, grad_v, q_ptr, grad_ptr, lse_ptr, delta_ptr,
            whole + tl.arange(0, BLOCK_M), num_queries,
            group, groups, step, stride, stride_q_token, stride_out_token, scale_log2,
            True, K, K0, K1, CLASS,
        )  # fmt: skip
    is_class = offs_n == 0
    rows = clip * stride_grad_kv_clip + token_n * stride_grad_kv_token + head * K
    class_rows = tl.zeros_like(token_n) + sequence * stride_grad_kv_token + head * K
    store_with_class(
        grad_k_ptr, class_grad_k_ptr, rows, class_rows, mask_n, is_class, scaled(grad_k, scale),
        K, K0, K1, CLASS,
    )  # fmt: skip
    store_with_class(
        grad_v_ptr, class_grad_v_ptr, rows, class_rows, mask_n, is_class, grad_v,
        K, K0, K1, CLASS,
    )  # fmt: skip


def tiled_attention(given: Three, results: Results, sequences: Sequences, scale: float) -> None:
    """Write the results; see :func:`.attention.attention_triton`."""
    (q, k, v), (out, class_out, lse) = given, results
    heads, head_width = q.shape[2:]
    num_queries = lse.shape[2]
    row = _launch.pick(_FORWARD, q.device, q.dtype, head_width)
    programs = lse.shape[0] * heads * cdiv(num_queries, row.blocks["BLOCK_M"])
    _launch.launch(
        _attention_kernel, programs, q, k, v, out, lse, class_out,
        num_queries, sequences.total, heads, sequences.count, sequences.step, sequences.stride,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), out.stride(0), scale * LOG2_E,
        row=row, **as_constants(head_width, sequences),
    )  # fmt: skip


def tiled_attention_backward(
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
    heads, head_width = q.shape[2:]
    num_queries, num_keys = lse.shape[2], sequences.total
    grad_q, grad_k, grad_v = grads
    class_q, class_k, class_v = class_grads
    delta = torch.empty_like(lse)
    lengths = (
        num_queries, num_keys, heads, sequences.count, sequences.step, sequences.stride,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), out.stride(0),
    )  # fmt: skip
    constants = as_constants(head_width, sequences)
    row = _launch.pick(_QUERY_GRADIENT, q.device, q.dtype, head_width)
    _launch.launch(
        _query_gradient_kernel, lse.shape[0] * heads * cdiv(num_queries, row.blocks["BLOCK_M"]),
        grad, q, k, v, out, class_out, lse, delta, grad_q, class_q,
        *lengths, grad_q.stride(0), grad_q.stride(1), scale, scale * LOG2_E, row=row, **constants,
    )  # fmt: skip
    row = _launch.pick(_KEY_VALUE_GRADIENT, q.device, q.dtype, head_width)
    _launch.launch(
        _key_value_gradient_kernel, lse.shape[0] * heads * cdiv(num_keys, row.blocks["BLOCK_N"]),
        grad, q, k, v, lse, delta, grad_k, grad_v, class_k, class_v,
        *lengths, grad_k.stride(0), grad_k.stride(1), scale, scale * LOG2_E, row=row, **constants,
    )  # fmt: skip
