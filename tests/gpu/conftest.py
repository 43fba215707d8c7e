"""Everything in this folder needs a GPU: marked so, and skipped with a reason where there is none.

Also: ops on fixed inputs, of sizes that matter.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# What torch.use_deterministic_algorithms asks of cuBLAS; read when its first handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from torch import Tensor

from vmae_fast import ops
from vmae_fast.ops import _attention_choice

FOLDER = Path(__file__).parent
LEAST_CAPABILITY = (8, 0)


def why_not() -> str | None:
    """Why nothing here can run; None where it can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device that torch can use"
    if torch.version.hip is not None:
        return "needs a CUDA build of torch"
    found = torch.cuda.get_device_capability()
    if found < LEAST_CAPABILITY:
        return f"needs compute capability {LEAST_CAPABILITY}, this GPU has {found}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "kernels would be interpreted: TRITON_INTERPRET=1"
    return None


# First, so that -m sees the marker.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    here = [item for item in items if FOLDER in item.path.parents]
    reason = why_not() if here else None
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def fp32_products():
    """Products of fp32 tensors in fp32, whatever ran before; memory handed back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def need_gib(device):
    """Call with how much GPU memory the test takes: skips where there is less."""

    def need(gib: float) -> None:
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        if free < gib:
            pytest.skip(f"needs {gib:g} GiB of GPU memory, {free:.1f} GiB are free")

    return need


@pytest.fixture
def deterministic():
    """Operations without a deterministic implementation are errors."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model and its batch."""

    batch: int
    channels: int
    tubelet: tuple[int, int, int]
    grid: tuple[int, int, int]
    width: int
    decoder_width: int
    num_visible: int
    heads: int
    head_width: int

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def video(self) -> tuple[int, ...]:
        """Shape of the video."""
        sides = (n * p for n, p in zip(self.grid, self.tubelet, strict=True))
        return (self.batch, self.channels, *sides)

    @property
    def values(self) -> int:
        """P."""
        return self.channels * self.tubelet[0] * self.tubelet[1] * self.tubelet[2]


GEOMETRIES = {
    "base": Geometry(8, 3, (2, 16, 16), (8, 14, 14), 768, 384, 160, 6, 64),
    # Nothing a multiple of a block.
    "odd": Geometry(3, 2, (3, 5, 7), (2, 3, 5), 37, 21, 7, 3, 80),
}


class Draw:
    """Random tensors on a device, the same every time."""

    def __init__(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> None:
        self.geometry, self.dtype, self.device = geometry, dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Noise in the dtype of the case."""
        drawn = torch.randn(shape, generator=self.generator).mul_(scale)
        return drawn.to(self.device, self.dtype)

    def pixels(self) -> Tensor:
        """A uint8 video."""
        shape = self.geometry.video
        drawn = torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)
        return drawn.to(self.device)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Visible and masked positions of each clip, in no order."""
        shape = (self.geometry.batch, self.geometry.num_tokens)
        order = torch.rand(shape, generator=self.generator).argsort(dim=1).to(self.device)
        return order[:, : self.geometry.num_visible], order[:, self.geometry.num_visible :]

    def scored(self) -> Tensor:
        """Weights of the masked tokens, 0 or 1."""
        g = self.geometry
        shape = (g.batch, g.num_tokens - g.num_visible)
        return (torch.rand(shape, generator=self.generator) < 0.7).float().to(self.device)


Outputs = Tensor | tuple[Tensor, ...]


class OpCase:
    """An op on fixed inputs.

    Args:
        function: of those inputs that want gradients; gives one output or several.
        inputs: they.
    """

    def __init__(self, function: Callable[..., Outputs], inputs: list[Tensor]) -> None:
        self.function, self.inputs = function, inputs

    def outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Of the function, in a tuple always."""
        found = self.function(*inputs)
        return found if isinstance(found, tuple) else (found,)

    def __call__(self, function: Callable[..., tuple[Tensor, ...]] | None = None) -> list[Tensor]:
        """Outputs and gradients, of random upstream gradients that are the same at every call.

        Args:
            function: instead of :meth:`outputs`.
        """
        inputs = [tensor.detach().requires_grad_() for tensor in self.inputs]
        outs = (function or self.outputs)(*inputs)
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, upstream)]


def _gather_tokens(g: Geometry, draw: Draw) -> OpCase:
    visible, _ = draw.positions()
    tokens = draw.normal(g.batch, g.num_tokens, g.width)
    return OpCase(lambda x: ops.gather_tokens(x, visible), [tokens])


def _decoder_tokens(g: Geometry, draw: Draw) -> OpCase:
    visible, masked = draw.positions()
    width = g.decoder_width
    shapes = ((g.batch, g.num_visible, width), (width,), (g.num_tokens, width))
    return OpCase(
        lambda x, mask_token, pos: ops.decoder_tokens(x, mask_token, pos, visible, masked),
        [draw.normal(*shape) for shape in shapes],
    )


def _shared_tokens(g: Geometry, draw: Draw) -> OpCase:
    _, masked = draw.positions()
    width = 3 * g.decoder_width
    inputs = [draw.normal(g.batch, g.num_visible, width), draw.normal(g.num_tokens, width)]
    return OpCase(lambda *given: ops.shared_tokens(*given, masked), inputs)


def _embedding(g: Geometry, draw: Draw) -> list[Tensor]:
    weight = draw.normal(g.width, g.channels, *g.tubelet, scale=g.values**-0.5)
    return [weight, draw.normal(g.width), draw.normal(g.num_tokens, g.width)]


def _tubelet_embed_uint8(g: Geometry, draw: Draw) -> OpCase:
    visible, _ = draw.positions()
    video, parameters = draw.pixels(), _embedding(g, draw)
    kinds = _statistics(g)
    return OpCase(
        lambda weight, bias, pos: ops.tubelet_embed(video, weight, bias, pos, visible, **kinds),
        parameters,
    )


def _tubelet_embed_float(g: Geometry, draw: Draw) -> OpCase:
    visible, _ = draw.positions()
    video, parameters = draw.normal(*g.video), _embedding(g, draw)
    return OpCase(
        lambda video, *given: ops.tubelet_embed(video, *given, visible), [video, *parameters]
    )


def _masked_mse(g: Geometry, draw: Draw) -> OpCase:
    _, masked = draw.positions()
    video, pred = draw.pixels(), draw.normal(*masked.shape, g.values)
    kinds = _statistics(g)
    return OpCase(
        lambda pred: ops.masked_mse(pred, video, masked, g.tubelet, reduction="none", **kinds),
        [pred],
    )


def _linear_masked_mse(g: Geometry, draw: Draw) -> OpCase:
    _, masked = draw.positions()
    video, scored, kinds = draw.pixels(), draw.scored(), _statistics(g)
    features = draw.normal(*masked.shape, g.decoder_width)
    weight = draw.normal(g.values, g.decoder_width, scale=g.decoder_width**-0.5)
    return OpCase(
        lambda x, weight, bias: ops.linear_masked_mse(
            x, weight, bias, video, masked, g.tubelet, scored=scored, **kinds
        ),
        [features, weight, draw.normal(g.values)],
    )


def _statistics(g: Geometry) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation for any number of channels."""
    return {
        "mean": tuple(0.4 + 0.05 * c for c in range(g.channels)),
        "std": tuple(0.2 + 0.02 * c for c in range(g.channels)),
    }


def _attention(g: Geometry, draw: Draw) -> OpCase:
    qkv = draw.normal(g.batch, g.num_visible, 3 * g.heads * g.head_width)
    return OpCase(lambda qkv: ops.attention(qkv, g.heads), [qkv])


def _cross_attention(g: Geometry, draw: Draw) -> OpCase:
    width = g.heads * g.head_width
    q = draw.normal(g.batch, g.num_tokens - g.num_visible, width)
    kv = draw.normal(g.batch, g.num_tokens, 2 * width)
    return OpCase(lambda q, kv: ops.cross_attention(q, kv, g.heads), [q, kv])


def _attention_in_time(g: Geometry, draw: Draw) -> OpCase:
    qkv = draw.normal(g.batch, g.num_tokens, 3 * g.heads * g.head_width)
    return OpCase(lambda qkv: ops.divided_attention(qkv, g.heads, g.grid, "time"), [qkv])


def _attention_in_space(g: Geometry, draw: Draw) -> OpCase:
    qkv = draw.normal(g.batch, 1 + g.num_tokens, 3 * g.heads * g.head_width)
    return OpCase(
        lambda qkv: ops.divided_attention(qkv, g.heads, g.grid, "space", class_token=True), [qkv]
    )


EPS = 1e-6


def _norm(g: Geometry, draw: Draw, branch: bool) -> list[Tensor]:
    """Tokens, the branch to be added where one is, and a norm's weight and bias."""
    tokens = [draw.normal(g.batch, g.num_visible, g.width) for _ in range(1 + branch)]
    return [*tokens, 1 + draw.normal(g.width, scale=0.1), draw.normal(g.width)]


def _clip_scale(g: Geometry, draw: Draw) -> Tensor:
    """What drop path does to each clip's branch: some get none of it."""
    return (torch.arange(g.batch, device=draw.device) % 3) / 2


def _linear(draw: Draw, width: int, rows: int) -> list[Tensor]:
    """Weight and bias."""
    return [draw.normal(rows, width, scale=width**-0.5), draw.normal(rows)]


def _layer_norm(g: Geometry, draw: Draw) -> OpCase:
    return OpCase(ops.layer_norm, _norm(g, draw, False))


def _add_layer_norm(g: Geometry, draw: Draw) -> OpCase:
    scale = _clip_scale(g, draw)
    return OpCase(
        lambda *given: ops.add_layer_norm(*given, branch_scale=scale), _norm(g, draw, True)
    )


def _bias_gelu(g: Geometry, draw: Draw) -> OpCase:
    inner = 4 * g.width
    return OpCase(ops.bias_gelu, [draw.normal(g.batch, g.num_visible, inner), draw.normal(inner)])


def _layer_norm_linear(g: Geometry, draw: Draw) -> OpCase:
    return OpCase(
        lambda x, norm_weight, norm_bias, *linear: ops.layer_norm_linear(
            x, norm_weight, norm_bias, EPS, *linear
        ),
        [*_norm(g, draw, False), *_linear(draw, g.width, 3 * g.width)],
    )


def _add_layer_norm_linear(g: Geometry, draw: Draw) -> OpCase:
    scale = _clip_scale(g, draw)
    return OpCase(
        lambda x, branch, norm_weight, norm_bias, *linear: ops.add_layer_norm_linear(
            x, branch, norm_weight, norm_bias, EPS, *linear, branch_scale=scale
        ),
        [*_norm(g, draw, True), *_linear(draw, g.width, 4 * g.width)],
    )


def _add_layer_norm_query_key_value(g: Geometry, draw: Draw) -> OpCase:
    # Without a scale: the branch's gradient is then the residual's own.
    queries = g.num_visible // 2 + 1
    return OpCase(
        lambda x, branch, norm_weight, norm_bias, *linear: ops.add_layer_norm_query_key_value(
            x, branch, norm_weight, norm_bias, EPS, *linear, queries
        ),
        [*_norm(g, draw, True), *_linear(draw, g.width, 3 * g.width)],
    )


def _bias_gelu_linear(g: Geometry, draw: Draw) -> OpCase:
    inner = 4 * g.width
    inputs = [draw.normal(g.batch, g.num_visible, inner), draw.normal(inner)]
    return OpCase(ops.bias_gelu_linear, [*inputs, *_linear(draw, inner, g.width)])


CASES = {
    "gather_tokens": _gather_tokens,
    "decoder_tokens": _decoder_tokens,
    "shared_tokens": _shared_tokens,
    "tubelet_embed_uint8": _tubelet_embed_uint8,
    "tubelet_embed_float": _tubelet_embed_float,
    "masked_mse": _masked_mse,
    "linear_masked_mse": _linear_masked_mse,
    "attention": _attention,
    "cross_attention": _cross_attention,
    "attention_in_time": _attention_in_time,
    "attention_in_space": _attention_in_space,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "bias_gelu": _bias_gelu,
    "layer_norm_linear": _layer_norm_linear,
    "add_layer_norm_linear": _add_layer_norm_linear,
    "add_layer_norm_query_key_value": _add_layer_norm_query_key_value,
    "bias_gelu_linear": _bias_gelu_linear,
}
# Our own kernels at any length: PyTorch's are not what the tests of all ops are about.
OWN_ATTENTION = tuple(
    _attention_choice.Choice(80, size, _attention_choice.LONGEST, "triton") for size in (2, 4)
)


@pytest.fixture(params=CASES)
def make_case(request, device, monkeypatch):
    """Call with the name of a geometry and a dtype: each op in turn, as an OpCase."""
    monkeypatch.setattr(_attention_choice, "CHOICES", OWN_ATTENTION)

    def make(geometry: str, dtype: torch.dtype) -> OpCase:
        g = GEOMETRIES[geometry]
        return CASES[request.param](g, Draw(g, dtype, device))

    return make


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled before, and nothing left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
