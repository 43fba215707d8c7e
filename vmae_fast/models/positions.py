"""Fixed position tables, and what becomes of them on a grid other than the trained one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import VideoMAEConfig


def sinusoid_table(num_tokens: int, width: int) -> Tensor:
    """Fixed position table ``(N, width)`` fp32 over the token index, computed in fp64.

    Sine on even and cosine on odd columns of ``pos / 10000 ** (2 * (j // 2) / width)``.

    Source: Attention Is All You Need (arXiv 1706.03762), as VideoMAE uses it.
    """
    position = torch.arange(num_tokens, dtype=torch.float64).unsqueeze(1)
    column = torch.arange(width)
    angle = position / 10000 ** (2 * (column // 2).double() / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def interpolate_table(
    table: Tensor, trained: tuple[int, int, int], grid: tuple[int, int, int]
) -> Tensor:
    """A table for another grid: trilinear between the rows of the trained one.

    Args:
        table: ``(t * h * w, width)`` in t-major order.
        trained: (t, h, w) of ``table``.
        grid: (t, h, w) wanted.

    Returns:
        ``(t' * h' * w', width)`` in the table's dtype; the corners of the grid are those of its
        outer cells (``align_corners=False``), and rows beyond the outermost centres repeat them.

    An axis that keeps its length is left as it is, so a table for the trained grid is the table
    bit by bit, and one for more frames is linear along time, as VideoMAE V2's fine-tuning has it.
    Across space V2 takes bicubic interpolation instead, which overshoots: such a table differs.
    """
    volume = table.view(1, *trained, -1).permute(0, 4, 1, 2, 3)
    volume = F.interpolate(volume, size=grid, mode="trilinear", align_corners=False)
    return volume[0].permute(1, 2, 3, 0).reshape(-1, table.shape[1])


def position_table(config: VideoMAEConfig, width: int) -> Tensor:
    """The table ``(N, width)`` fp32 that a stack of this width adds to its tokens.

    It is the sinusoid over the token index; where ``config.positions_from`` names the grid the
    weights were trained on, it is that grid's table interpolated to ``config.grid``.
    """
    trained = config.positions_from
    if trained is None:
        return sinusoid_table(config.num_tokens, width)
    t, h, w = trained
    return interpolate_table(sinusoid_table(t * h * w, width), trained, config.grid)
