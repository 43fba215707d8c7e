"""Builds vmae_fast._C, the CUDA C++ kernels, for setup.py: nvcc, run by ninja, without torch.

Where something is missing nothing is built, and a line says what. Either way the package gets
_C_build.json, which `vmae-fast env` reads: pip shows no output of a build that succeeds.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Extension
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
NAME = "vmae_fast._C"
RECORD = "_C_build.json"
# Where CUDA is installed unless told.
CUDA_HOME = "/usr/local/cuda"
LOST = 'every op runs on Triton, and backend "cuda" is an error'

# Of the architectures that nvcc knows; the last one that is not for one device alone ("a", "f") is
# kept as PTX as well, which drivers compile for devices to come.
DEFAULT_ARCHITECTURES = ("80", "90a", "100")
# cp.async and mma on bfloat16 came with it.
OLDEST_ARCHITECTURE = 80

HOST_FLAGS = ("-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden")
# The registers and spills that ptxas tells; they go to the build's log and not to the screen.
PTXAS_REPORT = re.compile(r"ptxas info|\s+\d+ bytes stack frame")


class Missing(Exception):
    """What the build needs and this machine has not, in a line."""


@dataclasses.dataclass(frozen=True)
class Tools:
    """The programs and folders of a build, as found."""

    nvcc: str
    nvcc_version: str
    architectures: tuple[str, ...]
    compiler: str
    ninja: tuple[str, ...]
    includes: tuple[str, ...]


def wanted() -> bool | None:
    """VMAE_FAST_BUILD_CUDA: True where a build is required, False where forbidden."""
    value = os.environ.get("VMAE_FAST_BUILD_CUDA", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"error: VMAE_FAST_BUILD_CUDA must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, CUDA_PATH, PATH or the usual place, the first there is."""
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    places = [str(Path(home, "bin")) for home in homes if home]
    places += [os.environ.get("PATH", os.defpath), str(Path(CUDA_HOME, "bin"))]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Missing(f"{shlex.join(command)} fails: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def find_tools() -> Tools:
    """What a build takes; raises Missing."""
    if wanted() is False:
        raise Missing("VMAE_FAST_BUILD_CUDA=0")
    if sys.platform != "linux":
        raise Missing("the CUDA C++ kernels are built on Linux only")
    nvcc = find_nvcc()
    if nvcc is None:
        raise Missing(f"no nvcc in CUDA_HOME, CUDA_PATH, PATH or {CUDA_HOME}")
    release = re.search(r"release (\d+\.\d+)", output(nvcc, "--version"))
    if release is None:
        raise Missing(f"{nvcc} --version says no release")
    architectures = known_architectures(nvcc, release[1])
    if not architectures:
        raise Missing(f"nvcc {release[1]} knows no architecture from {OLDEST_ARCHITECTURE} on")
    named = os.environ.get("CXX") or "g++"
    compiler = shutil.which(named)
    if compiler is None:
        raise Missing(f"no C++ compiler {named!r} (CXX names one program)")
    python_include = sysconfig.get_path("include")
    if not Path(python_include, "Python.h").is_file():
        raise Missing(f"no Python.h in {python_include} (Python's development files)")
    try:
        import pybind11
    except ImportError:
        raise Missing("no pybind11 (pip install pybind11)") from None
    if importlib.util.find_spec("ninja") is not None:
        ninja = (sys.executable, "-m", "ninja")
    elif (program := shutil.which("ninja")) is not None:
        ninja = (program,)
    else:
        raise Missing("no ninja (pip install ninja)")
    includes = (pybind11.get_include(), python_include)
    return Tools(nvcc, release[1], architectures, compiler, ninja, includes)


def known_architectures(nvcc: str, version: str) -> tuple[str, ...]:
    """The architectures that nvcc compiles for and the kernels run on."""
    release = tuple(int(part) for part in version.split("."))
    listed = {
        int(number) for number in re.findall(r"compute_(\d+)", output(nvcc, "--list-gpu-arch"))
    }
    known = []
    for number in sorted({int(number) for number in listed}):
        if number >= OLDEST_ARCHITECTURE:
            known.append(str(number))
            # nvcc does not list them: what one device alone has ("a"), or its family ("f").
            known += [f"{number}a"] * (number >= 90 and release >= (12, 0))
            known += [f"{number}f"] * (number >= 100 and release >= (12, 9))
    return tuple(known)


def choose_architectures(tools: Tools) -> list[str]:
    """What to build, "90a" for machine code and "100+PTX" for PTX, by VMAE_FAST_CUDA_ARCHS."""
    words = os.environ.get("VMAE_FAST_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split()
    if not words:
        words = [name for name in DEFAULT_ARCHITECTURES if name in tools.architectures]
        for name in DEFAULT_ARCHITECTURES:
            if name not in words:
                say(f"nvcc {tools.nvcc_version} does not know architecture {name}: left out")
        words += [f"{name}+PTX" for name in [name for name in words if name.isdigit()][-1:]]
    chosen: list[str] = []
    for word in words:
        name = word.removesuffix("+PTX")
        if name not in tools.architectures:
            raise SystemExit(
                f"error: VMAE_FAST_CUDA_ARCHS: {word!r} is none of "
                f"{', '.join(tools.architectures)}, with +PTX or without, and semicolons, commas "
                "or spaces between them"
            )
        chosen += [name, word]
    return list(dict.fromkeys(chosen))


def gencode(architecture: str) -> str:
    """nvcc's flag for one image."""
    name, ptx, _ = architecture.partition("+PTX")
    return f"-gencode=arch=compute_{name},code={'compute' if ptx else 'sm'}_{name}"


def ninja_file(tools: Tools, architectures: list[str], folder: Path, target: Path) -> str:
    """The build.ninja: every source to an object and a log beside it, and the target of these.

    nvcc drives the host compiler as well: it knows where CUDA's headers and libraries are.
    """
    common = [tools.nvcc, "-std=c++17", "-O3", f"-Xcompiler={','.join(HOST_FLAGS)}"]
    common += [f"-ccbin={tools.compiler}"]
    cuda = [*common, "-Xptxas=-v", *(gencode(architecture) for architecture in architectures)]
    module = [*common, *(f"-isystem={include}" for include in tools.includes)]
    module += [f'-DVMAE_FAST_ARCHITECTURES="{";".join(architectures)}"']
    link = [tools.nvcc, f"-ccbin={tools.compiler}", "-shared", "-cudart=static", "--no-device-link"]
    rest = "-MD -MF $out.d -MT $out -c $in -o $out > $out.log 2>&1"
    lines = [f"builddir = {folder}"]
    for rule, command in (("cuda", cuda), ("module", module)):
        lines += [
            f"rule {rule}",
            f"  command = {escaped(command)} {rest}",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $in",
        ]
    lines += ["rule link", f"  command = {escaped(link)} $in -o $out", "  description = $out"]
    objects = []
    for source in sources():
        objects.append(f"{folder}/{Path(source).name}.o")
        rule = "cuda" if source.endswith(".cu") else "module"
        lines.append(f"build {objects[-1]}: {rule} {source}")
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def escaped(command: list[str]) -> str:
    """For the shell, and that for ninja. nvcc's extra flags are in it, so that a change counts."""
    extra = [
        f"{name}={os.environ[name]}"
        for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
        if name in os.environ
    ]
    return shlex.join([*(["env", *extra] if extra else []), *command]).replace("$", "$$")


def sources() -> list[str]:
    """Relative to the root, where ninja runs."""
    return ["csrc/module.cpp", *sorted(f"csrc/{path.name}" for path in ROOT.glob("csrc/*.cu"))]


def say(line: str) -> None:
    print(f"vmae-fast: {line}", file=sys.stderr, flush=True)


def compile_extension(tools: Tools, architectures: list[str]) -> Path:
    """Brings the module up to date under build/, with ptxas.log, and returns its path."""
    folder = Path("build", "extension", sys.implementation.cache_tag)
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    target = folder / "_C.so"
    (ROOT / folder / "build.ninja").write_text(ninja_file(tools, architectures, folder, target))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [*tools.ninja, "-f", str(folder / "build.ninja"), *jobs]
    failed = subprocess.run(command, cwd=ROOT, check=False).returncode != 0
    report = []
    for source in sources():
        log = ROOT / folder / f"{Path(source).name}.o.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        report += [source, *lines]
        # Warnings, and errors.
        for line in lines:
            if not PTXAS_REPORT.match(line):
                print(line, file=sys.stderr, flush=True)
    (ROOT / folder / "ptxas.log").write_text("\n".join(report) + "\n")
    if failed:
        raise SystemExit(
            f"error: {NAME} does not build, see above; "
            f"VMAE_FAST_BUILD_CUDA=0 installs without it: {LOST}"
        )
    return ROOT / target


class Build(build):
    """build_ext runs even if there is nothing to build: it says so, and records why."""

    sub_commands: ClassVar[list[tuple]] = [
        (name, None if name == "build_ext" else needed) for name, needed in build.sub_commands
    ]


class BuildExtension(build_ext):
    """Builds by nvcc and ninja, and writes the record."""

    def run(self) -> None:
        try:
            tools = find_tools()
        except Missing as missing:
            if wanted():
                raise SystemExit(f"error: VMAE_FAST_BUILD_CUDA=1, but {missing}") from None
            say(f"no CUDA C++ kernels: {missing}; {LOST}")
            for folder in self.package_folders():
                (folder / Path(self.get_ext_filename(NAME)).name).unlink(missing_ok=True)
            self.record(built=False, why=str(missing), architectures="", nvcc="")
            return
        self.tools, self.architectures = tools, choose_architectures(tools)
        super().run()
        text = ";".join(self.architectures)
        say(f"CUDA C++ kernels built for {text} by nvcc {tools.nvcc_version}")
        self.record(built=True, why="", architectures=text, nvcc=tools.nvcc_version)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(compile_extension(self.tools, self.architectures)), str(target))

    def package_folders(self) -> list[Path]:
        """The package in the build, and in the source tree where that is what is installed."""
        return [Path(self.build_lib, "vmae_fast"), *([ROOT / "vmae_fast"] if self.inplace else [])]

    def record(self, **facts: object) -> None:
        for folder in self.package_folders():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECORD).write_text(json.dumps(facts, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib, "vmae_fast", RECORD))]

    def get_output_mapping(self) -> dict[str, str]:
        mapping = super().get_output_mapping()
        if self.inplace:
            mapping[str(Path(self.build_lib, "vmae_fast", RECORD))] = f"vmae_fast/{RECORD}"
        return mapping


def extensions() -> list[Extension]:
    """For setup(): none where it is not built, so that such a wheel fits every machine."""
    try:
        find_tools()
    except Missing:
        return []
    return [Extension(NAME, sources())]


COMMANDS = {"build": Build, "build_ext": BuildExtension}
