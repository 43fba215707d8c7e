"""Compiles CUDA C++ sources with g++ into Python modules that run them on the CPU."""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc"
# Ignored by git.
CACHE = ROOT / "build" / "emulated"

COMPILER = "g++"
FLAGS = [
    *["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DVMAE_FAST_EMULATED"],
    # Two of these modules in one process share nothing.
    "-fno-gnu-unique",
    *["-Wall", "-Wextra", "-Werror"],
    # nvcc's #pragma unroll
    "-Wno-unknown-pragmas",
]
DAY_S = 24 * 60 * 60


def build(folder: Path) -> Path:
    """The package's extension, emulated: the path of the module in `folder`."""
    return build_module([*sorted(KERNELS.glob("*.cu")), KERNELS / "module.cpp"], folder, "_C")


def build_module(sources: list[Path], folder: Path, name: str) -> Path:
    """A module called `name` from these sources and the emulator.

    What was compiled from the same sources, headers and flags is used again; what was not used for
    a day is deleted.

    Raises:
        RuntimeError: a source does not compile; with what the compiler says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Of several processes one builds, the others find what it made.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build_module(sources, folder, name)


def _build_module(sources: list[Path], folder: Path, name: str) -> Path:
    for old in folder.iterdir():
        if old.stat().st_mtime < time.time() - DAY_S:
            old.unlink()
    includes = [HERE, KERNELS, pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*FLAGS, *(f"-I{path}" for path in includes)]
    version = _output(COMPILER, "--version")
    folders = {HERE, KERNELS, *(source.parent for source in sources)}
    headers = [
        path for parent in folders for path in parent.iterdir() if path.suffix in (".h", ".cuh")
    ]
    common = _digest([version.encode(), *(flag.encode() for flag in flags), *_contents(headers)])

    def compiled(source: Path) -> Path:
        made = folder / f"{source.stem}-{_digest([common.encode(), *_contents([source])])}.o"
        _make(made, COMPILER, *flags, "-x", "c++", "-c", str(source))
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*sorted(HERE.glob("*.cpp")), *sources]))
    names = _digest([path.name.encode() for path in objects])
    module = folder / f"{name}-{names}{sysconfig.get_config_var('EXT_SUFFIX')}"
    _make(module, COMPILER, "-shared", *map(str, objects))
    return module


def load(path: Path):
    """Imports a module that was built here, under a name that no other module has."""
    # What follows the last dot is what the module was built as.
    stem, digest = path.name.split(".")[0].rsplit("-", 1)
    name = f"emulated_{digest}.{stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _make(path: Path, *command: str) -> None:
    if path.exists():
        path.touch()
        return
    # Other processes see all of a file or none.
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    _output(*command, "-o", str(partial))
    partial.replace(path)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def _contents(paths: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in sorted(paths)]


def _digest(parts: list[bytes]) -> str:
    sizes = [str(len(part)).encode() for part in parts]
    return hashlib.sha256(b"\0".join([*sizes, *parts])).hexdigest()[:16]
