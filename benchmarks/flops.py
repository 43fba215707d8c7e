"""Floating-point operations of models and blocks, counted by torch's counter without computing.

Everything is on the meta device, shapes without data, so that the giant model takes seconds. The
counter knows matrix products and convolutions, a multiply-add being two operations, and our ops by
the formulas that they register. Attention by PyTorch's fused function it takes as nothing on a CPU;
the plain model's is written out, or by our op.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn as nn
from plain_videomae import Attend, plain_loss, written_out
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vmae_fast import Mask, VideoMAE, VideoMAEConfig, ops
from vmae_fast.nn import DividedSpaceTimeBlock, JointSpaceTimeBlock, TubeletEmbed

# Parts of a pretraining model, in the order of the forward pass.
EMBED, ENCODER, BETWEEN, FIRST, MIDDLE, LAST, HEAD = ITEMS = (
    "patch embedding",
    "encoder blocks",
    "encoder to decoder",
    "decoder, first block",
    "decoder, middle blocks",
    "decoder, last block",
    "pixel head",
)
# Attention over all tokens; along time and then across space; within each row of tubelets alone.
ATTENTIONS = ("joint", "divided", "space")
# Operations of a pair of query and key for each value of the width: 2 for the logit, 2 for the sum.
FLOP_PER_PAIR = 4
FLOP_PER_MAC = 2

ByItem = dict[str, float]


def model_of(size: str | VideoMAEConfig, **settings: Any) -> VideoMAE:
    """A model without data."""
    with torch.device("meta"):
        return VideoMAE(size, **settings)


def batch_of(config: VideoMAEConfig, clips: int) -> tuple[Tensor, Mask]:
    """Clips and masks without data; the counts of tokens are those of any mask."""
    shape = (clips, config.in_channels, config.frames, *config.size)
    video = torch.empty(shape, dtype=torch.uint8, device="meta")
    return video, config.masking(torch.arange(clips, device="meta"))


def plain_forward(model: VideoMAE, clips: int, attend: Attend = written_out) -> ByItem:
    """Operations of the plain model's forward pass by item, for a clip."""
    video, mask = batch_of(model.config, clips)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        weights = _Watched(model, counter)
        plain_loss(weights, model.config, video, mask, attend=attend)
        found = weights.by_item()
    return {item: found[item] / clips for item in ITEMS}


def our_forward(model: VideoMAE, clips: int) -> ByItem:
    """Operations of a forward pass of ours by item, for a clip of a batch of so many.

    The batch matters: what mask tokens have in common is computed once for all of its clips.
    """
    video, mask = batch_of(model.config, clips)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(video, mask)
    counts, found = counter.get_flop_counts(), Counter[str]()
    blocks = [
        f"{part}.blocks.{index}"
        for part, depth in (
            ("encoder", model.config.depth),
            ("decoder", model.config.decoder_depth),
        )
        for index in range(depth)
    ]
    for name in ("encoder.patch_embed", *blocks, "encoder_to_decoder"):
        found[item_of(name, model.config)] += sum(counts[f"VideoMAE.{name}"].values())
    # Computed with the loss, outside of any module's call.
    found[HEAD] = counts["Global"][torch.ops.vmae_fast.linear_masked_mse]
    return {item: found[item] / clips for item in ITEMS}


def step(model: nn.Module, config: VideoMAEConfig, clips: int) -> float:
    """Operations of a forward and backward pass for a clip: of VideoMAE or PlainVideoMAE."""
    video, mask = batch_of(config, clips)
    with FlopCounterMode(display=False) as counter:
        model(video, mask).loss.backward()
    model.zero_grad()
    return counter.get_total_flops() / clips


def item_of(name: str, config: VideoMAEConfig) -> str:
    """The item that a module or parameter belongs to; "" for norms between them and mask token."""
    if name.startswith("decoder.blocks."):
        index = int(name.split(".")[2])
        if index == config.decoder_depth - 1:
            return LAST
        return MIDDLE if index else FIRST
    starts = {
        "encoder.patch_embed": EMBED,
        "encoder.blocks.": ENCODER,
        "encoder_to_decoder": BETWEEN,
        "decoder.head": HEAD,
    }
    return next((item for start, item in starts.items() if name.startswith(start)), "")


class _Watched(dict[str, Tensor]):
    """A model's weights, which note what was counted by the time each was asked for.

    The plain model calls functions and no modules, but every product comes after its weight.
    """

    def __init__(self, model: VideoMAE, counter: FlopCounterMode) -> None:
        super().__init__(model.named_parameters())
        self._config, self._counter = model.config, counter
        self._asked: list[tuple[str, int]] = []

    def __getitem__(self, name: str) -> Tensor:
        self._asked.append((name, self._counter.get_total_flops()))
        return super().__getitem__(name)

    def by_item(self) -> Counter[str]:
        """Operations by the item whose weight was asked for last."""
        found, ends = Counter[str](), [count for _, count in self._asked[1:]]
        ends.append(self._counter.get_total_flops())
        for (name, start), end in zip(self._asked, ends, strict=True):
            found[item_of(name, self._config)] += end - start
        return found


def attention_flops(kind: str, t: int, positions: int, width: int, heads: int) -> tuple[int, int]:
    """Operations of attention alone on a clip of t rows, forward and backward.

    Args:
        kind: of ATTENTIONS.
        t: rows of tubelets.
        positions: tokens of a row.
        width: D.
        heads: H.
    """
    qkv = torch.empty(1, t * positions, 3 * width, device="meta", requires_grad=True)
    axes = {"joint": (), "divided": ops.ATTENTION_AXES, "space": ("space",)}[kind]
    with FlopCounterMode(display=False) as counter:
        outs = [ops.divided_attention(qkv, heads, (t, positions), axis) for axis in axes]
        outs = outs or [ops.attention(qkv, heads)]
        forward = counter.get_total_flops()
        torch.autograd.backward([out.sum() for out in outs])
    return forward, counter.get_total_flops() - forward


def block_of(kind: str, config: VideoMAEConfig) -> nn.Module:
    """An encoder block without data; one of space alone is the joint block, called by row."""
    blocks = DividedSpaceTimeBlock if kind == "divided" else JointSpaceTimeBlock
    with torch.device("meta"):
        return blocks(config.width, config.heads, config.encoder_hidden)


def through(kind: str, block: nn.Module, x: Tensor, t: int) -> Tensor:
    """``(B, N, D)`` after a block; N tokens are t rows."""
    if kind == "divided":
        return block(x, (t, x.shape[1] // t))
    if kind == "space":
        return block(x.unflatten(1, (t, -1)).flatten(0, 1)).view_as(x)
    return block(x)


def block_flops(kind: str, t: int, config: VideoMAEConfig) -> ByItem:
    """Operations of an encoder block's forward pass on a clip of t rows, by sort of product."""
    _, h, w = config.grid
    block = block_of(kind, config)
    x = torch.empty(1, t * h * w, config.width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        through(kind, block, x, t)
    return by_sort(counter)


def encoder_flops(kind: str, config: VideoMAEConfig) -> tuple[ByItem, int]:
    """Operations of a whole encoder's forward pass on all tokens of a clip; and its parameters."""
    with torch.device("meta"):
        embed = TubeletEmbed(config.in_channels, config.width, config.tubelet)
    blocks = [block_of(kind, config) for _ in range(config.depth)]
    video, _ = batch_of(config, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = embed(video)
        for block in blocks:
            x = through(kind, block, x, config.grid[0])
    parameters = sum(p.numel() for part in (embed, *blocks) for p in part.parameters())
    return by_sort(counter), parameters


def by_sort(counter: FlopCounterMode) -> ByItem:
    """What was counted: patch embedding, attention's own products, and linear layers."""
    found = {"patch embedding": 0, "linear layers": 0, "attention": 0}
    for op, count in counter.get_flop_counts()["Global"].items():
        name = str(op)
        sort = "attention" if "attention" in name else "linear layers"
        found["patch embedding" if "tubelet_embed" in name else sort] += count
    return found
