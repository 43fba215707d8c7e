"""What nvcc made of the CUDA C++ kernels, read from the installed extension: no GPU is needed.

Its machine code and the registers it takes are what cuobjdump tells, of the CUDA toolkit or of
Triton's package.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vmae_fast.ops import _extension

SOURCES = Path(__file__).resolve().parents[2] / "csrc"

DTYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32"}
ATTENTION = ("short_attention_kernel", "short_attention_backward_kernel")
HEAD_WIDTHS = (64, 80, 88)
LOSS = "masked_mse_kernel"
# A kernel's name in its mangled one, the dtype and the integers that it is compiled for.
MANGLED = re.compile(rf"\d({'|'.join((*ATTENTION, LOSS))})I({'|'.join(DTYPES)})((?:L[ib]\d+E)+)E")
# Address, predicate, instruction.
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:\{ *)?(?:@!?\w+ +)?([A-Z][\w.]*)")

# CUDA C++ Programming Guide, table of technical specifications per compute capability.
REGISTERS_OF_BLOCK = 65536
REGISTERS_OF_THREAD = 255
# A warp's are handed out in such portions.
REGISTER_PORTION = 256
# What CUDA itself has of every block's shared memory from compute capability 9.0 on, bytes; not
# every toolkit counts it.
RESERVED_SHARED = 1024


@dataclass
class Code:
    """One kernel as compiled for one architecture.

    Attributes:
        kernel: name.
        architecture: "80", "90a".
        dtype: as PyTorch has it.
        constants: what it is compiled for, as the template has them.
        usage: registers a thread, and bytes of stack, local and static shared memory.
        instructions: how many of each.
    """

    kernel: str
    architecture: str
    dtype: str
    constants: tuple[int, ...]
    usage: dict[str, int] = field(default_factory=dict)
    instructions: Counter[str] = field(default_factory=Counter)

    def __str__(self):
        constants = ", ".join(map(str, self.constants))
        return f"{self.kernel}<{self.dtype}, {constants}> for {self.architecture}"

    def count(self, pattern):
        """Instructions that match from beginning to end."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    def threads(self):
        """Of a block, at most."""
        if self.kernel == "short_attention_backward_kernel":
            return 32 * constant("BACKWARD_WARPS")
        if self.kernel == "short_attention_kernel":
            return 32 * constant("FORWARD_WARPS")
        return constant("MOST_ROWS")


def constant(name):
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("*.*h")))
    return int(re.search(rf"constexpr int {name} = (\d+);", text)[1])


@pytest.fixture(scope="session")
def binary():
    """Path of the installed extension."""
    spec = importlib.util.find_spec("vmae_fast._C")
    if spec is not None:
        return Path(spec.origin)
    why = _extension._why_not_built()
    if shutil.which("nvcc") is None or "VMAE_FAST_BUILD_CUDA=0" in why:
        pytest.skip(f"the CUDA C++ extension is not built: {why}")
    pytest.fail(f"nvcc is on PATH, but the CUDA C++ extension is not built: {why}")


@pytest.fixture(scope="session")
def cuobjdump(binary):
    """A function that runs cuobjdump on the extension and gives its lines."""
    folder = None
    if shutil.which("cuobjdump") is None or shutil.which("nvdisasm") is None:
        triton = importlib.util.find_spec("triton")
        folder = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        if folder is None or not (folder / "cuobjdump").is_file():
            pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton's package")

    def run(*options):
        path = os.pathsep.join([str(folder)] * bool(folder) + [os.environ["PATH"]])
        program = shutil.which("cuobjdump", path=path)
        # It finds nvdisasm by PATH.
        command, environment = [program, *options, str(binary)], {**os.environ, "PATH": path}
        with subprocess.Popen(command, env=environment, stdout=-1, text=True) as process:
            yield from process.stdout
        assert process.returncode == 0, command

    return run


@pytest.fixture(scope="session")
def codes(cuobjdump):
    """Every kernel for every architecture, by architecture and mangled name."""
    found = {}
    for line in cuobjdump("--dump-resource-usage"):
        if line.startswith("arch ="):
            architecture = line.split("sm_")[1].strip()
        elif line.startswith(" Function "):
            mangled = line.split()[1].rstrip(":")
            name = MANGLED.search(mangled)
            assert name, f"{mangled} is no kernel that the tests know"
            constants = tuple(int(one) for one in re.findall(r"L[ib](\d+)E", name[3]))
            code = Code(name[1], architecture, DTYPES[name[2]], constants)
            found[architecture, mangled] = code
        elif "REG:" in line:
            usage = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)
            code.usage = {key: int(value) for key, value in usage}
    for line in cuobjdump("--dump-sass"):
        if line.startswith("\tcode for sm_"):
            architecture = line.split("sm_")[1].strip()
        elif line.startswith("\t\tFunction : "):
            instructions = found[architecture, line.split()[-1]].instructions
        elif name := INSTRUCTION.match(line):
            instructions[name[1]] += 1
    return list(found.values())


def failures(codes, *, of, but):
    """The kernels that something is wrong with, told with what was found."""
    return "\n".join(f"{code}: {of(code)}" for code in codes if not but(code))


# ---- what there is ------------------------------------------------------------------------------


def architectures():
    return _extension.extension().about()["architectures"].split(";")


def expected():
    """Kernel, dtype and the first constant: the width of heads, or channels."""
    found = {
        (kernel, dtype, width)
        for kernel in ATTENTION
        for dtype in ("float16", "bfloat16")
        for width in HEAD_WIDTHS
    }
    return found | {
        (LOSS, dtype, channels) for dtype in DTYPES.values() for channels in range(1, 5)
    }


def test_every_kernel_is_there_for_every_architecture(codes):
    machine = {name for name in architectures() if not name.endswith("+PTX")}
    assert {code.architecture for code in codes} == machine
    all_of = {
        name: {(c.kernel, c.dtype, *c.constants) for c in codes if c.architecture == name}
        for name in machine
    }
    for name, variants in all_of.items():
        assert {variant[:3] for variant in variants} == expected(), name
        assert variants == next(iter(all_of.values()))
        # Interleaved channels are three, and predictions of either order.
        loss = {variant[2:] for variant in variants if variant[0] == LOSS}
        planes = {(channels, 0, order) for channels in (1, 2, 3, 4) for order in (0, 1)}
        assert loss == planes | {(3, 1, 0), (3, 1, 1)}


def test_ptx_is_there_for_devices_to_come(cuobjdump):
    wanted = {name.removesuffix("+PTX") for name in architectures() if name.endswith("+PTX")}
    listed = {
        line.split("sm_")[1].split(".")[0] for line in cuobjdump("--list-ptx") if "sm_" in line
    }
    assert listed == wanted


def test_the_build_says_what_it_built(binary):
    said = json.loads(binary.with_name("_C_build.json").read_text())
    assert said["built"]
    assert said["architectures"].split(";") == architectures()
    about = _extension.extension().about()
    assert not about["emulated"]
    assert said["nvcc"] == f"{about['cuda'] // 1000}.{about['cuda'] % 1000 // 10}"


def test_the_extension_takes_no_cpu_tensors(binary):
    with pytest.raises(ValueError, match=r"^device must be the index of a CUDA device, got -1$"):
        _extension.extension().View(64, "uint8", [1], [1], -1)


def test_all_tensors_are_on_one_device(binary):
    """Said before any device is asked for: there need not be one."""
    module = _extension.extension()
    first, second = (
        module.View(4096, "float16", [1, 8, 1, 64], [512, 64, 64, 1], device) for device in (0, 1)
    )
    with pytest.raises(ValueError, match=r"^v must be on the device of q, 0, got device 1$"):
        module.short_attention(first, first, second, first, first, 1, 8, 0, 1, 0.1, 0)


# ---- registers and memory -----------------------------------------------------------------------


def test_no_kernel_spills(codes):
    def nothing_local(code):
        return not any(code.usage[kind] for kind in ("STACK", "LOCAL")) and not code.count(
            r"(LDL|STL)(\..*)?"
        )

    wrong = failures(codes, of=lambda code: code.usage, but=nothing_local)
    assert not wrong, wrong


def test_the_compiler_reports_no_spills(binary):
    """ptxas's own words, where the extension was built in this tree."""
    log = SOURCES.parent / "build" / "extension" / sys.implementation.cache_tag / "ptxas.log"
    if SOURCES.parent not in binary.parents:
        pytest.skip("the extension was not built here")
    spilt = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.read_text())
    assert len(spilt) > 2 * len(ATTENTION) * len(HEAD_WIDTHS)
    assert set(spilt) == {"0"}


def test_shared_memory_is_asked_for_by_the_launch(codes):
    def none_static(code):
        reserved = RESERVED_SHARED if int(re.match(r"\d+", code.architecture)[0]) >= 90 else 0
        return code.usage["SHARED"] in (0, reserved)

    wrong = failures(codes, of=lambda code: code.usage, but=none_static)
    assert not wrong, wrong


def test_registers_of_a_block_fit(codes):
    def fits(code):
        registers = code.usage["REG"]
        warp = -(-32 * registers // REGISTER_PORTION) * REGISTER_PORTION
        return registers <= REGISTERS_OF_THREAD and (
            warp * (code.threads() // 32) <= REGISTERS_OF_BLOCK
        )

    of = lambda code: f"{code.usage['REG']} registers, {code.threads()} threads"  # noqa: E731
    wrong = failures(codes, of=of, but=fits)
    assert not wrong, wrong


# ---- instructions -------------------------------------------------------------------------------


def memory(code):
    """Instructions on memory and matrices, for messages."""
    kinds = r"HMMA|LDSM|LDGSTS|LDG|STG|LDS|STS|ATOM|RED|LDL|STL|LD|ST"
    return {name: n for name, n in code.instructions.items() if re.match(rf"({kinds})", name)}


def test_instructions_were_read(codes):
    assert all(code.count("EXIT") and sum(code.instructions.values()) > 100 for code in codes)


def test_no_atomics_and_no_generic_addresses(codes):
    """The same from run to run; and the compiler knows which memory a pointer is to."""
    unwanted = r"(ATOM|ATOMG|ATOMS|RED|REDG|REDS|LD|ST)(\..*)?"
    wrong = failures(codes, of=memory, but=lambda code: not code.count(unwanted))
    assert not wrong, wrong


def test_attention_multiplies_on_tensor_cores(codes):
    def multiplies(code):
        kind = r"\.BF16" if code.dtype == "bfloat16" else ""
        deep, flat = (code.count(rf"HMMA\.{shape}\.F32{kind}") for shape in ("16816", "1688"))
        # Heads of an odd number of 8 values end in a product of that depth.
        odd = code.constants[0] % 16 == 8
        return deep > 0 and (flat > 0) == odd and code.count(r"HMMA\..*") == deep + flat

    attention = [code for code in codes if code.kernel in ATTENTION]
    wrong = failures(attention, of=memory, but=multiplies)
    assert not wrong, wrong


def test_attention_loads_matrices_and_copies_asynchronously(codes):
    def loads(code):
        copies = code.count(r"LDGSTS\..*")
        return (
            code.count(r"LDSM\.16\.M88\..*")
            and code.count(r"LDSM\.16\.MT88\..*")
            and copies
            # The log-sum-exp comes by the value.
            and (code.count(r"LDGSTS\..*\.128(\..*)?") == copies or "backward" in code.kernel)
            and code.count(r"LDGSTS\..*\.128(\..*)?")
            and code.count(r"STG\..*\.128")
        )

    attention = [code for code in codes if code.kernel in ATTENTION]
    wrong = failures(attention, of=memory, but=loads)
    assert not wrong, wrong


def test_the_loss_loads_and_stores_16_bytes(codes):
    """Pixels, 16 a load; predictions and differences, two units of 8 a channel."""

    def wide(code):
        channels, size = code.constants[0], 4 if code.dtype == "float32" else 2
        loads, stores = code.count(r"LDG\..*\.128(\..*)?"), code.count(r"STG\..*\.128(\..*)?")
        values = 2 * channels * 8 * size // 16
        return loads >= channels + values and stores >= values

    wrong = failures([code for code in codes if code.kernel == LOSS], of=memory, but=wide)
    assert not wrong, wrong
