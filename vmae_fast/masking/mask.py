"""The mask of a batch as integer index tensors of static shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Which tokens the encoder sees, the decoder reconstructs and the loss counts.

    Attributes:
        visible_idx: ``(B, V)`` int64, ascending: tokens for the encoder.
        decode_idx: ``(B, M)`` int64: tokens the decoder reconstructs. The last ``num_scored``
            of each clip carry the loss; those before them were seen by the encoder and only
            serve as keys. Ascending within both parts.
        num_tokens: N, tokens in the whole clip.
        num_scored: how many of ``decode_idx`` stand in the scored tail; M in V1.
        scored: None, or ``(B, num_scored)`` fp32 weights (0 or 1) where the number of scored
            tokens differs from clip to clip; ``num_scored`` is M then.
    """

    visible_idx: Tensor
    decode_idx: Tensor
    num_tokens: int
    num_scored: int
    scored: Tensor | None = None

    def __repr__(self) -> str:
        """Counts rather than thousands of indices."""
        visible, decoded = self.visible_idx.shape[1], self.decode_idx.shape[1]
        scored = self.num_scored if self.scored is None else "by weight"
        return (
            f"Mask({self.batch_size} clips of {self.num_tokens} tokens: {visible} visible, "
            f"{decoded} decoded, scored {scored})"
        )

    @property
    def target_idx(self) -> Tensor:
        """``(B, num_scored)``: positions of the tokens that predictions are made for."""
        return self.decode_idx[:, self.decode_idx.shape[1] - self.num_scored :]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.visible_idx.shape[0]

    def scored_count(self) -> Tensor | int:
        """How many tokens of the batch carry the loss: a number where it is static."""
        return self.target_idx.numel() if self.scored is None else self.scored.sum()

    def to_bool(self) -> Tensor:
        """``(B, N)`` boolean, True where the encoder does not see the token."""
        masked = torch.ones(
            self.batch_size, self.num_tokens, dtype=torch.bool, device=self.visible_idx.device
        )
        return masked.scatter_(1, self.visible_idx, False)

    def to(self, device: torch.device | str) -> Mask:
        """The same mask on another device."""
        return replace(
            self,
            visible_idx=self.visible_idx.to(device),
            decode_idx=self.decode_idx.to(device),
            scored=None if self.scored is None else self.scored.to(device),
        )

    @classmethod
    def from_bool(cls, mask: Tensor) -> Mask:
        """Convert the field's boolean mask; every masked token is decoded and scored.

        Reads the counts back from the device once: convert outside the training step.

        Args:
            mask: ``(B, N)`` boolean (or 0/1), True = masked; every clip masks the same number.

        Raises:
            ValueError: not ``(B, N)``, not boolean, counts differ, or a clip masks all or none.
        """
        if mask.dim() != 2:
            raise ValueError(f"mask must be (B, N), got shape {tuple(mask.shape)}")
        if mask.dtype != torch.bool:
            if mask.is_floating_point() or bool(((mask != 0) & (mask != 1)).any()):
                raise ValueError(
                    f"mask must be boolean (True = masked), got {mask.dtype}; index tensors "
                    "go into a vmae_fast.Mask"
                )
            mask = mask.bool()
        counts = mask.sum(dim=1).tolist()
        for clip, count in enumerate(counts):
            if count != counts[0]:
                raise ValueError(
                    f"mask marks {counts[0]} tokens in clip 0 but {count} in clip {clip}; "
                    "every clip in a batch must mask the same number"
                )
        num_tokens = mask.shape[1]
        num_masked = counts[0] if counts else 0
        if not 0 < num_masked < num_tokens:
            raise ValueError(
                f"mask marks {num_masked} of {num_tokens} tokens in each clip; the encoder must "
                "see at least one token and the decoder must be left at least one (True = masked)"
            )
        order = first_by_class(mask.long(), num_tokens)
        num_visible = num_tokens - num_masked
        return cls(order[:, :num_visible], order[:, num_visible:], num_tokens, num_masked)


def first_by_class(token_class: Tensor, count: int) -> Tensor:
    """Token positions sorted by class, then by position: the first ``count`` of each clip.

    Args:
        token_class: ``(B, N)`` small non-negative integers, int64.
        count: how many positions to keep, at most N.
    """
    num_tokens = token_class.shape[1]
    position = torch.arange(num_tokens, device=token_class.device)
    ranked = (token_class * num_tokens + position).sort(dim=1).values
    return ranked[:, :count] % num_tokens
