"""Options and records shared by the benchmarks.

pytest benchmarks/ --benchmark-only                      run, print
pytest benchmarks/ --benchmark-only --results benchmarks/results   and keep the figures
"""

import json
from pathlib import Path

import pytest
import torch
from attention_cases import TWINS
from environment import device_folder, environment
from rows import DEVICE, judged, rounded
from timing import ceilings

# Their figures would be filed under the GPU. CUDA_VISIBLE_DEVICES= in the environment hides it.
collect_ignore_glob = ["test_*_cpu.py", "test_data.py"] if torch.cuda.is_available() else []

# Worth most first: where the time is limited it may run out. All others come after them.
FIRST = (
    "test_step_gpu.py",
    "test_block.py",
    "test_attention.py",
    "test_tokens.py",
    "test_attention_curves.py",
    "test_mask_ratio.py",
    "test_memory_tables.py",
)
# Steps and blocks, then where a CUDA C++ kernel stands beside its Triton twin.
HEADLINES = FIRST[:2]
WITH_TWIN = {"test_masked_mse", *(f"test_attention[{case.name}]" for case in TWINS)}


def pytest_collection_modifyitems(items):
    items.sort(key=place)


def place(item):
    """Where a benchmark comes among all."""
    file = FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST)
    return item.path.name not in HEADLINES, item.name not in WITH_TWIN, file


def pytest_addoption(parser):
    parser.addoption("--results", default=None, help="folder to write result files to")


@pytest.fixture(scope="session")
def record(request):
    """Call with a name and figures: kept as DEVICE/NAME.json where --results names a folder.

    ``kind="published"`` files under that name what is counted, and the same on every device.
    """
    folder = request.config.getoption("--results")

    def write(name, figures, kind=None):
        print(f"\n{name}: " + json.dumps(figures, indent=2))
        if folder is None:
            return
        file = Path(folder) / (kind or device_folder()) / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"environment": environment(), **figures}, indent=2) + "\n")

    return write


@pytest.fixture
def finish_rows(benchmark, record):
    """Judge rows by their targets, record them, and give pytest-benchmark its call."""

    def write(name, what, rows, call):
        rows = [judged(row) for row in rows]
        figures = {"what": what, "ceilings": rounded(ceilings(DEVICE)), "rows": rows}
        record(name, figures)
        benchmark.extra_info.update(figures)

        def and_wait():
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(and_wait, rounds=3, warmup_rounds=1)

    return write
