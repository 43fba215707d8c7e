"""Build script: maps the top-level folders onto the package, and builds the CUDA C++ kernels.

The metadata is in pyproject.toml. The build needs no torch; csrc/build_extension.py says what the
kernels need, and everything else is installed where that is missing.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

# Not on the path in an isolated build.
sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

import build_extension

setup(
    packages=[
        *find_packages(include=["vmae_fast", "vmae_fast.*"]),
        "vmae_fast.kernels",
        "vmae_fast.configs",
    ],
    package_dir={"vmae_fast.kernels": "kernels", "vmae_fast.configs": "configs"},
    package_data={"vmae_fast": ["py.typed"], "vmae_fast.configs": ["*.toml"]},
    ext_modules=build_extension.extensions(),
    cmdclass=build_extension.COMMANDS,
)
