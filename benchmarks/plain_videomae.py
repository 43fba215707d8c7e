"""VideoMAE as one would write it in plain PyTorch: what the fast path is compared with.

Nothing here comes from vmae_fast's ops or modules. Every tubelet is embedded and the masked ones
thrown away, attention is a softmax of a product unless told otherwise, the decoder's blocks work on
all tokens to the very end, and the head on all decoded ones, those that carry no loss included.

Shapes: B clips, N tokens, V visible, M decoded, D width, H heads, K head width, P values of a
tubelet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vmae_fast import Mask, VideoMAE
from vmae_fast.models import VideoMAEConfig

Weights = dict[str, Tensor]
# From packed qkv (B, N, 3 * H * K) and H to (B, N, H * K).
Attend = Callable[[Tensor, int], Tensor]

# Added to a target tubelet's standard deviation.
STD_EPS = 1e-6


def written_out(qkv: Tensor, heads: int) -> Tensor:
    """Attention as a softmax of a product, whose weights are kept."""
    q, k, v = by_head(qkv, heads)
    weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3)
    return (weights @ v).transpose(1, 2).flatten(2)


def sdpa(qkv: Tensor, heads: int) -> Tensor:
    """Attention by PyTorch's fused function."""
    return F.scaled_dot_product_attention(*by_head(qkv, heads)).transpose(1, 2).flatten(2)


def by_head(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """``(B, N, 3 * H * K)`` to three of ``(B, H, N, K)``."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def plain_loss(
    weights: Weights,
    config: VideoMAEConfig,
    video: Tensor,
    mask: Mask,
    *,
    attend: Attend = written_out,
) -> Tensor:
    """Loss of a VideoMAE with these weights.

    Args:
        weights: by the names of VideoMAE's state dict, fp32 or fp64.
        config: its settings; drop path is not drawn.
        video: ``(B, C, T, H, W)``; uint8, or floating point and normalised already.
        mask: visible, decoded and scored tokens.
        attend: computes attention, :func:`written_out`, :func:`sdpa` or another.

    Returns:
        A scalar, in the weights' dtype.

    Raises:
        ValueError: the config has drop path.

    Sources: VideoMAE (arXiv 2203.12602), VideoMAE V2 (arXiv 2303.16727).
    """
    if config.drop_path:
        raise ValueError(f"there is no drop path here, but drop_path={config.drop_path}")
    eps, dtype = config.norm_eps, weights["mask_token"].dtype
    pixels, normalised = both_scales(video, config, dtype)
    x = F.conv3d(
        normalised,
        weights["encoder.patch_embed.weight"],
        weights["encoder.patch_embed.bias"],
        stride=config.tubelet,
    )
    x = x.flatten(2).transpose(1, 2) + positions(config.num_tokens, config.width, x.device)
    x = picked(x, mask.visible_idx)
    for index in range(config.depth):
        x = block(weights, f"encoder.blocks.{index}.", x, config.heads, eps, attend)
    if config.final_norm:
        x = norm(weights, "encoder.norm.", x, eps)

    visible = F.linear(x, weights["encoder_to_decoder.weight"])
    place = positions(config.num_tokens, config.decoder_width, x.device)
    place = place.expand(mask.batch_size, -1, -1)
    x = torch.cat(
        [
            visible + picked(place, mask.visible_idx),
            weights["mask_token"] + picked(place, mask.decode_idx),
        ],
        dim=1,
    )
    for index in range(config.decoder_depth):
        x = block(weights, f"decoder.blocks.{index}.", x, config.decoder_heads, eps, attend)
    x = norm(weights, "decoder.norm.", x[:, visible.shape[1] :], config.decoder_norm_eps)
    pred = linear(weights, "decoder.head.", x)

    target = picked(targets(pixels, config), mask.decode_idx)
    error = (pred - target).square().mean(dim=2)
    counted = counts(mask).to(error)
    return (error * counted).sum() / counted.sum()


class PlainOutput(NamedTuple):
    """What :class:`PlainVideoMAE` gives, as VideoMAE's output with nothing else in it."""

    loss: Tensor


class PlainVideoMAE(nn.Module):
    """:func:`plain_loss` as a module over the very parameters of a VideoMAE.

    Args:
        model: holds the parameters, and is not called.
        attend: as in :func:`plain_loss`.
    """

    def __init__(self, model: VideoMAE, *, attend: Attend = written_out) -> None:
        super().__init__()
        self.held, self.config, self.masking = model, model.config, model.masking
        self.attend = attend

    def forward(self, video: Tensor, mask: Mask) -> PlainOutput:
        """The loss of a batch, as VideoMAE's ``forward``."""
        weights = dict(self.held.named_parameters())
        return PlainOutput(plain_loss(weights, self.config, video, mask, attend=self.attend))


def block(weights: Weights, at: str, x: Tensor, heads: int, eps: float, attend: Attend) -> Tensor:
    """One pre-norm transformer block, ``(B, N, D)``."""
    branch = attention(weights, f"{at}attn.", norm(weights, f"{at}norm1.", x, eps), heads, attend)
    x = x + scaled(weights, f"{at}gamma_1", branch)
    hidden = linear(weights, f"{at}mlp.fc1.", norm(weights, f"{at}norm2.", x, eps))
    return x + scaled(weights, f"{at}gamma_2", linear(weights, f"{at}mlp.fc2.", F.gelu(hidden)))


def attention(weights: Weights, at: str, x: Tensor, heads: int, attend: Attend) -> Tensor:
    """Self-attention of ``(B, N, D)``: biases on q and v, none on k."""
    bias = None
    if f"{at}q_bias" in weights:
        q_bias, v_bias = weights[f"{at}q_bias"], weights[f"{at}v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    qkv = F.linear(x, weights[f"{at}qkv.weight"], bias)
    return linear(weights, f"{at}proj.", attend(qkv, heads))


def norm(weights: Weights, at: str, x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{at}weight"], weights[f"{at}bias"], eps)


def linear(weights: Weights, at: str, x: Tensor) -> Tensor:
    """Linear layer with a bias."""
    return F.linear(x, weights[f"{at}weight"], weights[f"{at}bias"])


def scaled(weights: Weights, name: str, branch: Tensor) -> Tensor:
    """Layer scale, where there is one."""
    return weights[name] * branch if name in weights else branch


@lru_cache(maxsize=8)
def positions(num_tokens: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids over the token index, ``(N, D)``: made in fp64, kept in fp32 as published."""
    table = torch.empty(num_tokens, width, dtype=torch.float64)
    for column in range(width):
        angle = torch.arange(num_tokens).double() / 10000 ** (2 * (column // 2) / width)
        table[:, column] = angle.cos() if column % 2 else angle.sin()
    return table.float().to(device)


def picked(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` ``(B, M)`` out of ``(B, N, D)``."""
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))


def both_scales(video: Tensor, config: VideoMAEConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The video in [0, 1], which the targets are of, and normalised, which the encoder reads."""
    mean, std = (
        torch.tensor(values, dtype=dtype, device=video.device).view(-1, 1, 1, 1)
        for values in (config.mean, config.std)
    )
    if video.dtype == torch.uint8:
        pixels = video.to(dtype) / 255
        return pixels, (pixels - mean) / std
    return video.to(dtype) * std + mean, video.to(dtype)


def targets(pixels: Tensor, config: VideoMAEConfig) -> Tensor:
    """Each tubelet's pixels ``(B, N, P)``, channel last, normalised per tubelet and channel."""
    batch, channels = pixels.shape[:2]
    (t, h, w), (pt, ph, pw) = config.grid, config.tubelet
    cut = pixels.reshape(batch, channels, t, pt, h, ph, w, pw)
    cut = cut.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, t * h * w, pt * ph * pw, channels)
    if config.norm_pix:
        std = cut.var(dim=2, unbiased=True, keepdim=True).sqrt()
        cut = (cut - cut.mean(dim=2, keepdim=True)) / (std + STD_EPS)
    return cut.flatten(2)


def counts(mask: Mask) -> Tensor:
    """``(B, M)`` fp32: 1 where a decoded token carries the loss, 0 where it is only a key."""
    counted = torch.zeros(mask.decode_idx.shape, device=mask.decode_idx.device)
    scored = torch.ones(()) if mask.scored is None else mask.scored
    counted[:, counted.shape[1] - mask.num_scored :] = scored
    return counted
