"""A training step of the base model on this CPU: as it stands, against an earlier revision.

    python benchmarks/against_revision.py REVISION [--precision fp32] [--rounds 9] [--results DIR]

Forward and backward on two clips, each revision in a process of its own, taking turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Folders that are installed under another name than they have.
PACKAGES = ("kernels", "configs")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="of git, or a folder that holds one (for the processes)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", help="folder to write a result file to")
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        take_steps(given.precision)
    else:
        compare(given)


def compare(given):
    """Time both, print and keep the figures."""
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as now:
        unpack(given.revision, Path(before))
        unpack("HEAD", Path(now))
        processes = {"before": start(before, given), "now": start(now, given)}
        taken_s = {name: [] for name in processes}
        for number in range(given.rounds):
            # Each goes first in every other round.
            for name in sorted(processes, reverse=number % 2 == 1):
                taken_s[name].append(one_step(processes[name]))
        for process in processes.values():
            process.kill()
    median_s = {name: statistics.median(each) for name, each in taken_s.items()}
    revision = git("rev-parse", "--short", given.revision).decode().strip()
    figures = {
        "what": f"base, 2 clips of 16x224x224, forward and backward, {given.precision}, "
        f"against revision {revision}",
        **{f"{name}_s": round(seconds, 4) for name, seconds in median_s.items()},
        "speedup": round(median_s["before"] / median_s["now"], 3),
        "rounds": [
            {f"{name}_s": round(taken_s[name][number], 3) for name in taken_s}
            for number in range(given.rounds)
        ],
    }
    print(json.dumps(figures, indent=2))
    if given.results:
        from environment import environment

        file = Path(given.results) / "cpu" / f"step_base_{given.precision}_against_{revision}.json"
        file.write_text(json.dumps({"environment": environment(), **figures}, indent=2) + "\n")


def unpack(revision, folder):
    """The package as it is installed, into a folder for Python's path."""
    with tarfile.open(fileobj=BytesIO(git("archive", revision))) as archive:
        archive.extractall(folder, filter="data")
    for name in PACKAGES:
        (folder / name).rename(folder / "vmae_fast" / name)


def git(*command):
    return subprocess.run(
        ["git", "-C", str(ROOT), *command], check=True, capture_output=True
    ).stdout


def start(folder, given):
    """A process that takes a step for every line it reads."""
    command = [sys.executable, __file__, folder, "--step", "--precision", given.precision]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": folder},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    # The first compiles nothing, but takes memory from the system.
    one_step(process)
    return process


def one_step(process):
    process.stdin.write("step\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def take_steps(precision):
    import torch

    import vmae_fast
    from vmae_fast import Masking, VideoMAE

    assert sys.argv[1] in vmae_fast.__file__
    torch.manual_seed(0)
    model = VideoMAE("base")
    video, mask = torch.randn(2, 3, 16, 224, 224), Masking((8, 14, 14))(torch.arange(2))
    for _ in sys.stdin:
        start_s = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(video, mask).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        print(time.perf_counter() - start_s, flush=True)


if __name__ == "__main__":
    main()
