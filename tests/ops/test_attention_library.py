"""PyTorch's attention in place of our kernels, as on a GPU: the same values, by the same ops."""

import sys

import pytest
import torch
from helpers import EXACT_RTOL, relative_error
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

from vmae_fast import ops
from vmae_fast.kernels import _launch
from vmae_fast.ops import _attention_choice
from vmae_fast.ops._attention_choice import LONGEST, Choice, library_attention

# Modules by name: the package has the functions of the same names.
MODULES = [sys.modules[f"vmae_fast.ops.{name}"] for name in ("attention", "divided_attention")]
LIBRARY = ("cudnn", "flash", "sdpa")


@pytest.fixture(autouse=True)
def any_algorithm():
    """The poison of memory is switched by the flag that is read here."""
    torch.use_deterministic_algorithms(False)


def _cross(qkv):
    q, kv = qkv.tensor_split([qkv.shape[2] // 3], dim=2)
    return ops.cross_attention(q.narrow(1, 0, 3), kv, 3, 0.3)


def _with_class_token(qkv, axis):
    return ops.divided_attention(qkv.narrow(1, 0, 34), 3, (3, 11), axis, class_token=True)


CALLS = {
    "joint": lambda qkv: ops.attention(qkv, 3),
    "cross": _cross,
    "time": lambda qkv: ops.divided_attention(qkv, 3, (5, 7), "time"),
    "space": lambda qkv: ops.divided_attention(qkv, 3, (5, 7), "space", scale=0.3),
    "class_token": lambda qkv: _with_class_token(qkv, "space"),
    "class_token_time": lambda qkv: _with_class_token(qkv, "time"),
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


@pytest.fixture
def chosen(monkeypatch):
    """Call with a kernel: the ops run it on a CPU too."""

    def make(kernel):
        for module in MODULES:
            monkeypatch.setattr(module, "choose", lambda *given, **more: kernel)

    return make


@pytest.mark.parametrize("name", ["joint", "cross", "time", "space", "class_token"])
@pytest.mark.parametrize("table_row", ["triton", "flash"])
def test_the_ops_go_by_the_length_of_a_sequence(monkeypatch, name, table_row):
    """Along time and with a class token it is ours, since PyTorch's would need a copy."""
    keys = {"joint": 35, "cross": 35, "time": 5, "space": 7, "class_token": 12}[name]
    other = "sdpa" if table_row == "triton" else "triton"
    rows = ((keys - 1, other), (keys, table_row), (LONGEST, other))
    table = tuple(Choice(90, 2, length, kernel) for length, kernel in rows)
    monkeypatch.setattr(_launch, "target_of", lambda device: 90)
    monkeypatch.setattr(_launch, "available", lambda device: True)
    monkeypatch.setattr(_attention_choice, "CHOICES", table)
    ran = []

    def recorded(qkv, scale, kernel):
        ran.append(kernel)
        return library_attention(qkv, scale, kernel)

    for module in MODULES:
        monkeypatch.setattr(module, "library_attention", recorded)
    with FakeTensorMode():
        out = CALLS[name](torch.empty(2, 35, 3 * 3 * 64, dtype=torch.bfloat16, device="cuda"))
    tokens = {"cross": 3, "class_token": 34}.get(name, 35)
    assert (out.shape, out.dtype, out.device.type) == ((2, tokens, 192), torch.bfloat16, "cuda")
    ours = table_row == "triton" or name in ("time", "class_token")
    assert ran == ([] if ours else [table_row])


def values_and_gradients(function, qkv):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, qkv, upstream)


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 35, 3 * 3 * 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kernel", LIBRARY)
@pytest.mark.parametrize("flag", [False, True], ids=["any", "deterministic"])
def test_pytorchs_attention_is_the_ops(chosen, call, qkv, kernel, flag):
    expected = values_and_gradients(call, qkv)
    torch.use_deterministic_algorithms(flag)
    chosen(kernel)
    for got, truth in zip(values_and_gradients(call, qkv), expected, strict=True):
        assert got.shape == truth.shape
        assert relative_error(got, truth) < EXACT_RTOL


@pytest.mark.parametrize("kernel", LIBRARY)
def test_pytorchs_attention_compiles(chosen, call, qkv, kernel):
    torch.compiler.reset()
    chosen(kernel)
    expected = values_and_gradients(call, qkv)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, truth in zip(values_and_gradients(compiled, qkv), expected, strict=True):
        assert relative_error(got, truth) < EXACT_RTOL


def test_dtypes_of_pytorchs_attention_under_autocast(chosen, call, qkv):
    expected = call(qkv.bfloat16())
    chosen("sdpa")
    leaf = qkv.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = call(leaf)
    assert out.dtype == expected.dtype
    assert relative_error(out, expected) < torch.finfo(torch.bfloat16).eps
    out.sum().backward()
    assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_pytorchs_attention_of_nothing(chosen, shape):
    chosen("sdpa")
    qkv = torch.zeros(*shape, 36, requires_grad=True)
    out = ops.attention(qkv, 3)
    assert out.shape == (*shape, 12)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("kernel", LIBRARY)
@pytest.mark.parametrize("flag", [False, True], ids=["any", "deterministic"])
def test_what_pytorch_may_run(monkeypatch, qkv, kernel, flag):
    """The one asked for first; nothing that has atomics where that is not allowed."""
    allowed = []
    real = _attention_choice.sdpa_kernel

    def recorded(backends, set_priority=False):
        assert set_priority
        allowed.extend(backends)
        return real(backends, set_priority=set_priority)

    monkeypatch.setattr(_attention_choice, "sdpa_kernel", recorded)
    torch.use_deterministic_algorithms(flag)
    library_attention(tuple(qkv.unflatten(2, (3, 3, 5)).unbind(2)), 0.3, kernel)
    if flag:
        assert allowed == [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    elif kernel == "sdpa":
        assert allowed == []
    else:
        first = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[kernel]
        assert allowed[0] == first
        assert allowed[-1] == SDPBackend.MATH
