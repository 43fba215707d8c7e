"""VideoMAE's encoder, decoder and classifier head.

Shapes: B clips, N tokens, V visible, M decoded, S scored, D encoder width, E decoder width,
P values of a tubelet.
"""

import torch
import torch.nn as nn
from torch import Tensor

from vmae_fast import ops
from vmae_fast.masking import Mask
from vmae_fast.nn import JointSpaceTimeBlock, Linear, TubeletEmbed

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


def _init_weights(module: nn.Module) -> None:
    # Xavier over the fused qkv weight, as published: separate q, k, v would start 1.41x wider.
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _blocks(
    config: VideoMAEConfig, depth: int, width: int, heads: int, hidden: int
) -> nn.ModuleList:
    rates = [config.drop_path * index / max(depth - 1, 1) for index in range(depth)]
    return nn.ModuleList(
        JointSpaceTimeBlock(
            width,
            heads,
            hidden,
            qkv_bias=config.qkv_bias,
            init_values=config.init_values,
            drop_path=rate,
            eps=config.norm_eps,
        )
        for rate in rates
    )


class Encoder(nn.Module):
    """ViT over the visible tokens only.

    Args:
        config: see :class:`VideoMAEConfig`.
    """

    pos_embed: Tensor

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.patch_embed = TubeletEmbed(
            config.in_channels, config.width, config.tubelet, mean=config.mean, std=config.std
        )
        self.blocks = _blocks(
            config, config.depth, config.width, config.heads, config.encoder_hidden
        )
        eps = config.norm_eps
        self.norm = nn.LayerNorm(config.width, eps=eps) if config.final_norm else nn.Identity()
        self.register_buffer(
            "pos_embed", sinusoid_table(config.num_tokens, config.width), persistent=False
        )
        self.blocks.apply(_init_weights)

    def forward(self, video: Tensor, visible_idx: Tensor | None = None) -> Tensor:
        """Encode ``(B, C, T, H, W)`` to ``(B, V, D)``, all N tokens when visible_idx is None."""
        x_BVD = self.patch_embed(video, self.pos_embed, visible_idx)
        for block in self.blocks:
            x_BVD = block(x_BVD)
        return self.norm(x_BVD)


class Decoder(nn.Module):
    """Narrow ViT over visible and mask tokens, and the pixel head on the scored ones.

    Args:
        config: see :class:`VideoMAEConfig`.
    """

    pos_embed: Tensor

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.blocks = _blocks(
            config, config.decoder_depth, width, config.decoder_heads, config.decoder_hidden
        )
        self.norm = nn.LayerNorm(width, eps=config.decoder_norm_eps)
        self.head = Linear(width, config.tubelet_values)
        self.register_buffer(
            "pos_embed", sinusoid_table(config.num_tokens, width), persistent=False
        )
        self.apply(_init_weights)

    def forward(self, visible: Tensor, mask_token: Tensor, mask: Mask) -> Tensor:
        """Predict the scored tokens: ``head`` of :meth:`features`.

        Args:
            visible: ``(B, V, E)``.
            mask_token: ``(E,)``.
            mask: visible, decoded and scored tokens.

        Returns:
            ``(B, S, P)`` in the order of ``mask.target_idx``.
        """
        return self.head(self.features(visible, mask_token, mask))

    def features(self, visible: Tensor, mask_token: Tensor, mask: Mask) -> Tensor:
        """What the head reads, ``(B, S, E)``; arguments as in :meth:`forward`."""
        x_BNE = ops.decoder_tokens(
            visible, mask_token, self.pos_embed, mask.visible_idx, mask.decode_idx
        )
        *blocks, last = self.blocks
        for block in blocks:
            x_BNE = block(x_BNE)
        # Nothing reads the other tokens after the last block: they are its keys only.
        x_BSE = last(x_BNE, mask.num_scored)
        return self.norm(x_BSE)


class ClassifierHead(nn.Module):
    """Head of a fine-tuned model: mean over tokens, norm, linear.

    Args:
        config: see :class:`VideoMAEConfig`. Where the encoder keeps its final norm, the head
            reads the first token instead of the mean, as Hugging Face's class does.
    """

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.fc_norm = (
            None if config.final_norm else nn.LayerNorm(config.width, eps=config.fc_norm_eps)
        )
        self.head = nn.Linear(config.width, config.num_classes)
        _init_weights(self.head)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, N, D)`` to ``(B, classes)`` logits."""
        pooled = tokens[:, 0] if self.fc_norm is None else self.fc_norm(tokens.mean(dim=1))
        return self.head(pooled)
