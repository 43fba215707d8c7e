"""vmae-fast env."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ._arguments import parse


@dataclass
class EnvArgs:
    """No flags."""


def run(args: list[str]) -> int:
    """Print versions, devices, backends and decoders; the exit status."""
    import platform

    import torch

    from vmae_fast import __version__
    from vmae_fast.ops._backend import backend_summary, extension_summary

    parse(
        EnvArgs,
        prog="vmae-fast env",
        description="Print versions, devices, backends and decoders: what to add to a report.",
        args=args,
        examples=("vmae-fast env",),
    )
    rows = [
        ("vmae-fast", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    rows += [(name, _version(name)) for name in ("triton", "einops", "numpy")]
    rows += _devices()
    rows += [
        ("backends", backend_summary(extension=False)),
        ("extension", extension_summary()),
        ("decoders", _decoder()),
        ("torchcodec", _torchcodec()),
    ]
    rows += [
        (name, _version(name))
        for name in ("safetensors", "tensorboard", "matplotlib", "huggingface_hub", "transformers")
    ]
    for name, value in rows:
        print(f"{name:16} {value}")
    return 0


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    import torch

    rows = [("cpu", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = about.total_memory / 2**30
        rows.append(
            (f"cuda:{index}", f"{about.name}, {memory:.0f} GiB, sm_{about.major}{about.minor}")
        )
    if not torch.cuda.device_count():
        built = torch.version.cuda
        why = f"no GPU seen (torch built for {built})" if built else "this torch is built without"
        rows.append(("cuda", why))
    return rows


def _decoder() -> str:
    try:
        import av
    except ImportError as error:
        return f"none: PyAV cannot be imported ({error})"
    version = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"PyAV {av.__version__} (libavcodec {version})"


def _torchcodec() -> str:
    from vmae_fast.data import DataError
    from vmae_fast.data.with_torchcodec import about_torchcodec

    version = _version("torchcodec")
    if version == "not installed":
        return version
    try:
        return about_torchcodec()
    except DataError as error:
        return f"{version}: {error}"
