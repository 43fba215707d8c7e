"""The scripts in examples/, run for real: nodes are processes of this machine, on its CPU."""

import contextlib
import os
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


def children_of(process):
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in tasks.read_text().split()]


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
    """The environment of a job of two nodes."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        stub = tmp_path / "bin" / name
        stub.write_text(text.replace("PYTHON", sys.executable, 1))
        stub.chmod(0o755)
    # The port follows from the job's number.
    job = free_port() % 20000
    return environment | {
        "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2",
        # Without --auto-resume the launcher's restart would go on in its place.
        "SLURM_CPUS_PER_TASK": "1", "MAX_RESTARTS": "0", "REQUEUED": str(tmp_path / "requeued"),
    }  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=[
    pytest.mark.slow])], ids=["time-limit", "preemption"])  # fmt: skip
def test_slurm_saves_and_goes_on(number, flags, slurm, start, tmp_path):
    run, log, requeued = tmp_path / "run", tmp_path / "job.log", tmp_path / "requeued"
    command = ["bash", EXAMPLES / "slurm.sh", *flags]
    job = start([*command, "--steps", "100000"], slurm, log)
    wait_for(lambda: len(steps_of(run)) > 2, log, "a third step")
    if number == signal.SIGTERM:
        # Preemption: to the step's tasks and to the script.
        for child in children_of(job):
            os.kill(child, number)
    job.send_signal(number)
    assert job.wait(TIMEOUT_S) != 0
    (saved,) = checkpoints_of(run)
    step = int(saved.removeprefix("step-"))
    assert step > 2
    # After preemption SLURM starts the job again by itself.
    assert requeued.exists() == (number == signal.SIGUSR1), log.read_text()

    again = slurm | {"SLURM_RESTART_COUNT": "1"}
    assert start([*command, "--steps", str(step + 3)], again, log).wait(TIMEOUT_S) == 0
    assert checkpoints_of(run) == [saved, f"step-{step + 3:08d}"]
    assert f"going on after step {step}\n" in log.read_text()
    assert steps_of(run) == list(range(1, step + 4))
    # It came to its end: no third start.
    assert not requeued.exists() or requeued.read_text() == "requeued\n"
