"""Layer norm, and the residual stream whose last addition it can take along."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn as nn
from torch import Tensor

from vmae_fast import ops


class Residual(NamedTuple):
    """A residual stream with an addition still to be made, which the next norm makes in its pass.

    Attributes:
        x: ``(B, N, D)``.
        branch: ``(B, N, D)`` to be added, or None.
        scale: ``(B,)``, drop path's factor on the branch of each clip, or None.
    """

    x: Tensor
    branch: Tensor | None = None
    scale: Tensor | None = None

    def sum(self) -> Tensor:
        """``(B, N, D)``, the addition made, in x's dtype."""
        if self.branch is None:
            return self.x
        branch = self.branch
        if self.scale is not None:
            branch = branch * self.scale.view(-1, 1, 1)
        return (self.x + branch).to(self.x.dtype)


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` (its arguments, start and state dict) over our op.

    Example:
        >>> import torch
        >>> from vmae_fast.nn import LayerNorm, Residual
        >>> norm = LayerNorm(384)
        >>> x, branch = torch.randn(2, 2, 160, 384)
        >>> torch.allclose(norm(Residual(x, branch)), norm(x + branch), atol=1e-6)
        True
    """

    def forward(self, x: Tensor | Residual, *, for_product: bool = False) -> Tensor:
        """Normalise the last dimension.

        Args:
            x: ``(..., D)``, or a stream, whose addition is made in the same pass.
            for_product: give the dtype that products are computed in (autocast's) instead of x's.
        """
        plain = self.weight is None or self.bias is None or len(self.normalized_shape) != 1
        if plain:
            return super().forward(x.sum() if isinstance(x, Residual) else x)
        given = (self.weight, self.bias, self.eps)
        if not isinstance(x, Residual):
            return ops.layer_norm(x, *given, for_product=for_product)
        if x.branch is None:
            return ops.layer_norm(x.x, *given, for_product=for_product)
        return ops.add_layer_norm(
            x.x, x.branch, *given, branch_scale=x.scale, for_product=for_product
        )[1]
