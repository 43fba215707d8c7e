"""The CUDA C++ extension ``vmae_fast._C``: where it runs, and tensors as it takes them.

It is built where nvcc was there at the installation, and absent elsewhere. One that was built and
cannot be loaded is an error, never taken for absent.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmae_fast.kernels import _launch

from ._checks import BackendError

_NAME = "vmae_fast._C"
_FOLDER = Path(__file__).resolve().parents[1]
# Written by the build: whether the extension was built, and if not why.
_BUILD_FILE = "_C_build.json"

_UNASKED: Any = object()
# What extension() returns, once it was asked.
_module: Any = _UNASKED


def extension() -> Any:
    """The module ``vmae_fast._C``, imported on first use; None where it was not built.

    Raises:
        BackendError: it was built and cannot be loaded.
    """
    global _module
    if _module is _UNASKED:
        _module = _load()
    return _module


def _load() -> Any:
    try:
        # By its name as it stands: the test that walks imports reads it.
        return importlib.import_module("vmae_fast._C")
    except ImportError as error:
        cause = error
    missing = isinstance(cause, ModuleNotFoundError) and cause.name == _NAME
    built = sorted(_FOLDER.glob("_C.*so")) + sorted(_FOLDER.glob("_C.*pyd"))
    if missing and not built:
        return None
    if missing:
        endings = ", ".join(importlib.machinery.EXTENSION_SUFFIXES)
        why = f"{built[0].name} is not for this Python, which loads files that end in {endings}"
    else:
        why = str(cause)
    raise BackendError(
        f"the CUDA C++ extension {_NAME} was built but cannot be loaded: {why}. Build it again "
        f"with this Python and the installed CUDA toolkit (pip install -e .), or delete "
        f"{built[0] if built else 'it'} to go without it"
    ) from cause


@contextmanager
def use(module: Any) -> Iterator[None]:
    """For tests: another module, or None for none, in place of ``vmae_fast._C``."""
    global _module
    before, _module = _module, module
    _why_not.cache_clear()
    try:
        yield
    finally:
        _module = before
        _why_not.cache_clear()


def why_not(device: torch.device) -> str:
    """Why the extension cannot run on tensors of this device; "" where it can.

    Raises:
        BackendError: it was built and cannot be loaded.
    """
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    return _why_not(device.type, index)


# What torch.compiler.assume_constant_result does, without importing the compiler for it: asking a
# GPU for its capability cannot be traced.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _why_not(kind: str, index: int | None) -> str:
    module = extension()
    if module is None:
        return f"the CUDA C++ extension is not built: {_why_not_built()}"
    device = torch.device(kind if index is None else f"{kind}:{index}")
    about = module.about()
    if about["emulated"]:
        return "" if kind == "cpu" else f"the emulated extension runs on the CPU, not on {device}"
    if kind != "cuda":
        return f"the CUDA C++ extension needs a CUDA device, not {device}"
    return _unsuited(_launch.target_of(device), about, module.driver_version(), str(device))


def _unsuited(target: int, about: dict[str, Any], driver: int, device: str) -> str:
    """Why code for some architectures does not run on a target; "" where it does.

    From the CUDA documentation, "Binary compatibility" and "Minor version compatibility": machine
    code runs on its own and later minor versions of one major compute capability (on its own alone
    where it ends in a), with any driver of the runtime's major version; PTX is compiled for every
    later one, by a driver that is no older than the compiler that wrote it.
    """
    built: int = about["cuda"]
    has = f"the driver is for CUDA {_dotted(driver)}" if driver else "there is no NVIDIA driver"
    if driver < built // 1000 * 1000:
        return f"{has}, but the extension was built with CUDA {_dotted(built)}"
    listed = [one for one in about["architectures"].split(";") if one]
    machine = [one for one in listed if not one.endswith("+PTX")]
    if any(_runs(one, target) for one in machine):
        return ""
    ptx = [one.removesuffix("+PTX") for one in listed if one.endswith("+PTX")]
    if not any(_compiles(one, target) for one in ptx):
        return (
            f"{device} has compute capability {target // 10}.{target % 10}, but the extension was "
            f"built for {_architectures(about)}"
        )
    if driver < built:
        return (
            f"{device} is newer than the machine code that the extension was built with, and "
            f"{has}, too old to compile PTX of CUDA {_dotted(built)}"
        )
    return ""


def _runs(architecture: str, target: int) -> bool:
    number = int(architecture.rstrip("af"))
    if architecture.endswith("a"):
        return number == target
    return number // 10 == target // 10 and number <= target


def _compiles(architecture: str, target: int) -> bool:
    if architecture[-1] in "af":
        return _runs(architecture, target)
    return int(architecture) <= target


def _why_not_built() -> str:
    path = _FOLDER / _BUILD_FILE
    unknown = "no build is on record (pip install -e . builds it where nvcc is)"
    if not path.is_file():
        return unknown
    said = json.loads(path.read_text())
    if said.get("built"):
        return "its file is no longer there"
    return said.get("why") or unknown


def _dotted(version: int) -> str:
    """13000 as "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _architectures(about: dict[str, Any]) -> str:
    """What a module was built for, "sm_80, 90a and PTX of 100"."""
    listed = [one for one in about["architectures"].split(";") if one]
    machine = ", ".join(one for one in listed if not one.endswith("+PTX"))
    ptx = ", ".join(one.removesuffix("+PTX") for one in listed if one.endswith("+PTX"))
    return " and ".join(filter(None, [machine and f"sm_{machine}", ptx and f"PTX of {ptx}"]))


def summary(chosen: str) -> str:
    """One line on the extension, for people, under the chosen backend."""
    try:
        module = extension()
    except BackendError as error:
        return f"CUDA C++ extension BROKEN: {error}"
    if module is None:
        return f"no CUDA C++ extension: {_why_not_built()}"
    about = module.about()
    if about["emulated"]:
        what = "CUDA C++ extension, emulated on the CPU"
    else:
        with_cuda = f"CUDA {_dotted(about['cuda'])}"
        what = f"CUDA C++ extension for {_architectures(about)} ({with_cuda})"
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    unserved = [why for why in map(why_not, gpus) if why]
    if gpus and len(unserved) == len(gpus):
        return f"{what}, which cannot run: {unserved[0]}"
    if chosen == "cuda" and not gpus and not about["emulated"]:
        return f"{what}, as VMAE_FAST_BACKEND demands, but there is no GPU to run on"
    if chosen == "cuda":
        return f"{what}, as VMAE_FAST_BACKEND demands"
    return f"{what}, off by default: VMAE_FAST_BACKEND=cuda"


def view(tensor: Tensor) -> Any:
    """A tensor's memory as the extension takes it; it does not keep the tensor alive."""
    device = tensor.device
    index = -1 if device.type == "cpu" else device.index
    dtype = str(tensor.dtype).removeprefix("torch.")
    return extension().View(tensor.data_ptr(), dtype, tensor.shape, tensor.stride(), index)


def stream_of(device: torch.device) -> int:
    """The current stream of a device, as the extension takes it."""
    return 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
