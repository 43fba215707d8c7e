"""Linear layer."""

from torch import Tensor

from vmae_fast.kernels.linear import linear_reference

from ._checks import check


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as :func:`torch.nn.functional.linear`.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.

    Returns:
        ``(..., out)``. Gradients flow to all three.

    Raises:
        ValueError: the widths do not fit.
    """
    check(
        weight.dim() == 2 and x.dim() >= 1 and x.shape[-1] == weight.shape[1],
        lambda: (
            f"x must be (..., in) and weight (out, in) with the same in, got shapes "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        ),
    )
    return linear_reference(x, weight, bias)
