"""What GPUs have, by their data sheets, and what of it a training step may hope for."""

from __future__ import annotations

from dataclasses import dataclass

# Of the published peaks: what large products, copies and attention are expected to reach. Shares
# that an H200 is known to give a large product (790 of 989 TFLOP/s), a copy (4.3 of 4.8 TB/s) and
# attention of long sequences, forward and backward together (390 of 989).
MATMUL_SHARE, COPY_SHARE, ATTENTION_SHARE = 0.80, 0.90, 0.40
# Of these rates: what a whole step of many sizes of products and passes gets. A guess.
STEP_SHARE = 0.85
# Of a link's published rate: what collectives reach. A guess; NCCL's own model takes rings among
# eight A100s for at most 235 of 300 GB/s.
LINK_SHARE = 0.70
# Between nodes, of one GPU, where nothing is said: 400 Gbit/s for a node of eight. Clouds sell
# such nodes with 400 (with A100s) to 3200 (with H100s); those with less are rare.
NETWORK_GB_PER_S = 6.25


@dataclass(frozen=True)
class Link:
    """What connects the GPUs of a machine.

    Attributes:
        name: in words.
        gb_per_s: each way, of one GPU, published.
        caveat: what slows it down, in words.
    """

    name: str
    gb_per_s: float
    caveat: str = ""


# Sources: NVIDIA's data sheets, which add up both ways; PCIe with 16 lanes. Bridges that join two
# cards only are not counted: a ring over more goes by PCIe. Consumer cards have no access to each
# other's memory by it: NCCL logs 24 GB/s to the processor for RTX 4090, and 10 to the other one.
_BY_HOST = "less from socket to socket or through the machine's memory"
LINKS: dict[str, Link] = {
    "pcie4": Link("PCIe 4.0", 32, _BY_HOST),
    "pcie5": Link("PCIe 5.0", 64, _BY_HOST),
    "nvlink3": Link("NVLink 3", 300),
    "nvlink4": Link("NVLink 4", 450),
    "nvlink5": Link("NVLink 5", 900),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as its driver calls it, or a part of that.
        memory_gib: that programs can have.
        bandwidth_gb_per_s: of its memory, published.
        bf16_tflop_per_s: dense products with fp32 sums, published.
        fp32_tflop_per_s: published, without TF32.
        link: between those of a machine, of :data:`LINKS`.
    """

    name: str
    memory_gib: float
    bandwidth_gb_per_s: float
    bf16_tflop_per_s: float
    fp32_tflop_per_s: float
    link: str = "pcie4"

    def tflop_per_s(self, precision: str) -> float:
        """The published peak of products in "bf16" or "fp32"."""
        return self.bf16_tflop_per_s if precision == "bf16" else self.fp32_tflop_per_s


# Sources: NVIDIA's data sheets. Consumer cards: products with fp32 sums run at half the rate.
GPUS: dict[str, Gpu] = {
    "a10": Gpu("A10", 22, 600, 125, 31.2),
    "a5000": Gpu("RTX A5000", 24, 768, 111, 27.8),
    "a6000": Gpu("RTX A6000", 48, 768, 155, 38.7),
    "a100-40": Gpu("A100-SXM4-40GB", 39.5, 1555, 312, 19.5, "nvlink3"),
    "a100": Gpu("A100-SXM4-80GB", 79, 2039, 312, 19.5, "nvlink3"),
    "l4": Gpu("L4", 22, 300, 121, 30.3),
    "l40s": Gpu("L40S", 44.5, 864, 362, 91.6),
    "rtx3090": Gpu("RTX 3090", 24, 936, 71, 35.6),
    "rtx4090": Gpu("RTX 4090", 24, 1008, 165, 82.6),
    "rtx5090": Gpu("RTX 5090", 31.5, 1792, 209, 104.8, "pcie5"),
    "h100-pcie": Gpu("H100 PCIe", 79, 2000, 756, 51.2, "pcie5"),
    "h100": Gpu("H100 80GB HBM3", 79, 3350, 989, 67, "nvlink4"),
    "h200": Gpu("H200", 139.8, 4800, 989, 67, "nvlink4"),
    "b200": Gpu("B200", 178, 8000, 2250, 75, "nvlink5"),
}


@dataclass(frozen=True)
class Rates:
    """What products, attention and passes over memory run at.

    Attributes:
        matmul_tflop_per_s, attention_tflop_per_s, copy_gb_per_s: the rates.
        source: where they are from, in words.
    """

    matmul_tflop_per_s: float
    attention_tflop_per_s: float
    copy_gb_per_s: float
    source: str

    @classmethod
    def assumed(cls, gpu: Gpu, precision: str) -> Rates:
        """Shares of the published peaks."""
        peak = gpu.tflop_per_s(precision)
        return cls(
            MATMUL_SHARE * peak,
            ATTENTION_SHARE * peak,
            COPY_SHARE * gpu.bandwidth_gb_per_s,
            f"assumed: {MATMUL_SHARE:.0%} of the published {peak:g} TFLOP/s for products, "
            f"{ATTENTION_SHARE:.0%} for attention, {COPY_SHARE:.0%} of {gpu.bandwidth_gb_per_s:g} "
            "GB/s",
        )


def find_gpu(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        ValueError: it is not there; the message lists those that are.
    """
    key = name.lower().replace("_", "-").removeprefix("nvidia-")
    if key not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[key]
