"""What one would write in plain PyTorch instead of each token op.

Video is floating and normalised here, as data loaders hand it over. Shapes as in
:mod:`vmae_fast.ops`: B clips, N tokens, V visible, M masked, D and E widths, P values a tubelet.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vmae_fast import ops

Tubelet = tuple[int, int, int]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalised(video: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 ``(B, 3, T, H, W)`` as normalised floating video."""
    return ((video.float() / 255 - _channels(MEAN, video)) / _channels(STD, video)).to(dtype)


def conv3d_then_gather(
    video: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, visible_idx: Tensor
) -> Tensor:
    """Embed all tubelets with a Conv3d, add the positions, keep the visible tokens."""
    tokens = F.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return torch_gather(tokens + pos_embed, visible_idx)


def unfold_then_linear(
    video: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, visible_idx: Tensor
) -> Tensor:
    """Copy the visible tubelets as rows, then a linear layer, then the positions."""
    pt, ph, pw = weight.shape[2:]
    cells = video.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
    cells = cells.permute(0, 2, 4, 6, 1, 3, 5, 7)
    h, w = cells.shape[2:4]
    clip = torch.arange(video.shape[0], device=video.device).unsqueeze(1)
    rows = cells[clip, visible_idx // (h * w), visible_idx // w % h, visible_idx % w]
    return F.linear(rows.flatten(2), weight.flatten(1), bias) + pos_embed[visible_idx]


def torch_gather(x: Tensor, idx: Tensor) -> Tensor:
    """Tokens at ``idx`` by torch.gather; its backward pass is a scatter-add into zeros."""
    return torch.gather(x, 1, idx.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def indexed(x: Tensor, idx: Tensor) -> Tensor:
    """Tokens at ``idx`` by indexing; its backward pass sorts the indices."""
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), idx]


def concatenated(
    visible: Tensor, mask_token: Tensor, pos_embed: Tensor, visible_idx: Tensor, decode_idx: Tensor
) -> Tensor:
    """The decoder's input as two sums and a concatenation."""
    seen = visible + pos_embed[visible_idx]
    return torch.cat([seen, mask_token + pos_embed[decode_idx]], dim=1)


def eager_loss(pred: Tensor, video: Tensor, mask: Tensor, tubelet: Tubelet) -> Tensor:
    """The loss as trainers compute it: targets of all tokens, then a boolean mask ``(B, N)``.

    The normalised targets are fp32 copies of the whole video, one after the other.
    """
    pt, ph, pw = tubelet
    with torch.no_grad():
        pixels = video * _channels(STD, video) + _channels(MEAN, video)
        cubes = rearrange(
            pixels,
            "b c (t pt) (h ph) (w pw) -> b (t h w) (pt ph pw) c",
            pt=pt, ph=ph, pw=pw,
        )  # fmt: skip
        centred = cubes - cubes.mean(dim=-2, keepdim=True)
        cubes = centred / (cubes.var(dim=-2, unbiased=True, keepdim=True).sqrt() + 1e-6)
        target = rearrange(cubes, "b n p c -> b n (p c)")[mask].reshape(pred.shape)
    # As autocast does before this loss.
    return F.mse_loss(pred.float(), target)


def head_then_loss(
    x: Tensor, weight: Tensor, bias: Tensor, video: Tensor, target_idx: Tensor, tubelet: Tubelet
) -> Tensor:
    """The pixel head as a layer of its own, then our loss on its whole output."""
    return ops.masked_mse(F.linear(x, weight, bias), video, target_idx, tubelet)


def _channels(values: tuple[float, ...], video: Tensor) -> Tensor:
    return torch.tensor(values, device=video.device).view(-1, 1, 1, 1)
