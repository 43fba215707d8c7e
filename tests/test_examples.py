"""The scripts in examples/, run for real: nodes are processes of this machine, on its CPU."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vmae_fast.data import synthetic_videos
from vmae_fast.train.metrics import read_metrics

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT_S = 240
# So many that a signal after the third comes before the last.
STEPS = 100


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return synthetic_videos(tmp_path_factory.mktemp("videos"), count=8, size=40, frames=24)


@pytest.fixture
def flags(videos, tmp_path):
    """Of a run of some seconds, by one process a node."""
    return [
        "--model", "tiny", "--frames", "4", "--image-size", "32", "--data", str(videos),
        "--stride", "2", "--val", "0.25", "--workers", "0", "--batch-size", "2", "--device", "cpu",
        "--log-every", "1", "--save-every", "100000", "--val-every", "100000",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip


@pytest.fixture
def environment(tmp_path):
    """PATH with this Python's torchrun, and what stands in for SLURM's commands."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    scripts = Path(sys.executable).parent
    path = os.pathsep.join([str(stubs), str(scripts), os.environ["PATH"]])
    return {
        **os.environ, "PATH": path, "GPUS": "1", "LOCAL_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def start():
    """Starts a command in a session of its own; nothing of it is left after the test."""
    started = []

    def run(command, environment, log):
        with log.open("ab") as out:
            started.append(subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            ))  # fmt: skip
        return started[-1]

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(found, log, what):
    """Until ``found`` gives something, which is returned."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.1)
    pytest.fail(f"{what} did not happen:\n{log.read_text()}")


def steps_of(run):
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return []
    return [row["step"] for row in read_metrics(metrics) if "loss" in row]


def checkpoints_of(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_two_nodes_share_a_run(flags, environment, start, tmp_path):
    endpoint = f"127.0.0.1:{free_port()}"
    command = ["bash", EXAMPLES / "two-nodes.sh", endpoint, *flags, "--steps", "3"]
    logs = [tmp_path / f"node{number}.log" for number in range(2)]
    nodes = [start(command, environment, log) for log in logs]
    for node, log in zip(nodes, logs, strict=True):
        assert node.wait(TIMEOUT_S) == 0, log.read_text()
    run = tmp_path / "run"
    assert checkpoints_of(run) == ["step-00000003"]
    # Each step's row once, and one process of the two talked: of 2 processes, a clip each.
    assert steps_of(run) == [1, 2, 3]
    text = "".join(log.read_text() for log in logs)
    assert text.count("3 steps of 2 clips (2 x 1 x 1)") == 1


def test_two_nodes_says_what_it_takes(environment):
    for arguments, got in (([], "nothing"), (["host"], "host")):
        done = subprocess.run(
            ["bash", EXAMPLES / "two-nodes.sh", *arguments],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("usage: two-nodes.sh HOST:PORT")
        assert done.stderr.endswith(f"got: {got}\n")


# ---- SLURM --------------------------------------------------------------------------------

# Reads what the script asks for, and runs a copy of it; again where it is to be. SIGALRM stands for
# its time being nearly up, SIGTERM for preemption: to the script and to its step.
SBATCH = textwrap.dedent("""
    #!PYTHON
    import os, pathlib, re, signal, subprocess, sys, tempfile
    text = pathlib.Path(sys.argv[1]).read_text()
    before = re.split(r"(?m)^[^#\\n]", text)[0]
    asked = dict(re.findall(r"(?m)^#SBATCH (--[\\w-]+)=?(\\S*)", before))
    batch, name, _ = re.fullmatch(r"(B:)?(\\w+)@(\\d+)", asked["--signal"]).groups()
    spool = pathlib.Path(tempfile.mkdtemp(dir=os.environ["SPOOL"]), "slurm_script")
    spool.write_text(text)
    again, me = False, str(os.getpid())
    mine = f"SLURM_JOB_ID={os.environ['SLURM_JOB_ID']}".encode()
    def children():
        return map(int, open(f"/proc/{job.pid}/task/{job.pid}/children").read().split())
    def nearly_up(*_):
        for one in [job.pid] if batch else children():
            os.kill(one, getattr(signal, f"SIG{name}"))
    def preempt(*_):
        global again
        again = "--requeue" in asked
        for one in [*children(), job.pid]:
            os.kill(one, signal.SIGTERM)
    signal.signal(signal.SIGALRM, nearly_up)
    signal.signal(signal.SIGTERM, preempt)
    environment = os.environ | {
        "SLURM_NNODES": asked["--nodes"], "SLURM_CPUS_PER_TASK": asked["--cpus-per-task"],
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    requeued = pathlib.Path(os.environ["REQUEUED"])
    for start in range(5):
        restart = {"SLURM_RESTART_COUNT": str(start)} if start else {}
        print("start", start, flush=True)
        job = subprocess.Popen(["bash", spool, *sys.argv[2:]], env=environment | restart)
        status = job.wait()
        # What a script leaves behind ends with it.
        for one in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if mine in (one / "environ").read_bytes().split(b"\\0") and one.name != me:
                    os.kill(int(one.name), signal.SIGKILL)
            except OSError:
                continue
        if not again and not requeued.exists():
            sys.exit(status)
        again = False
        requeued.unlink(missing_ok=True)
""").lstrip()
# A task a node, each with its own number; signals that srun gets go to the tasks; its status is
# the highest of theirs.
SRUN = textwrap.dedent("""
    #!PYTHON
    import os, signal, subprocess, sys
    command = sys.argv[1:]
    while command[0].startswith("--"):
        assert command[0].partition("=")[0] in ("--kill-on-bad-exit", "--cpus-per-task"), command[0]
        command.pop(0)
    tasks = []
    def pass_on(number, _):
        for task in tasks:
            task.poll() is None and task.send_signal(number)
    signal.signal(signal.SIGUSR1, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    for node in range(int(os.environ["SLURM_NNODES"])):
        mine = {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURM_LOCALID": "0"}
        tasks.append(subprocess.Popen(command, env={**os.environ, **mine}))
    codes = [task.wait() for task in tasks]
    sys.exit(max(128 - code if code < 0 else code for code in codes))
""").lstrip()
SCONTROL = textwrap.dedent("""
    #!PYTHON
    import os, sys
    if sys.argv[1:] == ["show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]:
        # Both nodes are this machine.
        print("127.0.0.1"); print("127.0.0.2")
    elif sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]]:
        open(os.environ["REQUEUED"], "a").write("requeued\\n")
    else:
        sys.exit(f"scontrol: {sys.argv[1:]}")
""").lstrip()


@pytest.fixture
def slurm(environment, tmp_path):
    """An environment with SLURM's commands."""
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        stub = tmp_path / "bin" / name
        stub.write_text(text.replace("PYTHON", sys.executable, 1))
        stub.chmod(0o755)
    # The port follows from the job's number.
    job = free_port() % 20000
    return environment | {
        "SLURM_JOB_ID": str(job), "SPOOL": str(tmp_path), "REQUEUED": str(tmp_path / "requeued"),
        # Without --auto-resume the launcher's restart would go on in its place.
        "MAX_RESTARTS": "0",
    }  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGALRM, pytest.param(signal.SIGTERM, marks=[
    pytest.mark.slow])], ids=["time-limit", "preemption"])  # fmt: skip
def test_slurm_saves_and_goes_on(number, flags, slurm, start, tmp_path):
    """Asked for another start by itself at its time's end, and started again after preemption."""
    run, log = tmp_path / "run", tmp_path / "job.log"
    job = start(["sbatch", EXAMPLES / "slurm.sh", *flags, "--steps", str(STEPS)], slurm, log)
    wait_for(lambda: len(steps_of(run)) > 2, log, "a third step")
    job.send_signal(number)
    assert job.wait(TIMEOUT_S) == 0, log.read_text()
    saved, end = checkpoints_of(run)
    step = int(saved.removeprefix("step-"))
    assert 2 < step < STEPS
    assert end == f"step-{STEPS:08d}"
    text = log.read_text()
    assert [line for line in text.splitlines() if line.startswith("start ")] == [
        "start 0", "start 1",
    ]  # fmt: skip
    asked = "the time is up: asking for another start\n"
    assert text.count(asked) == (number == signal.SIGALRM)
    assert text.count(f"going on after step {step}\n") == 1
    assert steps_of(run) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_slurm_ends_as_the_run_does(flags, slurm, start, tmp_path):
    """What no second start mends is not started again."""
    log = tmp_path / "job.log"
    job = start(["sbatch", EXAMPLES / "slurm.sh", *flags, "--steps", "-1"], slurm, log)
    assert job.wait(TIMEOUT_S) != 0
    assert "start 1" not in log.read_text()


def test_slurm_leaves_time_to_save():
    """The launcher waits for its processes, and the scheduler for the launcher."""
    text = (EXAMPLES / "slurm.sh").read_text()
    (before_end,) = re.findall(r"(?m)^#SBATCH --signal=B:USR1@(\d+)$", text)
    for script in EXAMPLES.glob("*.sh"):
        (shutdown,) = re.findall(r"--shutdown-timeout=(\d+)", script.read_text())
        assert 30 < int(shutdown) < int(before_end)
