"""Options and records shared by the benchmarks.

pytest benchmarks/ --benchmark-only                      run, print
pytest benchmarks/ --benchmark-only --results benchmarks/results   and keep the figures
"""

import datetime
import json
import platform
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import torch


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


def device_folder():
    """Name of the device, as a folder: cpu, or the GPU's."""
    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name().lower().replace(" ", "-")


@lru_cache(maxsize=1)
def environment():
    """What a figure depends on; read once, before result files change the working tree."""
    import transformers

    root = Path(__file__).parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"
