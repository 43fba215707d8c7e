"""Kernels on a GPU where there is one, else on the CPU.

There Triton's run in its interpreter, those in CUDA C++ in an emulator of ours.
"""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from aot import SHARED_BYTES, compile_all, faults
from emulator import build

from vmae_fast import ops
from vmae_fast.kernels import attention
from vmae_fast.kernels import packed_attention as packed
from vmae_fast.kernels import tiled_attention as tiled
from vmae_fast.kernels import whole_attention as whole
from vmae_fast.kernels._launch import Row
from vmae_fast.kernels.attention_tiles import joint
from vmae_fast.ops import _extension, _short_attention

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    """What "cuda" does not take is no test of it."""
    unsuited = [item for item in items if family_of(item) == "cuda" and not suits_cuda(item)]
    config.hook.pytest_deselected(items=unsuited)
    dropped = set(unsuited)
    items[:] = [item for item in items if item not in dropped]
    items.sort(key=of_interpreter)


def of_interpreter(item):
    return item.path.name == "test_interpreter.py"


def family_of(item):
    """The family of attention kernels that a test is for, "" for any."""
    return item.callspec.params.get("family", "") if hasattr(item, "callspec") else ""


def suits_cuda(item):
    """Whether a test's parameters are what the attention kernels in CUDA C++ are written for."""
    params = item.callspec.params
    return (
        params.get("dtype") in (torch.float16, torch.bfloat16)
        and params.get("head_width", 64) in _short_attention.HEAD_WIDTHS
        and not params.get("class_token", False)
    )


@pytest.fixture(scope="session", autouse=True)
def interpreted(request, tmp_path_factory):
    """Processes in which Triton interprets kernels, report and output of each, by file.

    They start with the first test of this folder and take what the others leave of the processor:
    one thread each, and last in its turn.
    """
    if not any(map(of_interpreter, request.session.items)):
        yield {}
        return
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
    for file in sorted(FOLDER.glob("test_numerics_*.py")):
        report = folder / f"{file.stem}.xml"
        command = ["nice", sys.executable, "-m", "pytest", str(file), "-q"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
        with (folder / f"{file.stem}.txt").open("w") as output:
            process = subprocess.Popen(
                command, cwd=FOLDER.parents[1], env=environment, stdout=output, stderr=output
            )
        processes[file.stem] = (process, report, folder / f"{file.stem}.txt")
    yield processes
    for process, _, _ in processes.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request, device):
    emulated = family_of(request.node) == "cuda"
    if request.param == torch.bfloat16 and device.type == "cpu" and not emulated:
        pytest.skip("Triton's interpreter multiplies bfloat16 as if it were integers")
    return request.param


@pytest.fixture
def kernels():
    """Demand the kernels, and fill what they leave unwritten with NaN (integers: the largest)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    # Warnings only: what other operations do is of no interest here.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for empty in (torch.empty(3), torch.zeros(3).new_empty(3), torch.empty_like(torch.zeros(3))):
        assert empty.isnan().all()
    with ops.backend("triton"):
        yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def force(monkeypatch, device, cuda_calls):
    """A function that has one family of attention kernels run, whatever the tables prefer.

    On a GPU a pass that the family's tables have no row for stays with what they do have.
    """

    def choose(family, num_keys, head_width, dtype, class_token=False):
        if family == "cuda":
            cuda_calls()
            return
        if family == "whole" and class_token:
            # They take none: whatever the tables prefer.
            return
        forward, backward = {
            "packed": (packed.packed_attention, packed.packed_attention_backward),
            "whole": (whole.whole_attention, whole.whole_attention_backward),
            "tiled": (tiled.tiled_attention, tiled.tiled_attention_backward),
        }[family]
        if family != "tiled":
            rows = rows_of(family, num_keys, head_width, dtype)
            forward, backward = (
                row and partial(launcher, row)
                for launcher, row in zip((forward, backward), rows, strict=True)
            )
        if forward:
            monkeypatch.setattr(attention, "_forward_for", lambda *_: forward)
        if backward:
            monkeypatch.setattr(attention, "_backward_for", lambda *_: backward)

    def rows_of(family, num_keys, head_width, dtype):
        given = torch.empty(1, 1, 1, head_width, dtype=dtype, device=device), joint(num_keys)
        if family == "packed":
            rows = packed.packed_forward_row(*given), packed.packed_backward_row(*given)
            other = Row({"BLOCK": 64})
        else:
            rows = whole.whole_forward_row(*given), whole.whole_backward_row(*given)
            other = Row({"BLOCK_M": 32})
        if device.type == "cpu":
            # In the interpreter everything fits.
            return [row or other for row in rows]
        if rows == (None, None):
            pytest.skip(f"no row of {family} attention's tables is for so many keys")
        return rows

    return choose


@pytest.fixture
def cuda_calls(request, monkeypatch, device):
    """A function that demands the backend "cuda"; returns the list that its calls are noted in."""
    noted = []
    call = _short_attention._call

    def note(name, *rest):
        call(name, *rest)
        noted.append(name)

    with ExitStack() as stack:

        def demand():
            if device.type == "cpu":
                module = request.getfixturevalue("emulated")
                stack.enter_context(_extension.use(module))
            elif why := _extension.why_not(device):
                pytest.skip(why)
            monkeypatch.setattr(_short_attention, "_call", note)
            stack.enter_context(ops.backend("cuda"))
            demanded.append(True)
            return noted

        demanded = []
        yield demand
    # A test of a kernel is one that ran it.
    assert not demanded or noted


@pytest.fixture(scope="session")
def emulated():
    """The CUDA C++ extension, run on the CPU by the emulator (tests/emulator)."""
    return build.load(build.build(build.CACHE))


@pytest.fixture(scope="session")
def pool():
    # Spawned: this process has threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        yield executor


@pytest.fixture(scope="session")
def compiled():
    """What was compiled already."""
    return {}


@pytest.fixture
def compile_and_check(pool, compiled, record_property):
    """A function that compiles launches of a dtype and looks at what came out.

    It takes, of a launch, the instruction that its products of matrices are to be ("" for any) and
    the shared memory that it may have.
    """

    def run(launches, dtype, product_of, shared_of=lambda launch: SHARED_BYTES[launch.target]):
        assert launches
        compiled.update(compile_all([one for one in launches if one not in compiled], pool))
        found = []
        for one in launches:
            made = compiled[one]
            record_property(str(one), f"{made.registers} registers, {made.stack_bytes} of stack")
            wrong = faults(one, made, dtype, shared_of(one), product_of(one))
            found += [f"{fault}: {one}" for fault in wrong]
        assert not found, "\n".join(found)

    return run
