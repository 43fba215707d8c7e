"""What several GPUs send each other in a training step, and how long the step waits for it.

Collectives go around rings, as NCCL's do: an all-gather or a reduce-scatter of S bytes over n GPUs
sends (n - 1) / n * S from each of them, an all-reduce twice that. Over several nodes there are as
many rings as a node has GPUs, and each crosses the network once at every node; so a GPU sends as
quickly as the slower of its link within the node and of all the node's network together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .gpus import LINK_SHARE, LINKS, NETWORK_GB_PER_S, Gpu
from .settings import Settings
from .units import units_of

# DistributedDataParallel's bucket_cap_mb: gradients are sent as soon as so many are there.
BUCKET_BYTES = 25 << 20
# Microseconds of a collective, and of each hop of its ring within a node and between nodes: what
# NCCL counts on (src/graph/tuning.cc, ring, "simple", over PCIe; NVLink's hops take 3.4).
_CALL_US, _NODE_HOP_US, _NETWORK_HOP_US = 8.4, 5.7, 14.0
# Bytes of a weight as it is kept, and of a gradient as it is summed.
_WEIGHT = _GRADIENT = 4


@dataclass(frozen=True)
class Links:
    """What GPUs are connected by.

    Attributes:
        gpus_per_node: that one machine has.
        node_gb_per_s, network_gb_per_s: each way, of one GPU, within a machine and between
            machines.
        source: where they are from, in words.
    """

    gpus_per_node: int
    node_gb_per_s: float
    network_gb_per_s: float
    source: str

    @classmethod
    def of(
        cls,
        gpu: Gpu,
        gpus_per_node: int = 8,
        node_gb_per_s: float | None = None,
        network_gb_per_s: float | None = None,
    ) -> Links:
        """Those of a GPU, or what is known better; None is not known.

        Raises:
            ValueError: a number that cannot be.
        """
        if gpus_per_node < 1:
            raise ValueError(f"gpus_per_node must be at least 1, got {gpus_per_node}")
        for name, value in (("node_gbs", node_gb_per_s), ("network_gbs", network_gb_per_s)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 GB/s, got {value:g}")
        link = LINKS[gpu.link]
        words = [
            f"{link.gb_per_s:g} GB/s each way within a node "
            f"({', '.join(filter(None, (link.name, 'published', link.caveat)))})"
            if node_gb_per_s is None
            else f"{node_gb_per_s:g} GB/s each way within a node (given)",
            f"{NETWORK_GB_PER_S:g} between nodes (assumed; --network-gbs says otherwise)"
            if network_gb_per_s is None
            else f"{network_gb_per_s:g} between nodes (given)",
        ]
        return cls(
            gpus_per_node,
            link.gb_per_s if node_gb_per_s is None else node_gb_per_s,
            NETWORK_GB_PER_S if network_gb_per_s is None else network_gb_per_s,
            f"a GPU's links {', '.join(words)}, of which {LINK_SHARE:.0%} is counted on",
        )

    def nodes(self, gpus: int) -> int:
        """Machines that hold so many GPUs."""
        return math.ceil(gpus / self.gpus_per_node)

    def rate_gb_per_s(self, gpus: int) -> float:
        """What each of some GPUs sends in a ring over all of them."""
        nodes = self.nodes(gpus)
        alike = gpus // nodes
        rates = [self.node_gb_per_s] * (alike > 1)
        rates += [alike * self.network_gb_per_s] * (nodes > 1)
        return LINK_SHARE * min(rates, default=math.inf)

    def ring_ms(self, sent_bytes: float, gpus: int, calls: int = 1) -> float:
        """Of all-gathers or reduce-scatters in which each of some GPUs sends that much."""
        if gpus == 1:
            return 0.0
        crossing = self.nodes(gpus) - (self.nodes(gpus) == 1)
        hops_us = crossing * _NETWORK_HOP_US + (gpus - 1 - crossing) * _NODE_HOP_US
        return 1e-3 * calls * (_CALL_US + hops_us) + sent_bytes / (1e6 * self.rate_gb_per_s(gpus))


@dataclass(frozen=True)
class Exchange:
    """What one GPU sends in an optimiser step, and what that takes.

    Attributes:
        sent_bytes: by what it is; nothing where there is one GPU.
        busy_ms: how long links are at it.
        exposed_ms: how long computing waits for it.
    """

    sent_bytes: dict[str, int]
    busy_ms: float
    exposed_ms: float


def exchange_of(
    settings: Settings, links: Links, backward_ms: float, forward_ms: float
) -> Exchange:
    """The exchange of a step.

    Args:
        settings: of the step.
        links: between its GPUs.
        backward_ms, forward_ms: computing of one batch on one GPU.
    """
    if settings.gpus == 1:
        return Exchange({}, 0.0, 0.0)
    if settings.shards == 1:
        return _of_ddp(settings, links, backward_ms)
    return _of_fsdp(settings, links, backward_ms, forward_ms)


def copied_bytes(settings: Settings) -> int:
    """What one GPU reads and writes of its own memory in a step, to send and to receive."""
    gpus, accumulate, units = settings.gpus, settings.accumulate, units_of(settings.config)
    if gpus == 1:
        return 0
    if settings.shards == 1:
        # Gradients go into buckets, and back.
        return 2 * 2 * _GRADIENT * units.values
    itemsize = settings.gathered_itemsize
    low = itemsize < _WEIGHT
    # The GPU's part is cast and put among the others', then all are taken apart.
    own = (_WEIGHT + itemsize) * low + 2 * itemsize
    gathered = units.root.shard(gpus) + 2 * sum(block.shard(gpus) for block in units.blocks)
    moved = accumulate * gathered * (own + gpus * 2 * itemsize)
    kept = itemsize
    if accumulate > 1:
        # The first batch's gradients are cast, the others' added; in fp32 they are as on one GPU.
        added = itemsize + 2 * _GRADIENT
        moved += units.values * (itemsize + _GRADIENT + (accumulate - 1) * added) * low
        kept = _GRADIENT
    # Into what is scattered, filled up to whole parts.
    return moved + units.values * kept + gpus * units.shard(gpus) * _GRADIENT


def _of_ddp(settings: Settings, links: Links, backward_ms: float) -> Exchange:
    """Gradients are all-reduced by buckets while the last batch's backward pass goes on."""
    gpus = settings.gpus
    size = _GRADIENT * units_of(settings.config).values
    last = min(size, BUCKET_BYTES)

    def all_reduce_ms(size_bytes: int) -> float:
        calls = 2 * math.ceil(size_bytes / BUCKET_BYTES)
        return links.ring_ms(2 * (gpus - 1) / gpus * size_bytes, gpus, calls)

    hidden, shown = all_reduce_ms(size - last), all_reduce_ms(last)
    return Exchange(
        {"gradients, all-reduced": round(2 * (gpus - 1) / gpus * size)},
        hidden + shown,
        max(hidden - backward_ms, 0.0) + shown,
    )


def _of_fsdp(settings: Settings, links: Links, backward_ms: float, forward_ms: float) -> Exchange:
    """Weights are gathered ahead of each block, gradients scattered behind each.

    Nothing hides the first gathers of a pass, nor the last gradients, which are the root's.
    """
    gpus, accumulate = settings.gpus, settings.accumulate
    units = units_of(settings.config)

    def ring_ms(values: int, itemsize: int, calls: int = 1) -> float:
        return links.ring_ms((gpus - 1) * values * itemsize, gpus, calls)

    # Values of a GPU's part.
    root, shards = units.root.shard(gpus), [block.shard(gpus) for block in units.blocks]
    itemsize, count = settings.gathered_itemsize, len(shards) - 1
    root_ms, first, last = (ring_ms(one, itemsize) for one in (root, shards[0], shards[-1]))
    after_first = ring_ms(sum(shards[1:]), itemsize, count)
    before_last = ring_ms(sum(shards[:-1]), itemsize, count)
    scattered = ring_ms(sum(shards), _GRADIENT, count + 1)
    end = ring_ms(root, _GRADIENT)
    forward = root_ms + first + max(after_first - forward_ms, 0.0)
    backward = last + max(before_last - backward_ms, 0.0)
    of_last = last + max(before_last + scattered - backward_ms, 0.0) + end
    gathered = root + 2 * sum(shards)
    return Exchange(
        {
            "weights, gathered": accumulate * (gpus - 1) * gathered * itemsize,
            "gradients, scattered": (gpus - 1) * (root + sum(shards)) * _GRADIENT,
        },
        accumulate * (root_ms + first + after_first + before_last + last) + scattered + end,
        accumulate * forward + (accumulate - 1) * backward + of_last,
    )
