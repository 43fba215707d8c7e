"""The CUDA C++ extension as Python sees it: built or not, broken, too old, and who asks for it."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vmae_fast
from vmae_fast import ops
from vmae_fast.kernels import _launch
from vmae_fast.ops import _backend, _extension

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ON_CPU, ON_GPU = SimpleNamespace(device=CPU), SimpleNamespace(device=GPU)
ABOUT = {"architectures": "80;90a;100;100+PTX", "cuda": 13000, "emulated": False}


def module(driver=13000, **about):
    """A stand-in for vmae_fast._C."""
    return SimpleNamespace(
        about=lambda: {**ABOUT, **about},
        driver_version=lambda: driver,
        View=lambda *given: given,
    )


class Untouchable:
    def __getattr__(self, name):
        raise AssertionError(f"the extension's {name} was asked for")


@pytest.fixture
def capability(monkeypatch):
    """A function that says what compute capability GPUs have, as two digits."""
    return lambda target: monkeypatch.setattr(_launch, "target_of", lambda device: target)


# ---- whether it can run -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "architectures"),
    [
        (80, "80"), (86, "80"), (89, "80"), (90, "90a"), (90, "90"), (100, "100"), (103, "100"),
        (103, "100f"), (103, "100;100+PTX"), (120, "100+PTX"), (121, "80;90a;100;100+PTX"),
        (90, "80;80+PTX"), (90, "90a+PTX"),
    ],
)  # fmt: skip
def test_code_that_runs(target, architectures, capability):
    capability(target)
    with _extension.use(module(architectures=architectures)):
        assert _extension.why_not(GPU) == ""


@pytest.mark.parametrize(
    ("target", "architectures", "built_for"),
    [
        (75, "80;80+PTX", "sm_80 and PTX of 80"),
        (80, "86", "sm_86"),
        (90, "80", "sm_80"),
        (100, "90a;90a+PTX", "sm_90a and PTX of 90a"),
        (103, "100a", "sm_100a"),
        (110, "100f", "sm_100f"),
        (120, "80;90a;100", "sm_80, 90a, 100"),
        (100, "120;120+PTX", "sm_120 and PTX of 120"),
    ],
)
def test_code_for_other_devices(target, architectures, built_for, capability):
    capability(target)
    with _extension.use(module(architectures=architectures)):
        assert _extension.why_not(GPU) == (
            f"cuda:0 has compute capability {target // 10}.{target % 10}, but the extension was "
            f"built for {built_for}"
        )


@pytest.mark.parametrize(
    ("target", "driver", "why"),
    [
        (80, 12080, "the driver is for CUDA 12.8, but the extension was built with CUDA 13.2"),
        (80, 0, "there is no NVIDIA driver, but the extension was built with CUDA 13.2"),
        (80, 13000, ""),
        (90, 13020, ""),
        (100, 14000, ""),
        # PTX, which the driver has to compile.
        (120, 13020, ""),
        (120, 13010, "cuda:0 is newer than the machine code that the extension was built with, and "
         "the driver is for CUDA 13.1, too old to compile PTX of CUDA 13.2"),
    ],
)  # fmt: skip
def test_drivers(target, driver, why, capability):
    capability(target)
    with _extension.use(module(driver, cuda=13020)):
        assert _extension.why_not(GPU) == why


def test_devices():
    with _extension.use(module()):
        assert _extension.why_not(CPU) == "the CUDA C++ extension needs a CUDA device, not cpu"
        meta = torch.device("meta")
        assert _extension.why_not(meta) == "the CUDA C++ extension needs a CUDA device, not meta"
    with _extension.use(module(emulated=True)):
        assert _extension.why_not(CPU) == ""
        assert _extension.why_not(GPU) == "the emulated extension runs on the CPU, not on cuda:0"


def test_a_device_is_asked_once(capability):
    capability(80)
    asked = []
    counting = module()
    counting.driver_version = lambda: asked.append(1) or 13000
    with _extension.use(counting):
        assert [_extension.why_not(GPU) for _ in range(3)] == ["", "", ""]
        assert len(asked) == 1
        with _extension.use(None):
            assert _extension.why_not(GPU) != ""
        assert _extension.why_not(GPU) == ""


def test_compiled_code_can_ask():
    def about():
        # What the extension says cannot be traced.
        assert not torch.compiler.is_dynamo_compiling()
        return {**ABOUT, "emulated": True}

    @torch.compile(backend="eager", fullgraph=True)
    def choose(x):
        return x + 1 if _extension.why_not(x.device) == "" else x - 1

    with _extension.use(SimpleNamespace(about=about)):
        assert choose(torch.zeros(2)).tolist() == [1, 1]
    torch._dynamo.reset()
    with _extension.use(None):
        assert choose(torch.zeros(2)).tolist() == [-1, -1]


# ---- not built, or broken -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (None, "no build is on record (pip install -e . builds it where nvcc is)"),
        ({"built": False, "why": "no ninja"}, "no ninja"),
        ({"built": True, "why": ""}, "its file is no longer there"),
    ],
)
def test_not_built_says_why(record, why, tmp_path, monkeypatch):
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    if record is not None:
        (tmp_path / "_C_build.json").write_text(json.dumps(record))
    with _extension.use(None):
        assert _extension.why_not(GPU) == f"the CUDA C++ extension is not built: {why}"
        assert ops.backend_summary().endswith(f"; no CUDA C++ extension: {why}")
        message = f"backend cuda cannot run on cuda:0: {_extension.why_not(GPU)}"
        with ops.backend("cuda"), pytest.raises(RuntimeError) as failed:
            _backend.use_cuda(ON_GPU)
    assert str(failed.value) == message


# What a process without installed packages' hooks says of a package with such an extension.
ASK = """
    import sys
    from types import SimpleNamespace
    import torch
    from vmae_fast import ops
    from vmae_fast.ops import _backend, _extension

    def ask(what, *args, **options):
        try:
            print(repr(what(*args, **options)))
        except RuntimeError as error:
            print("error", error, "cause", repr(error.__cause__))

    for name in ("auto", "reference", "triton", "cuda"):
        for device in ("cpu", "cuda:0"):
            with ops.backend(name):
                ask(_backend.use_cuda, SimpleNamespace(device=torch.device(device)))
    ask(_extension.extension)
    ask(ops.backend_summary)
"""


def ask_in(folder, *files):
    """The answers of :data:`ASK` of a copy of the package with such files of garbage in it."""
    package = Path(vmae_fast.__file__).parent
    kernels = Path(_launch.__file__).parent
    without = shutil.ignore_patterns("_C*", "__pycache__", "kernels", "configs")
    shutil.copytree(package, folder / "vmae_fast", ignore=without)
    shutil.copytree(kernels, folder / "vmae_fast" / "kernels")
    for name in files:
        (folder / "vmae_fast" / name).write_text("garbage")
    done = subprocess.run(
        # -S: no hook finds the real package's extension.
        [sys.executable, "-S", "-c", textwrap.dedent(ASK)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_that_was_never_built_is_none(tmp_path):
    answers = ask_in(tmp_path)
    assert answers[:6] == ["False"] * 6
    for answer, device in zip(answers[6:8], ("cpu", "cuda:0"), strict=True):
        start = f"error backend cuda cannot run on {device}: the CUDA C++ extension is not built"
        assert answer.startswith(start)
    assert answers[8] == "None"


@pytest.mark.parametrize(
    ("file", "cause"),
    [
        (f"_C{EXTENSION_SUFFIXES[0]}", "ImportError("),
        ("_C.cpython-37m-x86_64-linux-gnu.so", "ModuleNotFoundError("),
    ],
)
def test_one_that_cannot_be_loaded_is_an_error(tmp_path, file, cause):
    """Wherever a GPU's tensors could use it, not only where it is demanded."""
    answers = ask_in(tmp_path, file)
    on_cpu, on_gpu = answers[0:8:2], answers[1:8:2]
    broken = answers[8]
    assert broken.startswith("error the CUDA C++ extension vmae_fast._C was built but cannot be")
    assert "pip install -e ." in broken
    assert file in broken
    assert f"cause {cause}" in broken
    # auto, reference, triton, cuda.
    assert on_cpu == ["False", "False", "False", broken]
    assert on_gpu == [broken, "False", "False", broken]
    assert "CUDA C++ extension BROKEN: " in answers[9]


# ---- who asks for it ----------------------------------------------------------------------------


@pytest.mark.parametrize("unsuited", ["", "tubelets 8 pixels wide"])
@pytest.mark.parametrize("preferred", [False, True])
@pytest.mark.parametrize("chosen", _backend.BACKENDS)
def test_the_kernels_that_run(chosen, preferred, unsuited):
    with ops.backend(chosen), _extension.use(module(emulated=True)):
        found = _backend.use_cuda(None, ON_CPU, unsuited=unsuited, preferred=preferred)
    assert found == (not unsuited and (chosen == "cuda" or (chosen == "auto" and preferred)))


@pytest.mark.parametrize("tensor", [ON_CPU, ON_GPU])
def test_auto_does_without_where_it_cannot_run(tensor, capability):
    capability(75)
    with ops.backend("auto"), _extension.use(module()):
        assert not _backend.use_cuda(tensor, preferred=True)


@pytest.mark.parametrize("unsuited", ["", "fp32"])
def test_what_cannot_run_cannot_be_demanded(unsuited, capability):
    capability(75)
    message = r"^backend cuda cannot run on cpu: the CUDA C\+\+ extension needs a CUDA device"
    with ops.backend("cuda"), _extension.use(module()):
        with pytest.raises(RuntimeError, match=message):
            _backend.use_cuda(ON_CPU, unsuited=unsuited)
        with pytest.raises(RuntimeError, match=r"^backend cuda cannot run on cuda:0: .* 7\.5, but"):
            _backend.use_cuda(ON_GPU, unsuited=unsuited)


@pytest.mark.parametrize("chosen", ["auto", "reference"])
def test_by_default_nothing_of_it_is_used(chosen, use_of, device):
    use = use_of()
    leaves = [x.detach().to(device).requires_grad_() for x in use.leaves]
    rest = [x.to(device) for x in use.rest]
    with ops.backend(chosen), _extension.use(Untouchable()):
        use.function(*leaves, *rest).sum().backward()
    assert all(x.grad is not None for x in leaves)


@pytest.mark.parametrize(
    ("chosen", "given", "line"),
    [
        ("auto", module(), "CUDA C++ extension for sm_80, 90a, 100 and PTX of 100 (CUDA 13.0), off "
         "by default: VMAE_FAST_BACKEND=cuda"),
        ("cuda", module(), "CUDA C++ extension for sm_80, 90a, 100 and PTX of 100 (CUDA 13.0), as "
         "VMAE_FAST_BACKEND demands, but there is no GPU to run on"),
        ("auto", module(architectures="80", cuda=12090), "CUDA C++ extension for sm_80 (CUDA 12.9),"
         " off by default: VMAE_FAST_BACKEND=cuda"),
        ("cuda", module(emulated=True), "CUDA C++ extension, emulated on the CPU, as "
         "VMAE_FAST_BACKEND demands"),
    ],
)  # fmt: skip
def test_summary(chosen, given, line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with ops.backend(chosen), _extension.use(given):
        assert _backend.extension_summary() == line
        assert ops.backend_summary().endswith(f"; {line}")
        assert line not in ops.backend_summary(extension=False)


def test_summary_says_why_no_gpu_is_served(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    capability(80)
    with _extension.use(module(driver=12080)):
        assert _backend.extension_summary() == (
            "CUDA C++ extension for sm_80, 90a, 100 and PTX of 100 (CUDA 13.0), which cannot run: "
            "the driver is for CUDA 12.8, but the extension was built with CUDA 13.0"
        )


# ---- tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64]
)
def test_views(dtype):
    x = torch.zeros(4, 6, dtype=dtype)[1:, ::2]
    with _extension.use(module()):
        address, name, shape, strides, index = _extension.view(x)
    assert address == x.data_ptr()
    assert getattr(torch, name) == dtype
    assert (tuple(shape), strides, index) == ((3, 3), (6, 2), -1)


def test_the_cpu_has_no_stream():
    assert _extension.stream_of(CPU) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_and_streams_of_a_gpu():
    stream = torch.cuda.Stream(GPU)
    with torch.cuda.stream(stream):
        assert _extension.stream_of(GPU) == stream.cuda_stream != 0
    x = torch.zeros(2, device=GPU)
    with _extension.use(module()):
        assert _extension.view(x) == (x.data_ptr(), "float32", x.shape, (1,), 0)
