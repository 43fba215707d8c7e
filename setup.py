"""Build script: maps the top-level folders onto the package.

The metadata is in pyproject.toml. The build needs neither torch nor a compiler.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["vmae_fast", "vmae_fast.*"]),
        "vmae_fast.kernels",
        "vmae_fast.configs",
    ],
    package_dir={"vmae_fast.kernels": "kernels", "vmae_fast.configs": "configs"},
    package_data={"vmae_fast": ["py.typed"], "vmae_fast.configs": ["*.toml"]},
)
