"""Moving whole tokens: gather by index, and assembly of the decoder's input."""

import torch
from torch import Tensor


def gather_tokens_reference(x_BND: Tensor, idx_BV: Tensor) -> Tensor:
    """``out[b, i] = x[b, idx[b, i]]``, ``(B, V, D)``."""
    return torch.gather(x_BND, 1, idx_BV.long().unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


def decoder_tokens_reference(
    visible_BVE: Tensor,
    mask_token_E: Tensor,
    pos_embed_NE: Tensor,
    visible_idx_BV: Tensor,
    decode_idx_BM: Tensor,
) -> Tensor:
    """``[visible + pos | mask_token + pos]``, ``(B, V + M, E)``."""
    seen = visible_BVE + pos_embed_NE[visible_idx_BV]
    unseen = mask_token_E + pos_embed_NE[decode_idx_BM]
    return torch.cat([seen, unseen], dim=1)
