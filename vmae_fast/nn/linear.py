"""Linear module, and what its parameters are used for without calling it."""

import torch.nn as nn
from torch import Tensor

from vmae_fast import ops


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` (its arguments, start and state dict) over our op."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``; see :func:`vmae_fast.ops.linear`."""
        return ops.linear(x, self.weight, self.bias)


def as_built(*modules: nn.Module) -> bool:
    """Whether calling these modules, of this package, is no more than what their parameters say.

    Not where one was exchanged (for a quantised layer, or one with adapters, say) or has hooks:
    those want to be called.
    """
    return all(
        type(module).__module__.startswith("vmae_fast.nn.")
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        for module in modules
    )


def scaled(linear: nn.Linear, gamma: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``gamma * linear(x)``: layer scale that takes no pass over the tokens.

    Args:
        linear: the layer before the scale.
        gamma: ``(out,)``, or None for no scale.
    """
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if gamma is None:
        return weight, bias
    return gamma.unsqueeze(1) * weight, None if bias is None else gamma * bias
