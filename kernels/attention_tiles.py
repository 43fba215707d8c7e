"""What the attention kernels share: where a sequence's tokens lie, and tiles of odd head widths.

A head width that is no power of two is held as two tiles side by side, 80 as 64 + 16 and 88 as
64 + 32: in one of 128 half the work would be on padding. So a tile here is a tuple of parts, one or
two, over the same rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ._launch import jit, tl

# Logits are kept in units of log 2, since a GPU knows the exponential to base 2 alone.
LOG2_E = math.log2(math.e)

# Head widths that the kernels take, each with the widths of its parts.
HEAD_PARTS = {32: (32, 0), 64: (64, 0), 80: (64, 16), 88: (64, 32), 128: (128, 0)}


class Sequences(NamedTuple):
    """How a clip's tokens form the sequences that attend to each other.

    Attributes:
        count: sequences a clip, G.
        length: tokens of each, N; the class token not counted.
        step: tokens from the first of one sequence to the first of the next.
        stride: tokens from one of a sequence to the next of it.
        class_token: the clip's token 0 stands first in every sequence, before those of the grid.
    """

    count: int
    length: int
    step: int = 0
    stride: int = 1
    class_token: bool = False

    @property
    def total(self) -> int:
        """Tokens of each, with the class token."""
        return self.length + self.class_token

    @property
    def is_joint(self) -> bool:
        """All tokens of a clip in one sequence, which in cross attention are keys only."""
        return self == joint(self.length)


class Results(NamedTuple):
    """What attention returns.

    Attributes:
        out: ``(B, T, H, K)``, contiguous.
        class_out: what each sequence has for the class token, ``(B, G, H, K)`` fp32 (fp64 for
            fp64), whose mean is token 0 of out; None without one.
        lse: log-sum-exp of the logits, ``(S, H, M)`` fp32 (fp64 for fp64).
    """

    out: Tensor
    class_out: Tensor | None
    lse: Tensor


# q, k and v, ``(B, T, H, K)`` each, or their gradients.
Three = tuple[Tensor, Tensor, Tensor]


def joint(num_tokens: int) -> Sequences:
    """All tokens of a clip in one sequence."""
    return Sequences(1, num_tokens)


def divided(t: int, s: int, axis: str, class_token: bool) -> Sequences:
    """Tokens of a t-major grid of t rows and s positions: along "time" or across "space"."""
    if axis == "time":
        return Sequences(s, t, step=1, stride=s, class_token=class_token)
    return Sequences(t, s, step=s, stride=1, class_token=class_token)


def as_constants(head_width: int, sequences: Sequences | None = None) -> dict[str, int | bool]:
    """What a kernel is compiled for, by the names of its arguments; CLASS where it knows one."""
    first, second = HEAD_PARTS[head_width]
    widths = {"K": head_width, "K0": first, "K1": second}
    return widths if sequences is None else widths | {"CLASS": sequences.class_token}


@jit
def to_log2(x):
    """Natural logarithms as logarithms to base 2."""
    return x * 1.4426950408889634


@jit
def from_log2(x):
    """Logarithms to base 2 as natural ones."""
    return x * 0.6931471805599453


@jit
def token_at(position, group, step, stride, CLASS: tl.constexpr):
    """The clip's tokens, int64, at positions of a sequence."""
    start = group.to(tl.int64) * step
    if CLASS:
        return tl.where(position == 0, 0, 1 + start + (position - 1).to(tl.int64) * stride)
    else:
        return start + position.to(tl.int64) * stride


@jit
def load_parts(
    ptr, rows, mask, MASKED: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
):  # fmt: skip
    """A tile: K values from each row's offset; zeros where the mask says so (MASKED)."""
    here = ptr + rows[:, None] + tl.arange(0, K0)[None, :]
    first = tl.load(here, mask=mask[:, None], other=0.0) if MASKED else tl.load(here)
    if K1 == 0:
        return (first,)
    else:
        offs = K0 + tl.arange(0, K1)
        there = ptr + rows[:, None] + offs[None, :]
        inside = (offs < K)[None, :]
        if MASKED:
            inside = inside & mask[:, None]
        return (first, tl.load(there, mask=inside, other=0.0))


@jit
def store_parts(
    ptr, rows, mask, tile, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr
):  # fmt: skip
    """Write a tile of fp32 to each row's offset, in the dtype that lies there."""
    here = ptr + rows[:, None] + tl.arange(0, K0)[None, :]
    tl.store(here, tile[0].to(ptr.dtype.element_ty), mask=mask[:, None])
    if K1 > 0:
        offs = K0 + tl.arange(0, K1)
        there = ptr + rows[:, None] + offs[None, :]
        inside = mask[:, None] & (offs < K)[None, :]
        tl.store(there, tile[1].to(ptr.dtype.element_ty), mask=inside)


@jit
def store_with_class(
    ptr, class_ptr, rows, class_rows, mask, is_class, tile,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, CLASS: tl.constexpr,
):  # fmt: skip
    """:func:`store_parts`, the class token's rows to class_ptr instead (CLASS)."""
    if CLASS:
        store_parts(ptr, rows, mask & (is_class == 0), tile, K, K0, K1)
        store_parts(class_ptr, class_rows, mask & is_class, tile, K, K0, K1)
    else:
        store_parts(ptr, rows, mask, tile, K, K0, K1)


@jit
def zeros(ROWS: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr):
    """A tile of fp32 zeros."""
    first = tl.zeros([ROWS, K0], dtype=tl.float32)
    if K1 == 0:
        return (first,)
    else:
        return (first, tl.zeros([ROWS, K1], dtype=tl.float32))


@jit
def scaled(tile, factor):
    """Every value, or every row by its own factor ``(rows, 1)``, times a factor."""
    if len(tile) == 1:
        return (tile[0] * factor,)
    else:
        return (tile[0] * factor, tile[1] * factor)


@jit
def cast(tile, like):
    """A tile in the dtype of another."""
    if len(tile) == 1:
        return (tile[0].to(like[0].dtype),)
    else:
        return (tile[0].to(like[0].dtype), tile[1].to(like[0].dtype))


@jit
def row_products(a, b):
    """Each row's inner product of two tiles, fp32."""
    product = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), axis=1)
    if len(a) == 2:
        product += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), axis=1)
    return product


@jit
def inner(a, b):
    """``a @ b^T`` over the head width: (M, K) and (N, K) to (M, N) fp32."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) == 2:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision="ieee")
    return product


@jit
def add_product(accumulated, weights, tile):
    """``accumulated + weights @ tile``: (M, K) fp32, (M, N) and (N, K)."""
    first = tl.dot(weights, tile[0], accumulated[0], input_precision="ieee")
    if len(tile) == 1:
        return (first,)
    else:
        second = tl.dot(weights, tile[1], accumulated[1], input_precision="ieee")
        return (first, second)
