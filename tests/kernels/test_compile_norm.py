"""Kernels of layer norm and GELU compiled for every target, as their launchers launch them."""

import os
import re

import pytest
import torch
from aot import NORM_MODULES, Recorder, kernels_of

from vmae_fast.kernels import bias_gelu, layer_norm
from vmae_fast.kernels._launch import FLOAT_DTYPES, TARGETS

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

# For which every variant is compiled; the others get the usual one.
VARIANTS_TARGET = 90
# Of base's encoder, giant's, and one for the last row of the table.
WIDTHS = (768, 1408, 4096)
# Of the other presets: one each that makes other blocks than those above.
MORE_WIDTHS = (64, 128, 192, 384)
# Stream and branch: under autocast as published, and with a stream of 16 bits.
MIXES = ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))
PARTS = ("branch", "scale", "residual", "norm")


def dtypes_of(target):
    """fp32 is for checking, and may spill: once is enough."""
    return FLOAT_DTYPES if target == VARIANTS_TARGET else FLOAT_DTYPES[1:]


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_norm(
    width, stream, low, vectors=torch.float32, *, branch=True, scale=True, residual=True, norm=True
):
    """Forward and backward, with what there may be."""
    x, other = empty(64, 160, width, dtype=stream), empty(64, 160, width, dtype=low)
    weight = empty(width, dtype=vectors)
    factors = empty(64, dtype=stream) if scale else None
    layer_norm.layer_norm_triton(x, other if branch else None, factors, weight, weight, 1e-6, low)
    layer_norm.layer_norm_backward_triton(
        other, x[:, -16:] if residual else None, x, factors, weight, weight, 1e-6,
        low if branch else None, low if norm else None,
    )  # fmt: skip


def launch_gelu(width, dtype, vectors=torch.float32, *, bias=True, keep=True):
    x, vector = empty(10240, width, dtype=dtype), empty(width, dtype=vectors) if bias else None
    bias_gelu.bias_gelu_triton(x, vector)
    bias_gelu.bias_gelu_backward_triton(x, x, vector, keep)


@pytest.fixture(scope="module")
def usual():
    """What is compiled for every target: a recorder of each, by dtype."""
    recorders = {}
    for target in TARGETS:
        for dtype in dtypes_of(target):
            with Recorder(target) as recorders[target, dtype]:
                launch_norm(WIDTHS[0], torch.float32, dtype)
                if dtype == torch.bfloat16:
                    for width in WIDTHS[1:]:
                        launch_norm(width, dtype, dtype)
                launch_gelu(3072, dtype)
    return recorders


@pytest.fixture
def check(compile_and_check):
    return lambda launches, dtype: compile_and_check(launches, dtype, lambda launch: "")


@pytest.mark.parametrize(
    ("target", "dtype"), [(target, dtype) for target in TARGETS for dtype in dtypes_of(target)]
)
def test_usual(target, dtype, usual, check):
    check(usual[target, dtype].launches, dtype)


@pytest.mark.parametrize(("stream", "low"), MIXES, ids=["fp32", "bf16"])
def test_widths_of_the_presets(stream, low, check):
    with Recorder(VARIANTS_TARGET) as recorder:
        for width in MORE_WIDTHS:
            launch_norm(width, stream, low)
        # Giant's decoder: a multiple of 2 only.
        launch_gelu(2234, low)
    check(recorder.launches, low)


@pytest.mark.parametrize(("stream", "low"), MIXES, ids=["fp32", "bf16"])
def test_what_may_be_missing(stream, low, check):
    with Recorder(VARIANTS_TARGET) as recorder:
        launch_norm(768, stream, low, low, **dict.fromkeys(PARTS, False))
        for name in PARTS if stream == low else ():
            without = {"branch", "scale"} if name == "branch" else {name}
            launch_norm(768, stream, low, low, **dict.fromkeys(without, False))
        launch_gelu(3072, low, low, bias=False)
        launch_gelu(3072, low, low, keep=False)
    check(recorder.launches, low)


def test_odd_sizes(check):
    """That they compile: with no vectors to load, spills are no surprise, hence fp32."""
    with Recorder(VARIANTS_TARGET) as recorder:
        for width in (1, 13):
            launch_norm(width, torch.float32, torch.float32)
            launch_gelu(width, torch.float32)
    check(recorder.launches, torch.float32)


def test_loads_and_stores_are_of_16_bytes(usual, compiled, check):
    """But one number of a clip's scale, or 128 columns of a bias and of its partial sums."""
    launches = usual[VARIANTS_TARGET, torch.bfloat16].launches
    check(launches, torch.bfloat16)
    for launch in launches:
        lines = re.findall(r"^.*(?:ld|st)\.global.*$", compiled[launch].ptx, re.MULTILINE)
        narrow = [line for line in lines if ".v4" not in line]
        assert len(lines) >= 3
        assert len(narrow) <= 2, "\n".join(narrow)


def test_every_kernel_is_compiled(usual):
    written = kernels_of(NORM_MODULES)
    assert len(written) == 4
    for target in TARGETS:
        for dtype in dtypes_of(target):
            assert {one.kernel for one in usual[target, dtype].launches} == written


def test_every_table_row_is_compiled(usual):
    for target in TARGETS:
        rows = usual[target, torch.bfloat16].rows
        for row in (*layer_norm._ROWS.values(), bias_gelu._ROWS):
            assert any(row is one for one in rows)


def test_the_number_of_spans_hangs_on_shapes_only():
    """So that the order of adding up is the same on every GPU."""
    counts = set()
    for target in TARGETS:
        with Recorder(target) as recorder:
            launch_norm(768, torch.float32, torch.bfloat16)
        counts.add(str([dict(one.signature) for one in recorder.launches]))
    assert len(counts) == 1
    blocks, spans, span = layer_norm._spans(64 * 160, 768, layer_norm._BACKWARD_PROGRAMS)
    assert spans <= layer_norm._BACKWARD_PROGRAMS
    assert (spans - 1) * span < 64 * 160 <= spans * span
    assert span % blocks["BLOCK_R"] == 0
