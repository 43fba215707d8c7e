"""Attention kernels of all tokens, and of queries over other keys, against fp64 written out."""

import os
from unittest import mock

import pytest
import torch
from attention_truth import (
    HEAD_WIDTHS,
    assert_accurate,
    compare,
    definition,
    eager,
    heads,
    log_sum_exp,
    normal,
    run,
)
from helpers import EAGER_FACTOR, relative_error

from vmae_fast import ops
from vmae_fast.kernels import _launch
from vmae_fast.kernels._launch import TARGETS

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a GPU, or Triton's interpreter, in which test_interpreter.py runs this file",
        allow_module_level=True,
    )
pytestmark = [pytest.mark.usefixtures("kernels")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)

# One token, one less and one more than every block, tile and part of keys.
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 160, 196, 208, 255, 256, 257, 300)
# Every head width comes to short, middling and long sequences.
CASES = [(n, HEAD_WIDTHS[place % 5]) for place, n in enumerate(LENGTHS)]
CASES += [(n, HEAD_WIDTHS[(place + 2) % 5]) for place, n in enumerate(LENGTHS) if n < 128]
# Every sum of powers of two from 16 that a length up to 256 is cut into.
PARTS = range(80, 257, 16)
CROSS = ((1, 1), (1, 300), (300, 1), (37, 100), (5, 290), (130, 20), (20, 33), (19, 19))


def attend(num_heads, scale, count):
    """The function of packed projections, written out with a function of q, k and v."""

    def written(definition):
        def function(*leaves):
            if count == 3:
                given = heads(leaves[0], num_heads, 3)
            else:
                given = (*heads(leaves[0], num_heads, 1), *heads(leaves[1], num_heads, 2))
            return definition(*given, scale).flatten(2)

        return function

    return written


def check_attention(qkv, num_heads, scale=None, upstream=None, largest_logit=0.0):
    width = qkv.shape[2] // 3
    if upstream is None:
        upstream = normal(*qkv.shape[:2], width, dtype=qkv.dtype, device=qkv.device, seed=1)
    written = attend(num_heads, scale or (width // num_heads) ** -0.5, 3)

    def function(x):
        return ops.attention(x, num_heads, scale)

    compare(function, written, [qkv], upstream, num_heads, largest_logit)


def check_cross_attention(q, kv, num_heads, scale=None):
    upstream = normal(*q.shape, dtype=q.dtype, device=q.device, seed=2)
    written = attend(num_heads, scale or (q.shape[2] // num_heads) ** -0.5, 2)

    def function(q, kv):
        return ops.cross_attention(q, kv, num_heads, scale)

    compare(function, written, [q, kv], upstream, num_heads)


@pytest.mark.parametrize(("num_tokens", "head_width"), CASES)
def test_attention(num_tokens, head_width, dtype, device):
    num_heads = 2 if num_tokens < 64 else 1
    qkv = normal(1, num_tokens, 3 * num_heads * head_width, dtype=dtype, device=device)
    check_attention(qkv, num_heads)


@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
@pytest.mark.parametrize(
    ("family", "num_tokens"),
    [
        *(("packed", 5), ("packed", 64), ("whole", 65), ("whole", 166), ("tiled", 33)),
        *(("tiled", 131), ("cuda", 5), ("cuda", 64), ("cuda", 166)),
    ],
)
def test_every_family(family, num_tokens, head_width, dtype, device, force):
    force(family, num_tokens, head_width, dtype)
    qkv = normal(1, num_tokens, 3 * head_width, dtype=dtype, device=device)
    check_attention(qkv, 1)


@pytest.mark.parametrize("num_tokens", [n for n in LENGTHS if n < 160])
def test_tiled_at_short_lengths(num_tokens, device, force):
    force("tiled", num_tokens, 32, torch.float32)
    check_attention(normal(1, num_tokens, 3 * 32, dtype=torch.float32, device=device), 1)


# The longest of each width whose backward pass an H100's shared memory holds, and others.
CUDA_LENGTHS = [
    (n, (64, 80, 88)[place % 3]) for place, n in enumerate((*LENGTHS[:-4], 143, 176, 192, 193))
]
CUDA_LENGTHS += [(208, 64), (208, 80), (208, 88), (224, 64)]


@pytest.mark.parametrize("family", ["cuda"])
@pytest.mark.parametrize(("num_tokens", "head_width"), CUDA_LENGTHS)
def test_cuda_at_all_lengths(family, num_tokens, head_width, dtype, device, force):
    """Two heads and two clips: a block has several in turn where its shared memory is doubled."""
    force(family, num_tokens, head_width, dtype)
    check_attention(normal(2, num_tokens, 3 * 2 * head_width, dtype=dtype, device=device), 2)


@pytest.mark.parametrize("family", ["cuda"])
@pytest.mark.parametrize("head_width", [64, 80, 88])
@pytest.mark.parametrize("num_tokens", [225, 255, 256])
def test_cuda_forward_alone(family, num_tokens, head_width, dtype, device, force):
    """Sequences whose backward pass does not fit and is another kernel's."""
    force(family, num_tokens, head_width, dtype)
    qkv = normal(2, num_tokens, 3 * head_width, dtype=dtype, device=device)
    given, scale = heads(qkv, 1, 3), head_width**-0.5
    theirs, truth = eager(*given, scale), definition(*(x.double() for x in given), scale)
    got = ops.attention(qkv, 1).unflatten(2, (1, -1))
    assert_accurate([got], [theirs], [truth], EAGER_FACTOR)


@pytest.mark.parametrize("num_tokens", PARTS)
def test_whole_in_all_parts(num_tokens, dtype, device, force):
    force("whole", num_tokens, 64, dtype)
    check_attention(normal(1, num_tokens, 3 * 64, dtype=dtype, device=device), 1)


@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
def test_rows_of_other_targets(head_width, device, monkeypatch):
    """Their block sizes, which the interpreter can run wherever they are meant for."""
    if device.type != "cpu":
        pytest.skip("not rows for this GPU")
    known = set()
    for target in TARGETS:
        monkeypatch.setattr(_launch, "target_of", lambda _, target=target: target)
        for dtype in (torch.float32, torch.float16):
            for num_tokens in (7, 59, 77, 131, 246, 259):
                qkv = normal(1, num_tokens, 3 * head_width, dtype=dtype, device=device)
                blocks = blocks_of(qkv)
                if blocks - known:
                    check_attention(qkv, 1)
                known |= blocks
    # Packed and in tiles; the keys of some widths fit on no chip.
    assert len({kernel for kernel, _ in known}) >= 5


def blocks_of(qkv):
    """Kernels by name and the block sizes of their launches for one head, without running them."""
    noted = set()

    def note(kernel, programs, *args, row, **constants):
        noted.add((kernel.__name__, tuple(row.blocks.items())))

    with mock.patch.object(_launch, "launch", note):
        run(lambda x: ops.attention(x, 1), [qkv], qkv[..., : qkv.shape[2] // 3])
    return noted


@pytest.mark.parametrize("head_width", [32, 88])
@pytest.mark.parametrize(("num_queries", "num_keys"), CROSS)
def test_cross_attention(num_queries, num_keys, head_width, dtype, device):
    q = normal(2, num_queries, head_width, dtype=dtype, device=device)
    kv = normal(2, num_keys, 2 * head_width, dtype=dtype, device=device, seed=1)
    check_cross_attention(q, kv, 1)


@pytest.mark.parametrize(("num_queries", "num_keys"), CROSS)
def test_tiled_cross_attention(num_queries, num_keys, device, force):
    force("tiled", num_keys, 80, torch.float32)
    q = normal(1, num_queries, 2 * 80, dtype=torch.float32, device=device)
    kv = normal(1, num_keys, 2 * 160, dtype=torch.float32, device=device, seed=1)
    check_cross_attention(q, kv, 2, scale=0.3)


FAMILIES = [("packed", 5), ("packed", 43), ("whole", 70), ("whole", 183), ("tiled", 131)]
FAMILIES += [("cuda", 5), ("cuda", 43), ("cuda", 183)]
each_family = pytest.mark.parametrize(("family", "num_tokens"), FAMILIES)
# What does not hang on precision: the interpreter is slow.
two_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=str, indirect=True
)


@each_family
def test_log_sum_exp(family, num_tokens, dtype, device, force):
    force(family, num_tokens, 64, dtype)
    qkv = normal(2, num_tokens, 3 * 2 * 64, dtype=dtype, device=device)
    _, lse = torch.ops.vmae_fast.attention(qkv, 2, 0.7)
    assert lse.dtype == torch.float32
    q, k, _ = heads(qkv, 2, 3)
    truth = log_sum_exp(q, k, 0.7)
    assert lse.shape == truth.shape
    assert ((lse - truth).abs() <= 1e-5 + 1e-6 * truth.abs()).all()


@each_family
def test_small_and_large_logits_in_one_sequence(family, num_tokens, dtype, device, force):
    """From about 1e-4 to 3e4, near the largest number of fp16, in which eager PyTorch has them."""
    force(family, num_tokens, 64, dtype)
    q, k, v = heads(normal(1, num_tokens, 3 * 64, dtype=torch.float64, device=device), 1, 3)
    sizes = torch.tensor([1e-4, 1e2, 1.0, 1.0, 3e4], device=device, dtype=q.dtype)
    by_row = sizes[torch.arange(num_tokens, device=device) % 5].view(1, -1, 1, 1)
    # Queries of length 1 or so to keys of length 1: logits by the query's size.
    q, k = by_row * q / q.norm(dim=3, keepdim=True), k / k.norm(dim=3, keepdim=True)
    qkv = torch.stack([q, k, v], dim=2).flatten(2).to(dtype)
    check_attention(qkv, 1, scale=1.0, largest_logit=3e4)


@each_family
@two_dtypes
def test_keys_all_alike(family, num_tokens, dtype, device, force):
    """Uniform weights: the mean of the values."""
    force(family, num_tokens, 64, dtype)
    qkv = normal(1, num_tokens, 3 * 64, dtype=dtype, device=device)
    qkv[..., 64:128] = qkv[:, :1, 64:128]
    check_attention(qkv, 1)
    mean = qkv[..., 128:].double().mean(dim=1, keepdim=True).expand(-1, num_tokens, -1)
    assert relative_error(ops.attention(qkv, 1), mean) < 2 * torch.finfo(dtype).eps


@each_family
@pytest.mark.parametrize("size", [40.0, 100.0])
def test_all_logits_far_below_zero(size, family, num_tokens, dtype, device, force):
    """A key that is none has logit 0 beside them, and would have weight exp(256) and more."""
    force(family, num_tokens, 64, dtype)
    q, k, v = heads(normal(1, num_tokens, 3 * 64, dtype=torch.float64, device=device), 1, 3)
    # Logits around -6.4 * size, some units apart.
    root = (size / 10) ** 0.5
    given = torch.stack([0.1 * q - root, root + 0.2 * k / root, v], dim=2)
    qkv = given.flatten(2).to(dtype)
    _, lse = torch.ops.vmae_fast.attention(qkv, 1, 1.0)
    assert (lse < -5 * size).all()
    # What the weights are off by does not cancel in the gradients: queries and keys are alike.
    check_attention(qkv, 1, scale=1.0, largest_logit=-20 * lse.min().item())


@pytest.mark.parametrize("family", ["packed", "whole", "tiled", "cuda"])
@pytest.mark.parametrize("head_width", [32, 88])
def test_one_key(head_width, family, dtype, device, force):
    """Its weight is 1: the output is its value, and no gradient reaches queries and keys."""
    force(family, 1, head_width, dtype)
    qkv = normal(3, 1, 3 * 2 * head_width, dtype=dtype, device=device)
    upstream = normal(3, 1, 2 * head_width, dtype=dtype, device=device, seed=1)
    out, grad = run(lambda x: ops.attention(x, 2), [qkv], upstream)
    assert torch.equal(out, qkv[..., 4 * head_width :])
    grad_qk, grad_v = grad.split([4 * head_width, 2 * head_width], dim=2)
    assert grad_qk.abs().max() < 1e-5 * upstream.abs().max()
    assert relative_error(grad_v, upstream) < 1e-6 + torch.finfo(dtype).eps / 2


@each_family
@two_dtypes
def test_nothing_leaks_from_clip_to_clip(family, num_tokens, dtype, device, force):
    force(family, num_tokens, 64, dtype)
    qkv = normal(2, num_tokens, 3 * 64, dtype=dtype, device=device)
    upstream = normal(2, num_tokens, 64, dtype=dtype, device=device, seed=1)
    clean = run(lambda x: ops.attention(x, 1), [qkv], upstream)
    qkv[0], upstream[0] = torch.nan, torch.nan
    for got, expected in zip(
        run(lambda x: ops.attention(x, 1), [qkv], upstream), clean, strict=True
    ):
        assert got[0].isnan().all()
        assert torch.equal(got[1], expected[1])


LAYOUTS = ("tokens_cut", "every_second_clip", "transposed", "wider")


@each_family
@pytest.mark.parametrize("layout", LAYOUTS)
@two_dtypes
def test_layouts(layout, family, num_tokens, dtype, device, force):
    if family == "cuda" and layout == "wider":
        # Not aligned: another kernel's, as a test of its own says.
        layout = "wider_aligned"
    force(family, num_tokens, 64, dtype)
    columns, given = 3 * 64, {"dtype": dtype, "device": device}
    qkv = {
        "tokens_cut": lambda: normal(2, num_tokens + 3, columns, **given)[:, 3:],
        "every_second_clip": lambda: normal(4, num_tokens, columns, **given)[1::2],
        "transposed": lambda: normal(2, columns, num_tokens, **given).transpose(1, 2),
        "wider": lambda: normal(2, num_tokens, columns + 5, **given)[..., 3:-2],
        "wider_aligned": lambda: normal(2, num_tokens, columns + 24, **given)[..., 16:-8],
    }[layout]()
    # One number for every column of a token, of the kind that a sum hands back.
    upstream = normal(2, num_tokens, 1, **given, seed=1).expand(-1, -1, 64)
    check_attention(qkv, 1, upstream=upstream)


@two_dtypes
def test_five_dimensions(dtype, device):
    """``(B, N, 3, H, K)``, straight from a split of the columns."""
    qkv = normal(2, 37, 3 * 2 * 32, dtype=dtype, device=device)
    got = ops.attention(qkv.unflatten(2, (3, 2, 32)), 2)
    assert torch.equal(got, ops.attention(qkv, 2))


@pytest.mark.parametrize("num_keys", [7, 100, 260])
@two_dtypes
def test_cross_attention_layouts(num_keys, dtype, device):
    given = {"dtype": dtype, "device": device}
    q = normal(2, 45, 2 * 32, **given)[:, 4::2]
    kv = normal(num_keys, 2, 4 * 32 + 8, **given, seed=1).transpose(0, 1)[..., 8:]
    check_cross_attention(q, kv, 2)


@pytest.mark.parametrize("num_tokens", [20, 129, 270])
@two_dtypes
def test_the_same_from_run_to_run(num_tokens, dtype, device):
    qkv = normal(1, num_tokens, 3 * 64, dtype=dtype, device=device)
    upstream = normal(1, num_tokens, 64, dtype=dtype, device=device, seed=1)
    first, second = (run(lambda x: ops.attention(x, 1), [qkv], upstream) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
