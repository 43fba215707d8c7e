"""Which attention runs on a GPU: tensors without data stand for those on one."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from vmae_fast import ops
from vmae_fast.kernels import _launch
from vmae_fast.kernels.attention_tiles import HEAD_PARTS
from vmae_fast.ops import _attention_choice
from vmae_fast.ops._attention_choice import (
    ATTENTION_KERNELS,
    CHOICES,
    LONGEST,
    Choice,
    choose,
    prefers_cuda,
    tabled,
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LIBRARY = ("cudnn", "flash", "sdpa")
KERNELS = ("auto", "triton", "cuda", *LIBRARY)

# Every kernel of its own, so that each shows which row was taken.
TABLE = (
    Choice(80, 2, 100, "triton"),
    Choice(80, 2, LONGEST, "flash"),
    Choice(90, 2, LONGEST, "cudnn"),
    Choice(100, 2, 50, "sdpa"),
    Choice(100, 2, LONGEST, "triton"),
    Choice(80, 4, LONGEST, "sdpa"),
    Choice(120, 4, LONGEST, "flash"),
)


@pytest.fixture(autouse=True)
def any_algorithm():
    """The poison of memory is switched by the flag that is read here."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def gpu(monkeypatch):
    """Call with a compute capability and a table: as on such a GPU."""

    def make(target=90, table=TABLE, available=True):
        monkeypatch.setattr(_launch, "target_of", lambda device: target)
        monkeypatch.setattr(_launch, "available", lambda device: available)
        monkeypatch.setattr(_attention_choice, "CHOICES", table)

    make()
    return make


def queries(dtype=torch.bfloat16, head_width=64):
    with FakeTensorMode():
        return torch.empty(2, 5, 3, head_width, dtype=dtype, device="cuda")


# ---- the table ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "dtype", "num_keys", "kernel"),
    [
        (80, torch.bfloat16, 1, "triton"),
        (80, torch.bfloat16, 100, "triton"),
        (80, torch.bfloat16, 101, "flash"),
        (86, torch.float16, 100, "triton"),
        (89, torch.float16, 10**9, "flash"),
        (90, torch.bfloat16, 1, "cudnn"),
        (90, torch.bfloat16, 101, "cudnn"),
        (100, torch.bfloat16, 50, "sdpa"),
        (103, torch.bfloat16, 51, "triton"),
        (120, torch.bfloat16, 50, "sdpa"),
        (999, torch.float16, 51, "triton"),
        (80, torch.float32, 1, "sdpa"),
        (110, torch.float32, 1, "sdpa"),
        (120, torch.float32, 1, "flash"),
        (121, torch.float32, 10**9, "flash"),
    ],
    ids=str,
)
def test_rows(gpu, target, dtype, num_keys, kernel):
    gpu(target)
    assert tabled(target, dtype, num_keys).kernel == kernel
    assert choose(queries(dtype), num_keys) == ("op" if kernel == "triton" else kernel)


@pytest.mark.parametrize("target", [*_launch.TARGETS, 87, 103, 121, 200])
@pytest.mark.parametrize("dtype", _launch.FLOAT_DTYPES, ids=str)
def test_every_length_has_a_row(target, dtype):
    """The longest that a row is for, one more, and the ends; rows that are never reached."""
    lengths = {1, 2**40, *(choice.keys for choice in CHOICES)}
    lengths |= {length + 1 for length in lengths if length < LONGEST}
    for length in lengths:
        row = tabled(target, dtype, length)
        assert length <= row.keys
        assert row.target <= target
        assert row.value_bytes == dtype.itemsize
        assert row.kernel in ATTENTION_KERNELS
        assert row.kernel != "auto"


def test_no_row_is_hidden():
    groups = {}
    for row in CHOICES:
        groups.setdefault((row.target, row.value_bytes), []).append(row.keys)
    for lengths in groups.values():
        assert lengths == sorted(set(lengths))
        assert lengths[-1] == LONGEST
    assert {target for target, _ in groups} <= set(_launch.TARGETS)


def test_what_is_called_measured_was():
    for row in CHOICES:
        assert not row.measured or (RESULTS / row.measured).is_file(), row.measured


# ---- what goes before the table -----------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ATTENTION_KERNELS)
def test_without_a_gpu_it_is_always_the_op(device, name, deterministic):
    q = torch.empty(2, 5, 3, 7, device=device)
    with ops.attention_kernel(name):
        assert choose(q, 5) == "op"


@pytest.mark.parametrize("name", LIBRARY)
def test_one_is_demanded(gpu, name):
    gpu(80)
    with ops.attention_kernel(name):
        assert choose(queries(), 5) == name
        # Whatever our own kernels take.
        assert choose(queries(torch.float64, 24), 5) == name
    assert choose(queries(), 5) == "op"
    with ops.attention_kernel("triton"):
        assert choose(queries(), 10**6) == "op"


def test_a_backend_goes_before_a_kernel(gpu):
    for name in ATTENTION_KERNELS:
        with ops.attention_kernel(name):
            with ops.backend("triton"):
                assert choose(queries(), 5) == "op"
                # An error of the op.
                assert choose(queries(torch.float64), 5) == "op"
            with ops.backend("reference"):
                assert choose(queries(), 5) == "sdpa"


@pytest.mark.parametrize("head_width", [1, 24, 48, 96, 256])
def test_other_head_widths_are_pytorchs(gpu, head_width):
    gpu(80)
    assert choose(queries(head_width=head_width), 5) == "sdpa"
    message = rf"^attention_kernel triton cannot take heads of width {head_width}, only of 32, "
    with ops.attention_kernel("triton"), pytest.raises(RuntimeError, match=message):
        choose(queries(head_width=head_width), 5)


def test_head_widths_that_are_ours(gpu):
    gpu(80)
    assert [choose(queries(head_width=width), 5) for width in HEAD_PARTS] == ["op"] * 5


def test_other_dtypes_and_gpus_are_pytorchs(gpu):
    assert choose(queries(torch.float64), 5) == "sdpa"
    message = r"^attention_kernel triton cannot take torch\.float64$"
    with ops.attention_kernel("triton"), pytest.raises(RuntimeError, match=message):
        choose(queries(torch.float64), 5)
    gpu(75, available=False)
    assert choose(queries(), 5) == "sdpa"
    message = r"^attention_kernel triton cannot take cuda:0$"
    with ops.attention_kernel("triton"), pytest.raises(RuntimeError, match=message):
        choose(queries(), 5)


def test_sequences_that_would_be_copied_are_ours(gpu):
    assert choose(queries(), 5) == "cudnn"
    assert choose(queries(), 5, dense=False) == "op"
    assert choose(queries(head_width=24), 5, dense=False) == "sdpa"
    with ops.attention_kernel("flash"):
        assert choose(queries(), 5, dense=False) == "flash"


@pytest.mark.parametrize("target", [80, 86, 89, 90, 100, 120])
def test_a_deterministic_run_never_has_cudnn(gpu, deterministic, target):
    gpu(target, tuple(Choice(row.target, row.value_bytes, row.keys, "cudnn") for row in TABLE))
    for dtype in (torch.float32, torch.bfloat16):
        assert choose(queries(dtype), 5) == "op"
    assert choose(queries(head_width=24), 5) == "sdpa"
    message = "cudnn is not deterministic in its backward pass"
    with ops.attention_kernel("cudnn"):
        with pytest.raises(RuntimeError, match=message):
            choose(queries(), 5)
        with ops.backend("triton"):
            assert choose(queries(), 5) == "op"


# ---- our kernels in CUDA C++ ---------------------------------------------------------------


@pytest.fixture
def extension(monkeypatch):
    """Call with why the extension cannot run, "" where it can."""

    def set_to(why):
        monkeypatch.setattr(_attention_choice._extension, "why_not", lambda device: why)

    set_to("")
    return set_to


def test_no_row_has_them_before_they_are_measured():
    assert not [row for row in CHOICES if row.kernel == "cuda" and not row.measured]


def test_a_row_for_them(gpu):
    gpu(90, (Choice(80, 2, 100, "cuda"), Choice(80, 2, LONGEST, "flash")))
    assert [choose(queries(), keys) for keys in (100, 101)] == ["op", "flash"]
    assert [prefers_cuda(queries(), keys) for keys in (100, 101)] == [True, False]
    assert not prefers_cuda(queries(torch.float64), 100)
    with ops.attention_kernel("triton"):
        assert choose(queries(), 100) == "op"
        assert not prefers_cuda(queries(), 100)
    gpu()
    assert not prefers_cuda(queries(), 100)


def test_they_are_demanded(gpu, extension):
    with ops.attention_kernel("cuda"):
        for keys in (5, 10**6):
            assert choose(queries(), keys) == "op"
            assert prefers_cuda(queries(), keys)
        with pytest.raises(
            RuntimeError, match=r"^attention_kernel cuda cannot take heads of width"
        ):
            choose(queries(head_width=24), 5)
        extension("it is not built")
        message = r"^attention_kernel cuda cannot run: it is not built$"
        with pytest.raises(RuntimeError, match=message):
            choose(queries(), 5)


@pytest.mark.parametrize(
    ("dtype", "head_width", "keys", "takes"),
    [
        (torch.bfloat16, 64, 256, True),
        (torch.float16, 88, 1, True),
        (torch.bfloat16, 64, 257, False),
        (torch.bfloat16, 32, 5, False),
        (torch.float32, 64, 5, False),
    ],
    ids=str,
)
def test_their_backend_goes_before_a_kernel_for_what_they_take(
    gpu, extension, dtype, head_width, keys, takes
):
    with ops.backend("cuda"), ops.attention_kernel("flash"):
        assert choose(queries(dtype, head_width), keys) == ("op" if takes else "flash")


# ---- the context and the environment variable ---------------------------------------------


def test_it_ends_with_its_context():
    before = _attention_choice._chosen

    def fail():
        with ops.attention_kernel("flash"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _attention_choice._chosen == before
    with ops.attention_kernel("flash"):
        with ops.attention_kernel("auto"):
            assert _attention_choice._chosen == "auto"
        assert _attention_choice._chosen == "flash"
    assert _attention_choice._chosen == before


def test_it_holds_in_every_thread():
    seen = []
    with ops.attention_kernel("cudnn"):
        thread = threading.Thread(target=lambda: seen.append(_attention_choice._chosen))
        thread.start()
        thread.join()
    assert seen == ["cudnn"]


def test_an_unknown_kernel():
    message = f"^attention_kernel must be one of {', '.join(KERNELS)}, got 'math'$"
    with pytest.raises(ValueError, match=message), ops.attention_kernel("math"):
        pass


def run(value):
    code = "from vmae_fast.ops import _attention_choice; print(_attention_choice._chosen)"
    environment = {**os.environ, "VMAE_FAST_ATTENTION": value}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_environment_variable():
    chosen = run("flash")
    assert chosen.stdout.strip() == "flash", chosen.stderr
    wrong = run("flsh")
    assert wrong.returncode == 1
    message = f"VMAE_FAST_ATTENTION must be one of {', '.join(KERNELS)}, got 'flsh'"
    assert message in wrong.stderr


# ---- under the compiler -------------------------------------------------------------------


class OnGpu:
    """What of a tensor on a GPU the choice looks at; the compiler lets no such tensor in here."""

    shape, dtype, device = (2, 5, 3, 64), torch.bfloat16, torch.device("cuda", 0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_choice_is_made_while_compiling(monkeypatch, dynamic):
    """In one graph, and anew where the flag or the context is another."""
    torch.compiler.reset()
    _launch.target_of.cache_clear()
    properties = SimpleNamespace(major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(_attention_choice, "CHOICES", TABLE)
    q = OnGpu()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="eager")
    def chosen(x):
        return x + ("op", *LIBRARY).index(choose(q, x.shape[0]))

    def found(num_keys):
        return ("op", *LIBRARY)[int(chosen(torch.zeros(num_keys))[0])]

    assert [found(num_keys) for num_keys in (99, 100, 101, 300)] == ["op", "op", "flash", "flash"]
    with ops.attention_kernel("cudnn"):
        assert found(99) == found(300) == "cudnn"
        with ops.backend("reference"):
            assert found(99) == "sdpa"
    torch.use_deterministic_algorithms(True)
    assert found(300) == "op"
    torch.use_deterministic_algorithms(False)
    assert found(300) == "flash"
    _launch.target_of.cache_clear()
