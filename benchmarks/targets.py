"""What each token op is to reach on an H200, in bf16 with 64 clips of the base model."""

from dataclasses import dataclass
from typing import Any

# Part of the name of the device that the targets are for.
DEVICE = "H200"


@dataclass(frozen=True)
class Target:
    """A bound on one figure of a row.

    Attributes:
        figure: key of the row; "speedup.conv3d" is the entry conv3d of the row's speedup.
        bound: "at_most" or "at_least".
        value: in the figure's unit.
    """

    figure: str
    bound: str
    value: float

    def words(self) -> str:
        """The target as a reader sees it."""
        return f"{self.figure} {'<=' if self.bound == 'at_most' else '>='} {self.value:g}"

    def judge(self, row: dict[str, Any]) -> dict[str, Any]:
        """The target as it is kept in the row's result: with what was measured, and whether met."""
        measured: Any = row
        for key in self.figure.split("."):
            measured = measured[key]
        met = measured <= self.value if self.bound == "at_most" else measured >= self.value
        return {"target": self.words(), "measured": measured, "met": met}


def _at_most(figure: str, value: float) -> Target:
    return Target(figure, "at_most", value)


def _at_least(figure: str, value: float) -> Target:
    return Target(figure, "at_least", value)


_NEAR_COPY = (_at_least("percent_of_copy", 75),)

# By op and direction.
TARGETS: dict[tuple[str, str], tuple[Target, ...]] = {
    ("tubelet_embed", "forward"): (
        _at_most("time_ms", 0.10),
        _at_least("speedup.conv3d", 1.5),
        _at_least("speedup.unfold", 1.5),
    ),
    ("tubelet_embed", "backward"): (
        _at_most("time_ms", 0.12),
        _at_least("speedup.conv3d", 1.5),
        _at_least("speedup.unfold", 1.5),
    ),
    ("gather_tokens", "forward"): _NEAR_COPY,
    ("gather_tokens", "backward"): _NEAR_COPY,
    ("decoder_tokens", "forward"): _NEAR_COPY,
    ("decoder_tokens", "backward"): _NEAR_COPY,
    ("masked_mse", "forward"): (
        _at_most("time_ms", 0.22),
        *_NEAR_COPY,
        _at_least("speedup.eager", 10),
    ),
    # Within 5% of the time, and one prediction tensor less of memory.
    ("linear_masked_mse", "forward and backward"): (
        _at_least("speedup.head_then_loss", 0.95),
        _at_least("predictions_saved", 1),
    ),
}
