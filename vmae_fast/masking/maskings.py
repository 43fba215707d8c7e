"""Tube, random and running-cell masking, drawn on the device from per-clip keys."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .hashing import combine, random_words, shuffled
from .mask import Mask, first_by_class

KINDS = ("tube", "random")
# Running cell: which of the four queue slots are not decoded, by decoder mask ratio.
_CELL_QUEUES = {0.5: (1, 1, 0, 0), 0.75: (1, 1, 1, 0)}


@dataclass(frozen=True)
class Masking:
    """How masks are drawn for a grid of tokens.

    Attributes:
        grid: ``(t, h, w)`` tokens.
        kind: "tube" (the same positions in every row of tubelets) or "random".
        ratio: share of tokens hidden from the encoder; ``int(ratio * h * w)`` positions a row
            for tubes, ``int(ratio * N)`` tokens for random.
        decoder_ratio: 0 decodes every masked token (V1); 0.5 or 0.75 leaves out that share by
            running cell (V2) and scores the decoded tokens that the encoder did not see.

    Raises:
        ValueError: an unknown kind or ratio, a ratio that leaves nothing to see or to
            reconstruct, or running cell on a grid that 2x2 cells cannot tile.

    Source: VideoMAE (arXiv 2203.12602) and VideoMAE V2 (arXiv 2303.16727).
    """

    grid: tuple[int, int, int]
    kind: str = "tube"
    ratio: float = 0.9
    decoder_ratio: float = 0.0

    def __post_init__(self) -> None:
        t, h, w = self.grid
        if self.kind not in KINDS:
            raise ValueError(f"mask kind must be one of {KINDS}, got {self.kind!r}")
        places = h * w if self.kind == "tube" else t * h * w
        if not 0 < int(self.ratio * places) < places:
            raise ValueError(
                f"mask ratio {self.ratio} hides {int(self.ratio * places)} of {places} "
                f"{'positions of a row' if self.kind == 'tube' else 'tokens'}; at least one "
                "must stay visible and at least one be hidden"
            )
        if self.decoder_ratio not in (0, *_CELL_QUEUES):
            raise ValueError(
                f"decoder mask ratio must be 0, 0.5 or 0.75 (running cell), "
                f"got {self.decoder_ratio}"
            )
        if self.decoder_ratio and (h % 2 or w % 2):
            raise ValueError(
                f"running-cell decoder masking tiles the grid with 2x2 cells, but it is {h}x{w}; "
                "choose an image size that gives even numbers of patches, or decoder ratio 0"
            )

    @property
    def num_tokens(self) -> int:
        """N."""
        t, h, w = self.grid
        return t * h * w

    @property
    def num_visible(self) -> int:
        """V, tokens the encoder sees in each clip."""
        t, h, w = self.grid
        if self.kind == "tube":
            return t * (h * w - int(self.ratio * h * w))
        return self.num_tokens - int(self.ratio * self.num_tokens)

    @property
    def num_unscored(self) -> int | None:
        """Decoded tokens that the encoder saw; None where the number differs by clip."""
        if not self.decoder_ratio:
            return 0
        # Over four rows of tubelets every position is decoded equally often, and under a tube
        # mask the visible positions are the same in all of them.
        if self.kind == "tube" and self.grid[0] % 4 == 0:
            return round(self.num_visible * (1 - self.decoder_ratio))
        return None

    def __call__(self, key: Tensor) -> Mask:
        """Draw one mask per key, ``(B,)`` int64 (:func:`clip_keys`), on the key's device."""
        return self.decode_part(self._visible(key), key)

    def decode_part(self, visible_idx: Tensor, key: Tensor, *, static: bool = True) -> Mask:
        """The mask of given visible tokens, with decoder masking by this masking's ratio.

        Args:
            visible_idx: ``(B, V)`` int64, ascending.
            key: ``(B,)`` keys for the running cell's phase.
            static: the visible tokens come from this masking, so that counts known for it hold.
        """
        n = self.num_tokens
        batch, num_visible = visible_idx.shape
        # 1 where hidden from the encoder.
        hidden = torch.ones(batch, n, dtype=torch.int64, device=key.device)
        hidden = hidden.scatter(1, visible_idx, 0)
        if not self.decoder_ratio:
            order = first_by_class(hidden, n)
            return Mask(visible_idx, order[:, num_visible:], n, n - num_visible)

        left_out = self._running_cell(key)
        num_decoded = n - round(n * self.decoder_ratio)
        if static and self.num_unscored is not None:
            # Decoded and seen (0), decoded and hidden (1), left out (2).
            decode_idx = first_by_class(torch.where(left_out, 2, hidden), num_decoded)
            return Mask(visible_idx, decode_idx, n, num_decoded - self.num_unscored)
        decode_idx = first_by_class(left_out.long(), num_decoded)
        scored = hidden.gather(1, decode_idx).float()
        return Mask(visible_idx, decode_idx, n, num_decoded, scored)

    def _visible(self, key: Tensor) -> Tensor:
        t, h, w = self.grid
        if self.kind == "random":
            return shuffled(key, self.num_tokens)[:, : self.num_visible].sort(dim=1).values
        place = shuffled(key, h * w)[:, : self.num_visible // t].sort(dim=1).values
        row = torch.arange(t, device=key.device).unsqueeze(1) * (h * w)
        return (row + place.unsqueeze(1)).flatten(1)

    def _running_cell(self, key: Tensor) -> Tensor:
        """``(B, N)`` boolean, True = not decoded: the queue read from a moving pointer."""
        t, h, w = self.grid
        device = key.device
        # A stream of its own: the phase must not depend on which positions are visible.
        phase = random_words(combine(key, 1), 1) & 3
        slot = 2 * (torch.arange(h, device=device) % 2).unsqueeze(1) + (
            torch.arange(w, device=device) % 2
        )
        pointer = torch.arange(t, device=device).unsqueeze(1) + slot.flatten()
        num_left_out = sum(_CELL_QUEUES[self.decoder_ratio])
        # The queue holds its ones first, so reading it is a comparison.
        return ((pointer.flatten() + phase) & 3) < num_left_out
