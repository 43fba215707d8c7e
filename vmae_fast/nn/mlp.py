"""The MLP of a transformer block."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vmae_fast import ops

from .linear import Linear, as_built, scaled

# Rows of 16 bytes in 2-byte dtypes: what matrix products and vector loads want.
_ALIGNMENT = 8


class MLP(nn.Module):
    """Two linear layers with exact (erf) GELU between them.

    An inner width that is no multiple of 8 (giant's decoder has 2234) is padded with zeros while
    computing, which changes nothing, as GELU(0) = 0; the parameters stay as they are.

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
        if as_built(self.fc1, self.fc2):
            return self.outer(ops.linear(x, *self.inner()))
        return self.fc2(ops.bias_gelu(self.fc1(x)))

    def inner(self) -> tuple[Tensor, Tensor | None]:
        """fc1's weight ``(hidden, D)`` and the bias that its product adds, padded."""
        weight = self._padded(self.fc1.weight, (0, 0))
        return weight, None if self._bias_with_gelu else self._bias()

    def outer(self, inner: Tensor, gamma: Tensor | None = None) -> Tensor:
        """From ``(..., hidden)``, what :meth:`inner`'s product gave, to ``(..., D)``.

        Args:
            inner: padded as the weight is.
            gamma: layer scale ``(D,)`` of the result, or None.
        """
        weight, bias = scaled(self.fc2, gamma)
        weight = self._padded(weight)
        return ops.bias_gelu_linear(
            inner, self._bias() if self._bias_with_gelu else None, weight, bias
        )

    @property
    def _bias_with_gelu(self) -> bool:
        """Whether fc1's bias is added in GELU's pass rather than in the product.

        On a GPU: the backward pass then sums up the bias's gradient on the way. A CPU's products
        add it for nothing.
        """
        return self.fc1.weight.is_cuda

    def _bias(self) -> Tensor | None:
        bias: Tensor | None = self.fc1.bias
        return None if bias is None else self._padded(bias)

    def _padded(self, tensor: Tensor, after: tuple[int, ...] = ()) -> Tensor:
        """With zeros behind the inner width, which the dimensions that ``after`` pads follow."""
        padding = -self.fc1.out_features % _ALIGNMENT
        return F.pad(tensor, (*after, 0, padding)) if padding else tensor
