"""Attention on a GPU: every kernel against the definition in fp64, and what chooses one."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import EAGER_FACTOR, relative_error
from torch import Tensor

from vmae_fast import ops
from vmae_fast.ops import _attention_choice

LOW = torch.bfloat16
# A gradient's error, in those of the same computation done eagerly in the same dtype.
GRADIENT_FACTOR = 3.0
# Between two ways of computing the same in bf16, as norms: see BACKEND_RTOL in test_gpu_ops.py.
BF16_RTOL = 3e-2
KERNELS = ("triton", "cudnn", "flash", "sdpa")


@dataclass(frozen=True)
class Case:
    """An attention and its definition on the same inputs.

    Attributes:
        shapes: of the inputs.
        op: of this package.
        definition: by softmax, in the inputs' dtype.
    """

    shapes: tuple[tuple[int, ...], ...]
    op: Callable[..., Tensor]
    definition: Callable[..., Tensor]

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
        """Noise that wants gradients."""
        generator = torch.Generator(device).manual_seed(seed)
        return [
            torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
            for shape in self.shapes
        ]

    def run(self, function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """Output and the gradients of q, k and v, for an upstream gradient always the same."""
        out = function(*inputs)
        generator = torch.Generator(out.device).manual_seed(1)
        upstream = torch.randn(out.shape, generator=generator, device=out.device).to(LOW)
        grads = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
        width = out.shape[2]
        return [out.detach(), *(part for grad in grads for part in grad.split(width, dim=2))]


def softmax(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """``(B, M, HK)``, twice ``(B, N, HK)``; every step rounded to their dtype."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT * q.shape[3] ** -0.5).softmax(3)
    return (weights @ v).transpose(1, 2).flatten(2)


def joint(batch: int, tokens: int, heads: int, head_width: int) -> Case:
    """All tokens attend to each other."""
    return Case(
        ((batch, tokens, 3 * heads * head_width),),
        lambda qkv: ops.attention(qkv, heads),
        lambda qkv: softmax(*qkv.chunk(3, dim=2), heads),
    )


def cross(batch: int, queries: int, keys: int, heads: int, head_width: int) -> Case:
    """Some queries of others' keys."""
    width = heads * head_width
    return Case(
        ((batch, queries, width), (batch, keys, 2 * width)),
        lambda q, kv: ops.cross_attention(q, kv, heads),
        lambda q, kv: softmax(q, *kv.chunk(2, dim=2), heads),
    )


def divided(
    batch: int, t: int, s: int, heads: int, head_width: int, axis: str, class_token: bool = False
) -> Case:
    """Along time or across space."""

    def definition(qkv: Tensor) -> Tensor:
        first, grid = qkv.tensor_split([int(class_token)], dim=1)
        grid = grid.unflatten(1, (t, s))
        grid = grid.transpose(1, 2) if axis == "time" else grid
        count = grid.shape[1]
        first = first.unsqueeze(1).expand(-1, count, -1, -1)
        sequences = torch.cat([first, grid], dim=2).flatten(0, 1)
        out = softmax(*sequences.chunk(3, dim=2), heads).unflatten(0, (-1, count))
        own, grid = out.tensor_split([int(class_token)], dim=2)
        grid = (grid.transpose(1, 2) if axis == "time" else grid).flatten(1, 2)
        return torch.cat([own.mean(1), grid], dim=1)

    return Case(
        ((batch, class_token + t * s, 3 * heads * head_width),),
        lambda qkv: ops.divided_attention(qkv, heads, (t, s), axis, class_token=class_token),
        definition,
    )


# Sizes of the models: encoders, decoders, and what is divided of both.
MODELS = {
    "encoder": joint(4, 160, 12, 64),
    "giant_encoder": joint(2, 208, 16, 88),
    "decoder": joint(1, 1568, 6, 64),
    "decoder_of_a_half": joint(2, 944, 6, 64),
    "decoder_of_a_quarter": joint(2, 552, 6, 64),
    "decoder_last": cross(1, 1408, 1568, 6, 64),
    "pooling": cross(4, 1, 160, 12, 64),
    "time": divided(1, 8, 196, 12, 64, "time"),
    "time_of_16": divided(1, 16, 196, 6, 64, "time"),
    "time_visible": divided(2, 8, 20, 12, 64, "time"),
    "time_class": divided(2, 8, 49, 6, 64, "time", True),
    "space": divided(1, 8, 196, 12, 64, "space"),
    "space_visible": divided(2, 8, 20, 12, 64, "space"),
    "space_class": divided(1, 8, 196, 12, 64, "space", True),
    "space_large_class": divided(1, 3, 576, 6, 64, "space", True),
}
WIDTHS = (32, 64, 80, 88, 128)
# Lengths that are no multiple of a block, around those where another kernel takes over.
FAMILIES = {
    "packed": lambda width: divided(2, 5, 7, 3, width, "time"),
    "packed_class": lambda width: divided(2, 5, 7, 3, width, "space", True),
    "packed_longest": lambda width: joint(2, 64, 3, width),
    "whole_shortest": lambda width: joint(2, 65, 3, width),
    "whole": lambda width: joint(2, 160, 3, width),
    "whole_cross": lambda width: cross(2, 37, 97, 3, width),
    "whole_class": lambda width: divided(2, 3, 100, 3, width, "space", True),
    "whole_longest": lambda width: joint(2, 256, 3, width),
    "tiled_shortest": lambda width: joint(2, 257, 3, width),
    "tiled": lambda width: joint(1, 1001, 3, width),
    "tiled_cross": lambda width: cross(2, 37, 517, 3, width),
    "tiled_class": lambda width: divided(2, 3, 300, 3, width, "space", True),
}
# One of each op, long enough for every kernel to be worth asking for.
CALLS = {
    "joint": joint(2, 300, 6, 64),
    "cross": cross(2, 130, 300, 6, 64),
    "time": divided(2, 16, 49, 6, 64, "time"),
    "space": divided(2, 3, 196, 6, 64, "space"),
    "space_class": divided(2, 3, 196, 6, 64, "space", True),
}


@pytest.fixture(params=CALLS)
def case(request):
    return CALLS[request.param]


def assert_as_accurate_as_eager(case, dtype, device):
    inputs = case.inputs(dtype, device)
    truth = case.run(case.definition, [x.detach().double().requires_grad_() for x in inputs])
    eager, got = case.run(case.definition, inputs), case.run(case.op, inputs)
    names = ("out", "q", "k", "v")
    for name, mine, theirs, exact in zip(names, got, eager, truth, strict=True):
        assert mine.dtype == dtype
        factor = EAGER_FACTOR if name == "out" else GRADIENT_FACTOR
        assert relative_error(mine, exact) <= factor * relative_error(theirs, exact), name


@pytest.mark.parametrize("kernel", ["triton", "auto"])
@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_models_sizes_are_as_accurate_as_eager(device, case, kernel):
    with ops.attention_kernel(kernel):
        assert_as_accurate_as_eager(case, LOW, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_is_as_accurate_as_eager(device, family, width, dtype):
    with ops.backend("triton"):
        assert_as_accurate_as_eager(FAMILIES[family](width), dtype, device)


@pytest.mark.parametrize("width", [24, 40, 96])
@pytest.mark.parametrize("kernel", ["auto", "cudnn", "flash"])
def test_other_head_widths(device, kernel, width):
    for case in (joint(2, 160, 3, width), divided(2, 5, 7, 3, width, "space", True)):
        with ops.attention_kernel(kernel):
            assert_as_accurate_as_eager(case, LOW, device)


# ---- one kernel and another ---------------------------------------------------------------


@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
def test_kernels_agree(device, case, kernel):
    inputs = case.inputs(LOW, device)
    with ops.backend("reference"):
        expected = case.run(case.op, inputs)
    with ops.attention_kernel(kernel):
        got = case.run(case.op, inputs)
    for mine, other in zip(got, expected, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert relative_error(mine, other) < BF16_RTOL


def operations(function):
    """Names of what ran, in all threads."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


def test_the_kernel_asked_for_runs(device):
    """cuDNN's is looked for where PyTorch is known to have it, on compute capability 9 and 10."""
    case = CALLS["joint"]
    inputs = case.inputs(LOW, device)
    parts = {"triton": "vmae_fast::attention", "flash": "scaled_dot_product_flash_attention"}
    if torch.cuda.get_device_capability(device)[0] in (9, 10):
        parts["cudnn"] = "scaled_dot_product_cudnn_attention"
    for kernel, part in parts.items():
        with ops.attention_kernel(kernel):
            ran = operations(lambda: case.run(case.op, inputs))
        assert any(part in name for name in ran), (kernel, ran)
        assert any(part in name and "backward" in name for name in ran), (kernel, ran)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kernel", ["auto", "triton", "flash", "sdpa"])
def test_a_deterministic_run_has_no_cudnn(device, case, kernel):
    inputs = case.inputs(LOW, device)
    with ops.attention_kernel(kernel):
        first = case.run(case.op, inputs)
        ran = operations(lambda: case.run(case.op, inputs))
        for _ in range(3):
            for mine, before in zip(case.run(case.op, inputs), first, strict=True):
                assert torch.equal(mine, before)
    assert ran
    assert not any("cudnn" in name for name in ran)


@pytest.mark.usefixtures("deterministic")
def test_a_deterministic_run_cannot_ask_for_cudnn(device, case):
    message = "cudnn is not deterministic"
    with ops.attention_kernel("cudnn"), pytest.raises(RuntimeError, match=message):
        case.op(*case.inputs(LOW, device))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("width", [24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
def test_a_deterministic_run_takes_every_width(device, dtype, width):
    case = joint(2, 300, 3, width)
    first, second = (case.run(case.op, case.inputs(dtype, device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- inputs -------------------------------------------------------------------------------


def test_wherever_the_values_lie(device, case):
    """Rows further apart, columns apart, and starts at odd addresses."""
    tight = case.inputs(LOW, device)
    wide = [torch.empty(*x.shape[:2], x.shape[2] + 3, device=device, dtype=LOW) for x in tight]
    twice = [x.detach().repeat_interleave(2, dim=1)[:, ::2] for x in tight]
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in tight]
    odd = []
    for x, room in zip(tight, wide, strict=True):
        room[..., 1:-2] = x.detach()
        odd.append(room[..., 1:-2])
    with ops.backend("triton"):
        expected = case.run(case.op, tight)
        for views in (odd, twice, turned):
            assert not all(x.is_contiguous() for x in views)
            got = case.run(case.op, [x.requires_grad_() for x in views])
            for mine, other in zip(got, expected, strict=True):
                # Sums may be taken in another order where loads are narrower.
                assert relative_error(mine, other) < 1e-3


@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 160), (2, 0), (0, 0)])
def test_nothing_to_attend(device, kernel, batch, tokens):
    with ops.attention_kernel(kernel):
        for given in (joint(batch, tokens, 6, 64), cross(batch, tokens, 160, 6, 64)):
            inputs = given.inputs(LOW, device)
            out = given.op(*inputs)
            assert out.shape == (batch, tokens, 6 * 64)
            out.sum().backward()
            assert all(not x.grad.any() for x in inputs)


@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
def test_autocast(device, case, kernel):
    low = case.inputs(LOW, device)
    wide = [x.detach().float().requires_grad_() for x in low]
    with ops.attention_kernel(kernel):
        expected = case.run(case.op, low)
        with torch.autocast(device.type, LOW):
            got = case.run(case.op, wide)
    assert [x.dtype for x in got] == [LOW] + [torch.float32] * 3
    for mine, other in zip(got, expected, strict=True):
        assert relative_error(mine, other) < BF16_RTOL


# ---- compiler, graphs, streams, devices ---------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
def test_compiled(device, case, kernel, dynamic):
    """Whole, with something around it, and at three batch sizes."""

    def between(*inputs):
        return case.op(*(torch.sin(x) for x in inputs)).square()

    compiled = torch.compile(between, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3, 5):
        inputs = [
            torch.cat([x.detach()] * 3)[:batch].clone().requires_grad_()
            for x in case.inputs(LOW, device)
        ]
        with ops.attention_kernel(kernel):
            expected, got = case.run(between, inputs), case.run(compiled, inputs)
        for mine, other in zip(got, expected, strict=True):
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
            assert relative_error(mine, other) < 2 * BF16_RTOL


@pytest.mark.parametrize("kernel", ["triton", "auto"])
def test_cuda_graphs(device, case, kernel):
    """Forward and backward as one graph, replayed with other values."""
    inputs = case.inputs(LOW, device)
    others = [[x.detach() for x in case.inputs(LOW, device, seed)] for seed in (5, 6)]
    upstream = torch.randn_like(case.op(*inputs)).detach()

    def step():
        out = case.op(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, upstream)

    def load(values):
        with torch.no_grad():
            for x, value in zip(inputs, values, strict=True):
                x.copy_(value)

    with ops.attention_kernel(kernel):
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
    assert relative_error(expected[0][0], expected[1][0]) > 0.5
    for values, truth in zip(others, expected, strict=True):
        load(values)
        graph.replay()
        for mine, other in zip(found, truth, strict=True):
            if kernel == "triton":
                assert torch.equal(mine, other)
            assert relative_error(mine, other) < BF16_RTOL


def test_on_another_stream(device, case):
    """Values that arrive late, on a stream of their own: read from the default one, too early."""
    inputs = case.inputs(LOW, device)
    late = [x.detach() for x in case.inputs(LOW, device, seed=5)]
    with ops.backend("triton"):
        expected = case.run(case.op, [x.clone().requires_grad_() for x in late])
        torch.cuda.synchronize(device)
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            # About a tenth of a second, in clock cycles.
            torch.cuda._sleep(200_000_000)
            with torch.no_grad():
                for x, value in zip(inputs, late, strict=True):
                    x.copy_(value)
            got = case.run(case.op, inputs)
        stream.synchronize()
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("kernel", ["triton", "auto"])
def test_a_device_that_is_not_the_current_one(case, kernel):
    first, second = (torch.device("cuda", index) for index in (0, 1))
    assert torch.cuda.current_device() == 0
    inputs = case.inputs(LOW, first)
    with ops.attention_kernel(kernel):
        expected = case.run(case.op, inputs)
        moved = [x.detach().to(second).requires_grad_() for x in inputs]
        out = case.op(*moved)
        grads = torch.autograd.grad(out.square().sum(), moved)
        truth = torch.autograd.grad(case.op(*inputs).square().sum(), inputs)
    assert torch.cuda.current_device() == 0
    assert {x.device for x in (out, *grads)} == {second}
    for mine, other in zip((out, *grads), (expected[0], *truth), strict=True):
        assert relative_error(mine.to(first), other) < BF16_RTOL


def test_this_gpu_has_a_row(device):
    """And what the table names can run here."""
    capability = _attention_choice._launch.target_of(device)
    for num_keys in (1, 160, 256, 257, 1568):
        row = _attention_choice.tabled(capability, LOW, num_keys)
        assert row.kernel in KERNELS
        with ops.attention_kernel(row.kernel):
            out = ops.attention(torch.zeros(1, num_keys, 192, device=device, dtype=LOW), 1)
        assert torch.equal(out, torch.zeros_like(out))
