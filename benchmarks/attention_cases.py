"""Shapes of the attention benchmarks, what they cost at least, and batches of random numbers."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# On a CPU so many times fewer tokens, to see that everything runs.
CPU_FEWER = 8


@dataclass(frozen=True)
class Case:
    """What attends to what.

    Attributes:
        clips: B.
        tokens: N, of a clip.
        heads, head_width: H and K.
        queries: M, of cross attention; 0 for self-attention.
        axis: "time" or "space" of divided attention; "" for joint.
        rows: t of the grid that divided attention is over.
    """

    clips: int
    tokens: int
    heads: int
    head_width: int
    queries: int = 0
    axis: str = ""
    rows: int = 1

    @property
    def name(self) -> str:
        """As the row is called: (queries,) keys, heads, head width; divided, rows by positions."""
        size = f"{self.tokens}x{self.heads}x{self.head_width}"
        if self.queries:
            return f"cross_attention {self.queries}x{size}"
        if self.axis:
            grid = f"{self.rows}x{self.tokens // self.rows}"
            return f"divided_attention {self.axis} {grid}x{self.heads}x{self.head_width}"
        return f"attention {size}"

    @property
    def keys(self) -> int:
        """Keys of a sequence."""
        if self.axis == "time":
            return self.rows
        return self.tokens // self.rows

    @property
    def leaves(self) -> tuple[str, ...]:
        """What of a batch gets a gradient."""
        return ("q", "kv") if self.queries else ("qkv",)

    def forward_bytes(self, value_bytes: int) -> int:
        """q, k and v read, the output and the fp32 log-sum-exp written."""
        return value_bytes * 2 * (self._queries + self._keys) + self._lse_bytes

    def backward_bytes(self, value_bytes: int) -> int:
        """q, k, v, output, its gradient and log-sum-exp read, gradients of q, k and v written.

        Along time all logits of a sequence are on the chip at once: the output is not needed.
        """
        tensors = 4 * (self._queries + self._keys)
        if self.axis == "time":
            tensors -= self._queries
        return value_bytes * tensors + self._lse_bytes

    def flops(self, products: int) -> int:
        """Of so many matrix products over all pairs: 2 forward, 5 backward."""
        return 2 * products * self._queries * self.keys

    @property
    def _queries(self) -> int:
        """Values of q, and of the output."""
        return self.clips * (self.queries or self.tokens) * self.heads * self.head_width

    @property
    def _keys(self) -> int:
        """Values of k, and of v."""
        return self.clips * self.tokens * self.heads * self.head_width

    @property
    def _lse_bytes(self) -> int:
        return 4 * self._queries // self.head_width

    def small(self) -> "Case":
        """The same kind of case for a CPU: one clip, one or two heads, fewer tokens."""
        return replace(
            self,
            clips=1,
            tokens=self.tokens // CPU_FEWER // self.rows * self.rows,
            heads=min(self.heads, 2),
            queries=self.queries // CPU_FEWER,
        )


# Base's encoder, huge's and giant's; decoders; divided attention on grids of 14 x 14.
ENCODER = Case(64, 160, 12, 64)
DECODERS = (Case(64, 1568, 6, 64), Case(64, 944, 6, 64), Case(64, 552, 6, 64))
LARGER = (Case(32, 160, 16, 80), Case(32, 208, 16, 88), Case(16, 2048, 8, 64))
DIVIDED = tuple(
    Case(64, 196 * rows, 12, 64, axis=axis, rows=rows)
    for axis, rows in (("time", 8), ("time", 16), ("space", 8))
)
CROSS = Case(64, 1568, 6, 64, queries=1408)
# Divided attention of what a tube mask leaves visible.
VISIBLE = tuple(Case(64, 160, 12, 64, axis=axis, rows=8) for axis in ("space", "time"))
# Those that a CUDA C++ kernel is written for beside the Triton kernel.
TWINS = (ENCODER, DIVIDED[0], DIVIDED[2], *VISIBLE, *LARGER[:2])


class AttentionBatch:
    """Inputs of one call.

    Attributes:
        case: its shape.
        qkv: ``(B, N, 3 * H * K)``, or for cross attention q ``(B, M, H * K)`` and kv
            ``(B, N, 2 * H * K)``; all require gradients.
    """

    qkv: Tensor
    q: Tensor
    kv: Tensor

    def __init__(self, case: Case, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(seed)
        width = case.heads * case.head_width
        shapes = {"qkv": (case.tokens, 3 * width)}
        if case.queries:
            shapes = {"q": (case.queries, width), "kv": (case.tokens, 2 * width)}
        for name, shape in shapes.items():
            made = torch.randn(
                case.clips, *shape, generator=generator, dtype=dtype, device=device
            ).requires_grad_()
            setattr(self, name, made)
