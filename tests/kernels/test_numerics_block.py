"""The joint block over Triton kernels, against its modules one after the other in fp64."""

import copy
import os
from typing import NamedTuple

import pytest
import torch
from helpers import EAGER_FACTOR, random_positions, randomise, relative_error

from vmae_fast import ops
from vmae_fast.nn import MLP, DropPath, JointSpaceTimeBlock, Residual, SharedTokens

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a GPU, or Triton's interpreter, in which test_interpreter.py runs this file",
        allow_module_level=True,
    )
pytestmark = [pytest.mark.usefixtures("kernels")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)

# A dozen operations one after the other, each of which loses a few units in the last place.
FP32_RTOL = 2e-6

CLIPS, TOKENS, VISIBLE = 3, 13, 5
# The inner width is padded to 24.
WIDTH, HEADS, HIDDEN = 64, 2, 22


class Case(NamedTuple):
    """What a block is called with.

    Attributes:
        num_queries: as the block's.
        shared: mask tokens that are the same in all clips, else a pending branch with drop path.
        low_stream: the residual stream is in the dtype of products.
        bias_with_gelu: fc1's bias is added in GELU's pass, as on a GPU, or in the product.
    """

    num_queries: int | None
    shared: bool
    low_stream: bool
    bias_with_gelu: bool


CASES = {
    "whole": Case(None, False, False, False),
    "trimmed": Case(4, False, True, True),
    "shared": Case(None, True, False, True),
    "shared_trimmed": Case(4, True, True, False),
}


def normal(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def leaves_for(case, low, device):
    """Stream and branch, or visible and shared tokens: of values that low holds too."""
    if case.shared:
        shapes = (CLIPS, VISIBLE, WIDTH), (TOKENS, WIDTH)
    else:
        shapes = ((CLIPS, TOKENS, WIDTH),) * 2
    tensors = [
        normal(*shape, dtype=low, device=device, seed=seed) for seed, shape in enumerate(shapes)
    ]
    stream = low if case.low_stream else torch.float32
    # What is added comes from a product; tokens are all of the stream.
    return [one.to(stream) if case.shared or not at else one for at, one in enumerate(tensors)]


def run(block, case, leaves, low=None):
    """Result, and gradients of leaves and parameters, by name; under autocast with a low dtype."""
    own = [leaf.detach().requires_grad_() for leaf in leaves]
    device, shared = own[0].device, None
    if case.shared:
        decode_idx = random_positions(CLIPS, TOKENS, TOKENS)[:, VISIBLE:].to(device)
        shared = SharedTokens(*own, decode_idx)
        stream = Residual(torch.cat([own[0], own[1][decode_idx]], dim=1))
    else:
        stream = Residual(*own, torch.tensor([1.25, 1.25, 0.0], device=device))
    with torch.autocast(device.type, low, enabled=low is not None):
        if block._fusable():
            out = block(stream, case.num_queries, shared).sum()
        else:
            # Nothing pending, nothing shared.
            out = block(stream.sum(), case.num_queries)
    upstream = normal(*out.shape, dtype=low or torch.float32, device=device, seed=7).to(out.dtype)
    named = {"first": own[0], "second": own[1], **dict(block.named_parameters())}
    grads = torch.autograd.grad(out, list(named.values()), upstream)
    return {"out": out.detach(), **dict(zip(named, grads, strict=True))}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_joint_block(case, dtype, device, monkeypatch):
    monkeypatch.setattr(MLP, "_bias_with_gelu", case.bias_with_gelu)
    # A draw would be another one in another dtype.
    dropped = torch.tensor([1.25, 0.0, 1.25], device=device)
    monkeypatch.setattr(DropPath, "scale", lambda self, x: dropped)
    block = JointSpaceTimeBlock(WIDTH, HEADS, HIDDEN, init_values=0.1).to(device)
    randomise(block)
    plain = copy.deepcopy(block).double()
    plain._fusable = lambda: False
    leaves = leaves_for(case, dtype, device)
    low = None if dtype == torch.float32 else dtype
    got = run(block, case, leaves, low)
    with ops.backend("reference"):
        eager = run(block, case, leaves, low)
        truth = run(plain, case, [leaf.double() for leaf in leaves])
    for name, true in truth.items():
        assert got[name].dtype == eager[name].dtype, name
        bound = FP32_RTOL
        if low is not None:
            bound = EAGER_FACTOR * relative_error(eager[name], true)
        assert relative_error(got[name], true) <= bound, name
