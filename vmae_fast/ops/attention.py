"""Joint attention, read from the packed projections."""

from torch import Tensor

from vmae_fast.kernels.attention import attention_reference

from ._checks import check


def attention(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Self-attention over all tokens.

    Args:
        qkv: ``(B, N, 3 * H * K)``, straight from the linear layer, rows q, k, v.
        num_heads: H.
        scale: factor on the logits; None is ``K ** -0.5``.

    Returns:
        ``(B, N, H * K)`` in qkv's dtype, ready for the output projection.

    Raises:
        ValueError: qkv's last dimension does not divide into 3 * num_heads.
    """
    check(
        qkv.dim() == 3 and qkv.shape[2] % (3 * num_heads) == 0,
        lambda: f"qkv must be (B, N, 3 * {num_heads} heads * K), got shape {tuple(qkv.shape)}",
    )
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)
    return attention_reference(q, k, v, scale)


def cross_attention(q: Tensor, kv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Attention of M queries over N keys.

    Args:
        q: ``(B, M, H * K)``.
        kv: ``(B, N, 2 * H * K)``, rows k, v.
        num_heads: H.
        scale: factor on the logits; None is ``K ** -0.5``.

    Returns:
        ``(B, M, H * K)`` in q's dtype.

    Raises:
        ValueError: the widths do not divide into heads or do not fit each other.
    """
    check(
        q.dim() == 3 and q.shape[2] % num_heads == 0,
        lambda: f"q must be (B, M, {num_heads} heads * K), got shape {tuple(q.shape)}",
    )
    check(
        kv.dim() == 3 and kv.shape[0] == q.shape[0] and kv.shape[2] == 2 * q.shape[2],
        lambda: f"kv must be ({q.shape[0]}, N, {2 * q.shape[2]}), got shape {tuple(kv.shape)}",
    )
    k, v = kv.unflatten(2, (2, num_heads, -1)).unbind(2)
    return attention_reference(q.unflatten(2, (num_heads, -1)), k, v, scale)
