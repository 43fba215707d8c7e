"""Pre-norm transformer blocks: joint attention, and divided into time and space."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .attention import Attention, DividedAttention
from .linear import Linear


class DropPath(nn.Module):
    """Drop a residual branch of whole clips in training, rescaling those kept.

    Args:
        rate: probability of dropping a clip's branch, in [0, 1).

    Source: stochastic depth (arXiv 1603.09382).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``(B, ...)`` to the same shape."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * keep.bernoulli_(1 - self.rate).div_(1 - self.rate)

    def extra_repr(self) -> str:
        """Rate, for printing."""
        return f"rate={self.rate}"


class MLP(nn.Module):
    """Two linear layers with exact (erf) GELU between them.

    Args:
        width: D.
        hidden: width between the layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``."""
        return self.fc2(F.gelu(self.fc1(x)))


class JointSpaceTimeBlock(nn.Module):
    """Attention over all tokens, then an MLP: each with pre-norm, residual, layer scale, drop path.

    Args:
        width: D.
        num_heads: H.
        hidden: the MLP's inner width.
        qkv_bias: biases on q and v.
        init_values: start of the layer scale's gammas; 0 has none.
        drop_path: probability of dropping each branch for a clip in training.
        eps: the norms' epsilon.

    Source: VideoMAE (arXiv 2203.12602), the vanilla ViT block; layer scale after CaiT.

    Example:
        >>> import torch
        >>> from vmae_fast.nn import JointSpaceTimeBlock
        >>> JointSpaceTimeBlock(384, num_heads=6, hidden=1536)(torch.randn(2, 160, 384)).shape
        torch.Size([2, 160, 384])
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        *,
        qkv_bias: bool = True,
        init_values: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden)
        self.drop_path = DropPath(drop_path)
        scaled = init_values > 0
        self.gamma_1 = nn.Parameter(torch.full((width,), init_values)) if scaled else None
        self.gamma_2 = nn.Parameter(torch.full((width,), init_values)) if scaled else None

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """``(B, N, D)`` to the same, or to ``(B, num_queries, D)``, the last tokens only."""
        branch = self.attn(self.norm1(x), num_queries)
        if num_queries is not None:
            x = x[:, x.shape[1] - num_queries :]
        x = x + self._residual(branch, self.gamma_1)
        return x + self._residual(self.mlp(self.norm2(x)), self.gamma_2)

    def _residual(self, branch: Tensor, gamma: Tensor | None) -> Tensor:
        return self.drop_path(branch if gamma is None else branch * gamma)


class DividedSpaceTimeBlock(nn.Module):
    """Attention along time, attention across space, then an MLP: each with pre-norm and residual.

    Parameters are named as TimeSformer's (``temporal_norm1``, ``temporal_attn``, ``temporal_fc``,
    ``norm1``, ``attn``, ``norm2``, ``mlp``), the attentions' as VideoMAE's.

    Args:
        width: D.
        num_heads: H.
        hidden: the MLP's inner width.
        class_token: token 0 stands before the grid. It takes no part in attention along time;
            across space it takes part in every row, and its output is the mean over rows.
        temporal_fc: a further linear layer after attention along time, as TimeSformer has.
        zero_init_temporal: start the last projection of the temporal branch (temporal_fc, or
            temporal_attn.proj) at zero, so that the block starts as one of space alone.
        qkv_bias: biases on q and v.
        drop_path: probability of dropping each branch for a clip in training.
        eps: the norms' epsilon.

    Source: TimeSformer (arXiv 2102.05095), "divided space-time attention".

    Example:
        >>> import torch
        >>> from vmae_fast.nn import DividedSpaceTimeBlock
        >>> block = DividedSpaceTimeBlock(384, num_heads=6, hidden=1536)
        >>> block(torch.randn(2, 8 * 14 * 14, 384), grid=(8, 14, 14)).shape
        torch.Size([2, 1568, 384])
        >>> block(torch.randn(2, 8 * 20, 384), grid=(8, 20)).shape  # what a tube mask leaves
        torch.Size([2, 160, 384])
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        *,
        class_token: bool = False,
        temporal_fc: bool = False,
        zero_init_temporal: bool = False,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.class_token = class_token
        self.temporal_norm1 = nn.LayerNorm(width, eps=eps)
        self.temporal_attn = DividedAttention(width, num_heads, "time", qkv_bias=qkv_bias)
        self.temporal_fc = Linear(width, width) if temporal_fc else nn.Identity()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = DividedAttention(
            width, num_heads, "space", class_token=class_token, qkv_bias=qkv_bias
        )
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden)
        self.drop_path = DropPath(drop_path)
        if zero_init_temporal:
            last = self.temporal_fc if temporal_fc else self.temporal_attn.proj
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """``(B, t * s, D)``, with the class token one more in front, to the same.

        Args:
            x: tokens in t-major order.
            grid: ``(t, h, w)`` or ``(t, s)``; the rectangle that a tube mask leaves is one too.
        """
        tokens = x[:, 1:] if self.class_token else x
        branch = self.temporal_fc(self.temporal_attn(self.temporal_norm1(tokens), grid))
        tokens = tokens + self.drop_path(branch)
        x = torch.cat([x[:, :1], tokens], dim=1) if self.class_token else tokens
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))
