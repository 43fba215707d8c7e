"""The CUDA C++ kernels on a GPU: against Triton's, and what no emulator shows.

Their results at all sizes are compared with the definition on the CPU, where they are emulated
(tests/kernels); here are real sizes, graphs, streams, devices, the compiler and large tensors.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from attention_truth import sequences_of
from helpers import EAGER_FACTOR, relative_error
from torch import Tensor

from vmae_fast import ops
from vmae_fast.ops import _extension

LOW = [torch.bfloat16, torch.float16]
# Between two ways of computing the same: see BACKEND_RTOL in test_gpu_ops.py.
RTOL = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
# A gradient's error, in those of the same computation done eagerly in the same dtype.
GRADIENT_FACTOR = 3.0
TUBELET = (2, 16, 16)
# Of the extension's functions, those that launch a kernel.
FUNCTIONS = ("short_attention", "short_attention_backward", "masked_mse")
# Elements that a large tensor exceeds.
LIMIT = 2**31


@dataclass(frozen=True)
class Case:
    """An op, what it is called on, and the functions of the extension that it is to run.

    Attributes:
        op: of the input that wants gradients, and of what else there is.
        shape: of that input.
        rest: makes what else there is, from a device.
        functions: names.
        definition: of attention, in the dtype of its input.
        length, width: of its sequences and heads.
    """

    op: Callable[..., Tensor]
    shape: tuple[int, ...]
    rest: Callable[[torch.device], tuple[Tensor, ...]] = lambda device: ()
    functions: tuple[str, ...] = FUNCTIONS[:2]
    definition: Callable[[Tensor], Tensor] | None = None
    length: int = 0
    width: int = 0

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
        """Noise that wants gradients, and the rest."""
        generator = torch.Generator(device).manual_seed(seed)
        torch.manual_seed(seed)
        x = torch.randn(self.shape, generator=generator, device=device).to(dtype)
        return [x.requires_grad_(), *self.rest(device)]

    def run(self, inputs: list[Tensor], op: Callable[..., Tensor] | None = None) -> list[Tensor]:
        """Output and gradient, for an upstream gradient always the same."""
        out = (op or self.op)(*inputs)
        generator = torch.Generator(out.device).manual_seed(1)
        upstream = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, inputs[0], upstream)]


def joint(batch, tokens, heads, width):
    return attention(batch, 1, tokens, heads, width, "space", lambda x: ops.attention(x, heads))


def divided(batch, t, s, heads, width, axis):
    def op(qkv):
        return ops.divided_attention(qkv, heads, (t, s), axis)

    return attention(batch, t, s, heads, width, axis, op)


def attention(batch, t, s, heads, width, axis, op):
    length = t if axis == "time" else s
    shape = (batch, t * s, 3 * heads * width)

    def definition(qkv):
        return softmax(qkv, heads, sequences_of(t, s, axis, False).to(qkv.device))

    return Case(op, shape, definition=definition, length=length, width=width)


def softmax(qkv, heads, sequences):
    """The definition on ``(B, T, 3HK)`` whose tokens ``sequences`` (G, N) attend to each other."""
    tokens = qkv[:, sequences].flatten(0, 1)
    q, k, v = tokens.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    out = (q @ k.mT * q.shape[3] ** -0.5).softmax(3) @ v
    out = out.transpose(1, 2).flatten(2).unflatten(0, (len(qkv), -1)).flatten(1, 2)
    return out[:, sequences.flatten().argsort()]


def loss(batch, grid=(8, 14, 14), scored=1408, channels_last=False):
    def rest(device):
        shape = (batch, 3, *(n * p for n, p in zip(grid, TUBELET, strict=True)))
        video = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
        if channels_last:
            video = video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
        order = torch.rand(batch, grid[0] * grid[1] * grid[2], device=device).argsort(dim=1)
        return video, order[:, :scored]

    return Case(
        lambda pred, video, idx: ops.masked_mse(pred, video, idx, TUBELET, reduction="none"),
        (batch, scored, 1536), rest, FUNCTIONS[2:],
    )  # fmt: skip


# What the models ask for, and around the longest.
SIZES = {
    "encoder": joint(16, 160, 12, 64),
    "huge": joint(4, 160, 16, 80),
    "giant": joint(4, 208, 16, 88),
    "longest_backward": joint(4, 224, 12, 64),
    "longest": joint(4, 256, 12, 64),
    "odd": joint(3, 97, 5, 64),
    "one": joint(3, 1, 5, 64),
    "space": divided(4, 8, 196, 12, 64, "space"),
    "space_visible": divided(8, 8, 20, 12, 64, "space"),
    "space_huge": divided(2, 8, 20, 16, 80, "space"),
    "time": divided(4, 8, 196, 12, 64, "time"),
    "time_visible": divided(8, 8, 20, 12, 64, "time"),
    "time_of_16": divided(2, 16, 196, 12, 64, "time"),
    "time_giant": divided(2, 8, 49, 16, 88, "time"),
    "loss": loss(8),
    "loss_channels_last": loss(2, channels_last=True),
    "loss_odd": loss(3, (3, 2, 5), 7),
}
# One of each kind.
KINDS = {name: SIZES[name] for name in ("encoder", "space_visible", "time", "loss")}


@pytest.fixture(autouse=True)
def built(device, request):
    """The extension, or a skip with the reason."""
    if "built" in request.node.name:
        return
    missing = _extension.why_not(device)
    if missing:
        pytest.skip(missing)


@pytest.fixture
def called(monkeypatch):
    """Names of the extension's functions that are called."""
    module, names = _extension.extension(), []

    def noting(name):
        function = getattr(module, name)
        return lambda *given, **more: (names.append(name), function(*given, **more))[1]

    for name in FUNCTIONS:
        monkeypatch.setattr(module, name, noting(name))
    return names


@pytest.fixture
def cuda():
    """The backend, in both passes."""
    with ops.backend("cuda"):
        yield


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def fitting(case, device):
    """The case's functions whose shared memory this GPU has."""
    asked = _extension.extension().short_attention_fits
    return tuple(
        name
        for name in case.functions
        if not case.length or asked(case.length, case.width, "backward" in name, device.index)
    )


def by_triton(case, inputs):
    with ops.backend("triton"):
        return case.run(inputs)


def assert_close(got, expected, rtol):
    for place, (mine, other) in enumerate(zip(got, expected, strict=True)):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert mine.isfinite().all(), place
        assert relative_error(mine, other) < rtol, place


def assert_same_bits(got, expected):
    for place, (mine, other) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(mine, other), place


def test_the_extension_is_built_where_nvcc_is(device):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    assert _extension.why_not(device) == ""
    module = _extension.extension()
    about = module.about()
    assert about["architectures"]
    assert about["cuda"] >= 12000
    assert not about["emulated"]
    assert module.driver_version() // 1000 >= about["cuda"] // 1000
    if torch.cuda.get_device_capability(device) == (9, 0):
        for name, case in SIZES.items():
            assert fitting(case, device) == case.functions[: 1 + (name != "longest")], name


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_equals_triton(device, called, name, dtype):
    case = SIZES[name]
    inputs = case.inputs(dtype, device)
    got = case.run(inputs)
    # Where the backward pass does not fit, either pass may be Triton's.
    fit = fitting(case, device)
    assert set(called) == set(fit) or (fit != case.functions and not called)
    assert_close(got, by_triton(case, inputs), RTOL[dtype])


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", [name for name in SIZES if "loss" not in name])
def test_attention_is_as_accurate_as_eager(device, name, dtype):
    case = SIZES[name]
    inputs = [x.detach()[:2].requires_grad_() for x in case.inputs(dtype, device)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    generator = torch.Generator(device).manual_seed(1)
    upstream = torch.randn(case.op(*inputs).shape, generator=generator, device=device).to(dtype)
    ways = ((case.op, inputs), (case.definition, inputs), (case.definition, exact))
    parts = []
    for function, given in ways:
        out = function(*given)
        (grad,) = torch.autograd.grad(out, given, upstream.to(out.dtype))
        parts.append([out.detach(), *grad.chunk(3, dim=2)])
    for place, (mine, eager, truth) in enumerate(zip(*parts, strict=True)):
        factor = GRADIENT_FACTOR if place else EAGER_FACTOR
        if truth.abs().max() > 1e-6:
            assert relative_error(mine, truth) <= factor * relative_error(eager, truth), place
        else:
            # With one token a sequence the gradients of q and k are zero but for rounding.
            assert mine.abs().max() < 1e-2, place


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_same_bits_every_time(device, kind, dtype):
    inputs = kind.inputs(dtype, device)
    first = kind.run(inputs)
    for _ in range(20):
        assert_same_bits(kind.run(inputs), first)


@pytest.mark.usefixtures("cuda", "deterministic")
def test_nothing_is_left_unwritten(device, kind):
    """In a deterministic run torch fills new memory with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    inputs = kind.inputs(LOW[0], device)
    assert torch.empty_like(inputs[0]).isnan().all()
    assert all(x.isfinite().all() for x in kind.run(inputs))


@pytest.mark.usefixtures("cuda")
def test_what_a_kernel_does_not_take_runs_as_by_default(device, called):
    """Other widths and lengths, a class token, fp32, and rows that start at odd addresses."""
    wide = torch.randn(2, 40, 3 * 128 + 1, device=device, dtype=LOW[0])
    calls = {
        "width": (lambda x: ops.attention(x, 4), wide[..., 1:].contiguous()),
        "dtype": (lambda x: ops.attention(x, 2), wide[..., 1:].float()),
        "address": (lambda x: ops.attention(x, 2), wide[..., 1:]),
        "length": (lambda x: ops.attention(x, 2), wide[..., 1:].reshape(1, 80, -1).repeat(1, 4, 1)),
        "class token": (
            lambda x: ops.divided_attention(x, 2, (3, 13), "space", class_token=True),
            wide[..., 1:].contiguous(),
        ),
    }
    for name, (op, values) in calls.items():
        case = Case(op, ())
        got = case.run([values.detach().requires_grad_()])
        assert not called, name
        with ops.backend("auto"):
            # cuDNN's backward pass adds up in an order of its own each time.
            assert_close(got, case.run([values.detach().requires_grad_()]), RTOL[LOW[0]])


# ---- graphs, streams, devices, the compiler -------------------------------------------------


@pytest.mark.usefixtures("cuda")
def test_cuda_graphs(device, kind):
    """Forward and backward as one graph, replayed with other values."""
    inputs = kind.inputs(LOW[0], device)
    others = [kind.inputs(LOW[0], device, seed) for seed in (5, 6)]
    upstream = torch.randn_like(kind.op(*inputs)).detach()

    def step():
        out = kind.op(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs[0], upstream)

    def load(values):
        with torch.no_grad():
            for x, value in zip(inputs, values, strict=True):
                x.copy_(value)

    expected = []
    for values in others:
        load(values)
        expected.append([x.clone() for x in step()])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = step()
    assert not torch.equal(expected[0][0], expected[1][0])
    for values, truth in zip(others, expected, strict=True):
        load(values)
        graph.replay()
        assert_same_bits(found, truth)


@pytest.mark.usefixtures("cuda")
def test_on_another_stream(device, kind):
    """Values that arrive late, on a stream of their own: read from the default one, too early."""
    inputs = kind.inputs(LOW[0], device)
    late = kind.inputs(LOW[0], device, seed=5)
    expected = kind.run(late)
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        # About a tenth of a second, in clock cycles.
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for x, value in zip(inputs, late, strict=True):
                x.copy_(value)
        got = kind.run(inputs)
    stream.synchronize()
    assert_same_bits(got, expected)


@pytest.mark.usefixtures("cuda")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one(kind):
    first, second = (torch.device("cuda", index) for index in (0, 1))
    assert torch.cuda.current_device() == 0
    inputs = kind.inputs(LOW[0], first)
    expected = kind.run(inputs)
    moved = [x.detach().to(second) for x in inputs]
    moved[0].requires_grad_()
    out = kind.op(*moved)
    upstream = torch.randn(
        out.shape, generator=torch.Generator(first).manual_seed(1), device=first
    )  # fmt: skip
    grads = torch.autograd.grad(out, moved[0], upstream.to(second, out.dtype))
    assert torch.cuda.current_device() == 0
    assert {x.device for x in (out, *grads)} == {second}
    assert_close([x.to(first) for x in (out.detach(), *grads)], expected, RTOL[LOW[0]])


@pytest.mark.usefixtures("cuda", "fresh_dynamo")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(device, kind, called, dynamic):
    """Whole, with something around it, and at two batch sizes."""

    def between(x, *rest):
        return kind.op(torch.sin(x), *rest).square()

    compiled = torch.compile(between, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        inputs = [x.detach()[:batch].clone() for x in kind.inputs(LOW[0], device)]
        inputs[0].requires_grad_()
        expected = kind.run(inputs, between)
        called.clear()
        got = kind.run(inputs, compiled)
        assert set(called) == set(kind.functions)
        assert_close(got, expected, 2 * RTOL[LOW[0]])


# ---- large tensors --------------------------------------------------------------------------


LARGE = {
    # More values in the output than 2^31, thrice as many in qkv.
    "joint": (joint(LIMIT // (160 * 768) + 2, 160, 12, 64), 60),
    "space": (divided(LIMIT // (1568 * 768) + 2, 8, 196, 12, 64, "space"), 60),
    "time": (divided(LIMIT // (1568 * 768) + 2, 8, 196, 12, 64, "time"), 60),
    # More sequences than 2^21.
    "many": (divided(2**15 + 3, 2, 64, 1, 64, "time"), 12),
    "loss": (loss(LIMIT // (1568 * 1536) + 2, scored=1568), 30),
}


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", LARGE)
def test_offsets_beyond_32_bits(device, need_gib, called, name):
    case, gib = LARGE[name]
    need_gib(gib)
    x = torch.empty(case.shape, device=device, dtype=LOW[0]).normal_().requires_grad_()
    inputs = [x, *case.rest(device)]
    out = case.op(*inputs)
    assert max(x.numel(), out.numel()) > (LIMIT if name != "many" else 0)
    upstream = torch.empty_like(out).normal_()
    (grad,) = torch.autograd.grad(out, x, upstream)
    assert set(called) == set(case.functions)
    for clips in (slice(0, 2), slice(len(x) - 2, len(x))):
        part = [one.detach()[clips].clone() for one in inputs]
        part[0].requires_grad_()
        with ops.backend("reference"):
            expected = case.op(*part)
            (grad_expected,) = torch.autograd.grad(expected, part[0], upstream[clips])
        assert_close([out.detach()[clips], grad[clips]], [expected, grad_expected], RTOL[LOW[0]])
