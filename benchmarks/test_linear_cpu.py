"""fp32 linear layers of the presets on this CPU: torch's matmul against a 1x1 convolution.

Forward and backward at the step's own shapes, interleaved; decides `kernels/linear.py`. Operations
are those of the three products; percentages are of what a large fp32 product reaches.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from rows import DEVICE, rounded
from timing import ceilings

ROUNDS = 9
# The first ones of them, not counted.
WARM_UPS = 2
# (rows, in, out): base with 2 clips (encoder, decoder), tiny with 16.
SHAPES = [
    (320, 768, 2304),
    (320, 3072, 768),
    (3136, 384, 1152),
    (3136, 1536, 384),
    (448, 128, 384),
    (448, 512, 128),
    (4096, 64, 192),
    (4096, 256, 64),
]


def matmul(x, weight, bias):
    return F.linear(x, weight, bias)


def convolution(x, weight, bias):
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(rows, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(x.shape[0], -1)


def test_linear(benchmark, record):
    best = ceilings(DEVICE)
    figures = {
        "title": "Linear layers in fp32: a product against a 1x1 convolution",
        "what": "forward and backward, fp32",
        "ceilings": best,
        "shapes": [measure(*shape, best["matmul_tflop_per_s"]) for shape in SHAPES],
    }
    record("linear_fp32", rounded(figures))
    benchmark.extra_info.update(rounded(figures))
    call = step_of(convolution, *inputs(*SHAPES[0]))
    benchmark.pedantic(call, rounds=3)


def measure(rows, width, out, best_tflop_per_s):
    """Operations of a shape, and the rate of both ways with its share of a large product's."""
    given = inputs(rows, width, out)
    times_s = {matmul: [], convolution: []}
    for _ in range(ROUNDS):
        for way, measured in times_s.items():
            call = step_of(way, *given)
            start = time.perf_counter()
            call()
            measured.append(time.perf_counter() - start)
    gflop = 6 * rows * width * out / 1e9
    figures = {"rows_in_out": [rows, width, out], "gflop": gflop}
    speed = {way: gflop / statistics.median(t[WARM_UPS:]) for way, t in times_s.items()}
    for way, gflop_per_s in speed.items():
        figures |= {
            f"{way.__name__}_gflop_per_s": gflop_per_s,
            f"{way.__name__}_percent_of_matmul": gflop_per_s / best_tflop_per_s / 10,
        }
    return figures | {"speedup": speed[convolution] / speed[matmul]}


def inputs(rows, width, out):
    """What the layer takes, and an upstream gradient."""
    sizes = ((rows, width), (out, width), (out,))
    return *(torch.randn(size, requires_grad=True) for size in sizes), torch.randn(rows, out)


def step_of(way, x, weight, bias, upstream):
    """Both passes of a way."""
    leaves = (x, weight, bias)
    return lambda: torch.autograd.grad(way(*leaves), leaves, upstream)
