"""Compiling launches ahead of time, for a GPU that need not be there.

The launchers themselves are run, on tensors without data: what they would launch is compiled for
a target instead, with the argument types, the specialisations and the table row of that launch.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vmae_fast.kernels
from vmae_fast.kernels import _launch

# Shared memory a block may have, in bytes, by target: CUDA C++ Programming Guide, table of
# technical specifications per compute capability.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10,
                120: 99 << 10}  # fmt: skip

_NORM = ("bias_gelu", "layer_norm")

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """What decides how a kernel is compiled; can be handed to another process.

    Attributes:
        module: the kernel's, by name.
        kernel: its name.
        target: compute capability as two digits.
        signature: type of each argument, "constexpr" for constants.
        constants: their values by the arguments' names.
        divisible: names of integers and pointers that are multiples of 16.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
    """

    module: str
    kernel: str
    target: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        given = {name: kind for name, kind in self.signature if kind[0] == "*"}
        shown = ", ".join(f"{name}={kind}" for name, kind in (given | dict(self.constants)).items())
        return f"{self.kernel}({shown}), {self.num_warps} warps, sm_{self.target}"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch.

    Attributes:
        ptx: assembly.
        registers: a thread.
        stack_bytes: local memory a thread: spilled registers, where a kernel has no arrays.
        shared_bytes: shared memory a block.
    """

    ptx: str
    registers: int
    stack_bytes: int
    shared_bytes: int


class Recorder:
    """While active, launches are noted instead of run, as on a GPU of ``target``.

    Attributes:
        launches: what there is to compile, each once, with the table row it was launched with.
        rows: the table rows that were launched with, each object once.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.launches: dict[Launch, _launch.Row] = {}
        self.rows: list[_launch.Row] = []
        self._patches = ExitStack()

    def __enter__(self) -> "Recorder":
        self._patches.enter_context(mock.patch.object(_launch, "launch", self._note))
        self._patches.enter_context(
            mock.patch.object(_launch, "target_of", return_value=self.target)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _note(self, kernel, programs, *args, row, **constants) -> None:
        assert 0 < programs < 2**31
        values = dict(zip(kernel.arg_names, args, strict=False)) | dict(row.blocks) | constants
        declared = {p.name for p in kernel.params if p.is_constexpr}
        kinds = {
            name: "constexpr" if name in declared else _type_of(values[name])
            for name in kernel.arg_names
        }
        constant = {name for name, kind in kinds.items() if kind == "constexpr"}
        launch = Launch(
            module=kernel.fn.__module__,
            kernel=kernel.fn.__name__,
            target=self.target,
            signature=tuple(kinds.items()),
            constants=tuple((name, values[name]) for name in kinds if name in constant),
            divisible=tuple(n for n in kinds if n not in constant and _divides_by_16(values[n])),
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )
        self.launches[launch] = row
        if not any(row is known for known in self.rows):
            self.rows.append(row)


def compile_all(launches: list[Launch], pool: Executor) -> dict[Launch, Compiled]:
    """Compile each launch in one of the pool's processes."""
    return dict(zip(launches, pool.map(compile_launch, launches), strict=True))


def compile_launch(launch: Launch) -> Compiled:
    """Compile a launch in this process."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={place[name]: value for name, value in launch.constants},
        attrs={place[name]: [["tt.divisibility", 16]] for name in launch.divisible},
    )
    with warnings.catch_warnings():
        # Triton 3.9 announces what another version will do.
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        made = triton.compile(
            source,
            target=GPUTarget("cuda", launch.target, 32),
            options={
                "num_warps": launch.num_warps,
                "num_stages": launch.num_stages,
                "enable_fp_fusion": True,
            },
        )
    registers, stack_bytes = _resources(made.asm["cubin"])
    return Compiled(made.asm["ptx"], registers, stack_bytes, made.metadata.shared)


def faults(
    launch: Launch, made: Compiled, dtype: torch.dtype, shared_bytes: int, product: str = ""
) -> Iterator[str]:
    """What is wrong with a compiled launch.

    Args:
        launch: what was compiled.
        made: what came of it.
        dtype: that it computes in. fp32 is for checking, not for speed: it may spill.
        shared_bytes: shared memory that it may have.
        product: instruction that its products of matrices are to be, except in fp32.
    """
    if made.shared_bytes > shared_bytes:
        yield f"{made.shared_bytes} bytes of shared memory, above {shared_bytes}"
    if dtype == torch.float32:
        if ".tf32" in made.ptx:
            yield "fp32 is rounded to tf32"
        return
    if made.stack_bytes:
        yield f"{made.stack_bytes} bytes of spilled registers"
    if product not in made.ptx:
        yield f"no {product}"


# Those of layer norm and GELU, which test_compile_norm.py compiles.
NORM_MODULES = [importlib.import_module(f"vmae_fast.kernels.{n}") for n in _NORM]


def kernel_modules(*, attention: bool) -> list[ModuleType]:
    """The modules of vmae_fast.kernels: those of attention, or the others, without NORM_MODULES.

    Each kind has a test file that compiles it.
    """
    names = [module.name for module in pkgutil.iter_modules(vmae_fast.kernels.__path__)]
    wanted = [name for name in names if ("attention" in name) == attention and name not in _NORM]
    return [importlib.import_module(f"vmae_fast.kernels.{name}") for name in wanted]


def kernels_of(modules: list[ModuleType]) -> set[str]:
    """Names of the kernels that are written in modules."""
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }


def _type_of(value: object) -> str:
    # As Triton does it: an integer of 1 and a missing tensor are constants.
    if value is None or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert type(value) is int
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _divides_by_16(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])
