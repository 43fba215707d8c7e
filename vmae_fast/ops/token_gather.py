"""Gather of tokens by index and assembly of the decoder's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmae_fast.kernels import token_gather as kernels

from ._backend import use_triton
from ._checks import check, check_index, check_same_device
from ._library import once_differentiable, register


def gather_tokens(x: Tensor, idx: Tensor) -> Tensor:
    """Take tokens by position: ``out[b, i] = x[b, idx[b, i]]``.

    Args:
        x: ``(B, N, D)``, any floating dtype.
        idx: ``(B, V)`` int32 or int64, distinct positions within each clip. Positions outside
            0..N-1 or given twice are caught in :func:`vmae_fast.ops.debug` mode only: what
            comes of them otherwise is undefined.

    Returns:
        ``(B, V, D)`` in x's dtype. The gradient flows to x, without atomics: it is the same
        from run to run.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        IndexError: in debug mode, a position is out of range or given twice.
    """
    check(x.dim() == 3, lambda: f"x must be (B, N, D), got shape {tuple(x.shape)}")
    check(x.is_floating_point(), lambda: f"x must be floating point, got {x.dtype}")
    check_index("idx", idx, x.shape[0], x.shape[1])
    check_same_device("x", x, idx=idx)
    return _gather_tokens(x, idx)


def decoder_tokens(
    visible: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    visible_idx: Tensor,
    decode_idx: Tensor,
) -> Tensor:
    """Assemble the decoder's input ``[visible + pos | mask_token + pos]`` in one pass.

    Args:
        visible: ``(B, V, E)`` encoder tokens at the decoder's width.
        mask_token: ``(E,)``, one learned vector for every decoded position.
        pos_embed: ``(N, E)`` position table.
        visible_idx: ``(B, V)`` int32 or int64 positions of the visible tokens.
        decode_idx: ``(B, M)`` int32 or int64 positions to decode. Both distinct within each
            clip and in 0..N-1, which is checked in :func:`vmae_fast.ops.debug` mode only.

    Returns:
        ``(B, V + M, E)`` in the widest of the three dtypes. Gradients flow to visible,
        mask_token and pos_embed; those that are sums over tokens are added up in fp32 and in a
        fixed order.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        IndexError: in debug mode, a position is out of range or given twice.

    Source: VideoMAE (arXiv 2203.12602), the decoder's input.
    """
    check(
        visible.dim() == 3, lambda: f"visible must be (B, V, E), got shape {tuple(visible.shape)}"
    )
    batch, num_visible, width = visible.shape
    check(
        tuple(mask_token.shape) == (width,),
        lambda: f"mask_token must be (E,) = ({width},), got shape {tuple(mask_token.shape)}",
    )
    check(
        pos_embed.dim() == 2 and pos_embed.shape[1] == width,
        lambda: f"pos_embed must be (N, {width}), got shape {tuple(pos_embed.shape)}",
    )
    check_index("visible_idx", visible_idx, batch, pos_embed.shape[0])
    check_index("decode_idx", decode_idx, batch, pos_embed.shape[0])
    check(
        visible_idx.shape[1] == num_visible,
        lambda: f"visible_idx names {visible_idx.shape[1]} tokens but visible holds {num_visible}",
    )
    check_same_device(
        "visible",
        visible,
        mask_token=mask_token,
        pos_embed=pos_embed,
        visible_idx=visible_idx,
        decode_idx=decode_idx,
    )
    return _decoder_tokens(visible, mask_token, pos_embed, visible_idx, decode_idx)


def shared_tokens(visible: Tensor, shared: Tensor, decode_idx: Tensor) -> Tensor:
    """Place rows that all clips share after a clip's own: ``[visible | shared[decode_idx]]``.

    Before a decoder's first attention nothing but the position tells one mask token from another,
    so what is computed of them token by token is computed once a position, and placed here.

    Args:
        visible: ``(B, V, W)``, one row a visible token, any floating dtype.
        shared: ``(N, W)`` in visible's dtype, one row a position.
        decode_idx: ``(B, M)`` int32 or int64 positions to decode, distinct within each clip and
            in 0..N-1, which is checked in :func:`vmae_fast.ops.debug` mode only.

    Returns:
        ``(B, V + M, W)`` in their dtype. Gradients flow to visible and shared; the latter's is
        the sum over clips at each position, added up in fp32 (fp64 for fp64) and in a fixed order.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        IndexError: in debug mode, a position is out of range or given twice.
    """
    check(
        visible.dim() == 3, lambda: f"visible must be (B, V, W), got shape {tuple(visible.shape)}"
    )
    batch, _, width = visible.shape
    check(
        shared.dim() == 2 and shared.shape[1] == width,
        lambda: f"shared must be (N, {width}), got shape {tuple(shared.shape)}",
    )
    check(
        visible.is_floating_point(), lambda: f"visible must be floating point, got {visible.dtype}"
    )
    check(
        shared.dtype == visible.dtype,
        lambda: f"shared is {shared.dtype} but visible is {visible.dtype}; they must be alike",
    )
    check_index("decode_idx", decode_idx, batch, shared.shape[0])
    check_same_device("visible", visible, shared=shared, decode_idx=decode_idx)
    return _shared_tokens(visible, shared, decode_idx)


def _gather(x: Tensor, idx: Tensor) -> Tensor:
    if use_triton(x):
        return kernels.gather_tokens_triton(x, idx)
    return kernels.gather_tokens_reference(x, idx)


def _gather_backward(grad: Tensor, idx: Tensor, num_tokens: int) -> Tensor:
    if use_triton(grad):
        return kernels.gather_tokens_backward_triton(grad, idx, num_tokens)
    return kernels.gather_tokens_backward_reference(grad, idx, num_tokens)


_gather_tokens = register(
    "gather_tokens(Tensor x, Tensor idx) -> Tensor",
    _gather,
    fake=lambda x, idx: x.new_empty(*idx.shape, x.shape[2]),
)
_gather_tokens_backward = register(
    "gather_tokens_backward(Tensor grad, Tensor idx, SymInt num_tokens) -> Tensor",
    _gather_backward,
    fake=lambda grad, idx, num_tokens: grad.new_empty(grad.shape[0], num_tokens, grad.shape[2]),
)
once_differentiable(_gather_tokens_backward, "gather_tokens")


def _gather_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, idx = inputs
    ctx.save_for_backward(idx)
    ctx.num_tokens = x.shape[1]


def _gather_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (idx,) = ctx.saved_tensors
    return _gather_tokens_backward(grad, idx, ctx.num_tokens), None


torch.library.register_autograd(_gather_tokens, _gather_grad, setup_context=_gather_setup)


def _decoder(visible: Tensor, mask_token: Tensor, pos: Tensor, *idx: Tensor) -> Tensor:
    if use_triton(visible, mask_token, pos):
        return kernels.decoder_tokens_triton(visible, mask_token, pos, *idx)
    return kernels.decoder_tokens_reference(visible, mask_token, pos, *idx)


def _decoder_fake(
    visible: Tensor, mask_token: Tensor, pos: Tensor, visible_idx: Tensor, decode_idx: Tensor
) -> Tensor:
    batch, num_visible, width = visible.shape
    dtype = torch.promote_types(torch.promote_types(visible.dtype, mask_token.dtype), pos.dtype)
    return visible.new_empty(batch, num_visible + decode_idx.shape[1], width, dtype=dtype)


def _decoder_backward(
    grad: Tensor,
    visible_idx: Tensor,
    decode_idx: Tensor,
    num_tokens: int,
    need_mask_token: bool,
    need_pos: bool,
) -> tuple[Tensor, Tensor]:
    triton = use_triton(grad)
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_mask_token, grad_pos = grad.new_empty(0, dtype=wide), grad.new_empty(0, dtype=wide)
    seen, unseen = grad[:, : visible_idx.shape[1]], grad[:, visible_idx.shape[1] :]
    if need_mask_token:
        add_up = kernels.column_sum_triton if triton else kernels.column_sum_reference
        grad_mask_token = add_up(unseen)
    if need_pos:
        at_positions = (
            kernels.position_gradient_triton if triton else kernels.position_gradient_reference
        )
        # Two sums: a position may be both visible and decoded.
        grad_pos = at_positions(seen, visible_idx, num_tokens)
        grad_pos += at_positions(unseen, decode_idx, num_tokens)
    return grad_mask_token, grad_pos


def _decoder_backward_fake(
    grad: Tensor,
    visible_idx: Tensor,
    decode_idx: Tensor,
    num_tokens: int,
    need_mask_token: bool,
    need_pos: bool,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    width = grad.shape[2]
    return (
        grad.new_empty((width,) if need_mask_token else (0,), dtype=wide),
        grad.new_empty((num_tokens, width) if need_pos else (0,), dtype=wide),
    )


_decoder_tokens = register(
    "decoder_tokens(Tensor visible, Tensor mask_token, Tensor pos_embed, Tensor visible_idx,"
    " Tensor decode_idx) -> Tensor",
    _decoder,
    _decoder_fake,
)
_decoder_tokens_backward = register(
    "decoder_tokens_backward(Tensor grad, Tensor visible_idx, Tensor decode_idx,"
    " SymInt num_tokens, bool need_mask_token, bool need_pos) -> (Tensor, Tensor)",
    _decoder_backward,
    _decoder_backward_fake,
)
once_differentiable(_decoder_tokens_backward, "decoder_tokens")


def _decoder_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    visible, mask_token, pos, visible_idx, decode_idx = inputs
    ctx.save_for_backward(visible_idx, decode_idx)
    ctx.dtypes = visible.dtype, mask_token.dtype, pos.dtype
    ctx.num_tokens = pos.shape[0]


def _decoder_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    visible_idx, decode_idx = ctx.saved_tensors
    need_visible, need_mask_token, need_pos = ctx.needs_input_grad[:3]
    grad_visible = grad_mask_token = grad_pos = None
    if need_mask_token or need_pos:
        sums = _decoder_tokens_backward(
            grad, visible_idx, decode_idx, ctx.num_tokens, need_mask_token, need_pos
        )
        grad_mask_token = sums[0].to(ctx.dtypes[1]) if need_mask_token else None
        grad_pos = sums[1].to(ctx.dtypes[2]) if need_pos else None
    if need_visible:
        grad_visible = grad[:, : visible_idx.shape[1]].to(ctx.dtypes[0])
    return grad_visible, grad_mask_token, grad_pos, None, None


torch.library.register_autograd(_decoder_tokens, _decoder_grad, setup_context=_decoder_setup)


def _shared(visible: Tensor, shared: Tensor, decode_idx: Tensor) -> Tensor:
    if use_triton(visible, shared):
        return kernels.shared_tokens_triton(visible, shared, decode_idx)
    return kernels.shared_tokens_reference(visible, shared, decode_idx)


def _shared_fake(visible: Tensor, shared: Tensor, decode_idx: Tensor) -> Tensor:
    batch, num_visible, width = visible.shape
    return visible.new_empty(batch, num_visible + decode_idx.shape[1], width)


def _shared_backward(grad: Tensor, decode_idx: Tensor, num_visible: int, num_tokens: int) -> Tensor:
    at_positions = (
        kernels.position_gradient_triton
        if use_triton(grad)
        else kernels.position_gradient_reference
    )
    return at_positions(grad[:, num_visible:], decode_idx, num_tokens)


def _shared_backward_fake(
    grad: Tensor, decode_idx: Tensor, num_visible: int, num_tokens: int
) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_empty(num_tokens, grad.shape[2], dtype=wide)


_shared_tokens = register(
    "shared_tokens(Tensor visible, Tensor shared, Tensor decode_idx) -> Tensor",
    _shared,
    _shared_fake,
)
_shared_tokens_backward = register(
    "shared_tokens_backward(Tensor grad, Tensor decode_idx, SymInt num_visible,"
    " SymInt num_tokens) -> Tensor",
    _shared_backward,
    _shared_backward_fake,
)
once_differentiable(_shared_tokens_backward, "shared_tokens")


def _shared_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    visible, shared, decode_idx = inputs
    ctx.save_for_backward(decode_idx)
    ctx.num_visible, ctx.num_tokens = visible.shape[1], shared.shape[0]


def _shared_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (decode_idx,) = ctx.saved_tensors
    need_visible, need_shared, _ = ctx.needs_input_grad
    grad_shared = None
    if need_shared:
        sums = _shared_tokens_backward(grad, decode_idx, ctx.num_visible, ctx.num_tokens)
        grad_shared = sums.to(grad.dtype)
    return grad[:, : ctx.num_visible] if need_visible else None, grad_shared, None


torch.library.register_autograd(_shared_tokens, _shared_grad, setup_context=_shared_setup)
