"""What masks cover, counted from drawn ones: how many tokens, and how evenly in space and time.

Covered is what the encoder sees, or what the decoder decodes. B clips, N = T * H * W tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmae_fast import Mask, Masking, clip_keys
from vmae_fast.models import VideoMAEConfig

Figures = dict[str, Any]

ENCODER_RATIO = 0.9
# Signs of a token in a picture's strip.
LEFT_OUT, COVERED, UNSCORED = ".", "#", "o"
# Of (B, T, H, W): all but the clip and what coverage is looked at over.
SUMMED = {"rows": (1, 3), "columns": (1, 2), "time": (2, 3), "positions": (1,)}


@dataclass(frozen=True)
class Case:
    """A mask whose coverage is counted.

    Attributes:
        of: whose it is, "encoder" or "decoder"; the decoder's stand under tubes.
        kind: as of :class:`vmae_fast.Masking`.
        ratio: share of tokens that it leaves out.
    """

    of: str
    kind: str
    ratio: float

    @property
    def label(self) -> str:
        """The mask in words."""
        return f"{self.kind.replace('_', ' ')} {self.ratio:.0%}"

    def masking(self, grid: tuple[int, int, int]) -> Masking:
        """What draws it on a grid of tokens."""
        if self.of == "encoder":
            return Masking(grid, self.kind, self.ratio)
        return Masking(grid, "tube", ENCODER_RATIO, self.ratio, self.kind)

    def covered(self, mask: Mask) -> Tensor:
        """``(B, N)`` boolean, True = seen or decoded."""
        return as_booleans(mask.visible_idx if self.of == "encoder" else mask.decode_idx, mask)


CASES = (
    *(Case("encoder", kind, ENCODER_RATIO) for kind in ("tube", "random", "frame")),
    Case("decoder", "running_cell", 0.5),
    Case("decoder", "frame", 0.5),
    Case("decoder", "random", 0.5),
    Case("decoder", "running_cell", 0.75),
)


def keys_of(clips: int, device: torch.device) -> Tensor:
    """Keys of the first clips of a run's first epoch."""
    return clip_keys(0, 0, torch.arange(clips, device=device))


def as_booleans(idx: Tensor, mask: Mask) -> Tensor:
    """``(B, N)`` boolean, True at the tokens that the indices ``(B, M)`` name."""
    tokens = torch.zeros(mask.batch_size, mask.num_tokens, dtype=torch.bool, device=idx.device)
    return tokens.scatter_(1, idx, True)


def token_counts(config: VideoMAEConfig, key: Tensor) -> Figures:
    """Distinct tokens of a clip that are visible, decoded and scored, from drawn masks.

    Raises:
        ValueError: clips differ in a number.
    """
    mask = config.masking(key)
    seen, decoded = as_booleans(mask.visible_idx, mask), as_booleans(mask.decode_idx, mask)
    found = {"visible": seen, "decoded": decoded, "scored": decoded & ~seen}
    counts = {name: tokens.sum(dim=1).unique().tolist() for name, tokens in found.items()}
    for name, count in counts.items():
        if len(count) != 1:
            raise ValueError(f"clips differ in how many tokens are {name}: {count}")
    return {name: count[0] for name, count in counts.items()}


def evenness(covered_BTHW: Tensor) -> Figures:
    """How evenly tokens are covered over rows and columns of patches, time, and positions.

    Args:
        covered_BTHW: booleans; every clip covers something.

    Returns:
        ``NAME_spread``: standard deviation over mean of how many tokens are covered in each row
        (column, time step, position) of a clip. ``NAME_least_and_most_percent``: of the tokens in
        a row, those covered where they are fewest and where they are most.
        ``positions_never_covered``: how many are covered at no time. Means over clips.
    """
    figures: Figures = {}
    for name, dims in SUMMED.items():
        counts = covered_BTHW.sum(dim=dims).flatten(1).double()
        spread = counts.std(dim=1, correction=0) / counts.mean(dim=1)
        figures[f"{name}_spread"] = spread.mean().item()
        if name == "positions":
            figures["positions_never_covered"] = (counts == 0).sum(dim=1).double().mean().item()
            continue
        tokens = covered_BTHW[0].numel() / counts.shape[1]
        ends = (counts.amin(dim=1), counts.amax(dim=1))
        figures[f"{name}_least_and_most_percent"] = [
            (100 * end.mean() / tokens).item() for end in ends
        ]
    return figures


def coverage(case: Case, grid: tuple[int, int, int], key: Tensor) -> Figures:
    """One row of the table: how evenly a mask covers a grid, over the clips of these keys."""
    covered = case.covered(case.masking(grid)(key)).cpu()
    tokens = covered.sum(dim=1).double().mean().item()
    head = {"of": case.of, "mask": case.label, "tokens": round(tokens)}
    return head | evenness(covered.view(len(covered), *grid))


def strip(case: Case, grid: tuple[int, int, int], key: Tensor) -> list[str]:
    """The clip of a key as text: a line of H * W signs for each time step."""
    mask = case.masking(grid)(key.view(1))
    covered, seen = case.covered(mask)[0], ~mask.to_bool()[0]
    unscored = covered & seen if case.of == "decoder" else torch.zeros_like(covered)
    signs = [
        UNSCORED if both else COVERED if one else LEFT_OUT
        for one, both in zip(covered.tolist(), unscored.tolist(), strict=True)
    ]
    step = grid[1] * grid[2]
    return ["".join(signs[at : at + step]) for at in range(0, len(signs), step)]
