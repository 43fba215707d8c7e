"""Self-attention with VideoMAE's parameters: joint, and divided along time or across space."""

import torch
import torch.nn as nn
from torch import Tensor

from vmae_fast import ops

from .linear import Linear, as_built


class Attention(nn.Module):
    """Multi-head self-attention: fused qkv weight, biases on q and v only.

    Args:
        width: D, divisible by num_heads.
        num_heads: H.
        qkv_bias: hold ``q_bias`` and ``v_bias`` (a key bias would cancel in the softmax).

    Raises:
        ValueError: width is not a multiple of num_heads.

    Source: VideoMAE (arXiv 2203.12602), after BEiT.

    Example:
        >>> import torch
        >>> from vmae_fast.nn import Attention
        >>> attention = Attention(768, num_heads=12)
        >>> attention(torch.randn(2, 160, 768)).shape
        torch.Size([2, 160, 768])
        >>> attention(torch.randn(2, 160, 768), num_queries=20).shape
        torch.Size([2, 20, 768])
    """

    def __init__(self, width: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Attend over ``(B, N, D)``.

        Args:
            x: ``(B, N, D)``.
            num_queries: compute only the last so many tokens' outputs (all N are keys).

        Returns:
            ``(B, N, D)``, or ``(B, num_queries, D)``.
        """
        if num_queries is None or num_queries == x.shape[1]:
            return self.proj(ops.attention(self._qkv(x), self.num_heads))
        width, first = x.shape[2], x.shape[1] - num_queries
        if not as_built(self.qkv):
            qkv = self._qkv(x)
            q, kv = qkv[:, first:, :width], qkv[..., width:]
            return self.proj(ops.cross_attention(q, kv, self.num_heads))
        weight_q, weight_kv = self.qkv.weight.split([width, 2 * width])
        q = ops.linear(x[:, first:], weight_q, self.q_bias)
        bias = self.qkv_bias()
        kv = ops.linear(x, weight_kv, None if bias is None else bias[width:])
        return self.proj(ops.cross_attention(q, kv, self.num_heads))

    def _qkv(self, x: Tensor) -> Tensor:
        bias = self.qkv_bias()
        if as_built(self.qkv):
            return ops.linear(x, self.qkv.weight, bias)
        qkv: Tensor = self.qkv(x)
        return qkv if bias is None else qkv + bias.to(qkv.dtype)

    def qkv_bias(self) -> Tensor | None:
        """``(3 * D,)`` with zeros for the keys, or None."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


class DividedAttention(Attention):
    """:class:`Attention` within each position over time, or within each row over space.

    Args:
        width: D, divisible by num_heads.
        num_heads: H.
        axis: "time" or "space".
        class_token: token 0 stands before the grid and takes part in every sequence; its output is
            the mean over them.
        qkv_bias: hold ``q_bias`` and ``v_bias``.

    Raises:
        ValueError: width is not a multiple of num_heads, or there is no such axis.

    Source: TimeSformer (arXiv 2102.05095).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        axis: str,
        *,
        class_token: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(width, num_heads, qkv_bias=qkv_bias)
        if axis not in ops.ATTENTION_AXES:
            raise ValueError(f"axis must be one of {', '.join(ops.ATTENTION_AXES)}, got {axis!r}")
        self.axis = axis
        self.class_token = class_token

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        """Attend over ``(B, t * s, D)``, or one token more, the class token first.

        Args:
            x: tokens in t-major order.
            grid: ``(t, h, w)`` or ``(t, s)``.

        Returns:
            The same shape.
        """
        return self.proj(self.attend(self._qkv(x), grid))

    def attend(self, qkv: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Attention alone, from packed ``(B, N, 3 * D)`` to ``(B, N, D)``."""
        return ops.divided_attention(
            qkv, self.num_heads, grid, self.axis, class_token=self.class_token
        )

    def extra_repr(self) -> str:
        """Axis and class token, for printing."""
        return f"axis={self.axis}, class_token={self.class_token}"
