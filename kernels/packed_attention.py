"""Attention among few tokens: several short sequences in one tile, each seeing its own alone.

For columns of a grid along time (2 to 32 tokens) and small rows across space. All logits of a tile
are on the chip at once, so the backward pass reads neither output nor log-sum-exp. What is
computed of other sequences' logits is thrown away; the time goes into moving q, k and v. A tile
holds sequences of one clip only: a weight of zero times a value that is not finite is not zero, and
nothing of one clip may reach another.
"""

from __future__ import annotations

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
    scaled,
    store_with_class,
    token_at,
    zeros,
)


def _table(
    warps: dict[tuple[int, int, int], int | None],
) -> dict[tuple[int, Any, int, int], Row | None]:
    """Rows by target, dtype, head width and tile, from the warps of 16-bit ones."""
    rows: dict[tuple[int, Any, int, int], Row | None] = {}
    for (target, width, tile), num_warps in warps.items():
        row = None if num_warps is None else Row({"BLOCK": tile}, num_warps, num_stages=1)
        for dtype in (torch.float16, torch.bfloat16):
            rows[target, dtype, width, tile] = row
    for width in HEAD_PARTS:
        rows[80, torch.float32, width, 32] = Row({"BLOCK": 32}, num_warps=8, num_stages=1)
    return rows


_TILES = (32, 64)
# By head width and tile: so many warps that no register spills in Triton 3.6 and 3.9. Where some
# always do there is None, and such lengths go to the other kernels. Not yet measured.
_FORWARD_WARPS = {(width, tile): tile // 16 for width in HEAD_PARTS for tile in _TILES}
_BACKWARD_WARPS = {(width, 32): 2 if width <= 64 else 4 for width in HEAD_PARTS}
_BEFORE_HOPPER = {(32, 64): 4, (64, 64): 4, (80, 64): 8, (88, 64): None, (128, 64): None}
_SINCE_HOPPER = {(width, 64): 4 if width < 128 else 8 for width in HEAD_PARTS}
_FORWARD = _table({(80, *key): warps for key, warps in _FORWARD_WARPS.items()})
_BACKWARD = _table(
    {(80, *key): warps for key, warps in (_BACKWARD_WARPS | _BEFORE_HOPPER).items()}
    | {(90, *key): warps for key, warps in _SINCE_HOPPER.items()}
    | {(100, 128, 64): 4}
    # The last without Hopper's or the data centre Blackwell's matrix units.
    | {(120, *key): warps for key, warps in _BEFORE_HOPPER.items()}
)


@jit
def _place(program, tiles, heads):
    """Tile of a clip, head and clip (int64); heads fastest, since theirs are neighbours."""
    tile = program // heads
    return tile % tiles, program % heads, (tile // tiles).to(tl.int64)


@jit
def _rows_of_tile(tile, length, per_tile, groups, BLOCK: tl.constexpr):
    """Of each row of a clip's tile: sequence, position in it, whether there is one."""
    row = tl.arange(0, BLOCK)
    group = tile * per_tile + row // length
    return group, row % length, (row < per_tile * length) & (group < groups)


@jit
def _of_one_sequence(length, BLOCK: tl.constexpr):
    """Which rows of a tile are of one sequence, (BLOCK, BLOCK)."""
    # Rows that are no tokens see each other: not a softmax of nothing.
    row = tl.arange(0, BLOCK) // length
    return row[:, None] == row[None, :]


@jit
def _packed_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, class_out_ptr,
    tiles, per_tile, length, heads, groups, step, stride,
    stride_clip, stride_token, stride_out_clip, scale_log2,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, CLASS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of per_tile whole sequences of a clip.

    Grid: clips x tiles x heads, heads fastest. Writes all of out, lse and class_out.
    """
    tile, head, clip = _place(tl.program_id(0), tiles, heads)
    group, position, mask = _rows_of_tile(tile, length, per_tile, groups, BLOCK)
    token = token_at(position, group, step, stride, CLASS)
    rows = clip * stride_clip + token * stride_token + head * K
    q = load_parts(q_ptr, rows, mask, True, K, K0, K1)
    k = load_parts(k_ptr, rows, mask, True, K, K0, K1)
    v = load_parts(v_ptr, rows, mask, True, K, K0, K1)
    logits = tl.where(_of_one_sequence(length, BLOCK), inner(q, k) * scale_log2, float("-inf"))
    top = tl.max(logits, axis=1)
    weights = tl.exp2(logits - top[:, None])
    total = tl.sum(weights, axis=1)
    acc = add_product(zeros(BLOCK, K0, K1), weights.to(v[0].dtype), v)
    sequence = clip * groups + group
    rows = clip * stride_out_clip + token * (heads * K) + head * K
    store_with_class(
        out_ptr, class_out_ptr, rows, (sequence * heads + head) * K, mask, position == 0,
        scaled(acc, (1.0 / total)[:, None]), K, K0, K1, CLASS,
    )  # fmt: skip
    at = (sequence * heads + head) * length + position
    tl.store(lse_ptr + at, from_log2(top + tl.log2(total)), mask=mask)


@jit
def _packed_attention_backward_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr,
    class_grad_q_ptr, class_grad_k_ptr, class_grad_v_ptr,
    tiles, per_tile, length, heads, groups, step, stride,
    stride_clip, stride_token, stride_out_clip, stride_grad_clip, stride_grad_token,
    scale, scale_log2,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, CLASS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All gradients of one head of per_tile whole sequences of a clip.

    Grid: clips x tiles x heads, heads fastest. Writes all of grad_q, grad_k and grad_v.
    """
    tile, head, clip = _place(tl.program_id(0), tiles, heads)
    group, position, mask = _rows_of_tile(tile, length, per_tile, groups, BLOCK)
    is_class = position == 0
    token = token_at(position, group, step, stride, CLASS)
    rows = clip * stride_clip + token * stride_token + head * K
    q = load_parts(q_ptr, rows, mask, True, K, K0, K1)
    k = load_parts(k_ptr, rows, mask, True, K, K0, K1)
    v = load_parts(v_ptr, rows, mask, True, K, K0, K1)
    rows = clip * stride_out_clip + token * (heads * K) + head * K
    grad = load_parts(grad_ptr, rows, mask, True, K, K0, K1)
    if CLASS:
        # The class token's output is the mean over sequences of its outputs in each.
        grad = cast(scaled(grad, tl.where(is_class, 1.0 / groups, 1.0)[:, None]), grad)
    # Anew, not from the log-sum-exp, whose rounding would be that of the weights.
    logits = tl.where(_of_one_sequence(length, BLOCK), inner(q, k) * scale_log2, float("-inf"))
    weights = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    grad_weights = inner(grad, v)
    delta = tl.sum(weights * grad_weights, axis=1)
    grad_logits = (weights * (grad_weights - delta[:, None])).to(q[0].dtype)
    rows = clip * stride_grad_clip + token * stride_grad_token + head * K
    class_rows = (clip * groups + group) * stride_grad_token + head * K
    grad_v = add_product(zeros(BLOCK, K0, K1), tl.trans(weights.to(q[0].dtype)), grad)
    store_with_class(
        grad_v_ptr, class_grad_v_ptr, rows, class_rows, mask, is_class, grad_v, K, K0, K1, CLASS
    )
    grad_q = add_product(zeros(BLOCK, K0, K1), grad_logits, k)
    store_with_class(
        grad_q_ptr, class_grad_q_ptr, rows, class_rows, mask, is_class, scaled(grad_q, scale),
        K, K0, K1, CLASS,
    )  # fmt: skip
    grad_k = add_product(zeros(BLOCK, K0, K1), tl.trans(grad_logits), q)
    store_with_class(
        grad_k_ptr, class_grad_k_ptr, rows, class_rows, mask, is_class, scaled(grad_k, scale),
        K, K0, K1, CLASS,
    )  # fmt: skip


def packed_forward_row(q: Tensor, sequences: Sequences) -> Row | None:
    """The table's row for sequences of this length, None where no tile holds one."""
    return _row(_FORWARD, q, sequences.total)


def packed_backward_row(q: Tensor, sequences: Sequences) -> Row | None:
    """As :func:`packed_forward_row`, of the backward pass."""
    return _row(_BACKWARD, q, sequences.total)


def _row(table: Any, q: Tensor, length: int) -> Row | None:
    """The tile that sequences fill best, the smaller where two do."""
    rows = [
        _launch.find(table, q.device, q.dtype, q.shape[3], tile)
        for tile in _TILES
        if tile >= length
    ]
    fill = {tile: tile // length * length / tile for tile in _TILES}
    return max(
        (row for row in rows if row is not None),
        key=lambda row: (fill[row.blocks["BLOCK"]], -row.blocks["BLOCK"]),
        default=None,
    )


def packed_attention(
    row: Row, given: Three, results: Results, sequences: Sequences, scale: float
) -> None:
    """Write the results; see :func:`.attention.attention_triton`."""
    (q, k, v), (out, class_out, lse) = given, results
    programs, lengths = _tiles(row, q, sequences)
    _launch.launch(
        _packed_attention_kernel, programs, q, k, v, out, lse, class_out,
        *lengths, q.stride(0), q.stride(1), out.stride(0), scale * LOG2_E,
        row=row, **as_constants(q.shape[3], sequences),
    )  # fmt: skip


def packed_attention_backward(
    row: Row,
    grad: Tensor,
    given: Three,
    results: Results,
    grads: Three,
    class_grads: tuple[Tensor | None, ...],
    sequences: Sequences,
    scale: float,
) -> None:
    """Write grads and class_grads; see :func:`.attention.attention_backward_triton`."""
    (q, k, v), out = given, results.out
    programs, lengths = _tiles(row, q, sequences)
    _launch.launch(
        _packed_attention_backward_kernel, programs, grad, q, k, v, *grads, *class_grads,
        *lengths, q.stride(0), q.stride(1), out.stride(0), grads[0].stride(0), grads[0].stride(1),
        scale, scale * LOG2_E, row=row, **as_constants(q.shape[3], sequences),
    )  # fmt: skip


def _tiles(row: Row, q: Tensor, sequences: Sequences) -> tuple[int, tuple[int, ...]]:
    """Programs, and what says which rows of a tile are where, as the kernels take it."""
    batch, _, heads, _ = q.shape
    per_tile = row.blocks["BLOCK"] // sequences.total
    tiles = cdiv(sequences.count, per_tile)
    lengths = (
        tiles, per_tile, sequences.total, heads, sequences.count, sequences.step, sequences.stride
    )  # fmt: skip
    return batch * tiles * heads, lengths
