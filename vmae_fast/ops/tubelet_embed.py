"""Tubelet embedding of the visible tubelets only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vmae_fast.kernels import tubelet_embed as kernels
from vmae_fast.kernels.tubelet_embed import Tubelets

from ._backend import use_triton
from ._checks import check, check_channels, check_index, check_same_device, check_video
from ._library import autocasting, compute_dtype, once_differentiable, register


def tubelet_embed(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    visible_idx: Tensor | None = None,
    *,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> Tensor:
    """Embed chosen tubelets of a video: Conv3d with kernel = stride, gathered, plus position.

    Args:
        video: ``(B, C, T, H, W)``, any strides; uint8 0..255, normalised here, or floating
            point, already normalised.
        weight: ``(D, C, pt, ph, pw)``, as a Conv3d holds it.
        bias: ``(D,)`` or None.
        pos_embed: ``(N, D)`` with ``N = T/pt * H/ph * W/pw`` in t-major order, or None.
        visible_idx: ``(B, V)`` int32 or int64 token positions, distinct within each clip and in
            0..N-1, which is checked in :func:`vmae_fast.ops.debug` mode only; None embeds all N
            in order.
        mean: per-channel mean for uint8 video, in units of [0, 1].
        std: per-channel standard deviation for uint8 video.

    Returns:
        ``(B, V, D)``. Products are computed in weight's dtype, or autocast's; the result is in
        the wider of that and pos_embed's dtype. Gradients flow to weight, bias, pos_embed and a
        floating video, those of the first three added up in fp32.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names it.
        IndexError: in debug mode, a position is out of range or given twice.

    Source: VideoMAE (arXiv 2203.12602), section 3: joint space-time cube embedding.
    """
    check(
        weight.dim() == 5,
        lambda: f"weight must be (D, C, pt, ph, pw), got shape {tuple(weight.shape)}",
    )
    pt, ph, pw = weight.shape[2:]
    t, h, w = check_video(video, (pt, ph, pw))
    check(
        video.shape[1] == weight.shape[1],
        lambda: f"video has {video.shape[1]} channels but weight expects {weight.shape[1]}",
    )
    if bias is not None:
        check(
            tuple(bias.shape) == (weight.shape[0],),
            lambda: f"bias must be (D,) = ({weight.shape[0]},), got shape {tuple(bias.shape)}",
        )
    check(
        weight.is_floating_point() and (bias is None or bias.dtype == weight.dtype),
        lambda: (
            f"weight and bias must be of one floating dtype, got {weight.dtype} and "
            f"{None if bias is None else bias.dtype}"
        ),
    )
    if video.is_floating_point():
        check(
            video.dtype == weight.dtype or autocasting(video),
            lambda: f"video is {video.dtype} but weight is {weight.dtype}; cast one of them",
        )
    else:
        check_channels("mean", mean, video.shape[1])
        check_channels("std", std, video.shape[1])
    if pos_embed is not None:
        expected = (t * h * w, weight.shape[0])
        check(
            tuple(pos_embed.shape) == expected,
            lambda: f"pos_embed must be (N, D) = {expected}, got shape {tuple(pos_embed.shape)}",
        )
    if visible_idx is not None:
        check_index("visible_idx", visible_idx, video.shape[0], t * h * w)
    check_same_device(
        "video", video, weight=weight, bias=bias, pos_embed=pos_embed, visible_idx=visible_idx
    )
    return _tubelet_embed(
        video, weight, bias, pos_embed, visible_idx, mean, std, compute_dtype(weight)
    )


# What the ops below take in `settings`: visible_idx, mean, std and the dtype of products.


def _tubelets(video: Tensor, weight: Tensor, *settings: Any) -> Tubelets:
    visible_idx, mean, std, dtype = settings
    pt, ph, pw = weight.shape[2:]
    return Tubelets(video, visible_idx, (pt, ph, pw), tuple(mean), tuple(std), dtype)


def _forward(
    video: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, *settings: Any
) -> Tensor:
    tubelets = _tubelets(video, weight, *settings)
    if use_triton(video, weight, pos_embed, dtype=tubelets.dtype):
        return kernels.tubelet_embed_triton(tubelets, weight, bias, pos_embed)
    return kernels.tubelet_embed_reference(tubelets, weight, bias, pos_embed)


def _forward_fake(
    video: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, *settings: Any
) -> Tensor:
    tubelets = _tubelets(video, weight, *settings)
    dtype = tubelets.dtype
    dtype = dtype if pos_embed is None else torch.promote_types(dtype, pos_embed.dtype)
    return weight.new_empty(video.shape[0], tubelets.per_clip, weight.shape[0], dtype=dtype)


def _forward_flops(
    video: Any, weight: Any, bias: Any, pos_embed: Any, visible_idx: Any, *rest: Any, **more: Any
) -> int:
    grid = [size // step for size, step in zip(video[2:], weight[2:], strict=True)]
    tokens = math.prod(grid) if visible_idx is None else visible_idx[1]
    return 2 * video[0] * tokens * math.prod(weight)


def _backward(grad: Tensor, video: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    *settings, needs = rest
    tubelets = _tubelets(video, weight, *settings)
    if use_triton(video, weight, grad, dtype=tubelets.dtype):
        grads = kernels.tubelet_embed_backward_triton(tubelets, weight, grad, *needs)
    else:
        grads = kernels.tubelet_embed_backward_reference(tubelets, weight, grad, *needs)
    return [found for found in grads if found is not None]


def _backward_fake(grad: Tensor, video: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    *settings, needs = rest
    tubelets = _tubelets(video, weight, *settings)
    product = torch.promote_types(tubelets.dtype, torch.float32)
    added = torch.promote_types(grad.dtype, torch.float32)
    t, h, w = tubelets.grid
    width = weight.shape[0]
    every = [
        weight.new_empty(weight.shape, dtype=product),
        weight.new_empty(width, dtype=added),
        weight.new_empty(t * h * w, width, dtype=added),
        video.new_empty(video.shape),
    ]
    return [made for made, needed in zip(every, needs, strict=True) if needed]


def _backward_flops(grad: Any, video: Any, weight: Any, *rest: Any, **more: Any) -> int:
    need_weight, _, _, need_video = rest[-1]
    return (need_weight + need_video) * 2 * grad[0] * grad[1] * math.prod(weight)


_tubelet_embed = register(
    "tubelet_embed(Tensor video, Tensor weight, Tensor? bias, Tensor? pos_embed,"
    " Tensor? visible_idx, float[] mean, float[] std, ScalarType dtype) -> Tensor",
    _forward,
    _forward_fake,
    _forward_flops,
)
_tubelet_embed_backward = register(
    "tubelet_embed_backward(Tensor grad, Tensor video, Tensor weight, Tensor? visible_idx,"
    " float[] mean, float[] std, ScalarType dtype, bool[] needs) -> Tensor[]",
    _backward,
    _backward_fake,
    _backward_flops,
)
once_differentiable(_tubelet_embed_backward, "tubelet_embed")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    video, weight, bias, pos_embed, visible_idx, *ctx.settings = inputs
    ctx.save_for_backward(video, weight, visible_idx)
    ctx.dtypes = [None if given is None else given.dtype for given in (weight, bias, pos_embed)]


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    video, weight, visible_idx = ctx.saved_tensors
    need_video, *need_parameters = ctx.needs_input_grad[:4]
    found = _tubelet_embed_backward(
        grad, video, weight, visible_idx, *ctx.settings, [*need_parameters, need_video]
    )
    grads = iter(found)
    parameters = [
        next(grads).to(dtype) if needed else None
        for dtype, needed in zip(ctx.dtypes, need_parameters, strict=True)
    ]
    return (next(grads) if need_video else None, *parameters, *[None] * 4)


torch.library.register_autograd(_tubelet_embed, _grad, setup_context=_setup)
