"""Multi-head attention on packed projections, by the library's fused kernel.

Shapes: B clips, N keys, M queries, H heads, K head width.
"""

import torch.nn.functional as F
from torch import Tensor


def attention_reference(
    q_BMHK: Tensor, k_BNHK: Tensor, v_BNHK: Tensor, scale: float | None
) -> Tensor:
    """``softmax(q k^T * scale) v`` per head, ``(B, M, H*K)``; scale None is ``K ** -0.5``."""
    out_BHMK = F.scaled_dot_product_attention(
        q_BMHK.transpose(1, 2), k_BNHK.transpose(1, 2), v_BNHK.transpose(1, 2), scale=scale
    )
    return out_BHMK.transpose(1, 2).flatten(2)
