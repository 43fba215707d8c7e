"""Devices, one use of every op, and unwritten memory shown as NaN."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import make_video, random_positions

from vmae_fast import ops

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what ``torch.empty`` and its kin allocate with NaN for the time of a test."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    # Warnings only: matrix products on a GPU are not what this is about.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for empty in (torch.empty(3), torch.zeros(3).new_empty(3), torch.empty_like(torch.zeros(3))):
        assert empty.isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@dataclass
class Use:
    """One use of an op: a function of tensors that want gradients and tensors that do not.

    Attributes:
        name: of the public op.
        function: called with the leaves, then the rest.
        leaves: fp32, on the CPU, requiring gradients.
        rest: indices and videos.
    """

    name: str
    function: Callable[..., torch.Tensor]
    leaves: tuple[torch.Tensor, ...]
    rest: tuple[torch.Tensor, ...]

    def __call__(self, *leaves: torch.Tensor) -> torch.Tensor:
        return self.function(*(leaves or self.leaves), *self.rest)

    def gradients(self, out: torch.Tensor, **options: bool) -> tuple[torch.Tensor, ...]:
        """Of all leaves, for a random upstream gradient."""
        generator = torch.Generator().manual_seed(9)
        upstream = torch.randn(out.shape, generator=generator).to(out.dtype)
        return torch.autograd.grad(out, self.leaves, upstream, **options)


TUBELET = (2, 4, 4)


def gather_tokens(batch):
    def function(x, idx):
        return ops.gather_tokens(x, idx)

    return function, [(batch, 8, 6)], (random_positions(batch, 8, 3),)


def decoder_tokens(batch):
    def function(visible, mask_token, pos, visible_idx, decode_idx):
        return ops.decoder_tokens(visible, mask_token, pos, visible_idx, decode_idx)

    order = random_positions(batch, 8, 8)
    return function, [(batch, 3, 6), (6,), (8, 6)], (order[:, :3], order[:, 3:])


def shared_tokens(batch):
    def function(visible, shared, decode_idx):
        return ops.shared_tokens(visible, shared, decode_idx)

    return function, [(batch, 3, 6), (8, 6)], (random_positions(batch, 8, 5),)


def tubelet_embed_uint8(batch):
    def function(weight, bias, pos, video, idx):
        return ops.tubelet_embed(video, weight, bias, pos, idx)

    rest = (make_video((batch, 3, 4, 8, 8), torch.uint8), random_positions(batch, 8, 3))
    return function, [(10, 3, *TUBELET), (10,), (8, 10)], rest


def tubelet_embed_floating(batch):
    def function(video, weight, bias, pos, idx):
        return ops.tubelet_embed(video, weight, bias, pos, idx)

    shapes = [(batch, 3, 4, 8, 8), (10, 3, *TUBELET), (10,), (8, 10)]
    return function, shapes, (random_positions(batch, 8, 3),)


def masked_mse(batch):
    def function(pred, video, idx):
        return ops.masked_mse(pred, video, idx, TUBELET)

    rest = (make_video((batch, 3, 4, 8, 8), torch.uint8), random_positions(batch, 8, 5))
    return function, [(batch, 5, 96)], rest


def linear_masked_mse(batch):
    def function(x, weight, bias, video, idx, scored):
        return ops.linear_masked_mse(x, weight, bias, video, idx, TUBELET, scored=scored)

    video, idx = make_video((batch, 3, 4, 8, 8), torch.uint8), random_positions(batch, 8, 5)
    scored = (torch.arange(batch * 5).view(batch, 5) % 3 > 0).float()
    return function, [(batch, 5, 7), (96, 7), (96,)], (video, idx, scored)


def attention(batch):
    def function(qkv):
        return ops.attention(qkv, 2)

    return function, [(batch, 6, 3 * 2 * 4)], ()


def cross_attention(batch):
    def function(q, kv):
        return ops.cross_attention(q, kv, 2, scale=0.3)

    return function, [(batch, 5, 2 * 4), (batch, 7, 2 * 2 * 4)], ()


def divided_attention_in_time(batch):
    def function(qkv):
        return ops.divided_attention(qkv, 2, (2, 3), "time")

    return function, [(batch, 6, 3 * 2 * 4)], ()


def divided_attention_with_class_token(batch):
    def function(qkv):
        return ops.divided_attention(qkv, 2, (3, 1, 2), "space", class_token=True)

    return function, [(batch, 7, 3 * 2 * 4)], ()


def layer_norm_linear(batch):
    def function(x, norm_weight, norm_bias, weight, bias):
        return ops.layer_norm_linear(x, norm_weight, norm_bias, 1e-3, weight, bias)

    return function, [(batch, 3, 6), (6,), (6,), (5, 6), (5,)], ()


def add_layer_norm_linear(batch):
    def function(x, branch, norm_weight, norm_bias, weight, scale):
        given = (x, branch, norm_weight, norm_bias, 1e-3, weight)
        return torch.cat(ops.add_layer_norm_linear(*given, branch_scale=scale), dim=-1)

    shapes = [(batch, 3, 6), (batch, 3, 6), (6,), (6,), (5, 6)]
    return function, shapes, (torch.arange(batch) / 2,)


def add_layer_norm_query_key_value(batch):
    def function(x, branch, norm_weight, norm_bias, weight, bias):
        found = ops.add_layer_norm_query_key_value(
            x, branch, norm_weight, norm_bias, 1e-3, weight, bias, 2
        )
        return torch.cat([one.flatten(1) for one in found], dim=1)

    return function, [(batch, 3, 6), (batch, 3, 6), (6,), (6,), (18, 6), (18,)], ()


def bias_gelu_linear(batch):
    def function(x, gelu_bias, weight, bias):
        return ops.bias_gelu_linear(x, gelu_bias, weight, bias)

    return function, [(batch, 3, 6), (6,), (5, 6), (5,)], ()


def layer_norm(batch):
    def function(x, weight, bias):
        return ops.layer_norm(x, weight, bias)

    return function, [(batch, 5, 6), (6,), (6,)], ()


def add_layer_norm(batch):
    def function(x, branch, weight, bias, scale):
        residual, y = ops.add_layer_norm(x, branch, weight, bias, branch_scale=scale)
        return residual + 2 * y

    return function, [(batch, 5, 6), (batch, 5, 6), (6,), (6,)], (torch.arange(batch) / 3,)


def bias_gelu(batch):
    def function(x, bias):
        return ops.bias_gelu(x, bias)

    return function, [(batch, 5, 6), (6,)], ()


USES = [
    gather_tokens, decoder_tokens, shared_tokens, tubelet_embed_uint8, tubelet_embed_floating,
    masked_mse,
    linear_masked_mse, attention, cross_attention, divided_attention_in_time,
    divided_attention_with_class_token, layer_norm, add_layer_norm, bias_gelu,
    layer_norm_linear, add_layer_norm_linear, add_layer_norm_query_key_value, bias_gelu_linear,
]  # fmt: skip
# What the names of two uses of one op end in.
VARIANTS = ("_uint8", "_floating", "_in_time", "_with_class_token")


@pytest.fixture(params=USES, ids=lambda use: use.__name__)
def use_of(request):
    """Every op in turn: a function from the batch size to a :class:`Use` of it."""

    def make(batch: int = 2) -> Use:
        function, shapes, rest = request.param(batch)
        generator = torch.Generator().manual_seed(7)
        leaves = tuple(torch.randn(s, generator=generator).requires_grad_() for s in shapes)
        name = request.param.__name__
        for variant in VARIANTS:
            name = name.removesuffix(variant)
        return Use(name, function, leaves, rest)

    return make
