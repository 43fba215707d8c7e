"""How attention grows: joint, divided and space-only over frames; memory over tokens against eager.

The ops alone, without projections, of which divided attention has twice as many. Divided attention
is one call along time and one across space, each with a qkv of its own, as in a block; space-only
attention is the latter alone. Memory is the peak of one forward and backward pass above its inputs.
plot_attention.py draws what is kept.
"""

import math
import os
import statistics

import torch
from attention_cases import AttentionBatch, Case
from attention_peers import peers_of
from rows import DEVICE, backward, forward, forward_and_backward, rounded
from timing import ceilings, num_sets, peak_memory_bytes, time_ways
from torch.utils.flop_counter import FlopCounterMode

from vmae_fast import ops

CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32
CLIPS, HEADS, HEAD_WIDTH = (8, 12, 64) if CUDA else (1, 3, 64)
POSITIONS = 14 * 14
ROWS = (4, 8, 16)
TOKENS = (784, 1568, 3136, 6272)
# Eager keeps weights and holds logits and both their gradients at once.
MATRICES_OF_EAGER = 4
# Slopes of memory over tokens, log over log: 1 is linear, 2 quadratic.
MOST_OF_LINEAR, LEAST_OF_QUADRATIC = 1.15, 1.6


class Grid:
    """Inputs for t rows of 14 x 14: qkv, which joint attention takes, and qkv_space."""

    def __init__(self, rows, seed):
        self.rows = rows
        case = case_of(rows * POSITIONS)
        self.qkv = AttentionBatch(case, 2 * seed, DTYPE, DEVICE).qkv
        self.qkv_space = AttentionBatch(case, 2 * seed + 1, DTYPE, DEVICE).qkv


def case_of(tokens):
    return Case(CLIPS, tokens, HEADS, HEAD_WIDTH)


def joint(batch):
    return ops.attention(batch.qkv, HEADS)


def divided(batch):
    grid = (batch.rows, POSITIONS)
    return (
        ops.divided_attention(batch.qkv, HEADS, grid, "time"),
        ops.divided_attention(batch.qkv_space, HEADS, grid, "space"),
    )


def space(batch):
    return ops.divided_attention(batch.qkv_space, HEADS, (batch.rows, POSITIONS), "space")


# With what of a grid gets a gradient.
CONTENDERS = {joint: ("qkv",), divided: ("qkv", "qkv_space"), space: ("qkv_space",)}


def pairs_of(contender, rows):
    """Pairs of query and key, of a clip and head."""
    if contender is joint:
        return (rows * POSITIONS) ** 2
    across_space = rows * POSITIONS**2
    return across_space if contender is space else POSITIONS * rows**2 + across_space


def test_attention_curves(benchmark, record):
    over_rows = [figures for rows in ROWS for figures in measure(rows)]
    over_tokens, left_out = memory_over_tokens()
    ours_slope, eager_slope = slope(over_tokens, "ours_mib"), slope(over_tokens, "eager_mib")
    last = {one["attention"]: one for one in over_rows if one["t"] == ROWS[-1]}
    more = {f"joint_over_divided_{figure}_t{ROWS[-1]}": ratio(last, figure) for figure in RATIOS}
    figures = {
        "title": "Joint, divided and space-only attention: time and memory",
        "what": (
            f"attention alone on t x 14 x 14 tokens, B={CLIPS}, {HEADS} heads of {HEAD_WIDTH}, "
            f"{str(DTYPE).removeprefix('torch.')}"
        ),
        **more,
        "ours_memory_slope": ours_slope,
        "eager_memory_slope": eager_slope,
        **({"eager_left_out": left_out} if left_out else {}),
        "ceilings": ceilings(DEVICE),
        "over_rows": over_rows,
        "over_tokens": over_tokens,
    }
    record("attention_curves", rounded(figures))
    benchmark.extra_info.update(rounded(figures))
    assert ours_slope < MOST_OF_LINEAR
    assert eager_slope > LEAST_OF_QUADRATIC
    smallest = Grid(ROWS[0], 0)
    benchmark.pedantic(lambda: joint(smallest), rounds=3, warmup_rounds=1)


RATIOS = ("pairs_m", "forward_ms", "backward_ms", "peak_mib")


def ratio(by_attention, figure):
    return by_attention["joint"][figure] / by_attention["divided"][figure]


def measure(rows):
    """For t rows: pairs, operations, times and memory of all, interleaved."""
    moved_bytes = case_of(rows * POSITIONS).forward_bytes(DTYPE.itemsize)
    sets = [Grid(rows, seed) for seed in range(num_sets(moved_bytes, DEVICE))]
    times = {
        direction: time_ways(
            {one.__name__: direction(one, leaves) for one, leaves in CONTENDERS.items()},
            sets,
            DEVICE,
        )
        for direction in (forward, backward)
    }
    found = []
    for one, leaves in CONTENDERS.items():
        step = forward_and_backward(one, leaves)(sets[0])
        with FlopCounterMode(display=False) as counter:
            step()
        gflop, best = counter.get_total_flops() / 1e9, ceilings(DEVICE)
        both_ms = sum(times[direction][one.__name__].time_ms for direction in times)
        found.append(
            {
                "t": rows,
                "attention": one.__name__,
                "tokens": rows * POSITIONS,
                "pairs_m": pairs_of(one, rows) / 1e6,
                "gflop": gflop,
                "forward_ms": times[forward][one.__name__].time_ms,
                "backward_ms": times[backward][one.__name__].time_ms,
                # Both passes; the product is of the dtype that attention is in.
                "percent_of_matmul": 100 * gflop / both_ms / best["matmul_tflop_per_s"],
                "peak_mib": peak_memory_bytes(step, DEVICE) / 2**20,
            }
        )
    return found


def memory_over_tokens():
    """Peak memory of ours and eager's, None where it would not fit; and which did not, in words."""
    found, left_out = [], []
    eager = peers_of(case_of(TOKENS[0]))["eager"]
    for tokens in TOKENS:
        batch = AttentionBatch(case_of(tokens), 0, DTYPE, DEVICE)
        needed = MATRICES_OF_EAGER * CLIPS * HEADS * tokens**2 * DTYPE.itemsize
        fits = needed < free_bytes()
        if not fits:
            left_out.append(f"{tokens} tokens: some {needed / 2**30:.0f} GiB")
        found.append(
            {
                "tokens": tokens,
                "ours_mib": peak_mib(joint, batch),
                "eager_mib": peak_mib(eager, batch) if fits else None,
            }
        )
    return found, ", ".join(left_out)


def peak_mib(attention, batch):
    step = forward_and_backward(attention, batch.case.leaves)(batch)
    return peak_memory_bytes(step, DEVICE) / 2**20


def free_bytes():
    """Memory that nobody uses, the system's where there is no GPU."""
    if CUDA:
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def slope(rows, figure):
    """The exponent with which a figure grows with the tokens: least squares in logarithms."""
    known = [(math.log(row["tokens"]), math.log(row[figure])) for row in rows if row[figure]]
    return statistics.linear_regression(*zip(*known, strict=True)).slope
