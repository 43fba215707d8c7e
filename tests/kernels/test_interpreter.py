"""The kernels' tests of numbers in Triton's interpreter, each file in a process of its own.

Triton decides at its import whether kernels are interpreted. The processes (conftest.py) run
beside the other tests; these here come last.
"""

import ast
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

FILES = sorted(Path(__file__).parent.glob("test_numerics_*.py"))


def test_there_is_something_to_run():
    assert len(FILES) >= 3


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_numerics(file, interpreted):
    process, report, output = interpreted[file.stem]
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
