"""What one would write in plain PyTorch instead of the block's ops, and of the block."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vmae_fast.nn import JointSpaceTimeBlock

EPS = 1e-6


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, low: torch.dtype) -> Tensor:
    """The norm, in the dtype of the product after it."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS).to(low)


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, low: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The residual and its norm."""
    residual = x + branch
    return residual, layer_norm(residual, weight, bias, low)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """The exact GELU."""
    return F.gelu(x + bias)


def shared_tokens(visible: Tensor, shared: Tensor, decode_idx: Tensor) -> Tensor:
    """Rows taken by index, and a concatenation."""
    return torch.cat([visible, shared[decode_idx]], dim=1)


class PlainBlock(nn.Module):
    """A pre-norm block over torch's own modules, with the weights of one of ours."""

    def __init__(self, block: JointSpaceTimeBlock) -> None:
        super().__init__()
        width, hidden = block.attn.qkv.in_features, block.mlp.fc1.out_features
        self.heads = block.attn.num_heads
        self.norm1 = nn.LayerNorm(width, eps=block.norm1.eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=block.norm2.eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        # Ours has no bias for the keys: zeros here.
        qkv = {"weight": block.attn.qkv.weight, "bias": block.attn.qkv_bias()}
        taken = {"norm1": block.norm1, "norm2": block.norm2, "proj": block.attn.proj}
        taken |= {"fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
        for name, module in taken.items():
            self.get_submodule(name).load_state_dict(module.state_dict())
        self.qkv.load_state_dict(qkv)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, D)`` to the same."""
        x = x + self._attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """The function under torch.compile, for one size."""
    import torch._functorch.config as functorch

    made = torch.compile(function, dynamic=False, backend=backend)

    def run(*given: Any) -> Any:
        # Donated buffers forbid a second backward pass after one forward pass, which is timed.
        with functorch.patch(donated_buffer=False):
            return made(*given)

    return run
