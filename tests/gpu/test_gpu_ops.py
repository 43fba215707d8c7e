"""Every op on a GPU: the same bits twice, nothing left unwritten, the backend asked for."""

from contextlib import contextmanager

import pytest
import torch
from helpers import relative_error
from torch import Tensor

from vmae_fast import ops
from vmae_fast.kernels import _launch

LOW = [torch.float32, torch.float16, torch.bfloat16]
# Between two ways of computing the same in one dtype: several roundings of its own, as norms.
BACKEND_RTOL = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_same_bits(got, expected):
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"result {place} of {len(got)}"


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched."""
    names = []
    launch = _launch.launch

    def counted(kernel, programs, *args, **options):
        names.append(kernel.__name__)
        return launch(kernel, programs, *args, **options)

    monkeypatch.setattr(_launch, "launch", counted)
    return names


@contextmanager
def poisoned(monkeypatch):
    """Memory that is allocated and not written holds NaN, or the largest integer."""
    made = []

    def filling(make):
        def filled(*args, **options):
            out = make(*args, **options)
            made.append(out.shape)
            whole = not out.is_floating_point()
            return out.fill_(torch.iinfo(out.dtype).max if whole else float("nan"))

        return filled

    with monkeypatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, filling(getattr(owner, name)))
        yield made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(make_case, dtype):
    case = make_case("base", dtype)
    with ops.backend("triton"):
        first = case()
        for _ in range(3):
            assert_same_bits(case(), first)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_algorithms_are_all_there_is(make_case, dtype):
    case = make_case("base", dtype)
    with ops.backend("triton"):
        assert_same_bits(case(), case())


@pytest.mark.parametrize("geometry", ["base", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_everything_allocated_is_written(make_case, monkeypatch, geometry, dtype):
    case = make_case(geometry, dtype)
    with ops.backend("triton"):
        expected = case()
        with poisoned(monkeypatch) as made:
            got = case()
    assert made
    assert all(tensor.isfinite().all() for tensor in got)
    assert_same_bits(got, expected)


def test_the_poison_is_seen(monkeypatch, device):
    with poisoned(monkeypatch) as made:
        assert torch.empty(2, device=device).isnan().all()
        assert torch.zeros(2, device=device).new_empty(3, dtype=torch.bfloat16).isnan().all()
        whole = torch.empty_like(torch.zeros(2, dtype=torch.int32, device=device))
    assert (whole == 2**31 - 1).all()
    assert [tuple(shape) for shape in made] == [(2,), (3,), (2,)]


@pytest.mark.parametrize("name", ["triton", "auto"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_kernels_are_launched(make_case, launches, name, dtype):
    case = make_case("odd", dtype)
    with ops.backend(name):
        case()
    # At least one forward and one backward.
    assert len(launches) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_launches_none(make_case, launches, dtype):
    case = make_case("odd", dtype)
    with ops.backend("reference"):
        case()
    assert launches == []


def test_double_precision_is_the_references(make_case, launches, device):
    case = make_case("odd", torch.float64)
    with ops.backend("auto"):
        got = case()
    assert launches == []
    with ops.backend("reference"):
        assert_same_bits(got, case())
    assert all(tensor.dtype == torch.float64 and tensor.device == device for tensor in got)
    with (
        ops.backend("triton"),
        pytest.raises(RuntimeError, match=r"takes float32, float16 and bfloat16, got .*float64"),
    ):
        case()


@pytest.mark.parametrize("geometry", ["base", "odd"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_backends_agree(make_case, geometry, dtype):
    case = make_case(geometry, dtype)
    results = {}
    for name in ("reference", "triton", "auto"):
        with ops.backend(name):
            results[name] = case()
    assert_same_bits(results["auto"], results["triton"])
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert relative_error(got, expected) < BACKEND_RTOL[dtype]
