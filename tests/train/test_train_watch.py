"""Which process hangs, and where."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vmae_fast.train import to_toml
from vmae_fast.train.distributed import Ranks, alone, is_of_group
from vmae_fast.train.metrics import read_metrics
from vmae_fast.train.watch import Watch

ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def test_one_process_watches_nothing():
    with Watch(alone(), 1.0, print) as watch:
        watch.at(3, "computing")
        assert watch._thread is None
    assert watch.report() == ""


@pytest.fixture
def store(monkeypatch):
    """What torchrun has: a store at an address that the environment names."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return server


def test_the_one_that_is_silent_is_named_first(store):
    said = []
    watches = [Watch(Ranks(rank, 3, torch.device("cpu")), 2.0, said.append) for rank in range(3)]
    for rank, watch in enumerate(watches):
        watch.at(7 - (rank == 2), "loading clips" if rank == 2 else "computing")
    with watches[0], watches[1]:
        with watches[2]:
            time.sleep(0.3)
        end = time.monotonic() + 10
        while not said and time.monotonic() < end:
            time.sleep(0.05)
        # One of them says it, once.
        time.sleep(0.5)
    (report,) = said
    lines = report.splitlines()
    assert "no step for" in lines[0]
    assert lines[1].startswith("  process 2: 6 steps done, loading clips; not heard of for")
    assert lines[2].startswith("  process 0: 7 steps done, computing")
    assert len(lines) == 4


def test_nothing_is_said_while_steps_are_made(store):
    said = []
    watches = [Watch(Ranks(rank, 2, torch.device("cpu")), 0.5, said.append) for rank in range(2)]
    with watches[0], watches[1]:
        for step in range(15):
            for watch in watches:
                watch.at(step, "computing")
            time.sleep(0.1)
    assert said == []


def test_the_store_may_end_first(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    with Watch(Ranks(0, 2, torch.device("cpu")), 0.5, print) as watch:
        time.sleep(0.2)
        del server
        time.sleep(0.5)
    assert not watch._thread.is_alive()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[...gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("Timed out waiting 10000ms for recv operation to complete"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("timed out"), False),
    ],
)
def test_errors_that_another_process_caused(error, expected):
    assert is_of_group(error) == expected


def test_a_process_that_hangs_is_reported(config):
    """Stopped in the middle of a run: the other one says which, and ends."""
    config.optim.steps, config.run.timeout, config.run.val_every = 100_000, 6.0, 100_000
    config.run.save_every = 2
    file = Path(config.run.out).with_suffix(".toml")
    file.write_text(to_toml(config))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
                "--shutdown-timeout=1"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "vmae_fast.cli", "pretrain", "--config", str(file)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    end = time.monotonic() + 90
    while time.monotonic() < end and not any(
        row["step"] >= 6 for row in read_metrics(Path(config.run.out) / "metrics.jsonl")
    ):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    # So that it has said where it is.
    time.sleep(1)
    goes_on, hangs = (child_of(process.pid, rank) for rank in (0, 1))
    os.kill(hangs, signal.SIGSTOP)
    while Path(f"/proc/{goes_on}/environ").exists() and time.monotonic() < end:
        time.sleep(0.05)
    # Else torchrun waits half a minute for it.
    os.kill(hangs, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the run is given up after 6 s (--timeout)" in output
    assert "process 0: another process of the run has ended, or hung for 6 s" in output
    reports = [line for line in output.splitlines() if line.startswith("  process 1: ")]
    assert len(reports) == 2
    for line in reports:
        assert "not heard of for" in line
        assert int(line.split()[2]) >= 4
    assert "--resume" in output
    assert sorted((Path(config.run.out) / "checkpoints").glob("step-*"))


def child_of(launcher, rank):
    """The process of a rank, by its launcher's."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("no such process")
