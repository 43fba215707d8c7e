"""Rows of figures: what is timed of an op, and what is kept of it.

Directions:

- forward: with gradients on, as in a training step, so what the backward pass needs is kept;
- backward: that pass alone, torch.autograd.grad again and again after one forward pass;
- forward and backward: both, anew each time;
- evaluation: forward without gradients.

Where a CUDA C++ kernel has a Triton kernel for a twin, both are timed in the same run: the row
whose name ends in "cuda" has "triton" among its peers.
"""

from contextlib import contextmanager
from functools import partial

import torch
from environment import device_name
from targets import DEVICE as TARGET_DEVICE
from targets import TARGETS
from timing import ceilings, copy_of, time_ways

from vmae_fast import ops
from vmae_fast.ops import _extension

# Functions of the extension that launch a kernel.
CUDA_FUNCTIONS = ("short_attention", "short_attention_backward", "masked_mse")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def without_cuda_kernels():
    """Why the CUDA C++ kernels cannot run here, in words; "" where they can."""
    return _extension.why_not(DEVICE) if DEVICE.type == "cuda" else "needs a GPU"


@contextmanager
def extension_calls():
    """Names of the extension's functions that launch something while the context lasts."""
    module, names = _extension.extension(), []
    functions = {name: getattr(module, name) for name in CUDA_FUNCTIONS if hasattr(module, name)}

    def noting(name):
        return lambda *given, **more: (names.append(name), functions[name](*given, **more))[1]

    try:
        for name in functions:
            setattr(module, name, noting(name))
        yield names
    finally:
        for name, function in functions.items():
            setattr(module, name, function)


def forward(function, _):
    return lambda batch: lambda: function(batch)


def evaluation(function, _):
    return lambda batch: torch.no_grad()(lambda: function(batch))


def backward(function, leaves):
    def prepare(batch):
        out = function(batch)
        wanted = [getattr(batch, leaf) for leaf in leaves]
        upstream = upstream_of(out)
        return lambda: torch.autograd.grad(out, wanted, upstream, retain_graph=True)

    return prepare


def forward_and_backward(function, leaves):
    def prepare(batch):
        wanted = [getattr(batch, leaf) for leaf in leaves]
        upstream = upstream_of(function(batch))
        return lambda: torch.autograd.grad(function(batch), wanted, upstream)

    return prepare


def upstream_of(out):
    """Random gradients of what a function returns, a tensor or several."""
    if isinstance(out, torch.Tensor):
        return torch.randn_like(out)
    return [torch.randn_like(one) for one in out]


def name_of(direction):
    """The direction in words."""
    return direction.__name__.replace("_", " ")


def in_context(way, context):
    """The same way with ``context()`` around each call and what is prepared for it."""

    def prepare(batch):
        with context():
            call = way(batch)

        def in_it():
            with context():
                return call()

        return in_it

    return prepare


def by_backend(way, name):
    """The same way by a backend of the ops, in either pass."""
    return in_context(way, partial(ops.backend, name))


def timed(ways, sets, moved_bytes):
    """A timing by name of each way and of "copy", which moves as many bytes; interleaved."""
    return time_ways({**ways, "copy": copy_of(moved_bytes, DEVICE)}, sets, DEVICE)


def row_of(name, direction, ours, copy, peers, moved_bytes, flops=0, dtype=None):
    """One row, from the timings of ours, of a copy of as many bytes and of the peers.

    The operations stand with their share of what a product reaches where ``dtype``, theirs, is
    that of the product that was measured.
    """
    best = ceilings(DEVICE)
    gb_per_s, tflop_per_s = moved_bytes / ours.time_ms / 1e6, flops / ours.time_ms / 1e9
    row = {
        "op": name,
        "direction": name_of(direction),
        **as_figures(ours),
        "bytes": moved_bytes,
        "gb_per_s": gb_per_s,
        "percent_of_copy": 100 * gb_per_s / best["copy_gb_per_s"],
        "copy_of_as_many_bytes_ms": copy.time_ms,
        "peers": {name: as_figures(timing) for name, timing in peers.items()},
        "speedup": {name: timing.time_ms / ours.time_ms for name, timing in peers.items()},
    }
    if flops:
        row |= {"flops": flops, "tflop_per_s": tflop_per_s}
    if flops and str(dtype) == f"torch.{best['matmul_dtype']}":
        row["percent_of_matmul"] = 100 * tflop_per_s / best["matmul_tflop_per_s"]
    return row


def as_figures(timing):
    figures = {"time_ms": timing.time_ms, "how": timing.how}
    return figures | ({"why": timing.why} if timing.why else {})


def judged(row):
    """A row, rounded, with its targets where this is the device they are for."""
    on_target = TARGET_DEVICE in device_name()
    targets = TARGETS.get((row["op"], row["direction"]), ()) if on_target else ()
    return rounded(row | {"targets": [target.judge(row) for target in targets]})


def rounded(figures):
    """Four digits of every float, at any depth."""
    if isinstance(figures, dict):
        return {key: rounded(value) for key, value in figures.items()}
    if isinstance(figures, list):
        return [rounded(value) for value in figures]
    return float(f"{figures:.4g}") if isinstance(figures, float) else figures
