"""Which implementation runs, and how that is chosen."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers import make_video, random_positions

from vmae_fast import ops
from vmae_fast.kernels import _launch
from vmae_fast.ops import _backend

SIZE = (2, 4, 4)
VIDEO = make_video((2, 3, 4, 8, 8), torch.uint8)
IDX = random_positions(2, 8, 4)

pytestmark = pytest.mark.skipif(
    _launch.interpreting(), reason="in the interpreter kernels run on a CPU as well"
)


def calls(dtype):
    """A call of every op on the CPU."""
    x, weight = torch.zeros(2, 8, 6, dtype=dtype), torch.zeros(6, 3, *SIZE, dtype=dtype)
    pred, head = torch.zeros(2, 4, 96, dtype=dtype), torch.zeros(96, 6, dtype=dtype)
    # One head of width 32; pred is q, k and v of it as well.
    q, kv = pred[..., :32], pred[..., 32:]
    # A norm's weight and bias, and a linear layer's weight.
    norm, linear = (x[0, 0], x[0, 0]), torch.zeros(18, 6, dtype=dtype)
    return {
        "gather_tokens": lambda: ops.gather_tokens(x, IDX),
        "decoder_tokens": lambda: ops.decoder_tokens(x[:, :4], x[0, 0], x[0], IDX, IDX),
        "tubelet_embed": lambda: ops.tubelet_embed(VIDEO, weight, visible_idx=IDX),
        "masked_mse": lambda: ops.masked_mse(pred, VIDEO, IDX, SIZE),
        "zero_prediction_mse": lambda: ops.zero_prediction_mse(VIDEO, IDX, SIZE),
        "linear_masked_mse": lambda: ops.linear_masked_mse(x[:, :4], head, None, VIDEO, IDX, SIZE),
        "attention": lambda: ops.attention(pred, 1),
        "cross_attention": lambda: ops.cross_attention(q, kv, 1),
        "divided_attention": lambda: ops.divided_attention(pred, 1, (2, 2), "time"),
        "shared_tokens": lambda: ops.shared_tokens(x[:, :4], x[0], IDX),
        "layer_norm": lambda: ops.layer_norm(x, *norm),
        "add_layer_norm": lambda: ops.add_layer_norm(x, x, *norm),
        "bias_gelu": lambda: ops.bias_gelu(x, x[0, 0]),
        "layer_norm_linear": lambda: ops.layer_norm_linear(x, *norm, 1e-6, linear),
        "add_layer_norm_linear": lambda: ops.add_layer_norm_linear(x, x, *norm, 1e-6, linear),
        "add_layer_norm_query_key_value": lambda: ops.add_layer_norm_query_key_value(
            x, x, *norm, 1e-6, linear, None, 3
        ),
        "bias_gelu_linear": lambda: ops.bias_gelu_linear(x, None, linear),
    }


@pytest.mark.parametrize("name", calls(torch.float32))
def test_triton_cannot_be_demanded_of_a_cpu(name):
    message = r"^backend triton needs a GPU of compute capability 8\.0 or later .* are on cpu$"
    with ops.backend("triton"), pytest.raises(RuntimeError, match=message):
        calls(torch.float32)[name]()


@pytest.mark.parametrize("name", [n for n in calls(torch.float64) if n != "zero_prediction_mse"])
def test_triton_does_no_fp64(name):
    message = "^backend triton takes float32, float16 and bfloat16, got torch.float64$"
    with ops.backend("triton"), pytest.raises(RuntimeError, match=message):
        calls(torch.float64)[name]()


def test_triton_takes_some_head_widths_only():
    message = r"^backend triton cannot take heads of width 24, only of 32, 64, 80, 88, 128$"
    with ops.backend("triton"), pytest.raises(RuntimeError, match=message):
        ops.attention(torch.zeros(2, 8, 3 * 24), 1)


@pytest.mark.parametrize("chosen", ["auto", "reference"])
def test_a_cpu_runs_the_reference(chosen, monkeypatch):
    # By which all modules of kernels launch theirs.
    monkeypatch.setattr(_launch, "launch", None)
    with ops.backend(chosen):
        for call in (*calls(torch.float32).values(), *calls(torch.float64).values()):
            call()


NO_CUDA_KERNEL = [
    "gather_tokens",
    "decoder_tokens",
    "tubelet_embed",
    "shared_tokens",
    *(name for name in calls(torch.float32) if "norm" in name or "gelu" in name),
]


@pytest.mark.parametrize("name", NO_CUDA_KERNEL)
def test_cuda_leaves_other_ops_as_they_are(name):
    """What no CUDA C++ kernel is written for runs as under "auto"."""
    for dtype in (torch.float32, torch.float64):
        with ops.backend("cuda"):
            calls(dtype)[name]()


def test_the_backward_pass_is_chosen_too():
    """When it runs, which is not when the forward pass ran."""
    x = torch.zeros(2, 8, 6, requires_grad=True)
    out = ops.gather_tokens(x, IDX)
    with ops.backend("triton"), pytest.raises(RuntimeError, match=r"^backend triton needs a GPU"):
        out.sum().backward()


def test_it_holds_in_every_thread():
    seen = []
    with ops.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_backend._chosen))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_an_unknown_backend():
    message = r"^backend must be one of auto, reference, triton, cuda, got 'hip'$"
    with pytest.raises(ValueError, match=message), ops.backend("hip"):
        pass


def test_it_ends_with_its_context():
    before = _backend._chosen

    def fail():
        with ops.backend("reference"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _backend._chosen == before
    with ops.backend("reference"):
        with ops.backend("triton"):
            assert _backend._chosen == "triton"
        assert _backend._chosen == "reference"
    assert _backend._chosen == before


def run(value, code):
    environment = {**os.environ, "VMAE_FAST_BACKEND": value}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_environment_variable():
    call = "ops.gather_tokens(torch.zeros(1, 2, 1), torch.tensor([[1]]))"
    code = f"import torch; from vmae_fast import ops; print(ops.backend_summary()); {call}"
    demanded = run("triton", code)
    assert demanded.returncode == 1
    assert "BackendError: backend triton needs a GPU" in demanded.stderr
    chosen = run("reference", code)
    assert chosen.returncode == 0, chosen.stderr
    assert chosen.stdout.startswith("reference: plain PyTorch for every op, as VMAE_FAST_BACKEND")


def test_an_unknown_backend_in_the_environment():
    wrong = run("trito", "import vmae_fast.ops")
    assert wrong.returncode == 1
    assert (
        "VMAE_FAST_BACKEND must be one of auto, reference, triton, cuda, got 'trito'"
        in wrong.stderr
    )
