"""Attention kernels compiled ahead of time, as their launchers would launch them.

Compiling takes seconds a kernel, so the usual run has each row of the tables once for every target
and dtype it is listed for, 16-bit floats as bf16; the rest is marked slow.
"""

import os
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from aot import SHARED_BYTES, Recorder, kernel_modules, kernels_of

from vmae_fast.kernels import packed_attention, tiled_attention, whole_attention
from vmae_fast.kernels._launch import FLOAT_DTYPES, TARGETS, Row
from vmae_fast.kernels.attention import attention_backward_triton, attention_triton
from vmae_fast.kernels.attention_tiles import HEAD_PARTS, divided, joint
from vmae_fast.kernels.whole_attention import Fit, parts_of

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

MODULES = kernel_modules(attention=True)
# For which every variant is compiled; the others get what their rows need.
VARIANTS_TARGET = 90
# The longest sequences of two tiles, and of VideoMAE, which no chip holds.
TILES, LONG = (32, 64), 1568
# Sums of powers of two: one to four of them, and the lengths of VideoMAE's encoder and decoder.
WHOLE = (160, 196, 208, 240, 256)
LOW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """What attention is asked for; ``num_tokens`` a sequence, the class token included."""

    dtype: torch.dtype
    head_width: int
    num_tokens: int
    class_token: bool = False


def record(case, target):
    """What the launchers launch for a case, forward and backward, with the table rows."""
    batch, heads = 2, 8
    sequences = joint(case.num_tokens)
    if case.class_token:
        sequences = divided(case.num_tokens - 1, 5, "time", class_token=True)
    length = sequences.count * sequences.length + sequences.class_token
    qkv = torch.empty(batch, length, 3, heads, case.head_width, dtype=case.dtype, device="meta")
    given, grads, grad = qkv.unbind(2), torch.empty_like(qkv).unbind(2), qkv[:, :, 0].contiguous()
    with Recorder(target) as recorder:
        results = attention_triton(given, sequences, 0.125)
        attention_backward_triton(grad, given, results, grads, sequences, 0.125)
    return recorder.launches


def tables():
    """Every table: module, its name in it, entries by target, dtype, head width and maybe more."""
    return [
        (module, name, value)
        for module in (packed_attention, whole_attention, tiled_attention)
        for name, value in vars(module).items()
        if isinstance(value, dict) and name != "__builtins__"
        # Others hold what tables are made of.
        if all(isinstance(key, tuple) and key[1] in FLOAT_DTYPES for key in value)
    ]


def fits_in(entry):
    """Rows of one entry with the number of keys up to which they serve, None for any."""
    if entry is None:
        return []
    if isinstance(entry, Row):
        return [Fit(None, entry)]
    return [entry] if isinstance(entry, Fit) else list(entry)


def limits():
    """The numbers of keys up to which rows serve."""
    entries = [entry for _, _, table in tables() for entry in table.values()]
    return sorted({fit.keys for entry in entries for fit in fits_in(entry)} - {None})


def listed(dtype, head_width):
    """The targets that any table has rows of their own for, and the one of all variants."""
    keys = [key for _, _, table in tables() for key in table]
    own = {key[0] for key in keys if key[1:3] == (dtype, head_width)}
    return sorted(own | {VARIANTS_TARGET})


def shared_bytes_of(target, dtype, head_width):
    """What all GPUs that run a target's rows have."""
    later = [one for one in listed(dtype, head_width) if one > target]
    served = [one for one in TARGETS if target <= one < min(later, default=10**3)]
    return min(SHARED_BYTES[one] for one in served)


@pytest.fixture(scope="module")
def launches():
    """Of every case on every target it is listed for: launch, table row."""
    return {
        (case, target): record(case, target)
        for dtype in FLOAT_DTYPES
        for head_width in HEAD_PARTS
        for num_tokens in (*TILES, *limits(), LONG)
        for target in listed(dtype, head_width)
        for case in [Case(dtype, head_width, num_tokens)]
    }


def kind_of(case, target, launch, row):
    """What need not be compiled twice: a row on a target, for 16-bit floats once."""
    dtype = "fp32" if case.dtype == torch.float32 else "low"
    return launch.kernel, target, dtype, tuple(row.blocks.items()), row.num_warps, row.num_stages


def chosen(launches, dtypes):
    """One launch of every kind, with its case: the widest heads and the longest sequence."""
    found = {}
    for (case, target), noted in launches.items():
        for launch, row in noted.items():
            size = (case.dtype == torch.bfloat16, case.head_width, case.num_tokens)
            kind = kind_of(case, target, launch, row)
            if case.dtype in dtypes and (kind not in found or found[kind][0] < size):
                found[kind] = (size, launch, case)
    return {kind: (launch, case) for kind, (_, launch, case) in found.items()}


@pytest.fixture
def check(compile_and_check):
    """Compile launches, each with its case, and look at what came out."""

    def product_of(launch):
        """Hopper's product, of 64 rows at least: in tiles and nowhere else it is certain."""
        tiled = launch.module.endswith("tiled_attention")
        return "wgmma.mma_async" if launch.target == 90 and tiled else ""

    def run(cases):
        for dtype in FLOAT_DTYPES:
            wanted = {launch: case for launch, case in cases if case.dtype == dtype}

            def shared_of(launch, wanted=wanted, dtype=dtype):
                target = launch.target
                if target in listed(dtype, wanted[launch].head_width):
                    return shared_bytes_of(target, dtype, wanted[launch].head_width)
                return SHARED_BYTES[target]

            if wanted:
                compile_and_check(wanted, dtype, product_of, shared_of)

    return run


def with_case(case, target):
    return [(launch, case) for launch in record(case, target)]


@pytest.mark.parametrize("target", TARGETS)
def test_every_row(target, launches, check):
    """fp32 for the first target alone that has the row: it is compiled alike for all."""
    cases = {kind: found for kind, found in chosen(launches, LOW).items() if kind[1] == target}
    full, first = chosen(launches, (torch.float32,)), {}
    for kind in sorted(full, key=lambda kind: kind[1]):
        first.setdefault((kind[0], *kind[2:]), kind)
    cases |= {kind: full[kind] for kind in first.values() if kind[1] == target}
    # The rows of a target without its own have to fit it too; see shared_bytes_of.
    has_rows = any(target in listed(*key) for key in product(FLOAT_DTYPES, HEAD_PARTS))
    assert bool(cases) == has_rows
    check(cases.values())


@pytest.mark.parametrize("head_width", HEAD_PARTS)
def test_every_head_width(head_width, launches, check):
    """Each kernel at least once."""
    found = {}
    for num_tokens in (*TILES, *limits(), LONG):
        case = Case(torch.bfloat16, head_width, num_tokens)
        for launch, row in launches[case, VARIANTS_TARGET].items():
            found[launch.kernel, tuple(row.blocks.items())] = (launch, case)
    # Any length can be cut into tiles, short ones packed; for others there may be no room.
    needed = kernels_of([packed_attention, tiled_attention])
    assert {kernel for kernel, _ in found} >= needed
    check(found.values())


def test_fp16(check):
    """It shares rows with bf16; once, that it is all the same."""
    for num_tokens in (TILES[-1], 160, LONG):
        check(with_case(Case(torch.float16, 64, num_tokens), VARIANTS_TARGET))


@pytest.mark.parametrize("num_tokens", [*TILES, 197, LONG + 1])
def test_class_token(num_tokens, check):
    case = Case(torch.bfloat16, 64, num_tokens, class_token=True)
    check(with_case(case, VARIANTS_TARGET))


@pytest.mark.parametrize("num_tokens", WHOLE)
def test_parts_of_keys(num_tokens, check):
    check(with_case(Case(torch.bfloat16, 64, num_tokens), VARIANTS_TARGET))


def test_every_number_of_parts_is_compiled():
    counts = {len(parts_of(num_keys)) for num_keys in range(TILES[-1] + 1, max(limits()) + 1)}
    assert {len(parts_of(num_keys)) for num_keys in WHOLE} == counts


@pytest.mark.slow
@pytest.mark.parametrize("head_width", HEAD_PARTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_everything(target, dtype, head_width, check):
    for num_tokens in sorted({*TILES, 100, *WHOLE, *limits(), 300, LONG}):
        check(with_case(Case(dtype, head_width, num_tokens), target))


@pytest.mark.slow
@pytest.mark.parametrize("head_width", [width for width in HEAD_PARTS if width < 128])
@pytest.mark.parametrize("dtype", LOW, ids=str)
# On the others, and at width 128, a class token spills some registers, which is known and said.
@pytest.mark.parametrize("target", [90, 100])
def test_every_class_token(target, dtype, head_width, check):
    for num_tokens in (9, TILES[-1], 197, LONG + 1):
        check(with_case(Case(dtype, head_width, num_tokens, class_token=True), target))


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", range(80, 257, 16))
@pytest.mark.parametrize("target", TARGETS)
def test_every_sum_of_parts(target, num_tokens, check):
    for head_width in HEAD_PARTS:
        check(with_case(Case(torch.bfloat16, head_width, num_tokens), target))


# ---- nothing is left out ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_length_has_kernels(target, dtype):
    """Forward and backward, whatever the tables leave to another kernel."""
    backward = {
        "_packed_attention_backward_kernel": 1,
        "_whole_attention_backward_kernel": 1,
        "_query_gradient_kernel": 2,
        "_key_value_gradient_kernel": 2,
    }
    for head_width in HEAD_PARTS:
        for num_tokens in (1, 7, 16, 33, 64, 65, 128, 160, 196, 208, 256, 257, LONG):
            kernels = [one.kernel for one in record(Case(dtype, head_width, num_tokens), target)]
            assert len([name for name in kernels if name not in backward]) == 1
            assert sum(1 / backward[name] for name in kernels if name in backward) == 1


def test_rows_are_for_what_there_is():
    assert len(tables()) >= 6
    for module, name, table in tables():
        for (target, dtype, head_width, *_), entry in table.items():
            assert target in TARGETS, (module, name)
            assert dtype in FLOAT_DTYPES, (module, name)
            assert head_width in HEAD_PARTS, (module, name)
            for _, row in fits_in(entry):
                sizes = [*row.blocks.values(), row.num_warps]
                assert all(size & (size - 1) == 0 for size in sizes), (module, name, row)
                assert min(row.blocks.values()) >= 16, (module, name, row)
            # The first that serves is taken.
            keys = [fit.keys for fit in fits_in(entry)]
            assert keys == sorted(set(keys)), (module, name)


def test_every_kernel_is_compiled(launches):
    assert {kind[0] for kind in chosen(launches, LOW)} == kernels_of(MODULES)


def rows_not_launched(launches):
    """Entries of tables with a row that no case is launched with on the target that they are for.

    What is launched has a launch of its kind compiled.
    """
    launched = {
        (target, case.dtype, case.head_width, id(row))
        for (case, target), noted in launches.items()
        for row in noted.values()
    }
    return [
        f"{module.__name__.rpartition('.')[2]}.{name}{key}"
        for module, name, table in tables()
        for key, entry in table.items()
        for _, row in fits_in(entry)
        if (*key[:3], id(row)) not in launched
    ]


def test_every_table_row_is_compiled(launches):
    assert rows_not_launched(launches) == []


def test_a_row_that_is_not_compiled_is_noticed(launches, monkeypatch):
    key = (130, torch.bfloat16, 64)
    monkeypatch.setitem(tiled_attention._FORWARD, key, Row({"BLOCK_M": 64, "BLOCK_N": 64}))
    assert rows_not_launched(launches) == [f"tiled_attention._FORWARD{key}"]
