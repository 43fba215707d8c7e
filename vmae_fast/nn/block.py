"""Pre-norm transformer blocks: joint attention, and divided into time and space.

Each runs norms, residual additions and GELU in one pass with what stands beside them. The joint
block keeps 10 widths a token for the backward pass: 2 in the residual stream's dtype (what comes
in, and after attention), 8 in that of products (packed qkv, attention's output, what goes into
GELU), and 4 bytes a head of log-sum-exp. Norms and GELU are computed again.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vmae_fast import ops, profiling

from .attention import Attention, DividedAttention
from .linear import Linear, as_built, scaled
from .mlp import MLP
from .norm import LayerNorm, Residual

Checkpointing = Literal["none", "mlp", "block"]


class SharedTokens(NamedTuple):
    """Tokens of which all but the visible ones hang on their position alone.

    Attributes:
        visible: ``(B, V, D)``, the first V tokens of each clip.
        shared: ``(N, D)``, what any other token is at each position, the same in all clips.
        decode_idx: ``(B, M)``, positions of the other tokens.
    """

    visible: Tensor
    shared: Tensor
    decode_idx: Tensor


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
        scale = self.scale(x)
        if scale is None:
            return x
        return x * scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))

    def scale(self, x: Tensor) -> Tensor | None:
        """Factors ``(B,)`` for the clips of ``(B, ...)``, newly drawn: 0 or 1 / (1 - rate).

        In fp32 (fp64 for fp64). None where nothing is dropped.
        """
        if not self.training or self.rate == 0:
            return None
        dtype = torch.promote_types(x.dtype, torch.float32)
        keep = torch.empty(x.shape[0], dtype=dtype, device=x.device)
        return keep.bernoulli_(1 - self.rate).div_(1 - self.rate)

    def extra_repr(self) -> str:
        """Rate, for printing."""
        return f"rate={self.rate}"


def _normed_qkv(stream: Residual, norm: LayerNorm, attn: Attention) -> tuple[Tensor, Tensor]:
    """The stream with its addition made, and packed qkv of it normed, ``(B, N, 3 * D)``."""
    given = (norm.weight, norm.bias, norm.eps, attn.qkv.weight, attn.qkv_bias())
    if stream.branch is None:
        return stream.x, ops.layer_norm_linear(stream.x, *given)
    return ops.add_layer_norm_linear(stream.x, stream.branch, *given, branch_scale=stream.scale)


def _mlp_branch(
    stream: Residual, norm: LayerNorm, mlp: MLP, gamma: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The stream with its addition made, and the branch ``mlp(norm(...))`` of it."""
    given = (norm.weight, norm.bias, norm.eps, *mlp.inner())
    assert stream.branch is not None
    x, inner = ops.add_layer_norm_linear(stream.x, stream.branch, *given, branch_scale=stream.scale)
    return x, mlp.outer(inner, gamma)


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

    Attributes:
        checkpointing: what is computed again in the backward pass beside norms and GELU: "none";
            "mlp", which keeps 6 widths a token; "block", which keeps what comes in.

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
        self.norm1 = LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads, qkv_bias=qkv_bias)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden)
        self.drop_path = DropPath(drop_path)
        scaled = init_values > 0
        self.gamma_1 = nn.Parameter(torch.full((width,), init_values)) if scaled else None
        self.gamma_2 = nn.Parameter(torch.full((width,), init_values)) if scaled else None
        self.checkpointing: Checkpointing = "none"

    def forward(
        self,
        x: Tensor | Residual,
        num_queries: int | None = None,
        shared: SharedTokens | None = None,
    ) -> Tensor | Residual:
        """``(B, N, D)`` to the same, or to ``(B, num_queries, D)``, the last tokens only.

        Args:
            x: tokens; or a stream, and then the result is one too, its last addition not made.
            num_queries: compute only so many.
            shared: what x is made of, where mask tokens are the same in all clips: norm and qkv
                of those are then computed once for each position.
        """
        stream = x if isinstance(x, Residual) else Residual(x)
        # Before anything is checkpointed: what is computed again draws nothing.
        scales = self.drop_path.scale(stream.x), self.drop_path.scale(stream.x)
        run = self._run if self._fusable() else self._run_modules
        if self.checkpointing == "block":
            stream = checkpoint(
                run, stream, num_queries, shared, scales,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        else:
            stream = run(stream, num_queries, shared, scales)
        return stream if isinstance(x, Residual) else stream.sum()

    def _fusable(self) -> bool:
        attn, mlp = self.attn, self.mlp
        modules = (self.norm1, attn, attn.qkv, attn.proj, self.norm2, mlp, mlp.fc1, mlp.fc2)
        return as_built(*modules)

    def _run(
        self,
        stream: Residual,
        num_queries: int | None,
        shared: SharedTokens | None,
        scales: tuple[Tensor | None, Tensor | None],
    ) -> Residual:
        x, attended = self._attended(stream, num_queries, shared)
        branch = ops.linear(attended, *scaled(self.attn.proj, self.gamma_1))
        stream = Residual(x, branch, scales[0])
        if self.checkpointing == "mlp":
            x, branch = checkpoint(
                _mlp_branch, stream, self.norm2, self.mlp, self.gamma_2,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        else:
            x, branch = _mlp_branch(stream, self.norm2, self.mlp, self.gamma_2)
        return Residual(x, branch, scales[1])

    def _attended(
        self, stream: Residual, num_queries: int | None, shared: SharedTokens | None
    ) -> tuple[Tensor, Tensor]:
        """The stream's tokens, those that are wanted, and attention's output for them."""
        norm, attn, num_tokens = self.norm1, self.attn, stream.x.shape[1]
        trimmed = num_queries is not None and num_queries < num_tokens
        first = num_tokens - (num_queries if trimmed and num_queries is not None else num_tokens)
        if shared is None and trimmed:
            x, q, kv = ops.add_layer_norm_query_key_value(
                stream.x, stream.branch, norm.weight, norm.bias, norm.eps,
                attn.qkv.weight, attn.qkv_bias(), num_tokens - first, branch_scale=stream.scale,
            )  # fmt: skip
            return x, ops.cross_attention(q, kv, attn.num_heads)
        if shared is None:
            x, qkv = _normed_qkv(stream, norm, attn)
        else:
            x = stream.sum()
            qkv = ops.shared_tokens(
                _normed_qkv(Residual(shared.visible), norm, attn)[1],
                _normed_qkv(Residual(shared.shared.unsqueeze(0)), norm, attn)[1].squeeze(0),
                shared.decode_idx,
            )
        if not trimmed:
            return x, ops.attention(qkv, attn.num_heads)
        width = x.shape[2]
        q, kv = qkv[:, first:, :width], qkv[..., width:]
        return x[:, first:], ops.cross_attention(q, kv, attn.num_heads)

    def _run_modules(
        self,
        stream: Residual,
        num_queries: int | None,
        shared: SharedTokens | None,
        scales: tuple[Tensor | None, Tensor | None],
    ) -> Residual:
        """The same by calling the modules one after the other."""
        x = stream.sum()
        branch = self.attn(self.norm1(x), num_queries)
        if num_queries is not None:
            x = x[:, x.shape[1] - num_queries :]
        x = Residual(x, branch if self.gamma_1 is None else branch * self.gamma_1, scales[0]).sum()
        branch = self.mlp(self.norm2(x))
        return Residual(x, branch if self.gamma_2 is None else branch * self.gamma_2, scales[1])


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
        self.temporal_norm1 = LayerNorm(width, eps=eps)
        self.temporal_attn = DividedAttention(width, num_heads, "time", qkv_bias=qkv_bias)
        self.temporal_fc = Linear(width, width) if temporal_fc else nn.Identity()
        self.norm1 = LayerNorm(width, eps=eps)
        self.attn = DividedAttention(
            width, num_heads, "space", class_token=class_token, qkv_bias=qkv_bias
        )
        self.norm2 = LayerNorm(width, eps=eps)
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
        name = type(self).__name__
        with profiling.span(name):
            (x,) = profiling.backward_ends(name, x)
            (x,) = profiling.backward_begins(name, self._run(x, grid))
        return x

    def _run(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        tokens = x[:, 1:] if self.class_token else x
        tokens, branch = self._attended(
            Residual(tokens), self.temporal_norm1, self.temporal_attn, grid
        )
        branch = self.temporal_fc(branch)
        stream = Residual(tokens, branch, self.drop_path.scale(x))
        if self.class_token:
            stream = Residual(torch.cat([x[:, :1], stream.sum()], dim=1))
        tokens, branch = self._attended(stream, self.norm1, self.attn, grid)
        stream = Residual(tokens, branch, self.drop_path.scale(x))
        if as_built(self.norm2, self.mlp, self.mlp.fc1, self.mlp.fc2):
            tokens, branch = _mlp_branch(stream, self.norm2, self.mlp, None)
        else:
            tokens = stream.sum()
            branch = self.mlp(self.norm2(tokens))
        return Residual(tokens, branch, self.drop_path.scale(x)).sum()

    @staticmethod
    def _attended(
        stream: Residual, norm: LayerNorm, attn: DividedAttention, grid: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """The stream with its addition made, and the branch ``attn(norm(...))`` of it."""
        if as_built(norm, attn, attn.qkv):
            x, qkv = _normed_qkv(stream, norm, attn)
            return x, attn.proj(attn.attend(qkv, grid))
        x = stream.sum()
        return x, attn(norm(x), grid)
