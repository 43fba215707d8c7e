"""Masks for encoder and decoder, drawn on the device from per-clip keys."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .hashing import combine, random_words, shuffled
from .mask import Mask, first_by_class

KINDS = ("tube", "random", "frame")
DECODER_KINDS = ("running_cell", "frame", "random")
# Running cell: which of the four queue slots are not decoded, by decoder mask ratio.
_CELL_QUEUES = {0.5: (1, 1, 0, 0), 0.75: (1, 1, 1, 0)}


@dataclass(frozen=True)
class Masking:
    """How masks are drawn for a grid of tokens.

    Attributes:
        grid: ``(t, h, w)`` tokens.
        kind: which tokens are hidden from the encoder: "tube" (the same positions in every row of
            tubelets), "random", or "frame" (whole rows of tubelets).
        ratio: share of tokens hidden; ``int(ratio * h * w)`` positions a row for tubes,
            ``int(ratio * N)`` tokens for random, ``int(ratio * t)`` rows for frame.
        decoder_ratio: 0 decodes every hidden token (V1). Above 0 this share of all tokens is left
            out (V2), and of those decoded the ones that the encoder did not see are scored.
        decoder_kind: which are left out: "running_cell" (ratio 0.5 or 0.75), "frame" or "random",
            which count as above.

    Raises:
        ValueError: an unknown kind or ratio, a ratio that leaves nothing to see, to decode or to
            score, or running cell on a grid that 2x2 cells cannot tile.

    Sources: VideoMAE (arXiv 2203.12602) and VideoMAE V2 (arXiv 2303.16727), which compares the
    decoder's kinds.
    """

    grid: tuple[int, int, int]
    kind: str = "tube"
    ratio: float = 0.9
    decoder_ratio: float = 0.0
    decoder_kind: str = "running_cell"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask kind must be one of {KINDS}, got {self.kind!r}")
        places, called = self._places(self.kind)
        hidden = int(self.ratio * places)
        if not 0 < hidden < places:
            raise ValueError(
                f"mask ratio {self.ratio} hides {hidden} of {places} {called}; at least one "
                "must stay visible and at least one be hidden: a share such as 0.9"
            )
        if self.decoder_kind not in DECODER_KINDS:
            raise ValueError(
                f"decoder mask kind must be one of {DECODER_KINDS}, got {self.decoder_kind!r}"
            )
        if self.decoder_ratio:
            self._check_decoder()

    def _check_decoder(self) -> None:
        ratio, (_, h, w) = self.decoder_ratio, self.grid
        if self.decoder_kind == "running_cell":
            if ratio not in _CELL_QUEUES:
                raise ValueError(
                    f"decoder mask ratio must be 0, 0.5 or 0.75 (running cell), got {ratio}; "
                    'decoder mask kinds "frame" and "random" take any'
                )
            if h % 2 or w % 2:
                raise ValueError(
                    "running-cell decoder masking tiles the grid with 2x2 cells, but it is "
                    f"{h}x{w}; choose an image size that gives even numbers of patches, or "
                    "decoder ratio 0"
                )
            return
        places, called = self._places(self.decoder_kind)
        left_out = int(ratio * places)
        if not 0 < left_out < places:
            raise ValueError(
                f"decoder mask ratio {ratio} leaves out {left_out} of {places} {called}; at least "
                "one must be left out and at least one be decoded"
            )
        # Else a clip may decode nothing but what the encoder saw.
        scores_always = self.kind == "tube" and self.decoder_kind == "frame"
        if not scores_always and self.num_decoded <= self.num_visible:
            raise ValueError(
                f"decoder mask ratio {ratio} decodes {self.num_decoded} tokens, but the encoder "
                f"sees {self.num_visible} of its own under {self.kind} masks: a clip may be left "
                "with none to score; more must be decoded than seen"
            )

    def _places(self, kind: str) -> tuple[int, str]:
        """How many things a kind of mask chooses from, and what they are called."""
        t, h, w = self.grid
        return {
            "tube": (h * w, "positions of a row"),
            "random": (t * h * w, "tokens"),
            "frame": (t, "rows of tubelets"),
        }[kind]

    @property
    def num_tokens(self) -> int:
        """N."""
        t, h, w = self.grid
        return t * h * w

    @property
    def num_visible(self) -> int:
        """V, tokens the encoder sees in each clip."""
        places, _ = self._places(self.kind)
        return (places - int(self.ratio * places)) * (self.num_tokens // places)

    @property
    def num_decoded(self) -> int:
        """M, tokens decoded in each clip, those that the encoder saw included."""
        if not self.decoder_ratio:
            return self.num_tokens - self.num_visible
        if self.decoder_kind == "running_cell":
            return self.num_tokens - round(self.num_tokens * self.decoder_ratio)
        places, _ = self._places(self.decoder_kind)
        return (places - int(self.decoder_ratio * places)) * (self.num_tokens // places)

    @property
    def num_unscored(self) -> int | None:
        """Decoded tokens that the encoder saw; None where the number differs by clip."""
        if not self.decoder_ratio:
            return 0
        t, h, w = self.grid
        if self.decoder_kind == "running_cell":
            # Each row decodes as many tokens; over four rows so does each position.
            same = self.kind == "frame" or (self.kind == "tube" and t % 4 == 0)
            return round(self.num_visible * (1 - self.decoder_ratio)) if same else None
        # Under a tube mask as many positions are visible in each row.
        if self.kind == "tube" and self.decoder_kind == "frame":
            return self.num_visible // t * (self.num_decoded // (h * w))
        return None

    def __call__(self, key: Tensor) -> Mask:
        """Draw one mask per key, ``(B,)`` int64 (:func:`clip_keys`), on the key's device."""
        return self.decode_part(self._visible(key), key)

    def decode_part(self, visible_idx: Tensor, key: Tensor, *, static: bool = True) -> Mask:
        """The mask of given visible tokens, with decoder masking by this masking's ratio.

        Args:
            visible_idx: ``(B, V)`` int64, ascending.
            key: ``(B,)`` keys for what is left out.
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

        left_out, num_decoded = self._left_out(key), self.num_decoded
        if static and self.num_unscored is not None:
            # Decoded and seen (0), decoded and hidden (1), left out (2).
            decode_idx = first_by_class(torch.where(left_out, 2, hidden), num_decoded)
            return Mask(visible_idx, decode_idx, n, num_decoded - self.num_unscored)
        decode_idx = first_by_class(left_out.long(), num_decoded)
        scored = hidden.gather(1, decode_idx).float()
        return Mask(visible_idx, decode_idx, n, num_decoded, scored)

    def _visible(self, key: Tensor) -> Tensor:
        if self.kind == "random":
            return shuffled(key, self.num_tokens)[:, : self.num_visible].sort(dim=1).values
        t, h, w = self.grid
        if self.kind == "frame":
            row = shuffled(key, t)[:, : self.num_visible // (h * w)].sort(dim=1).values
            place = torch.arange(h * w, device=key.device)
            return (row.unsqueeze(2) * (h * w) + place).flatten(1)
        place = shuffled(key, h * w)[:, : self.num_visible // t].sort(dim=1).values
        row = torch.arange(t, device=key.device).unsqueeze(1) * (h * w)
        return (row + place.unsqueeze(1)).flatten(1)

    def _left_out(self, key: Tensor) -> Tensor:
        """``(B, N)`` boolean, True = not decoded."""
        if self.decoder_kind == "running_cell":
            return self._running_cell(key)
        # As in the running cell: a stream of its own.
        places, _ = self._places(self.decoder_kind)
        rank = shuffled(combine(key, 1), places)
        left_out = rank < int(self.decoder_ratio * places)
        return left_out.repeat_interleave(self.num_tokens // places, dim=1)

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
