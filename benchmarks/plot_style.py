"""What all pictures of results have in common; needs matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Figures = dict[str, Any]

# From the palette of Okabe and Ito, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#999999"
DPI = 130


def title_of(kept: Figures) -> str:
    """What a result file holds, with the device and torch that it is from."""
    environment = kept["environment"]
    return f"{environment['device']}, torch {environment['torch']}: {kept['what']}"


def save(figure: Figure, file: Path) -> Path:
    """Write a figure as the PNG beside its result file, the same bytes for the same figures."""
    picture = file.with_suffix(".png")
    figure.savefig(picture, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return picture
