"""What a figure depends on: versions, device, commit.

Run as a script it prints them as JSON.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache(maxsize=1)
def environment() -> dict[str, str | int]:
    """As :func:`machine`, and what the CUDA C++ extension was built for, if it is there."""
    from vmae_fast.ops import _extension

    module = _extension.extension()
    return machine() | ({"extension": module.about()["architectures"]} if module else {})


@lru_cache(maxsize=1)
def machine() -> dict[str, str | int]:
    """Versions and device as they were at the first call, before result files change the tree.

    ``vector_units`` are the processor's widest that torch uses (AVX2, AVX512, ...).
    ``compute_capability``, ``driver`` and ``cuda`` are there with a GPU only; ``triton``,
    ``transformers`` and ``nvcc`` where installed.
    """
    root = str(Path(__file__).parent)
    found: dict[str, str | int] = {
        "date": datetime.date.today().isoformat(),
        "commit": _output("git", "-C", root, "describe", "--always", "--dirty") or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "transformers"):
        if importlib.util.find_spec(package):
            found[package] = importlib.metadata.version(package)
    found |= {"device": device_name(), "threads": torch.get_num_threads()}
    found["vector_units"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["compute_capability"] = f"{major}.{minor}"
        found["driver"] = (_output(*query).splitlines() or ["unknown"])[0]
        found["cuda"] = torch.version.cuda or "unknown"
        # "Cuda compilation tools, release 13.0, V13.0.48"
        releases = [word for word in _output("nvcc", "--version").split() if word[:1] == "V"]
        found |= {"nvcc": releases[-1]} if releases else {}
    return found


def device_name() -> str:
    """Name of the GPU, or of the processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"


def device_folder() -> str:
    """Folder of the device's results: cpu, or the GPU's name."""
    return device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"


def _output(*command: str) -> str:
    """What a command prints; nothing where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    print(json.dumps(machine(), indent=2))
