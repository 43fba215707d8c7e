"""Pixel head and masked reconstruction loss together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmae_fast.kernels import linear_masked_mse as kernels
from vmae_fast.kernels.masked_mse import too_large

from ._backend import use_cuda, use_triton
from ._checks import check, check_same_device
from ._library import (
    autocasting,
    compute_dtype,
    once_differentiable,
    refuse_double_backward,
    register,
)
from ._masked_mse_cuda import linear_masked_mse_cuda, why_not
from .masked_mse import check_targets, targets_of


def linear_masked_mse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    video: Tensor,
    target_idx: Tensor,
    tubelet: tuple[int, int, int],
    *,
    norm_pix: bool = True,
    scored: Tensor | None = None,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> Tensor:
    """``masked_mse(linear(x, weight, bias), ...)`` without the predictions in memory.

    Works through the tokens in chunks. The gradients are computed along with the loss, and kept
    instead of predictions: of x (its size), of weight and of bias (in fp32).

    Args:
        x: ``(B, S, E)`` features of the tokens to predict.
        weight: ``(P, E)`` with ``P = C * pt * ph * pw``, the pixel head.
        bias: ``(P,)`` or None.
        video: as in :func:`vmae_fast.ops.masked_mse`, as are the following.
        target_idx: ``(B, S)``.
        tubelet: ``(pt, ph, pw)``.
        norm_pix: normalise each target tubelet channel by channel.
        scored: ``(B, S)`` weights, not all 0, or None.
        mean: per-channel mean of a floating video's normalisation.
        std: per-channel standard deviation of it.

    Returns:
        The mean over scored tokens of the squared error, a scalar in fp32 (fp64 for fp64). The
        products are computed in x's dtype, or autocast's. Gradients flow to x, weight and bias.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        IndexError: in debug mode, a position is out of range or given twice.

    Source: the loss of VideoMAE (arXiv 2203.12602, 2303.16727); chunks of the head and loss
    together as in Liger Kernel (arXiv 2410.10989).
    """
    targets = check_targets(video, target_idx, tubelet, norm_pix, mean, std)
    check(
        x.dim() == 3 and x.shape[:2] == target_idx.shape,
        lambda: (
            f"x must be (B, S, E) with (B, S) = {tuple(target_idx.shape)}, got shape "
            f"{tuple(x.shape)}"
        ),
    )
    expected = (targets.values, x.shape[2])
    check(
        tuple(weight.shape) == expected,
        lambda: f"weight must be (P, E) = {expected}, got shape {tuple(weight.shape)}",
    )
    check(
        bias is None or tuple(bias.shape) == expected[:1],
        lambda: (
            f"bias must be (P,) = {expected[:1]}, got shape "
            f"{None if bias is None else (*bias.shape,)}"
        ),
    )
    check(
        scored is None or scored.shape == target_idx.shape,
        lambda: (
            f"scored must be (B, S) = {tuple(target_idx.shape)}, got shape "
            f"{None if scored is None else (*scored.shape,)}"
        ),
    )
    dtype = compute_dtype(weight)
    check(
        x.dtype == weight.dtype or autocasting(x),
        lambda: f"x is {x.dtype} but weight is {weight.dtype}; cast one of them",
    )
    check_same_device(
        "video", video, x=x, weight=weight, bias=bias, target_idx=target_idx, scored=scored
    )
    given = (x, weight, bias)
    keep = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in given)
    loss, *_ = _linear_masked_mse(x.to(dtype), weight, bias, scored, *targets, keep)
    return loss


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, scored: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *targets_args, keep = rest
    targets = targets_of(*targets_args)
    triton = use_triton(targets.video, x, too_large=too_large(targets))
    if use_cuda(targets.video, x, unsuited=why_not(targets, x.dtype)):
        loss, *grads = linear_masked_mse_cuda(x, weight, bias, targets, scored, keep, triton)
    else:
        run = kernels.linear_masked_mse_triton if triton else kernels.linear_masked_mse_reference
        loss, *grads = run(x, weight, bias, targets, scored, keep)
    grad_x, grad_weight, grad_bias = (loss.new_empty(0) if g is None else g for g in grads)
    return loss, grad_x, grad_weight, grad_bias


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, scored: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    if not rest[-1]:
        return loss, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0)
    return (
        loss,
        x.new_empty(x.shape[0] * x.shape[1], x.shape[2]),
        loss.new_empty(weight.shape),
        loss.new_empty(weight.shape[:1]),
    )


def _forward_flops(x: Any, weight: Any, *rest: Any, **more: Any) -> int:
    # The products of the backward pass are computed here too, where anything asks for them.
    products = 3 if rest[-1] else 1
    return products * 2 * x[0] * x[1] * weight[0] * weight[1]


def _backward(
    grad: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    scored: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    values = max(grad_bias.shape[0], 1)
    if scored is None:
        factor = grad.new_full((), 2 / (values * max(grad_x.shape[0], 1)))
    else:
        factor = 2 / (values * scored.sum(dtype=grad.dtype))
    scale = grad * factor
    triton = use_triton(grad_x, grad)
    return kernels.linear_masked_mse_backward(scale, grad_x, grad_weight, grad_bias, triton)


_linear_masked_mse = register(
    "linear_masked_mse(Tensor x, Tensor weight, Tensor? bias, Tensor? scored, Tensor video,"
    " Tensor target_idx, int[] tubelet, bool norm_pix, float[] mean, float[] std, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _forward_flops,
)
_linear_masked_mse_backward = register(
    "linear_masked_mse_backward(Tensor grad, Tensor grad_x, Tensor grad_weight, Tensor grad_bias,"
    " Tensor? scored) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=lambda grad, grad_x, grad_weight, grad_bias, scored: (
        torch.empty_like(grad_x),
        torch.empty_like(grad_weight),
        torch.empty_like(grad_bias),
    ),
)
once_differentiable(_linear_masked_mse_backward, "linear_masked_mse")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, scored, *_ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept, scored)
    ctx.shape = x.shape
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype


def _grad(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_masked_mse")
    if grad is None:
        return (None,) * 11
    grad_x, *parameters = _linear_masked_mse_backward(grad, *ctx.saved_tensors)
    grads = (grad_x.view(ctx.shape), *parameters)
    return (
        *(
            found.to(dtype) if needed else None
            for found, dtype, needed in zip(
                grads, ctx.dtypes, ctx.needs_input_grad[:3], strict=True
            )
        ),
        *[None] * 8,
    )


torch.library.register_autograd(_linear_masked_mse, _grad, setup_context=_setup)
