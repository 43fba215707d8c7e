"""The build of the CUDA C++ extension, with a compiler that stands in for nvcc."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only")

# Answers like nvcc, compiles by g++, keeps its arguments in the file that CALLS names, and tells
# of registers as ptxas does.
NVCC = """#!{python}
import os, subprocess, sys
arguments = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    print(*arguments, file=calls)
if arguments == ["--version"]:
    print("Cuda compilation tools, release 13.0, V13.0.88")
elif arguments == ["--list-gpu-arch"]:
    print("compute_75", "compute_80", "compute_90", "compute_110", "compute_100", sep="\\n")
else:
    command = ["g++", "-x", "c++"] if "-c" in arguments else ["g++"]
    for argument in arguments:
        if argument.startswith("-Xcompiler="):
            command += argument.partition("=")[2].split(",")
        elif argument.startswith("-isystem="):
            command += ["-isystem", argument.partition("=")[2]]
        elif argument == "-Xptxas=-v":
            print("ptxas info    : Used 8 registers, 0 barriers")
            print("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", flush=True)
        elif not argument.startswith(("-gencode=", "-ccbin=", "-cudart=", "--no-device", "-O")):
            command.append(argument)
    sys.exit(subprocess.call(command))
"""

MODULE = """#include <Python.h>
int answer();
static PyObject* about(PyObject*, PyObject*) {
  return Py_BuildValue("si", VMAE_FAST_ARCHITECTURES, answer());
}
static PyMethodDef methods[] = {{"about", about, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods, {}, {}, {}, {}};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""


@pytest.fixture
def build_extension():
    """csrc/build_extension.py as setup.py sees it."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "csrc/build_extension.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tools(build_extension, monkeypatch):
    """A function that gives the tools of an nvcc of some release, which lists some numbers."""

    def make(release="13.0", numbers=(75, 80, 90, 100)):
        listed = "\n".join(f"compute_{number}" for number in numbers)
        monkeypatch.setattr(build_extension, "output", lambda *_: listed)
        known = build_extension.known_architectures("nvcc", release)
        return build_extension.Tools("nvcc", release, known, "g++", ("ninja",), ())

    return make


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Nothing that steers a build is set."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "MAX_JOBS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("VMAE_FAST_BUILD_CUDA", "VMAE_FAST_CUDA_ARCHS", "NVCC_PREPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return monkeypatch


@pytest.fixture
def nvcc(environment, tmp_path):
    """The stand-in, first on PATH."""
    program = tmp_path / "bin/nvcc"
    program.parent.mkdir()
    program.write_text(NVCC.format(python=sys.executable))
    program.chmod(0o755)
    environment.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return program


@pytest.fixture
def project(environment, tmp_path):
    """The project's build with next to nothing to build: a module, a source and a header."""
    root = tmp_path / "project"
    for folder in ("vmae_fast", "kernels", "configs", "csrc"):
        (root / folder).mkdir(parents=True)
    for name in (
        "vmae_fast/__init__.py",
        "vmae_fast/py.typed",
        "kernels/__init__.py",
        "configs/a.toml",
    ):
        (root / name).touch()
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, root)
    shutil.copy(ROOT / "csrc/build_extension.py", root / "csrc")
    (root / "csrc/module.cpp").write_text(MODULE)
    (root / "csrc/answer.cu").write_text('#include "answer.h"\nint answer() { return ANSWER; }\n')
    (root / "csrc/answer.h").write_text("#define ANSWER 41\n")
    return root


def build(project, hook="build_editable", before="pass"):
    """Calls the build backend as pip does, after a line of Python; its status and what it says."""
    call = f"setuptools.build_meta.{hook}(sys.argv[1])"
    program = f"import sys, setuptools.build_meta\n{before}\n{call}"
    (project / "out").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", program, str(project / "out")],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def without_nvcc(tmp_path):
    """For `build`: no CUDA in the usual place, and nothing on PATH."""
    (tmp_path / "empty").mkdir(exist_ok=True)
    return (
        f"import os; os.environ['PATH'] = {str(tmp_path / 'empty')!r}; sys.path.append('csrc')\n"
        f"import build_extension; build_extension.CUDA_HOME = {str(tmp_path / 'empty')!r}"
    )


def record(project):
    return json.loads((project / "vmae_fast/_C_build.json").read_text())


def about(folder):
    """What the module in a folder's package says."""
    program = "import vmae_fast._C as c; print(*c.about())"
    return subprocess.check_output([sys.executable, "-c", program], cwd=folder, text=True).strip()


# ---- choices --------------------------------------------------------------------------------


def test_known_architectures(tools):
    assert tools("13.0", (100, 75, 90, 80, 86)).architectures == (
        *("80", "86", "90", "90a"),
        *("100", "100a", "100f"),
    )
    assert tools("12.8").architectures == ("80", "90", "90a", "100", "100a")
    assert tools("11.8", (80, 90)).architectures == ("80", "90")


@pytest.mark.parametrize(
    ("release", "numbers", "expected"),
    [
        ("13.0", (75, 80, 90, 100, 120), ["80", "90a", "100", "100+PTX"]),
        ("12.4", (75, 80, 90), ["80", "90a", "80+PTX"]),
        ("11.8", (75, 80, 90), ["80", "80+PTX"]),
    ],
)
def test_default_architectures(
    build_extension, environment, tools, capsys, release, numbers, expected
):
    assert build_extension.choose_architectures(tools(release, numbers)) == expected
    said = capsys.readouterr().err.splitlines()
    left_out = {"80", "90a", "100"} - set(expected)
    assert len(said) == len(left_out)
    assert all(any(f"architecture {name}:" in line for line in said) for name in left_out)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("80", ["80"]),
        ("80;90a,100+PTX", ["80", "90a", "100", "100+PTX"]),
        (" 90a ; 80 ;", ["90a", "80"]),
        ("80 80;80+PTX,80+PTX", ["80", "80+PTX"]),
        (" ; ", ["80", "90a", "100", "100+PTX"]),
        # What about() says can be asked for again.
        ("80;90a;100;100+PTX", ["80", "90a", "100", "100+PTX"]),
    ],
)
def test_asked_architectures(build_extension, environment, tools, asked, expected):
    environment.setenv("VMAE_FAST_CUDA_ARCHS", asked)
    assert build_extension.choose_architectures(tools()) == expected


@pytest.mark.parametrize("word", ["75", "9.0", "sm_80", "80+SASS", "+PTX", "90A", "80+PTX+PTX"])
def test_unknown_architectures(build_extension, environment, tools, word):
    environment.setenv("VMAE_FAST_CUDA_ARCHS", f"80;{word}")
    with pytest.raises(SystemExit, match=r"none of 80, 90, 90a, 100, ") as error:
        build_extension.choose_architectures(tools())
    assert repr(word) in str(error.value)


def test_gencode(build_extension):
    assert build_extension.gencode("90a") == "-gencode=arch=compute_90a,code=sm_90a"
    assert build_extension.gencode("100+PTX") == "-gencode=arch=compute_100,code=compute_100"


def test_where_nvcc_is_looked_for(build_extension, environment, tmp_path):
    found = []
    for name in ("home", "path", "on_path", "usual"):
        program = tmp_path / name / "bin/nvcc"
        program.parent.mkdir(parents=True)
        program.touch(mode=0o755)
        found.append(str(program))
    environment.setenv("CUDA_HOME", str(tmp_path / "home"))
    environment.setenv("CUDA_PATH", str(tmp_path / "path"))
    environment.setenv("PATH", str(tmp_path / "on_path/bin"))
    environment.setattr(build_extension, "CUDA_HOME", str(tmp_path / "usual"))
    for program in found:
        assert build_extension.find_nvcc() == program
        Path(program).unlink()
    assert build_extension.find_nvcc() is None


def test_what_else_can_be_missing(build_extension, nvcc, environment, tmp_path):
    assert build_extension.find_tools().nvcc == str(nvcc)
    with environment.context() as patch:
        patch.setenv("CXX", "nog++")
        with pytest.raises(build_extension.Missing, match="no C\\+\\+ compiler 'nog\\+\\+'"):
            build_extension.find_tools()
    with environment.context() as patch:
        patch.setitem(sys.modules, "pybind11", None)
        with pytest.raises(build_extension.Missing, match="no pybind11"):
            build_extension.find_tools()
    with environment.context() as patch:
        patch.setattr(build_extension.sysconfig, "get_path", lambda _: str(tmp_path))
        with pytest.raises(build_extension.Missing, match=r"no Python\.h"):
            build_extension.find_tools()
    with environment.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        patch.setattr(shutil, "which", lambda name, **_: None if name == "ninja" else str(nvcc))
        with pytest.raises(build_extension.Missing, match="no ninja"):
            build_extension.find_tools()
    nvcc.write_text("#!/bin/sh\necho broken; exit 1\n")
    with pytest.raises(build_extension.Missing, match=r"--version fails: broken"):
        build_extension.find_tools()


# ---- builds ---------------------------------------------------------------------------------


def test_editable(project, nvcc, environment, tmp_path):
    status, said = build(project)
    assert status == 0, said
    assert about(project) == "80;90a;100;100+PTX 41"
    assert record(project) == {
        "built": True,
        "why": "",
        "architectures": "80;90a;100;100+PTX",
        "nvcc": "13.0",
    }
    calls = (tmp_path / "calls").read_text().splitlines()
    (cuda,) = [call for call in calls if "-c csrc/answer.cu" in call]
    for flag in ("-Wall,-Wextra", "-O3", "code=sm_80 ", "code=sm_90a ", "code=compute_100 "):
        assert flag in cuda
    (module,) = [call for call in calls if "-c csrc/module.cpp" in call]
    assert "pybind11" in module
    assert "torch" not in module + cuda
    # What ptxas tells is kept, not shown.
    (log,) = project.glob("build/extension/*/ptxas.log")
    assert "Used 8 registers" in log.read_text()
    assert "ptxas" not in said
    assert "spill" not in said

    # Nothing is compiled twice, what includes a header is when that changes.
    (tmp_path / "calls").unlink()
    status, said = build(project)
    assert status == 0
    assert "no work to do" in said
    (project / "csrc/answer.h").write_text("#define ANSWER 42\n")
    status, said = build(project)
    assert status == 0
    compiled = [call for call in (tmp_path / "calls").read_text().splitlines() if " -c " in call]
    assert len(compiled) == 1
    assert "answer.cu" in compiled[0]
    assert about(project) == "80;90a;100;100+PTX 42"
    # And all of it for other flags.
    environment.setenv("VMAE_FAST_CUDA_ARCHS", "90a")
    assert build(project)[0] == 0
    assert about(project) == "90a 42"
    (tmp_path / "calls").unlink()
    environment.setenv("NVCC_APPEND_FLAGS", "-g")
    assert build(project)[0] == 0
    assert (tmp_path / "calls").read_text().count(" -c ") == 2

    # A module of before does not outlive the choice against it.
    environment.setenv("VMAE_FAST_BUILD_CUDA", "0")
    status, said = build(project)
    assert status == 0, said
    assert not list(project.glob("vmae_fast/*.so"))
    assert record(project) == {
        "built": False,
        "why": "VMAE_FAST_BUILD_CUDA=0",
        "architectures": "",
        "nvcc": "",
    }


def test_wheels(project, nvcc, environment, tmp_path):
    pytest.importorskip("pip")
    # What an editable install left in the sources is none of a wheel's.
    assert build(project)[0] == 0
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps"]
    for value, built in (("1", True), ("0", False)):
        environment.setenv("VMAE_FAST_BUILD_CUDA", value)
        folder = tmp_path / f"wheel{value}"
        subprocess.run([*command, "-w", folder], cwd=project, check=True, capture_output=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(folder)
        assert any(name.startswith("vmae_fast/_C.") for name in names) == built
        assert not any("csrc" in name or name.endswith((".cu", ".h")) for name in names)
        assert record(folder)["built"] == built
        # One without the module serves every machine.
        assert ("none-any" in wheel.name) != built
    assert about(tmp_path / "wheel1") == "80;90a;100;100+PTX 41"


def test_source_distribution(project, nvcc):
    """It builds: the headers are in it, and what is compiled is not."""
    assert build(project)[0] == 0
    status, said = build(project, "build_sdist")
    assert status == 0, said
    (archive,) = (project / "out").glob("*.tar.gz")
    shutil.unpack_archive(archive, project / "unpacked")
    (unpacked,) = (project / "unpacked").iterdir()
    assert not list(unpacked.rglob("*.so"))
    assert not list(unpacked.rglob("_C_build.json"))
    status, said = build(unpacked)
    assert status == 0, said
    assert about(unpacked) == "80;90a;100;100+PTX 41"


def test_an_error_of_the_compiler_is_one(project, nvcc):
    (project / "csrc/answer.cu").write_text("int answer() { return FORTY_TWO; }\n")
    status, said = build(project)
    assert status != 0
    assert "was not declared in this scope" in said
    assert "VMAE_FAST_BUILD_CUDA=0 installs without it" in said
    assert not list(project.glob("vmae_fast/_C*"))


def test_warnings_are_seen(project, nvcc):
    (project / "csrc/answer.cu").write_text("int answer() { int unused; return 41; }\n")
    status, said = build(project)
    assert status == 0
    assert "unused variable" in said


def test_without_nvcc(project, environment, tmp_path):
    status, said = build(project, before=without_nvcc(tmp_path))
    assert status == 0, said
    (line,) = [line for line in said.splitlines() if line.startswith("vmae-fast: ")]
    assert "no nvcc" in line
    assert "every op runs on Triton" in line
    assert not record(project)["built"]
    assert record(project)["why"] in line
    environment.setenv("VMAE_FAST_BUILD_CUDA", "1")
    status, said = build(project, before=without_nvcc(tmp_path))
    assert status != 0
    assert "VMAE_FAST_BUILD_CUDA=1, but no nvcc" in said
    assert "Traceback" not in said


def test_number_of_jobs(project, nvcc, environment):
    environment.setenv("MAX_JOBS", "two")
    status, said = build(project)
    assert status != 0
    assert "invalid -j" in said


def test_neither_0_nor_1(project, nvcc, environment):
    environment.setenv("VMAE_FAST_BUILD_CUDA", "yes")
    status, said = build(project)
    assert status != 0
    assert "VMAE_FAST_BUILD_CUDA must be 0 or 1, got 'yes'" in said


@pytest.mark.slow
def test_with_nvcc(request, build_extension, environment, tmp_path):
    """The real sources by the real nvcc, which may warn of nothing."""
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes; run with -m slow")
    if build_extension.find_nvcc() is None:
        pytest.skip("no nvcc")
    project = tmp_path / "project"
    for folder in ("vmae_fast", "kernels", "configs", "csrc"):
        leave = shutil.ignore_patterns("*.so", "_C_build.json", "__pycache__")
        shutil.copytree(ROOT / folder, project / folder, ignore=leave)
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, project)
    environment.setenv("VMAE_FAST_CUDA_ARCHS", "90a")
    environment.setenv("NVCC_APPEND_FLAGS", "-Werror=all-warnings -Xcompiler=-Werror")
    status, said = build(project)
    assert status == 0, said
    program = "import importlib.util as util, sys\n"
    program += "spec = util.spec_from_file_location('vmae_fast._C', sys.argv[1])\n"
    program += "module = util.module_from_spec(spec); spec.loader.exec_module(module)\n"
    program += "print(module.about()['architectures'])"
    (module,) = project.glob("vmae_fast/_C.*.so")
    done = subprocess.run(
        [sys.executable, "-c", program, module], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "90a"
