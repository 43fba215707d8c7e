"""Pre-norm transformer block."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .attention import Attention
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


class Block(nn.Module):
    """Pre-norm block: attention and MLP, each with residual, optional layer scale and drop path.

    Args:
        width: D.
        num_heads: H.
        hidden: the MLP's inner width.
        qkv_bias: biases on q and v.
        init_values: start of the layer scale's gammas; 0 has none.
        drop_path: probability of dropping each branch for a clip in training.
        eps: the norms' epsilon.

    Source: VideoMAE (arXiv 2203.12602), the vanilla ViT block; layer scale after CaiT.
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
