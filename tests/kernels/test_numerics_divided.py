"""Divided attention kernels, along time and across space, against each sequence by itself."""

import os

import pytest
import torch
from attention_truth import (
    HEAD_WIDTHS,
    compare,
    definition,
    heads,
    in_sequences,
    log_sum_exp,
    normal,
    run,
    sequences_of,
)
from helpers import relative_error

from vmae_fast import ops

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a GPU, or Triton's interpreter, in which test_interpreter.py runs this file",
        allow_module_level=True,
    )
pytestmark = [pytest.mark.usefixtures("kernels")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)

# Sequences by the axis, of every length that counts, and how many: the last tile is never full.
GRIDS = [  # axis, t, s
    *(("time", t, s) for t, s in ((2, 35), (3, 23), (8, 5), (16, 5), (31, 3), (64, 2), (70, 2))),
    *(("space", 7, s) for s in (4, 5)),
    *(("space", 3, s) for s in (20, 49)),
    # With a class token one of these becomes too long to be packed, and one fills its tile.
    *(("space", 2, s) for s in (63, 64, 65, 196)),
    ("space", 1, 257),
]
# What does not hang on precision: the interpreter is slow.
two_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=str, indirect=True
)
class_token = pytest.mark.parametrize("class_token", [False, True], ids=["", "class_token"])
each_family = pytest.mark.parametrize(
    ("family", "axis", "t", "s"),
    [
        *(("packed", "space", 5, 4), ("whole", "time", 41, 2), ("tiled", "space", 2, 67)),
        *(("cuda", "time", 8, 19), ("cuda", "space", 5, 20), ("cuda", "space", 2, 67)),
    ],
)


def attend(num_heads, index, scale):
    """The function of packed projections, written out with a function of q, k and v."""

    def written(definition):
        def function(qkv):
            return in_sequences(definition, *heads(qkv, num_heads, 3), scale, index).flatten(2)

        return function

    return written


def check(qkv, num_heads, grid, axis, class_token, scale=None, upstream=None):
    if upstream is None:
        shape = (*qkv.shape[:2], qkv.shape[2] // 3)
        upstream = normal(*shape, dtype=qkv.dtype, device=qkv.device, seed=1)
    index = sequences_of(grid[0], (qkv.shape[1] - class_token) // grid[0], axis, class_token)
    scale_of_all = scale or (qkv.shape[2] // 3 // num_heads) ** -0.5

    def function(x):
        return ops.divided_attention(x, num_heads, grid, axis, class_token=class_token, scale=scale)

    compare(function, attend(num_heads, index, scale_of_all), [qkv], upstream, num_heads)


@class_token
@pytest.mark.parametrize(("place", "case"), enumerate(GRIDS), ids=lambda value: str(value))
def test_divided_attention(place, case, class_token, dtype, device):
    axis, t, s = case
    head_width = HEAD_WIDTHS[place % 5]
    qkv = normal(1, class_token + t * s, 3 * head_width, dtype=dtype, device=device)
    check(qkv, 1, (t, s), axis, class_token)


@pytest.mark.parametrize("family", ["cuda"])
@pytest.mark.parametrize(("place", "case"), enumerate(GRIDS[:-1]), ids=lambda value: str(value))
def test_cuda_divided_attention(family, place, case, dtype, device, force):
    axis, t, s = case
    head_width = (64, 80, 88)[place % 3]
    force(family, max(t, s), head_width, dtype)
    qkv = normal(2, t * s, 3 * 2 * head_width, dtype=dtype, device=device)
    check(qkv, 2, (t, s), axis, False)


@class_token
@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
@each_family
def test_every_head_width(family, axis, t, s, head_width, class_token, device, force):
    force(family, class_token + max(t, s), head_width, torch.float32, class_token)
    qkv = normal(1, class_token + t * s, 3 * head_width, dtype=torch.float32, device=device)
    check(qkv, 1, (t, s), axis, class_token)


@class_token
@pytest.mark.parametrize("axis", ["time", "space"])
@two_dtypes
def test_a_grid_of_rows_and_columns(axis, class_token, dtype, device):
    """Two clips, two heads, a grid of three numbers, a scale of its own."""
    qkv = normal(2, class_token + 3 * 4 * 5, 3 * 2 * 32, dtype=dtype, device=device)
    check(qkv, 2, (3, 4, 5), axis, class_token, scale=0.3)
    flat, grid = (
        ops.divided_attention(qkv, 2, grid, axis, class_token=class_token)
        for grid in ((3, 20), (3, 4, 5))
    )
    assert torch.equal(flat, grid)


@class_token
@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("family", ["packed", "whole", "tiled", "cuda"])
@two_dtypes
def test_lengths_that_any_family_takes(family, axis, class_token, dtype, device, force):
    force(family, class_token + 20, 64, dtype, class_token)
    qkv = normal(2, class_token + 20 * 3, 3 * 2 * 64, dtype=dtype, device=device)
    check(qkv, 2, (20, 3) if axis == "time" else (3, 20), axis, class_token)


@class_token
@each_family
@two_dtypes
def test_layouts(family, axis, t, s, class_token, dtype, device, force):
    force(family, class_token + max(t, s), 64, dtype, class_token)
    num_tokens, given = class_token + t * s, {"dtype": dtype, "device": device}
    # Nothing that a kernel may hope for in the memory's alignment but what "cuda" asks for.
    margin = 8 if family == "cuda" else 2
    qkv = normal(4, num_tokens + 3, 3 * 64 + 2 * margin, **given)[::2, 3:, margin:-margin]
    upstream = normal(2, num_tokens, 1, **given, seed=1).expand(-1, -1, 64)
    check(qkv, 1, (t, s), axis, class_token, upstream=upstream)


@class_token
@each_family
@two_dtypes
def test_what_else_is_returned(family, axis, t, s, class_token, dtype, device, force):
    """Log-sum-exp, and the class token's output in each sequence, whose mean is its output."""
    force(family, class_token + max(t, s), 64, dtype, class_token)
    qkv = normal(2, class_token + t * s, 3 * 2 * 64, dtype=dtype, device=device)
    out, class_out, lse = torch.ops.vmae_fast.divided_attention(
        qkv, 2, t, s, axis, class_token, 0.7
    )
    index = sequences_of(t, s, axis, class_token).to(device)
    q, k, v = (x[:, index].flatten(0, 1) for x in heads(qkv.double(), 2, 3))
    truth = log_sum_exp(q, k, 0.7)
    assert lse.shape == truth.shape
    assert ((lse - truth).abs() <= 1e-5 + 1e-6 * truth.abs()).all()
    assert class_out.dtype == torch.float32
    assert class_out.shape == (2, len(index) if class_token else 0, 2 * 64)
    if class_token:
        first = definition(q, k, v, 0.7)[:, 0].flatten(1).unflatten(0, (2, -1))
        # The values are as they are given; what is rounded is the weights.
        rtol = 1e-5 + torch.finfo(dtype).eps
        assert relative_error(class_out, first) < rtol
        assert relative_error(out[:, 0], class_out.double().mean(1)) < rtol


@each_family
@two_dtypes
def test_nothing_leaks_to_other_sequences_or_clips(family, axis, t, s, dtype, device, force):
    force(family, max(t, s), 64, dtype)
    qkv = normal(2, t * s, 3 * 64, dtype=dtype, device=device)
    upstream = normal(2, t * s, 64, dtype=dtype, device=device, seed=1)

    def function(x):
        return ops.divided_attention(x, 1, (t, s), axis)

    clean = run(function, [qkv], upstream)
    poisoned, *others = sequences_of(t, s, axis, False).to(device)
    qkv[1, poisoned], upstream[1, poisoned] = torch.nan, torch.nan
    for got, expected in zip(run(function, [qkv], upstream), clean, strict=True):
        assert got[1, poisoned].isnan().all()
        assert torch.equal(got[0], expected[0])
        # Sequences of one clip may share a tile, where a weight of 0 times NaN is NaN.
        for other in others if family not in ("packed", "cuda") else ():
            assert torch.equal(got[1, other], expected[1, other])


@class_token
@each_family
@two_dtypes
def test_the_same_from_run_to_run(family, axis, t, s, class_token, dtype, device, force):
    force(family, class_token + max(t, s), 64, dtype, class_token)
    qkv = normal(1, class_token + t * s, 3 * 64, dtype=dtype, device=device)
    upstream = normal(1, class_token + t * s, 64, dtype=dtype, device=device, seed=1)

    def function(x):
        return ops.divided_attention(x, 1, (t, s), axis, class_token=class_token)

    first, second = (run(function, [qkv], upstream) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
