"""What ops of ours do between their arguments and results, which a tracer does not see.

The products' own reads and writes are not counted here: where a product is worth its name they
are hidden by its operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

# From this many keys on attention is the library's, whose gradients of q, k and v are packed into
# one tensor by a copy (vmae_fast/ops/_attention_choice.py).
_LIBRARYS_KEYS = 256
# Of predictions at a time (kernels/linear_masked_mse.py).
_LOSS_CHUNK_BYTES = 24 << 20


class Inside(NamedTuple):
    """What goes on within one call.

    Attributes:
        workspace_bytes: most that is held beside arguments and results.
        moved_bytes: read and written; None is each argument and result once.
    """

    workspace_bytes: int
    moved_bytes: int | None


def inside_of(func: Any, args: tuple[Any, ...]) -> Inside:
    """What goes on within a call of an op; nothing is known of those of others."""
    known = _INSIDE.get(func._schema.name)
    return known(*args) if known else Inside(0, None)


def is_attention(func: Any) -> bool:
    """Whether an op is attention, in either pass."""
    name = func._schema.name
    return name.startswith("vmae_fast::") and "attention" in name


def _norm_linear(x: Tensor, branch: Tensor | None, *rest: Any) -> Inside:
    narrow: Tensor = rest[5]
    normed = x.numel() * narrow.itemsize
    # Read: x and the branch; written: their sum, and the norm.
    added = 0 if branch is None else _bytes(branch) + _bytes(x)
    return Inside(normed, _bytes(x) + added + normed)


def _norm_linear_backward(
    grad_out: Tensor, grad_tail: Tensor | None, grad_residual: Tensor | None, residual: Tensor,
    *rest: Any,
) -> Inside:  # fmt: skip
    narrow, branch_dtype, need_weight, need_bias = rest[4:8]
    normed = residual.numel() * narrow.itemsize
    # Read: the norm's gradient, the residual and its gradient, and the bias's gradient's terms;
    # written: the stream's gradient, the branch's where its dtype is another one, and the norm.
    moved = normed + 2 * _bytes(residual)
    moved += _bytes(grad_out) if need_bias else 0
    moved += 0 if grad_residual is None else _bytes(grad_residual)
    moved += 0 if branch_dtype is None else residual.numel() * branch_dtype.itemsize
    moved += normed if need_weight else 0
    return Inside(normed * (2 if need_weight else 1), moved)


def _gelu_linear(x: Tensor, *_: Any) -> Inside:
    return Inside(_bytes(x), 2 * _bytes(x))


def _gelu_linear_backward(grad: Tensor, x: Tensor, *rest: Any) -> Inside:
    need_weight = rest[-1]
    # GELU's gradient takes the place of the one it is made from.
    return Inside(
        _bytes(x) if need_weight else 0, (4 if need_weight else 3) * _bytes(x) + _bytes(grad)
    )


def _head_and_loss(x: Tensor, weight: Tensor, *rest: Any) -> Inside:
    video: Tensor = rest[2]
    values = x.shape[0] * x.shape[1] * weight.shape[0]
    size = values * x.itemsize
    copies = 2 * weight.numel() * x.itemsize
    # The targets are read, and differences take the predictions' place.
    return Inside(min(size, _LOSS_CHUNK_BYTES) + copies, values * video.itemsize + 2 * size)


def _embed(video: Tensor, *rest: Any) -> Inside:
    visible_idx: Tensor | None = rest[3]
    return Inside(0, _read_of(video, rest[0], visible_idx))


def _embed_backward(grad: Tensor, video: Tensor, *rest: Any) -> Inside:
    return Inside(0, _read_of(video, rest[0], rest[1]) + _bytes(grad))


def _read_of(video: Tensor, weight: Tensor, visible_idx: Tensor | None) -> int:
    """Only the visible tubelets are read."""
    if visible_idx is None:
        return _bytes(video)
    return visible_idx.numel() * (weight.numel() // weight.shape[0]) * video.itemsize


def _attention_backward(grad: Tensor, qkv: Tensor, *_: Any) -> Inside:
    librarys = qkv.shape[1] > _LIBRARYS_KEYS
    moved = 2 * _bytes(grad) + 2 * _bytes(qkv)
    packing = _bytes(qkv) if librarys else 0
    return Inside(packing, moved + 2 * packing)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_INSIDE: dict[str, Callable[..., Inside]] = {
    "vmae_fast::layer_norm_linear": _norm_linear,
    "vmae_fast::layer_norm_linear_backward": _norm_linear_backward,
    "vmae_fast::bias_gelu_linear": _gelu_linear,
    "vmae_fast::bias_gelu_linear_backward": _gelu_linear_backward,
    "vmae_fast::linear_masked_mse": _head_and_loss,
    "vmae_fast::tubelet_embed": _embed,
    "vmae_fast::tubelet_embed_backward": _embed_backward,
    "vmae_fast::attention_backward": _attention_backward,
}
