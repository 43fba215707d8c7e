"""fp32 linear layers of the presets on this CPU: torch's matmul against a 1x1 convolution.

Forward and backward at the step's own shapes, interleaved; decides `kernels/linear.py`.
"""

import statistics
import time

import torch
import torch.nn.functional as F

ROUNDS = 9
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
    figures = []
    for rows, width, out in SHAPES:
        x = torch.randn(rows, width, requires_grad=True)
        weight = torch.randn(out, width, requires_grad=True)
        bias = torch.randn(out, requires_grad=True)
        upstream = torch.randn(rows, out)
        times_s = {matmul: [], convolution: []}
        for _ in range(ROUNDS):
            for way, measured in times_s.items():
                start = time.perf_counter()
                way(x, weight, bias).backward(upstream)
                measured.append(time.perf_counter() - start)
                x.grad = weight.grad = bias.grad = None
        gflops = 6 * rows * width * out / 1e9
        speed = {way: gflops / statistics.median(t[2:]) for way, t in times_s.items()}
        figures.append(
            {
                "rows_in_out": [rows, width, out],
                "matmul_gflop_per_s": round(speed[matmul]),
                "convolution_gflop_per_s": round(speed[convolution]),
                "speedup": round(speed[convolution] / speed[matmul], 2),
            }
        )
    record("linear_fp32", {"what": "forward and backward, fp32", "shapes": figures})
    benchmark.pedantic(lambda: convolution(x, weight, bias), rounds=3)
