"""Options and records shared by the benchmarks.

pytest benchmarks/ --benchmark-only                      run, print
pytest benchmarks/ --benchmark-only --results benchmarks/results   and keep the figures
"""

import json
from pathlib import Path

import pytest
import torch
from environment import device_folder, environment

# Their figures would be filed under the GPU. CUDA_VISIBLE_DEVICES= in the environment hides it.
collect_ignore_glob = ["test_*_cpu.py"] if torch.cuda.is_available() else []


def pytest_addoption(parser):
    parser.addoption("--results", default=None, help="folder to write result files to")


@pytest.fixture(scope="session")
def record(request):
    """Call with a name and figures: kept as DEVICE/NAME.json where --results names a folder."""
    folder = request.config.getoption("--results")

    def write(name, figures):
        print(f"\n{name}: " + json.dumps(figures, indent=2))
        if folder is None:
            return
        file = Path(folder) / device_folder() / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"environment": environment(), **figures}, indent=2) + "\n")

    return write
