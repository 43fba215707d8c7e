"""Every kernel on small inputs, forward and backward, under NVIDIA's compute-sanitizer.

    python benchmarks/sanitize.py --out DIR    memcheck, then racecheck; their logs in DIR
    python benchmarks/sanitize.py --calls      the calls alone, as the sanitizer runs them

CUDA C++ kernels come first, so that a run that is cut short has seen them. Exit status: 0, 1 where
a tool found an error or did not get to the end, 77 without a GPU or without compute-sanitizer.
"""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tools import GRACE_S, SKIPPED, find_tool, note, notes_in, run_limited, short_name
from torch import Tensor

from vmae_fast import ops
from vmae_fast.kernels import tubelet_embed as embedding
from vmae_fast.nn import JointSpaceTimeBlock

TOOLS = ("memcheck", "racecheck")
LOW = torch.bfloat16
TUBELET, GRID = (2, 16, 16), (2, 2, 3)
RAN = "ran "
# Kernels named in the table.
MOST_PLACES = 4

# Inputs that want gradients, and the op on them.
Made = tuple[list[Tensor], Callable[..., Tensor]]


class Draw:
    """Random tensors on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype = LOW) -> None:
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int) -> Tensor:
        """Noise that wants gradients."""
        return torch.randn(shape, device=self.device).to(self.dtype).requires_grad_()

    def pixels(self) -> Tensor:
        """A uint8 video of two clips on GRID."""
        shape = (2, 3, *(n * p for n, p in zip(GRID, TUBELET, strict=True)))
        return torch.randint(0, 256, shape, device=self.device, dtype=torch.uint8)

    def order(self) -> Tensor:
        """The tokens of both clips, in no order."""
        num_tokens = GRID[0] * GRID[1] * GRID[2]
        return torch.rand(2, num_tokens, device=self.device).argsort(dim=1)


def joint(length: int, width: int) -> Callable[[Draw], Made]:
    """Attention of two clips, three heads."""
    return lambda draw: (
        [draw.normal(2, length, 3 * 3 * width)],
        lambda qkv: ops.attention(qkv, 3),
    )


def divided(t: int, s: int, axis: str, width: int = 64, own: bool = False) -> Callable[..., Made]:
    """Divided attention of two clips, three heads, with a class token or without."""
    return lambda draw: (
        [draw.normal(2, own + t * s, 3 * 3 * width)],
        lambda qkv: ops.divided_attention(qkv, 3, (t, s), axis, class_token=own),
    )


def cross(queries: int, keys: int) -> Callable[[Draw], Made]:
    """Attention of some queries."""
    return lambda draw: (
        [draw.normal(2, queries, 3 * 64), draw.normal(2, keys, 2 * 3 * 64)],
        lambda q, kv: ops.cross_attention(q, kv, 3),
    )


def masked_mse(draw: Draw) -> Made:
    """The loss over some tokens."""
    video, idx = draw.pixels(), draw.order()[:, :7]
    return [draw.normal(2, 7, 1536)], lambda pred: ops.masked_mse(pred, video, idx, TUBELET)


def masked_mse_channels_last(draw: Draw) -> Made:
    """The same of a video as decoders leave it."""
    video, idx = draw.pixels().permute(0, 2, 3, 4, 1).contiguous(), draw.order()[:, :7].int()
    return [draw.normal(2, 7, 1536)], lambda pred: ops.masked_mse(
        pred, video.permute(0, 4, 1, 2, 3), idx, TUBELET
    )


def masked_mse_floating(draw: Draw) -> Made:
    """The same of a normalised one."""
    video = draw.normal(2, 4, 32, 48, 3).detach().permute(0, 4, 1, 2, 3)
    idx = draw.order()[:, :7].int()
    return [draw.normal(2, 7, 1536)], lambda pred: ops.masked_mse(pred, video, idx, TUBELET)


def linear_masked_mse(draw: Draw) -> Made:
    """The head and the loss."""
    video, idx = draw.pixels(), draw.order()[:, :7]
    inputs = [draw.normal(2, 7, 32), draw.normal(1536, 32), draw.normal(1536)]
    return inputs, lambda *given: ops.linear_masked_mse(*given, video, idx, TUBELET)


def gather_tokens(draw: Draw) -> Made:
    """Some tokens."""
    idx = draw.order()[:, :5]
    return [draw.normal(2, 12, 64)], lambda x: ops.gather_tokens(x, idx)


def decoder_tokens(draw: Draw) -> Made:
    """The decoder's input, with gradients of the positions."""
    order = draw.order()
    inputs = [draw.normal(2, 5, 64), draw.normal(64), draw.normal(12, 64)]
    return inputs, lambda *given: ops.decoder_tokens(*given, order[:, :5], order[:, 5:])


def shared_tokens(draw: Draw) -> Made:
    """Rows placed among a clip's own."""
    idx = draw.order()[:, 5:].int()
    return [draw.normal(2, 5, 192), draw.normal(12, 192)], lambda *given: ops.shared_tokens(
        *given, idx
    )


def layer_norm(draw: Draw) -> Made:
    """The norm of rows that are no whole block."""
    return [draw.normal(2, 37, 200), *(draw.normal(200) for _ in range(2))], ops.layer_norm


def add_layer_norm(stream: torch.dtype, scaled: bool = False) -> Callable[[Draw], Made]:
    """The addition to a stream and the norm, with drop path's factors or without; both results."""

    def make(draw: Draw) -> Made:
        inputs = [draw.normal(2, 37, 200), draw.normal(2, 37, 200)]
        inputs += [draw.normal(200), draw.normal(200)]
        inputs[0] = inputs[0].detach().to(stream).requires_grad_()
        scale = torch.tensor([0.0, 2.0], device=draw.device) if scaled else None
        return inputs, lambda *given: torch.cat(ops.add_layer_norm(*given, branch_scale=scale))

    return make


def bias_gelu(draw: Draw) -> Made:
    """GELU of rows that are no whole block."""
    return [draw.normal(2, 37, 200), draw.normal(200)], ops.bias_gelu


def block(draw: Draw) -> Made:
    """A whole block, by the ops that join a norm or GELU with the linear layer after it."""
    made = JointSpaceTimeBlock(192, 3, 384, drop_path=0.5).to(draw.device, draw.dtype)
    return [draw.normal(2, 37, 192), *made.parameters()], lambda x, *_: made(x)


def tubelet_embed(way: str, floating: bool = False) -> Callable[[Draw], Made]:
    """The embedding in one of its ways, of pixels or with the gradient of a floating video."""

    def make(draw: Draw) -> Made:
        idx = draw.order()[:, :5]
        inputs = [draw.normal(64, 3, *TUBELET), draw.normal(64), draw.normal(12, 64)]
        video = draw.normal(2, 3, 4, 32, 48) if floating else draw.pixels()

        def embed(*given: Tensor) -> Tensor:
            before, embedding.forward_way = embedding.forward_way, way
            try:
                return ops.tubelet_embed(given[3] if floating else video, *given[:3], idx)
            finally:
                embedding.forward_way = before

        return [*inputs, video] if floating else inputs, embed

    return make


# By name; lengths about where another kernel, or another number of tiles, takes over.
CUDA_CALLS: dict[str, Callable[[Draw], Made]] = {
    "attention of 160, 64 wide": joint(160, 64),
    "attention of 160, 80 wide": joint(160, 80),
    "attention of 208, 88 wide": joint(208, 88),
    "attention of 37, 64 wide": joint(37, 64),
    "attention of 224, 64 wide": joint(224, 64),
    "attention of 256, 64 wide": joint(256, 64),
    "along time": divided(8, 5, "time"),
    "along time, 88 wide": divided(16, 3, "time", 88),
    "across space": divided(2, 20, "space"),
    "across space, 196": divided(2, 196, "space"),
    "masked_mse": masked_mse,
    "masked_mse, channels last": masked_mse_channels_last,
    "linear_masked_mse": linear_masked_mse,
}
TRITON_CALLS: dict[str, Callable[[Draw], Made]] = {
    **{name: CUDA_CALLS[name] for name in ("along time", "across space", "masked_mse")},
    "masked_mse of a floating video": masked_mse_floating,
    "attention of 160": joint(160, 64),
    "attention of 300": joint(300, 64),
    "across space, class token": divided(2, 20, "space", own=True),
    "across space, 100 and class token": divided(2, 100, "space", own=True),
    "cross attention": cross(37, 97),
    "cross attention of 300": cross(37, 300),
    "linear_masked_mse": linear_masked_mse,
    "gather_tokens": gather_tokens,
    "decoder_tokens": decoder_tokens,
    "shared_tokens": shared_tokens,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm(LOW),
    "add_layer_norm, fp32 stream and drop path": add_layer_norm(torch.float32, scaled=True),
    "bias_gelu": bias_gelu,
    "block": block,
    "tubelet_embed": tubelet_embed("rows"),
    "tubelet_embed in one kernel": tubelet_embed("one_kernel"),
    "tubelet_embed of a floating video": tubelet_embed("rows", floating=True),
}


def calls(device: torch.device, cuda: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and function of every call, forward and backward."""
    backends = {"cuda": CUDA_CALLS} if cuda else {}
    for backend, made in {**backends, "triton": TRITON_CALLS}.items():
        for name, make in made.items():

            def call(backend: str = backend, make: Callable[[Draw], Made] = make) -> None:
                inputs, op = make(Draw(device))
                with ops.backend(backend):
                    out = op(*inputs)
                    torch.autograd.grad(out, inputs, torch.randn_like(out))

            yield f"{backend}: {name}", call


def run_calls() -> int:
    """Make every call, saying so after each."""
    from rows import DEVICE, without_cuda_kernels

    missing = without_cuda_kernels()
    if missing:
        note(f"no CUDA C++ kernel: {missing}")
    todo = list(calls(DEVICE, cuda=not missing))
    print(f"{len(todo)} calls")
    for name, call in todo:
        call()
        torch.cuda.synchronize()
        print(RAN + name, flush=True)
    return 0


# ---- what the sanitizer says --------------------------------------------------------------------


@dataclass
class Findings:
    """What a tool's log says.

    Attributes:
        tool: "memcheck" or "racecheck".
        errors, warnings: how many.
        finished: the tool wrote its summary.
        ran, calls: calls that came to their end, of how many.
        last: the last of them.
        places: errors and warnings by kernel.
    """

    tool: str
    errors: int = 0
    warnings: int = 0
    finished: bool = False
    ran: int = 0
    calls: int = 0
    last: str = ""
    places: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Nothing found in every call."""
        return self.finished and not self.errors and 0 < self.calls == self.ran

    def line(self) -> str:
        """For the suite's table."""
        words = [f"{self.tool}: {self.errors} errors, {self.warnings} warnings"]
        words[0] += f" in {self.ran} of {self.calls or '?'} calls"
        if self.ran < self.calls or not self.calls:
            words.append(f"ended after {self.last}" if self.last else "ended before the first")
        if not self.finished:
            words.append("no summary")
        words += [f"{name} {count}x" for name, count in self.places.most_common(MOST_PLACES)]
        return "; ".join(words)


def parse(tool: str, log: str) -> Findings:
    """Read a log of compute-sanitizer around :func:`run_calls`."""
    found = Findings(tool)
    ran = re.findall(rf"^{RAN}(.+)$", log, re.MULTILINE)
    counted = re.search(r"^(\d+) calls$", log, re.MULTILINE)
    found.ran, found.last = len(ran), ran[-1] if ran else ""
    found.calls = int(counted[1]) if counted else 0
    warned = _read_places(log, found)
    races = re.findall(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) err\D+(\d+) warn", log)
    errors = re.findall(r"^=+ ERROR SUMMARY: (\d+) errors?\s*$", log, re.MULTILINE)
    summary = races if tool == "racecheck" else errors
    found.finished = bool(summary)
    if races and tool == "racecheck":
        found.errors, found.warnings = map(int, races[-1])
    elif errors and tool == "memcheck":
        found.errors = int(errors[-1])
    else:
        found.errors, found.warnings = found.places.total() - warned, warned
    return found


def _read_places(log: str, found: Findings) -> int:
    """Count the reports by kernel; how many of them are warnings."""
    # "Invalid __global__ read of size 4 bytes", on the next line "    at kernel(int *)+0x70 ...";
    # "Error: Race reported between Write access at kernel(int *)+0x70 in file.cu:10". Earlier
    # versions have "at 0x70 in kernel(int *)".
    warned = 0
    heads = re.compile(
        r"^=+ (?P<warning>Warning|WARN)?(?:Error|ERR)?:?\s*"
        r"(?:(?:Potential )?(?:Race|RAW|WAR|WAW)\b.*? at|(?:Invalid|Misaligned)\b.*\n=+\s+at)\s+"
        r"(?:0x[0-9a-fA-F]+ in )?(?P<kernel>.+)$",
        re.MULTILINE,
    )
    for report in heads.finditer(log):
        found.places[short_name(report["kernel"])] += 1
        warned += report["warning"] is not None
    return warned


def command_of(tool: str, sanitizer: str) -> list[str]:
    """The command that runs the calls under a tool."""
    # Room between allocations, so that what runs past one is not within the next; no calls of CUDA
    # that torch makes to ask what there is, and expects to fail.
    options = ["--padding", "1024"] if tool == "memcheck" else []
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    script = [sys.executable, str(Path(__file__).resolve()), "--calls"]
    return [sanitizer, "--tool", tool, *options, "--print-limit", "50", *script]


def main() -> int:
    """Run the tools; the exit status."""
    parser = argparse.ArgumentParser(description="Run every kernel under compute-sanitizer.")
    parser.add_argument("--out", type=Path, help="folder for logs")
    parser.add_argument("--calls", action="store_true", help="the calls alone, not under a tool")
    parser.add_argument("--limit-s", type=float, default=600, help="seconds for all tools")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        note("skipped: no GPU that torch can use")
        return SKIPPED
    if options.calls:
        return run_calls()
    if options.out is None:
        parser.error("--out or --calls is wanted")
    sanitizer = find_tool("compute-sanitizer")
    if not sanitizer:
        note("skipped: compute-sanitizer is neither on PATH nor in CUDA_HOME")
        return SKIPPED
    options.out.mkdir(parents=True, exist_ok=True)
    deadline, good = time.monotonic() + options.limit_s, True
    for position, tool in enumerate(TOOLS):
        log = options.out / f"{tool}.log"
        left_s = (deadline - time.monotonic() - GRACE_S) / (len(TOOLS) - position)
        # Without torch's cache of memory each tensor is an allocation that the tool knows.
        _, said = run_limited(
            command_of(tool, sanitizer), log, max(left_s, 1), PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        found = parse(tool, said)
        for one in [*notes_in(said)[: position == 0], found.line()]:
            note(one)
        good &= found.ok
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
