"""Moving whole tokens: gather by index, its scatter, and assembly of the decoder's input.

Shapes: x (B, N, D) tokens, idx (B, V) positions distinct within each clip; decoder tokens
(B, S, E) with S = V + M, the visible ones first; rows of any width W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _launch
from ._launch import Row, cdiv, jit, tl

# 16 values a thread, 16-byte loads: enough bytes in flight on every target. Not yet measured.
_ROWS = Row({"BLOCK_R": 16, "BLOCK_D": 128}, num_warps=4, num_stages=1)
# Rows that one program of column_sum adds up before its partial sum goes to memory.
_SUM_SPAN = 256


def gather_tokens_reference(x_BND: Tensor, idx_BV: Tensor) -> Tensor:
    """``out[b, i] = x[b, idx[b, i]]``, ``(B, V, D)``."""
    return torch.gather(x_BND, 1, _rows_at(idx_BV, x_BND.shape[2]))


def gather_tokens_backward_reference(grad_BVD: Tensor, idx_BV: Tensor, num_tokens: int) -> Tensor:
    """``(B, N, D)``: each gradient at the position it was read from, zero elsewhere."""
    batch, _, width = grad_BVD.shape
    grad_x = grad_BVD.new_zeros(batch, num_tokens, width)
    return grad_x.scatter_(1, _rows_at(idx_BV, width), grad_BVD)


def _rows_at(idx_BV: Tensor, width: int) -> Tensor:
    return idx_BV.long().unsqueeze(-1).expand(-1, -1, width)


def decoder_tokens_reference(
    visible_BVE: Tensor,
    mask_token_E: Tensor,
    pos_embed_NE: Tensor,
    visible_idx_BV: Tensor,
    decode_idx_BM: Tensor,
) -> Tensor:
    """``[visible + pos | mask_token + pos]``, ``(B, V + M, E)``."""
    seen = visible_BVE + pos_embed_NE[visible_idx_BV]
    unseen = mask_token_E + pos_embed_NE[decode_idx_BM]
    return torch.cat([seen, unseen], dim=1)


def shared_tokens_reference(
    visible_BVW: Tensor, shared_NW: Tensor, decode_idx_BM: Tensor
) -> Tensor:
    """``[visible | shared[decode_idx]]``, ``(B, V + M, W)``."""
    return torch.cat([visible_BVW, shared_NW[decode_idx_BM]], dim=1)


def position_gradient_reference(grad_BSE: Tensor, idx_BS: Tensor, num_tokens: int) -> Tensor:
    """``(N, E)`` fp32 (fp64 for fp64): the sum over clips of the gradients at each position."""
    dtype = torch.promote_types(grad_BSE.dtype, torch.float32)
    grad_pos = grad_BSE.new_zeros(num_tokens, grad_BSE.shape[2], dtype=dtype)
    for grad_SE, idx_S in zip(grad_BSE, idx_BS, strict=True):
        # Clip by clip: positions are distinct within one, so the order of adding is fixed.
        grad_pos[idx_S.long()] += grad_SE
    return grad_pos


def column_sum_reference(x_BSE: Tensor) -> Tensor:
    """Sum over clips and tokens, ``(E,)`` fp32 (fp64 for fp64)."""
    return x_BSE.sum((0, 1), dtype=torch.promote_types(x_BSE.dtype, torch.float32))


@jit
def _gather_kernel(
    x_ptr, idx_ptr, out_ptr, num_rows, rows_per_clip, width,
    stride_x_clip, stride_x_token, stride_idx_clip, stride_idx_token,
    HOLES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy BLOCK_R rows of BLOCK_D columns from where the index says.

    Grid: row blocks x column blocks, columns fastest. Writes all of out; an index of -1 reads
    as zeros (HOLES).
    """
    column_blocks = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    rows = (program // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_r = rows < num_rows
    clip = rows // rows_per_clip
    at = clip * stride_idx_clip + (rows % rows_per_clip) * stride_idx_token
    token = tl.load(idx_ptr + at, mask=mask_r, other=0).to(tl.int64)
    mask = mask_r[:, None] & (offs_d < width)[None, :]
    source = mask
    if HOLES:
        source = mask & (token >= 0)[:, None]
    start = clip * stride_x_clip + token * stride_x_token
    values = tl.load(x_ptr + start[:, None] + offs_d[None, :], mask=source, other=0.0)
    tl.store(out_ptr + rows[:, None] * width + offs_d[None, :], values, mask=mask)


@jit
def _invert_kernel(
    idx_ptr, inverse_ptr, num_rows, rows_per_clip, num_tokens, stride_idx_clip, stride_idx_token,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write row i of each clip at the place idx[i] of its inverse.

    Grid: blocks of BLOCK_R rows. Writes only the places that idx names.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = rows < num_rows
    clip, row = rows // rows_per_clip, rows % rows_per_clip
    at = clip * stride_idx_clip + row * stride_idx_token
    token = tl.load(idx_ptr + at, mask=mask, other=0).to(tl.int64)
    tl.store(inverse_ptr + clip * num_tokens + token, row.to(tl.int32), mask=mask)


@jit
def _decoder_tokens_kernel(
    visible_ptr, mask_token_ptr, pos_ptr, visible_idx_ptr, decode_idx_ptr, out_ptr,
    num_rows, num_visible, rows_per_clip, width,
    stride_visible_clip, stride_visible_token, stride_pos,
    stride_vidx_clip, stride_vidx_token, stride_didx_clip, stride_didx_token,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_R rows of BLOCK_D columns of [visible + pos | mask_token + pos].

    Grid: row blocks x column blocks, columns fastest. Writes all of out.
    """
    column_blocks = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    rows = (program // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_r, mask_d = rows < num_rows, offs_d < width
    clip, token = rows // rows_per_clip, rows % rows_per_clip
    seen = token < num_visible
    visible_at = clip * stride_vidx_clip + token * stride_vidx_token
    decode_at = clip * stride_didx_clip + (token - num_visible) * stride_didx_token
    position = tl.load(visible_idx_ptr + visible_at, mask=mask_r & seen, other=0).to(tl.int64)
    position += tl.load(decode_idx_ptr + decode_at, mask=mask_r & (token >= num_visible), other=0)
    mask = mask_r[:, None] & mask_d[None, :]
    start = clip * stride_visible_clip + token * stride_visible_token
    visible = tl.load(
        visible_ptr + start[:, None] + offs_d[None, :], mask=mask & seen[:, None], other=0.0
    ).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    pos = tl.load(
        pos_ptr + position[:, None] * stride_pos + offs_d[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    values = tl.where(seen[:, None], visible, mask_token[None, :]) + pos
    out = out_ptr + rows[:, None] * width + offs_d[None, :]
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _shared_tokens_kernel(
    visible_ptr, shared_ptr, decode_idx_ptr, out_ptr, num_rows, num_visible, rows_per_clip, width,
    stride_visible_clip, stride_visible_token, stride_shared, stride_idx_clip, stride_idx_token,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_R rows of BLOCK_D columns of [visible | shared[decode_idx]].

    Grid: row blocks x column blocks, columns fastest. Writes all of out.
    """
    column_blocks = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    rows = (program // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_r, mask_d = rows < num_rows, offs_d < width
    clip, token = rows // rows_per_clip, rows % rows_per_clip
    seen, unseen = mask_r & (token < num_visible), mask_r & (token >= num_visible)
    at = clip * stride_idx_clip + (token - num_visible) * stride_idx_token
    position = tl.load(decode_idx_ptr + at, mask=unseen, other=0).to(tl.int64)
    start = clip * stride_visible_clip + token * stride_visible_token
    visible = tl.load(
        visible_ptr + start[:, None] + offs_d[None, :],
        mask=seen[:, None] & mask_d[None, :],
        other=0.0,
    )
    shared = tl.load(
        shared_ptr + position[:, None] * stride_shared + offs_d[None, :],
        mask=unseen[:, None] & mask_d[None, :],
        other=0.0,
    )
    values = tl.where(seen[:, None], visible, shared)
    out = out_ptr + rows[:, None] * width + offs_d[None, :]
    tl.store(out, values, mask=mask_r[:, None] & mask_d[None, :])


@jit
def _position_gradient_kernel(
    grad_ptr, inverse_ptr, out_ptr, num_clips, num_tokens, width,
    stride_grad_clip, stride_grad_token,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add up, over clips, the gradients at BLOCK_R positions.

    Grid: position blocks x column blocks, columns fastest. Writes all of out, in fp32.
    """
    column_blocks = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    offs_n = (program // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < num_tokens
    mask = mask_n[:, None] & (offs_d < width)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for clip in range(num_clips):
        clip64 = tl.cast(clip, tl.int64)
        row = tl.load(inverse_ptr + clip64 * num_tokens + offs_n, mask=mask_n, other=-1)
        row = row.to(tl.int64)
        start = clip64 * stride_grad_clip + row * stride_grad_token
        total += tl.load(
            grad_ptr + start[:, None] + offs_d[None, :], mask=mask & (row >= 0)[:, None], other=0.0
        ).to(tl.float32)
    tl.store(out_ptr + offs_n[:, None] * width + offs_d[None, :], total, mask=mask)


@jit
def _column_sum_kernel(
    x_ptr, partial_ptr, num_rows, rows_per_clip, width, stride_x_clip, stride_x_token,
    SPAN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add up SPAN rows of BLOCK_D columns in fp32.

    Grid: spans x column blocks, columns fastest. Writes one row of partial a span.
    """
    column_blocks = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0)
    span = (program // column_blocks).to(tl.int64)
    offs_d = (program % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < width
    total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for first in range(0, SPAN, BLOCK_R):
        rows = span * SPAN + first + tl.arange(0, BLOCK_R)
        start = (rows // rows_per_clip) * stride_x_clip + (rows % rows_per_clip) * stride_x_token
        total += tl.load(
            x_ptr + start[:, None] + offs_d[None, :],
            mask=(rows < num_rows)[:, None] & mask_d[None, :],
            other=0.0,
        ).to(tl.float32)
    tl.store(partial_ptr + span * width + offs_d, tl.sum(total, axis=0), mask=mask_d)


def gather_tokens_triton(x_BND: Tensor, idx_BV: Tensor) -> Tensor:
    """As :func:`gather_tokens_reference`."""
    return _gather(x_BND, idx_BV, holes=False)


def gather_tokens_backward_triton(grad_BVD: Tensor, idx_BV: Tensor, num_tokens: int) -> Tensor:
    """As :func:`gather_tokens_backward_reference`: a gather by the inverse index, in one pass."""
    return _gather(grad_BVD, inverse_index(idx_BV, num_tokens), holes=True)


def _gather(x_BND: Tensor, idx_BV: Tensor, holes: bool) -> Tensor:
    x_BND = dense_rows(x_BND)
    batch, count = idx_BV.shape
    width = x_BND.shape[2]
    out = x_BND.new_empty(batch, count, width)
    _launch.launch(
        _gather_kernel,
        _tiles(batch * count, width),
        x_BND, idx_BV, out, batch * count, count, width,
        x_BND.stride(0), x_BND.stride(1), idx_BV.stride(0), idx_BV.stride(1),
        HOLES=holes,
        row=_ROWS,
    )  # fmt: skip
    return out


def inverse_index(idx_BV: Tensor, num_tokens: int) -> Tensor:
    """``(B, N)`` int32: where in idx each position stands, -1 where it does not."""
    batch, count = idx_BV.shape
    inverse = idx_BV.new_full((batch, num_tokens), -1, dtype=torch.int32)
    block = 256
    _launch.launch(
        _invert_kernel,
        cdiv(batch * count, block),
        idx_BV, inverse, batch * count, count, num_tokens, idx_BV.stride(0), idx_BV.stride(1),
        row=Row({"BLOCK_R": block}),
    )  # fmt: skip
    return inverse


def decoder_tokens_triton(
    visible_BVE: Tensor,
    mask_token_E: Tensor,
    pos_embed_NE: Tensor,
    visible_idx_BV: Tensor,
    decode_idx_BM: Tensor,
) -> Tensor:
    """As :func:`decoder_tokens_reference`, in one pass."""
    visible_BVE, pos_embed_NE = dense_rows(visible_BVE), dense_rows(pos_embed_NE)
    batch, num_visible, width = visible_BVE.shape
    count = num_visible + decode_idx_BM.shape[1]
    dtype = torch.promote_types(visible_BVE.dtype, mask_token_E.dtype)
    dtype = torch.promote_types(dtype, pos_embed_NE.dtype)
    out = visible_BVE.new_empty(batch, count, width, dtype=dtype)
    _launch.launch(
        _decoder_tokens_kernel,
        _tiles(batch * count, width),
        visible_BVE, mask_token_E.contiguous(), pos_embed_NE, visible_idx_BV, decode_idx_BM, out,
        batch * count, num_visible, count, width,
        visible_BVE.stride(0), visible_BVE.stride(1), pos_embed_NE.stride(0),
        *visible_idx_BV.stride(), *decode_idx_BM.stride(),
        row=_ROWS,
    )  # fmt: skip
    return out


def shared_tokens_triton(visible_BVW: Tensor, shared_NW: Tensor, decode_idx_BM: Tensor) -> Tensor:
    """As :func:`shared_tokens_reference`, in one pass."""
    visible_BVW, shared_NW = dense_rows(visible_BVW), dense_rows(shared_NW)
    batch, num_visible, width = visible_BVW.shape
    count = num_visible + decode_idx_BM.shape[1]
    out = visible_BVW.new_empty(batch, count, width)
    _launch.launch(
        _shared_tokens_kernel,
        _tiles(batch * count, width),
        visible_BVW, shared_NW, decode_idx_BM, out, batch * count, num_visible, count, width,
        visible_BVW.stride(0), visible_BVW.stride(1), shared_NW.stride(0), *decode_idx_BM.stride(),
        row=_ROWS,
    )  # fmt: skip
    return out


def position_gradient_triton(grad_BSE: Tensor, idx_BS: Tensor, num_tokens: int) -> Tensor:
    """As :func:`position_gradient_reference`."""
    grad_BSE = dense_rows(grad_BSE)
    batch, _, width = grad_BSE.shape
    out = grad_BSE.new_empty(num_tokens, width, dtype=torch.float32)
    _launch.launch(
        _position_gradient_kernel,
        _tiles(num_tokens, width),
        grad_BSE, inverse_index(idx_BS, num_tokens), out, batch, num_tokens, width,
        grad_BSE.stride(0), grad_BSE.stride(1),
        row=_ROWS,
    )  # fmt: skip
    return out


def column_sum_triton(x_BSE: Tensor) -> Tensor:
    """As :func:`column_sum_reference`: partial sums of fixed spans, added in a fixed order."""
    x_BSE = dense_rows(x_BSE)
    batch, count, width = x_BSE.shape
    spans = cdiv(batch * count, _SUM_SPAN)
    partial = x_BSE.new_empty(spans, width, dtype=torch.float32)
    _launch.launch(
        _column_sum_kernel,
        spans * cdiv(width, _ROWS.blocks["BLOCK_D"]),
        x_BSE, partial, batch * count, count, width, x_BSE.stride(0), x_BSE.stride(1),
        SPAN=_SUM_SPAN,
        row=_ROWS,
    )  # fmt: skip
    return partial.sum(0)


def dense_rows(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, else a copy that is."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _tiles(rows: int, width: int) -> int:
    return cdiv(rows, _ROWS.blocks["BLOCK_R"]) * cdiv(width, _ROWS.blocks["BLOCK_D"])
