"""DRAM and tensor-pipe percentages of CUDA C++ kernels and their Triton twins, by Nsight Compute.

    python benchmarks/counters.py --out DIR    DIR/results/DEVICE/kernel_counters.json
    python benchmarks/counters.py --calls      the calls alone, as ncu runs them

The shapes are those of the benchmarks. Caches are flushed before each kernel, clocks are left as
they are. Exit status: 0, 1 where ncu read nothing, 77 without a GPU or without ncu.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from attention_cases import TWINS, AttentionBatch
from environment import device_folder, environment
from rows import DEVICE, backward, by_backend, evaluation, forward, rounded, without_cuda_kernels
from tools import SKIPPED, find_tool, note, notes_in, run_limited, short_name

# A kernel of torch's that does nothing, launched before each call: where a call's kernels begin.
MARKER = "spin_kernel"
CALL = "call "
# Of each figure, ncu's names, the first that the GPU has; and what its base unit is divided by.
# (Nsight Compute's documentation, "Metrics Structure"; --query-metrics lists what a GPU has.)
METRICS: dict[str, tuple[float, tuple[str, ...]]] = {
    "time_us": (1e3, ("gpu__time_duration.sum",)),
    "dram_percent": (
        1,
        (
            "dram__throughput.avg.pct_of_peak_sustained_elapsed",
            "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        ),
    ),
    "tensor_percent": (
        1,
        (
            "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
            "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_elapsed",
            "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_elapsed",
        ),
    ),
    "warps_percent": (1, ("sm__warps_active.avg.pct_of_peak_sustained_active",)),
    "read_mb": (1e6, ("dram__bytes_read.sum",)),
    "written_mb": (1e6, ("dram__bytes_write.sum",)),
    "bank_conflicts": (1, ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",)),
}
MOST_NOTES = 24


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name of every call, and the call prepared."""
    from test_attention import DTYPE, attend
    from test_tokens import SIZE, masked_mse
    from token_batch import Batch

    backends = ["triton"] if without_cuda_kernels() else ["cuda", "triton"]
    for case in TWINS:
        batch = AttentionBatch(case, 0, DTYPE, DEVICE)
        for backend in backends:
            for direction in (forward, backward):
                way = by_backend(direction(attend, case.leaves), backend)
                yield f"{case.name} {backend} {direction.__name__}", way(batch)
    batch = Batch(SIZE, 0)
    for backend in backends:
        for direction in (evaluation, forward):
            way = by_backend(direction(masked_mse, ()), backend)
            yield f"masked_mse {backend} {direction.__name__}", way(batch)


def run_calls() -> int:
    """Make every call once unseen, for compilers and caches, and once under the profiler."""
    if without_cuda_kernels():
        note(f"no CUDA C++ kernel: {without_cuda_kernels()}")
    for name, call in calls():
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(CALL + name, flush=True)
    return 0


def chosen_metrics(listed: str) -> dict[str, str]:
    """ncu's name of each figure, from what ``--query-metrics`` lists, or else the first."""
    known = {line.split()[0] for line in listed.splitlines() if line[:1].isalpha()}
    return {
        figure: next((name for name in names if name.split(".")[0] in known), names[0])
        for figure, (_, names) in METRICS.items()
    }


def parse(text: str, names: list[str], metrics: dict[str, str]) -> list[dict[str, object]]:
    """A row for each kernel of ncu's CSV, which begins with lines of its own.

    Args:
        text: what ``ncu --csv`` wrote, a line for each metric of each kernel.
        names: of the calls, in their order.
        metrics: ncu's name of each figure.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, str]] = {}
    for line in csv.DictReader(lines[start:]):
        if not line.get("Metric Name"):
            continue
        kernel = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
        kernel[line["Metric Name"]] = line["Metric Value"]
    rows: list[dict[str, object]] = []
    call = -1
    for kernel in kernels.values():
        if MARKER in kernel["kernel"]:
            call += 1
        elif 0 <= call < len(names):
            figures = {
                figure: _number(kernel.get(metrics[figure], ""), unit)
                for figure, (unit, _) in METRICS.items()
            }
            rows.append({"call": names[call], "kernel": short_name(kernel["kernel"]), **figures})
    return rows


def _number(value: str, unit: float) -> float | None:
    """ "1,234.5" in a unit; None for "n/a"."""
    try:
        return float(value.replace(",", "")) / unit
    except ValueError:
        return None


def line_of(row: dict[str, object]) -> str:
    """A kernel's line for the suite's table."""
    shown = list(METRICS)[:3]
    words = [f"{name} {'?' if row[name] is None else f'{row[name]:.3g}'}" for name in shown]
    return f"{row['call']}, {row['kernel']}: {', '.join(words)}"


def measure(ncu: str, out: Path, limit_s: float) -> int:
    """Run the calls under ncu and keep what it read; the exit status."""
    listed = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, check=False)
    metrics = chosen_metrics(listed.stdout)
    table = out / "ncu.csv"
    table.unlink(missing_ok=True)
    options = ["--csv", "--log-file", str(table), "--print-units", "base", "--print-fp"]
    options += ["--clock-control", "none", "--profile-from-start", "off"]
    options += ["--metrics", ",".join(metrics.values())]
    script = [sys.executable, str(Path(__file__).resolve()), "--calls"]
    status, said = run_limited([ncu, *options, *script], out / "ncu_calls.log", limit_s)
    for one in notes_in(said):
        note(one)
    names = [line[len(CALL) :] for line in said.splitlines() if line.startswith(CALL)]
    text = table.read_text(errors="replace") if table.exists() else ""
    rows = parse(text, names, metrics)
    if status is None:
        note(f"stopped at the limit after {len(names)} calls")
    if not rows:
        wrong = [line for line in text.splitlines() if line.startswith("==ERROR==")]
        note(f"ncu read nothing: {(wrong or [f'exit status {status}, see the logs'])[0]}")
        return 1
    rows = rounded(rows)
    what = "kernels at the benchmarks' shapes, caches flushed, by Nsight Compute"
    file = out / "results" / device_folder() / "kernel_counters.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    asked = [{"figure": figure, "ncu": name} for figure, name in metrics.items()]
    kept = {"environment": environment(), "what": what, "kernels": rows, "metrics": asked}
    file.write_text(json.dumps(kept, indent=2) + "\n")
    for row in rows[:MOST_NOTES]:
        note(line_of(row))
    return 0 if status == 0 else 1


def main() -> int:
    """Run ncu; the exit status."""
    parser = argparse.ArgumentParser(description="Read hardware counters of the kernels.")
    parser.add_argument("--out", type=Path, help="folder for logs and results")
    parser.add_argument("--calls", action="store_true", help="the calls alone, not under ncu")
    parser.add_argument("--limit-s", type=float, default=300, help="seconds for all")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        note("skipped: no GPU that torch can use")
        return SKIPPED
    if options.calls:
        return run_calls()
    if options.out is None:
        parser.error("--out or --calls is wanted")
    ncu = find_tool("ncu")
    if not ncu:
        note("skipped: ncu is neither on PATH nor in CUDA_HOME")
        return SKIPPED
    options.out.mkdir(parents=True, exist_ok=True)
    return measure(ncu, options.out.resolve(), options.limit_s)


if __name__ == "__main__":
    sys.exit(main())
