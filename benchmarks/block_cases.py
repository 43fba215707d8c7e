"""Inputs of the block's benchmarks: sizes, and batches of random numbers."""

import math
from dataclasses import dataclass, replace

import torch
from block_peers import PlainBlock
from torch import Tensor

from vmae_fast import Masking
from vmae_fast.nn import JointSpaceTimeBlock

# What matrix products are computed in, and what comes from one.
LOW = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """Dimensions of a transformer's tokens.

    Attributes:
        name: of the model's part.
        clips, tokens: B, and N of each.
        width, hidden, heads: D, I and H.
        stream: the residual stream's dtype.
        low: the products'.
    """

    name: str
    clips: int
    tokens: int
    width: int
    hidden: int
    heads: int
    stream: torch.dtype = torch.float32
    low: torch.dtype = LOW

    @property
    def row(self) -> str:
        """As the part is called in the name of a row: with the stream's dtype."""
        return f"{self.name} {'fp32' if self.stream == torch.float32 else 'bf16'}"

    @property
    def values(self) -> int:
        """Of the residual stream."""
        return self.clips * self.tokens * self.width

    def small(self) -> "Size":
        """The same part for a CPU."""
        return replace(
            self, clips=2, tokens=self.tokens // 8, width=self.width // 4, hidden=self.hidden // 4,
            heads=self.heads // 2,
        )  # fmt: skip


ENCODER = Size("encoder", 64, 160, 768, 3072, 12)
DECODER = Size("decoder", 64, 1568, 384, 1536, 6)
GIANT = Size("giant", 16, 208, 1408, 6144, 16, stream=LOW)
# With either stream: under autocast it is in fp32, unless the model is asked for another one.
NORMS = (
    *(replace(one, stream=stream) for one in (ENCODER, DECODER) for stream in (LOW, torch.float32)),
    GIANT,
)


class Batch:
    """What one call reads; tensors are made when first asked for, and want gradients.

    Attributes:
        size: their dimensions.
        x: ``(B, N, D)`` residual stream; ``branch`` is what a linear layer adds to it.
        weight, bias: ``(D,)`` of a norm, in the stream's dtype: what PyTorch's takes.
        inner: ``(B, N, I)`` what a linear layer gives, and its ``inner_bias``.
        low: the products' dtype.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        self.low, self._device = size.low, device
        tokens = (size.clips, size.tokens)
        self._made = {
            "x": ((*tokens, size.width), size.stream),
            "branch": ((*tokens, size.width), size.low),
            "weight": ((size.width,), size.stream),
            "bias": ((size.width,), size.stream),
            "inner": ((*tokens, size.hidden), size.low),
            "inner_bias": ((size.hidden,), size.low),
        }

    def __getattr__(self, name: str) -> Tensor:
        """Called for what is not there yet."""
        if name not in self._made:
            raise AttributeError(f"a batch has no {name!r}")
        shape, dtype = self._made[name]
        made = torch.randn(shape, device=self._device).to(dtype).requires_grad_()
        setattr(self, name, made)
        return made


class Placement:
    """Rows to be placed: packed qkv of the decoder's first block.

    Attributes:
        visible: ``(B, V, 3 * D)``; ``shared`` is ``(N, 3 * D)``. Both want gradients.
        decode_idx: ``(B, M)``, by V1's tube masks on 8 x n x n positions, N of them at most.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        side = math.isqrt(size.tokens // 8)
        mask = Masking((8, side, side))(torch.arange(size.clips, device=device))
        self.decode_idx = mask.decode_idx
        self.visible, self.shared = (
            torch.randn(*shape, 3 * size.width, device=device).to(size.low).requires_grad_()
            for shape in (mask.visible_idx.shape, (mask.num_tokens,))
        )


class Blocks:
    """A block of ours and a plain one with the same weights; parameters are in fp32.

    A leaf is called by the block's name and the parameter's: ``ours.norm1.weight``.

    Attributes:
        ours, plain: the blocks; of every instance the same.
        x: ``(B, N, D)`` fp32.
    """

    def __init__(
        self, size: Size, ours: JointSpaceTimeBlock, plain: PlainBlock, device: torch.device
    ) -> None:
        self.ours, self.plain = ours, plain
        self.x = torch.randn(size.clips, size.tokens, size.width, device=device).requires_grad_()

    def __getattr__(self, name: str) -> Tensor:
        """A parameter."""
        block, _, parameter = name.partition(".")
        if block not in ("ours", "plain") or not parameter:
            raise AttributeError(f"a batch has no {name!r}")
        found: Tensor = getattr(self, block).get_parameter(parameter)
        return found
