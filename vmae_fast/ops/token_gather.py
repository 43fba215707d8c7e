"""Gather of tokens by index and assembly of the decoder's input."""

from torch import Tensor

from vmae_fast.kernels.token_gather import decoder_tokens_reference, gather_tokens_reference

from ._checks import check, check_index


def gather_tokens(x: Tensor, idx: Tensor) -> Tensor:
    """Take tokens by position: ``out[b, i] = x[b, idx[b, i]]``.

    Args:
        x: ``(B, N, D)``, any floating dtype.
        idx: ``(B, V)`` int32 or int64, distinct positions within each clip.

    Returns:
        ``(B, V, D)`` in x's dtype. The gradient flows to x.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check(x.dim() == 3, f"x must be (B, N, D), got shape {tuple(x.shape)}")
    check_index("idx", idx, x.shape[0])
    return gather_tokens_reference(x, idx)


def decoder_tokens(
    visible: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    visible_idx: Tensor,
    decode_idx: Tensor,
) -> Tensor:
    """Assemble the decoder's input ``[visible + pos | mask_token + pos]``.

    Args:
        visible: ``(B, V, E)`` encoder tokens at the decoder's width.
        mask_token: ``(E,)``, one learned vector for every decoded position.
        pos_embed: ``(N, E)`` position table.
        visible_idx: ``(B, V)`` int32 or int64 positions of the visible tokens.
        decode_idx: ``(B, M)`` int32 or int64 positions to decode.

    Returns:
        ``(B, V + M, E)``. Gradients flow to visible, mask_token and pos_embed.

    Raises:
        ValueError: a shape or dtype does not fit.

    Source: VideoMAE (arXiv 2203.12602), the decoder's input.
    """
    check(visible.dim() == 3, f"visible must be (B, V, E), got shape {tuple(visible.shape)}")
    batch, num_visible, width = visible.shape
    check(
        tuple(mask_token.shape) == (width,),
        f"mask_token must be (E,) = ({width},), got shape {tuple(mask_token.shape)}",
    )
    check(
        pos_embed.dim() == 2 and pos_embed.shape[1] == width,
        f"pos_embed must be (N, {width}), got shape {tuple(pos_embed.shape)}",
    )
    check_index("visible_idx", visible_idx, batch)
    check_index("decode_idx", decode_idx, batch)
    check(
        visible_idx.shape[1] == num_visible,
        f"visible_idx names {visible_idx.shape[1]} tokens but visible holds {num_visible}",
    )
    return decoder_tokens_reference(visible, mask_token, pos_embed, visible_idx, decode_idx)
