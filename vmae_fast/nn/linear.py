"""Linear module."""

import torch.nn as nn
from torch import Tensor

from vmae_fast import ops


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` (its arguments, start and state dict) over our op."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``; see :func:`vmae_fast.ops.linear`."""
        return ops.linear(x, self.weight, self.bias)
