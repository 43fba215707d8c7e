"""The kernels' tests of numbers in Triton's interpreter, each file in a process of its own.

Triton decides at its import whether kernels are interpreted.
"""

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.glob("test_numerics_*.py"))


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """All of them at once: they are independent, and use one thread each."""
    folder = tmp_path_factory.mktemp("interpreter")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTEST_ADDOPTS": "",
    }
    processes = {}
    for file in FILES:
        report = folder / f"{file.stem}.xml"
        command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider",
                   f"--junitxml={report}"]  # fmt: skip
        with (folder / f"{file.stem}.txt").open("w") as output:
            process = subprocess.Popen(
                command, cwd=FOLDER.parents[1], env=environment, stdout=output, stderr=output
            )
        processes[file.stem] = (process, report, folder / f"{file.stem}.txt")
    yield processes
    for process, _, _ in processes.values():
        process.kill()
        process.wait()


def test_there_is_something_to_run():
    assert len(FILES) >= 3


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_numerics(file, started):
    process, report, output = started[file.stem]
    code = process.wait(timeout=1500)
    assert code == 0, output.read_text()
    passed, skipped = Counter(), []
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name")
        if case.find("skipped") is None:
            passed[name.partition("[")[0]] += 1
        else:
            skipped.append(name)
    # Each test passed for something, and none was left out but in bfloat16.
    written = {
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert set(passed) == written
    assert [name for name in skipped if "bfloat16" not in name] == []
    # One dtype of three at most.
    assert len(skipped) < passed.total()
