"""The package as a whole: who imports whom, what an import needs, what the help says."""

import ast
import doctest
import importlib.metadata
import importlib.resources
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import vmae_fast

ROOT = Path(__file__).resolve().parents[1]

# cli -> commands -> (pictures, train) -> (data, plan) -> (masking, models) -> nn -> ops ->
# (kernels | _C), plus: models take masks, _files and profiling are below all, no model calls a
# kernel, the trainer names no op. "" is the package itself, which gathers what users import.
MAY_IMPORT = {
    "kernels": set(),
    "_C": set(),
    "_files": set(),
    "configs": set(),
    "profiling": set(),
    "ops": {"kernels", "_C", "profiling"},
    "nn": {"ops", "profiling"},
    "masking": {"nn", "ops"},
    "data": {"_files", "nn", "ops"},
    "models": {"_files", "masking", "nn", "ops", "profiling"},
    "plan": {"masking", "models", "nn"},
    "train": {"_files", "configs", "data", "masking", "models", "plan", "profiling"},
    "pictures": {"_files", "data", "masking", "models"},
    "commands": {
        "", "_files", "configs", "data", "masking", "models", "ops", "pictures", "plan", "train",
    },
    "cli": {"", "commands", "data", "models", "ops", "train"},
    "": {"masking", "models"},
}  # fmt: skip


def imported_modules(source, package):
    """Full names of what a file imports, at any depth, relative ones resolved.

    ``package`` is the dotted name of the package the file is in.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            if base == "vmae_fast":
                # `from vmae_fast import ops` names a layer, or something of the package itself.
                yield from (f"{base}.{alias.name}" for alias in node.names)
            else:
                yield base
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function.endswith(("import_module", "__import__")) and node.args:
                yield str(getattr(node.args[0], "value", "")) or "computed"


def layer_of(module):
    parts = module.split(".")
    if parts[0] != "vmae_fast":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


def sources(root):
    """Every file of the package with the dotted name that it is installed under."""
    for folder, package in ((root / "vmae_fast", "vmae_fast"), (root / "kernels", None)):
        for file in sorted(folder.rglob("*.py")):
            parts = list(file.relative_to(root).with_suffix("").parts)
            if package is None:
                parts = ["vmae_fast", *parts]
            yield file, ".".join(parts)


def backward_arrows(root):
    found = []
    for file, name in sources(root):
        package = name.removesuffix(".__init__")
        package = package if name.endswith(".__init__") else package.rpartition(".")[0]
        layer = layer_of(name.removesuffix(".__init__"))
        if name != "vmae_fast.__init__" and layer == "":
            found.append(f"{file.relative_to(root)} belongs to no layer")
            continue
        for module in imported_modules(file.read_text(), package):
            # The folder is a package of another name elsewhere: only ever vmae_fast.kernels.
            if module.split(".")[0] == "kernels":
                found.append(f"{file.relative_to(root)} imports {module}")
            target = layer_of(module)
            if target is not None and target != layer and target not in MAY_IMPORT[layer]:
                found.append(f"{file.relative_to(root)} imports {module}")
    return found


def test_imports_run_one_way():
    files = [name for _, name in sources(ROOT)]
    assert len(files) > 20
    assert "vmae_fast.kernels.attention" in files
    assert backward_arrows(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("vmae_fast/models/videomae.py", "from vmae_fast.train import loop"),
        ("vmae_fast/models/videomae.py", "from vmae_fast.data.decode import Decoder"),
        ("vmae_fast/models/videomae.py", "import vmae_fast.kernels.attention"),
        ("vmae_fast/models/videomae.py", "from ..data import Decoder"),
        ("vmae_fast/models/videomae.py", "from .. import data"),
        ("vmae_fast/models/videomae.py", "from vmae_fast import VideoMAE"),
        ("vmae_fast/ops/attention.py", "def f():\n    from vmae_fast import nn"),
        ("vmae_fast/ops/attention.py", "from vmae_fast._files import atomic_file"),
        ("vmae_fast/profiling.py", "from vmae_fast import ops"),
        ("vmae_fast/ops/__init__.py", "from ..nn import JointSpaceTimeBlock"),
        ("vmae_fast/nn/block.py", "importlib.import_module('vmae_fast._C')"),
        ("vmae_fast/models/videomae.py", "from vmae_fast import _C"),
        ("kernels/attention.py", "import vmae_fast._C"),
        ("vmae_fast/nn/block.py", "if TYPE_CHECKING:\n    from vmae_fast.masking import Mask"),
        ("vmae_fast/data/dataset.py", "from vmae_fast.masking import clip_keys"),
        ("vmae_fast/data/dataset.py", "importlib.import_module('vmae_fast.models')"),
        ("vmae_fast/train/loop.py", "from vmae_fast import ops"),
        ("vmae_fast/train/loop.py", "import vmae_fast.cli"),
        ("vmae_fast/__init__.py", "from .train import pretrain"),
        ("vmae_fast/new.py", ""),
        ("kernels/attention.py", "from vmae_fast import ops"),
        ("kernels/attention.py", "from ..ops import attention"),
        ("kernels/attention.py", "from kernels import tubelets"),
    ],
)
def test_an_arrow_that_runs_back_is_noticed(tmp_path, file, line):
    for good in ("vmae_fast/__init__.py", "vmae_fast/ops/__init__.py", "vmae_fast/cli.py"):
        (tmp_path / good).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / good).touch()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "vmae_fast/cli.py").write_text("from vmae_fast import VideoMAE, train")
    (tmp_path / "vmae_fast/ops/__init__.py").write_text(
        "from vmae_fast.kernels.attention import x\nfrom .attention import y\nimport torch"
    )
    assert backward_arrows(tmp_path) == []
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(line)
    assert len(backward_arrows(tmp_path)) == 1


def test_one_file_loads_the_extension():
    loading = [
        name
        for file, name in sources(ROOT)
        if "vmae_fast._C" in imported_modules(file.read_text(), name.rpartition(".")[0])
    ]
    assert loading == ["vmae_fast.ops._extension"]


def test_kernels_import_only_torch_triton_and_each_other():
    allowed = {"torch", "triton", "vmae_fast"} | sys.stdlib_module_names
    for file in (ROOT / "kernels").glob("*.py"):
        for module in imported_modules(file.read_text(), "vmae_fast.kernels"):
            assert module.split(".")[0] in allowed, f"{file.name} imports {module}"


# ---- imports in a process of their own ----------------------------------------------------


def run_python(code, cwd, *options):
    """Run code in a fresh interpreter; its output, or a failure that shows its errors."""
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_torch_einops_and_numpy_only(tmp_path):
    out = run_python(
        """
        import sys
        for name in ("av", "matplotlib", "safetensors", "tyro", "tensorboard", "tqdm",
                     "transformers", "huggingface_hub", "triton", "tomli_w"):
            sys.modules[name] = None
        import vmae_fast
        import torch
        assert not torch.cuda.is_initialized()
        model = vmae_fast.VideoMAE("tiny")
        video = torch.randint(0, 256, (2, 3, 8, 64, 64), dtype=torch.uint8)
        loss = model(video).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad
        assert model(video).loss.isfinite()
        print("stepped")
        """,
        tmp_path,
    )
    assert out == "stepped"


def test_import_loads_neither_trainer_nor_video_nor_transformers(tmp_path):
    out = run_python(
        """
        import sys
        import vmae_fast
        print(*sorted(sys.modules))
        """,
        tmp_path,
    ).split()
    others = ("av", "matplotlib", "transformers", "tyro")
    for name in (*others, "vmae_fast.train", "vmae_fast.cli", "vmae_fast._C"):
        assert name not in out


def test_transformers_imports_from_the_root():
    """Our folder kernels/ has the name of a package that transformers looks for."""
    out = run_python(
        """
        import transformers
        from transformers import VideoMAEConfig, VideoMAEForPreTraining
        import vmae_fast.kernels.attention
        print(VideoMAEForPreTraining.__name__, vmae_fast.kernels.__name__)
        """,
        ROOT,
    )
    assert out == "VideoMAEForPreTraining vmae_fast.kernels"


def test_tests_do_not_shadow_kernels():
    assert not (ROOT / "tests" / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


# ---- what is shipped and said -------------------------------------------------------------


WITH_EXAMPLES = [
    vmae_fast,
    vmae_fast.VideoMAE,
    vmae_fast.nn.TubeletEmbed,
    vmae_fast.nn.Attention,
    vmae_fast.nn.DividedSpaceTimeBlock,
    vmae_fast.nn.GatherVisible,
    vmae_fast.nn.JointSpaceTimeBlock,
    vmae_fast.nn.MaskedMSELoss,
    vmae_fast.ops.attention_kernel,
    vmae_fast.ops.backend,
    vmae_fast.ops.debug,
]


@pytest.mark.parametrize("thing", WITH_EXAMPLES, ids=lambda thing: thing.__name__)
def test_docstring_examples(thing):
    name = thing.__name__
    (test,) = (t for t in doctest.DocTestFinder(recurse=False).find(thing, name) if t.name == name)
    assert test.examples
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0


def test_pydoc_says_the_shapes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pydoc", "vmae_fast.VideoMAE"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for part in ("(B, C, T, H, W)", "(B, N, D)", "(B, N)", "True = masked", "arXiv 2203.12602"):
        assert part in done.stdout


def test_everything_public_has_a_docstring():
    for module in (vmae_fast, vmae_fast.nn, vmae_fast.ops):
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                assert thing.__doc__, name
                # dataclass writes "Name(field, ...)" where nobody wrote anything.
                assert not thing.__doc__.startswith(f"{name}("), name


def test_types_are_announced():
    assert (importlib.resources.files("vmae_fast") / "py.typed").is_file()
    assert "py.typed" in (ROOT / "setup.py").read_text()


def test_version():
    assert vmae_fast.__version__ == importlib.metadata.version("vmae-fast")


def test_the_command_line_sets_up_before_torch_is_loaded():
    """OpenMP reads its wait policy once, when torch is loaded."""
    script = """
        import os, sys
        os.environ.pop("OMP_WAIT_POLICY", None)
        import vmae_fast.cli
        assert "torch" not in sys.modules
        vmae_fast.cli.main(["env"])
        assert "torch" in sys.modules
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_sub_packages_are_attributes():
    script = (
        "import vmae_fast; vmae_fast.ops.linear; vmae_fast.nn.JointSpaceTimeBlock; vmae_fast.Mask"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'VideoMAF'"):
        vmae_fast.VideoMAF  # noqa: B018
