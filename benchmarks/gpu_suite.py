"""Everything that wants a GPU in one command: build, tests, sanitizers, benchmarks, profiles.

    python benchmarks/gpu_suite.py --out DIR
    python benchmarks/gpu_suite.py --out DIR --no-build --only step

Each part runs in a process of its own under a time limit, with its log in DIR; a part that fails
does not keep the next from running. Within a part what is worth most comes first: the default
limit is for that, and may cut short what follows. All tests, and all benchmarks, want a run of
their own (--no-build --only tests); so do whole training steps, whose part "step" is left out where
its time is not there. The last thing printed, and kept as DIR/summary.txt, is a short table. Exit
status: 0, 1 where a part failed, 2 without a GPU. Needs nothing that torch and pytest do not bring.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

import report
from targets import CUDA
from tools import SKIPPED, notes_in

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PARTS = ("build", "tests", "sanitize", "step", "benchmarks", "profile", "ncu")
# Of the time that is left when a part starts; the last one gets all of it. nvcc may take three
# minutes on two cores for all architectures, of which one is built here.
SHARE = {
    "build": 0.35,
    "tests": 0.35,
    "sanitize": 0.25,
    "step": 0.6,
    "benchmarks": 1.0,
    "profile": 0.5,
    "ncu": 1.0,
}
# A part that would get less is not started, unless it is asked for. Steps of models of five sizes,
# some of them compiled, are guessed to take twelve minutes, not yet measured: what is worth most is
# done in the first seven, and test_step_gpu.py says how to make two runs of them.
LEAST_S = {"step": 420, "profile": 45, "ncu": 45}
# Parts of pytest.
TESTS = ("tests", "step", "benchmarks")
# The benchmark that the part "step" is.
STEP = "benchmarks/test_step_gpu.py"
# What a stopped pytest gets to write its report before it is killed.
GRACE_S = 10
MOST_LINES, MOST_FAILURES, MOST_WIDTH = 230, 20, 160
# Peers of a row that are shown: the quickest.
MOST_PEERS = 3


@dataclass
class Outcome:
    """How a part went.

    Attributes:
        part: one of PARTS.
        status: exit status; None where it ran past its limit, SKIPPED where it cannot run here.
        seconds: how long it ran.
        passed, skipped: how many tests.
        failures: test and first line of its error.
        not_collected: files whose tests were never seen, and why.
        missing: files whose tests were never seen for want of a package, by package.
        notes: what it has to say.
    """

    part: str
    status: int | None = None
    seconds: float = 0
    passed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    not_collected: list[str] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Finished, and nothing wrong but packages that are not there."""
        if self.part not in TESTS or self.status in (None, SKIPPED):
            return self.status in (0, SKIPPED)
        # 1 is also what files that cannot be collected end with.
        return (
            self.status in (0, 1) and self.passed > 0 and not (self.failures or self.not_collected)
        )

    def line(self) -> str:
        """The part's line of the table."""
        result = "ok" if self.ok else "FAILED"
        if self.status is None:
            result = "FAILED (time limit)"
        if self.status == SKIPPED:
            result = "skipped"
        words = [f"{self.part:<11} {result}, {self.seconds:.0f} s"]
        if self.part in TESTS and self.status != SKIPPED:
            words.append(f"{self.passed} passed, {len(self.failures)} failed")
            words.append(f"{self.skipped} skipped, {len(self.not_collected)} files broken")
            words += [f"{len(files)} without {name}" for name, files in self.missing.items()]
        return ", ".join(words)


def command_of(part: str, out: Path, limit_s: float = 0) -> list[str]:
    """The command of a part, which is to take so many seconds at most."""
    scripts = {"sanitize": "sanitize.py", "ncu": "counters.py"}
    if part in scripts:
        script = str(HERE / scripts[part])
        # Less what it takes to start.
        return [sys.executable, script, "--out", str(out), "--limit-s", f"{limit_s - GRACE_S:.0f}"]
    if part == "profile":
        # A trace of some steps as they are trained, and tables of them in the log.
        return [sys.executable, str(HERE / "profile_step.py"), "--out", str(out / "profile")]
    if part == "build":
        options = ["-e", ".", "--no-deps", "--no-build-isolation"]
        return [sys.executable, "-m", "pip", "install", *options]
    # Verbose, so that the log of a part that had to be killed says at which test.
    pytest = [sys.executable, "-m", "pytest", "-v", f"--junitxml={out / part}.xml"]
    # Video and checkpoint tests want packages that a GPU machine may not have.
    pytest += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if part == "tests":
        return [*pytest, "-p", "gpu_test_order", "-m", "gpu", "tests"]
    # What is counted needs no GPU.
    others = ["benchmarks", f"--ignore={STEP}", "-m", "not counted"]
    files = [STEP] if part == "step" else others
    return [*pytest, *files, "--benchmark-only", "--results", str(out / "results")]


def variables_of(part: str, found: dict[str, str | int]) -> dict[str, str]:
    """Environment variables that a part wants, where they are not set."""
    if part != "build" or "VMAE_FAST_CUDA_ARCHS" in os.environ:
        return {}
    # This GPU's machine code alone; "a" has the instructions of Hopper alone too.
    target = str(found["compute_capability"]).replace(".", "")
    return {"VMAE_FAST_CUDA_ARCHS": "90a" if target == "90" else target}


def run_part(
    part: str,
    command: list[str],
    out: Path,
    limit_s: float,
    variables: dict[str, str] | None = None,
) -> Outcome:
    """Run a part with its output in DIR/PART.log; never raises for what the part does."""
    start = time.monotonic()
    junit = out / f"{part}.xml"
    junit.unlink(missing_ok=True)
    outcome = Outcome(part)
    # For the plugin that orders the tests: pytest loads it before it reads its settings.
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    with (out / f"{part}.log").open("w") as log:
        # A session of its own, so that what the part starts can be stopped with it.
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **(variables or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            outcome.status = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            stop(child)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    outcome.seconds = time.monotonic() - start
    said = (out / f"{part}.log").read_text(errors="replace")
    outcome.notes = notes_in(said)
    counted = read_junit(junit, outcome)
    if outcome.status is None:
        read_log(said, outcome, counted)
    return outcome


def stop(child: "subprocess.Popen[bytes]") -> None:
    """Interrupt a part, upon which pytest still writes its report; kill what does not listen."""
    os.killpg(child.pid, signal.SIGINT)
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def read_junit(file: Path, outcome: Outcome) -> bool:
    """Add the counts and failures of a pytest report to an outcome; False without a whole one."""
    try:
        cases = list(ElementTree.parse(file).iter("testcase"))
    except (FileNotFoundError, ElementTree.ParseError):
        return False
    for case in cases:
        name = ".".join(filter(None, [case.get("classname"), case.get("name")]))
        bad = [child for child in case if child.tag in ("failure", "error")]
        if not name:
            # The test that was interrupted; the log has its name.
            continue
        if not bad:
            skipped = case.find("skipped") is not None
            outcome.skipped += skipped
            outcome.passed += not skipped
        elif bad[0].get("message") == "collection failure":
            _add_uncollected(outcome, name, _last_error(bad[0].text or ""))
        else:
            message = (bad[0].get("message") or bad[0].text or "").strip() or "no message"
            outcome.failures.append(f"{name}: {message.splitlines()[0]}")
    return True


def _add_uncollected(outcome: Outcome, name: str, error: str) -> None:
    package = re.search(r"No module named '(\w+)", error)
    if package and package[1] != "vmae_fast":
        outcome.missing.setdefault(package[1], []).append(name)
    else:
        outcome.not_collected.append(f"{name}: {error}")


def read_log(log: str, outcome: Outcome, counted: bool) -> None:
    """Add the test that was running when pytest was stopped, and counts where it left no report."""
    # "tests/test_a.py::test_b PASSED [ 50%]"; the running one has no word yet.
    lines = [line for line in log.splitlines() if re.match(r"\S+\.py::", line)]
    done = [line for line in lines if line.endswith("%]")]
    for line in lines[-1:] if lines[-1:] != done[-1:] else []:
        outcome.failures.append(f"{line.strip()}: still running at the time limit")
    if not counted:
        outcome.passed = sum(" PASSED " in line for line in done)
        outcome.skipped = sum(" SKIPPED " in line for line in done)
        failed = [line for line in done if " FAILED " in line or " ERROR " in line]
        outcome.failures += [f"{line.split()[0]}: see the log" for line in failed]


def _last_error(text: str) -> str:
    """The error's own line of a traceback as pytest writes it."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return lines[-1] if lines else (text.strip().splitlines() or ["no message"])[-1]


def figures(results: Path, since: float) -> list[str]:
    """Every measured figure, with its targets below; ``since`` leaves out files of earlier runs."""
    lines = []
    for file in sorted(results.glob("*/*.json")):
        if file.stat().st_mtime < since:
            continue
        kept = json.loads(file.read_text())
        for row in told(kept.get("rows", [])):
            peers = filter(None, [*report.refused(row), report.against(quickest_peers(row))])
            lines.append(
                f"{report.title(row)} {row['direction']}: {report.number(row['time_ms'])} ms "
                f"({row['how']}), {rates(row)}; {', '.join(peers)}"
            )
            if row["targets"]:
                lines.append("    " + "; ".join(report.judgements(row)).replace("**", ""))
        if "rows" not in kept:
            scalars = [f"{k} {v}" for k, v in kept.items() if isinstance(v, int | float)]
            lines.append(f"{file.stem}: {', '.join(scalars) or 'see the file'}")
    return lines


def told(rows: list[report.Figures]) -> list[report.Figures]:
    """The rows of a file that others do not say already.

    Without both passes together where each has its row, and Triton's where it is a row's peer.
    """
    both = {row["op"] for row in rows if row["direction"] == "backward"}
    peers = {row["op"].removesuffix(CUDA) + " triton" for row in rows if row["op"].endswith(CUDA)}
    return [
        row
        for row in rows
        if row["op"] not in peers
        and (row["op"] not in both or row["direction"] in ("forward", "backward"))
    ]


def rates(row: report.Figures) -> str:
    """What a row gets through in a second; of a whole step also the memory that it takes."""
    gb_per_s, tflop_per_s = report.rates(row)
    if "clips_per_s" not in row:
        return f"{gb_per_s} GB/s, {tflop_per_s} TFLOP/s"
    clips_per_s, peak_gib = (report.number(row[key]) for key in ("clips_per_s", "peak_gib"))
    return f"{clips_per_s} clips/s, {tflop_per_s} TFLOP/s, {peak_gib} GiB"


def quickest_peers(row: report.Figures) -> report.Figures:
    """A row with few of its peers, and the twin of a CUDA C++ kernel."""
    ordered = sorted(row["peers"], key=lambda name: row["peers"][name]["time_ms"])
    shown = {*ordered[:MOST_PEERS], "triton"}
    return row | {"peers": {name: row["peers"][name] for name in ordered if name in shown}}


def summary(outcomes: list[Outcome], measured: list[str]) -> list[str]:
    """The table, cut to what fits a screen; the logs have the rest."""
    lines = []
    for outcome in outcomes:
        lines += [outcome.line(), *(f"    {one}" for one in outcome.notes)]
    for outcome in outcomes:
        wrong = [f"FAILED {failure}" for failure in outcome.failures]
        wrong += [f"BROKEN {file}" for file in outcome.not_collected]
        wrong += [f"WITHOUT {name}: {', '.join(files)}" for name, files in outcome.missing.items()]
        lines += _first(wrong, MOST_FAILURES // 2)
    return [line[:MOST_WIDTH] for line in _first([*lines, *measured], MOST_LINES)]


def _first(lines: list[str], most: int) -> list[str]:
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], f"... and {len(lines) - most + 1} more, in the logs"]


def find_environment(out: Path) -> dict[str, str | int]:
    """Versions and device, kept as DIR/environment.json; empty where torch does not even load."""
    script = str(HERE / "environment.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {}
    (out / "environment.json").write_text(done.stdout)
    found: dict[str, str | int] = json.loads(done.stdout)
    return found


def extension_built(out: Path) -> str:
    """What the build left of the CUDA C++ extension, in a line."""
    code = "from vmae_fast.ops import _extension; print(_extension.summary('auto'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=out, capture_output=True, text=True, check=False
    )
    return (done.stdout.strip() or done.stderr.strip() or "nothing said").splitlines()[-1]


def main() -> int:
    """Run the parts; the exit status."""
    parser = argparse.ArgumentParser(description="Build, test and measure on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument(
        "--only",
        choices=PARTS,
        nargs="+",
        help="these parts alone; step, the benchmark of whole training steps, may take a run of "
        "ten minutes for itself",
    )
    parser.add_argument("--no-build", action="store_true", help="test what is installed")
    parser.add_argument("--budget-s", type=float, default=570, help="seconds for all parts")
    options = parser.parse_args()
    deadline, since = time.monotonic() + options.budget_s, time.time()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found = find_environment(out)
    if "compute_capability" not in found:
        print("no GPU that torch can use: nothing to build, test or measure here")
        return 2
    print(json.dumps(found))
    asked = options.only or PARTS
    parts = [part for part in PARTS if part in asked and not (part == "build" and options.no_build)]
    outcomes = []
    for part in parts:
        left_s = deadline - time.monotonic() - GRACE_S
        limit_s = max(left_s * (1.0 if part == parts[-1] else SHARE[part]), 1)
        if not options.only and limit_s < LEAST_S.get(part, 0):
            note = f"{max(left_s, 0):.0f} s were left; --no-build --only {part} runs it alone"
            outcomes.append(Outcome(part, SKIPPED, notes=[note]))
            continue
        print(f"{part}: at most {limit_s:.0f} s, log in {out / part}.log", flush=True)
        command, variables = command_of(part, out, limit_s), variables_of(part, found)
        outcomes.append(run_part(part, command, out, limit_s, variables))
        if part == "build":
            outcomes[-1].notes.append(extension_built(out))
    lines = summary(outcomes, figures(out / "results", since))
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
