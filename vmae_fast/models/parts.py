"""VideoMAE's encoder, decoder and classifier head.

Shapes: B clips, N tokens, V visible, M decoded, S scored, D encoder width, E decoder width,
P values of a tubelet.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from vmae_fast import ops, profiling
from vmae_fast.masking import Mask
from vmae_fast.nn import (
    JointSpaceTimeBlock,
    LayerNorm,
    Linear,
    Residual,
    SharedTokens,
    TubeletEmbed,
)

from .config import VideoMAEConfig
from .positions import position_table


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


def _through(part: str, number: int, block: nn.Module, stream: Residual, *rest: Any) -> Residual:
    """The stream after a block; its ranges have its name, by the part of the model it is in."""
    if not profiling.enabled():
        return _called(block, stream, *rest)
    name = f"{part}.blocks.{number}"
    with profiling.span(name):
        shared = rest[1] if rest else None
        given = profiling.backward_ends(name, *stream, *(shared or ()))
        if shared is not None:
            rest = (rest[0], SharedTokens(*given[3:]))
        stream = _called(block, Residual(*given[:3]), *rest)
        return Residual(*profiling.backward_begins(name, *stream))


def _called(block: nn.Module, stream: Residual, *rest: Any) -> Residual:
    """The stream after a block, which may be one that was put in our block's place or around it."""
    if isinstance(block, JointSpaceTimeBlock):
        return block(stream, *rest)
    num_queries = rest[0] if rest else None
    return Residual(block(stream.sum(), *([] if num_queries is None else [num_queries])))


class Encoder(nn.Module):
    """ViT over the visible tokens only.

    Args:
        config: see :class:`VideoMAEConfig`.

    Attributes:
        residual_dtype: of the residual stream; None is what embedding gives, fp32 under autocast.
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
        self.norm = LayerNorm(config.width, eps=eps) if config.final_norm else nn.Identity()
        self.residual_dtype: torch.dtype | None = None
        self.register_buffer("pos_embed", position_table(config, config.width), persistent=False)
        self.blocks.apply(_init_weights)

    def forward(self, video: Tensor, visible_idx: Tensor | None = None) -> Tensor:
        """Encode ``(B, C, T, H, W)`` to ``(B, V, D)``, all N tokens when visible_idx is None."""
        pos_embed = self.pos_embed.to(self.residual_dtype or self.pos_embed.dtype)
        x_BVD = self.patch_embed(video, pos_embed, visible_idx)
        if self.residual_dtype not in (None, x_BVD.dtype):
            raise ValueError(
                f"residual_dtype {self.residual_dtype} goes with autocast to it, but the embedding "
                f"is computed in {x_BVD.dtype}"
            )
        stream = Residual(x_BVD)
        for number, block in enumerate(self.blocks):
            stream = _through("encoder", number, block, stream)
        return self.norm(stream if isinstance(self.norm, LayerNorm) else stream.sum())


class Decoder(nn.Module):
    """Narrow ViT over visible and mask tokens, and the pixel head on the scored ones.

    Args:
        config: see :class:`VideoMAEConfig`.

    Attributes:
        residual_dtype: of the residual stream; None is the widest of what comes in, fp32 under
            autocast.
    """

    pos_embed: Tensor

    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.blocks = _blocks(
            config, config.decoder_depth, width, config.decoder_heads, config.decoder_hidden
        )
        self.norm = LayerNorm(width, eps=config.decoder_norm_eps)
        self.residual_dtype: torch.dtype | None = None
        self.head = Linear(width, config.tubelet_values)
        self.register_buffer("pos_embed", position_table(config, width), persistent=False)
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
        dtype = self.residual_dtype
        pos_embed = self.pos_embed if dtype is None else self.pos_embed.to(dtype)
        if dtype is not None:
            visible, mask_token = visible.to(dtype), mask_token.to(dtype)
        tokens = (visible, mask_token, pos_embed, mask.visible_idx)
        stream = Residual(ops.decoder_tokens(*tokens, mask.decode_idx))
        shared = self._shared(*tokens, mask.decode_idx)
        for number, block in enumerate(self.blocks):
            # Nothing reads the other tokens after the last block: they are its keys only.
            num_queries = mask.num_scored if number == len(self.blocks) - 1 else None
            stream = _through("decoder", number, block, stream, num_queries, shared)
            shared = None
        return self.norm(stream, for_product=True)

    def _shared(
        self, visible: Tensor, mask_token: Tensor, pos_embed: Tensor, *idx: Tensor
    ) -> SharedTokens | None:
        """For the first block: a mask token is the same wherever it stands in the batch.

        None where the batch has fewer of them than there are positions. Nothing random, dropout
        say, may come between these tokens and that block's norm.
        """
        visible_idx, decode_idx = idx
        if pos_embed.shape[0] >= decode_idx.shape[0] * decode_idx.shape[1]:
            return None
        seen = ops.decoder_tokens(visible, mask_token, pos_embed, visible_idx, decode_idx[:, :0])
        return SharedTokens(seen, mask_token + pos_embed, decode_idx)


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
