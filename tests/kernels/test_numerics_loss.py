"""Kernels of the two losses against the published target, written out in fp64."""

import os

import pytest
import torch
from helpers import make_video, relative_error
from loss_truth import FP32_RTOL, LossInputs, check_linear_masked_mse, check_masked_mse

from vmae_fast import ops
from vmae_fast.kernels import linear_masked_mse as kernel
from vmae_fast.ops import linear_masked_mse, masked_mse, zero_prediction_mse

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a GPU, or Triton's interpreter, in which test_interpreter.py runs this file",
        allow_module_level=True,
    )
pytestmark = [pytest.mark.usefixtures("kernels")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)

# A program holds 1024 values of a channel or one token, and scales 4 tokens of 512 values.
CASES = {  # batch, channels, tubelet, grid, tokens
    "two_pixels": (1, 1, (1, 1, 2), (1, 1, 1), 1),
    "odd": (2, 2, (3, 3, 5), (1, 2, 3), 5),
    "one_channel": (2, 1, (1, 8, 8), (2, 3, 3), 17),
    "videomae": (2, 3, (2, 16, 16), (2, 2, 1), 3),
    "patch_14": (1, 4, (2, 14, 14), (1, 2, 2), 3),
    "patch_32": (1, 1, (4, 32, 32), (1, 1, 2), 2),
    "seven_channels": (3, 7, (4, 3, 5), (1, 3, 2), 4),
    "one_more_token": (1, 3, (1, 2, 4), (1, 13, 10), 65),
    "three_clips": (3, 2, (1, 2, 3), (1, 3, 2), 4),
    "no_tokens": (2, 3, (2, 4, 4), (2, 2, 2), 0),
    "no_clips": (0, 3, (2, 4, 4), (2, 2, 2), 5),
}


class Inputs(LossInputs):
    cases = CASES


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("kind", ["uint8", torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_masked_mse(case, kind, norm_pix, dtype, device):
    inputs = Inputs(case, kind, device, norm_pix=norm_pix)
    check_masked_mse(inputs, dtype, reduction="none")


@pytest.mark.parametrize("layout", ["contiguous", "cropped", "expanded"])
@pytest.mark.parametrize("kind", ["uint8", torch.float32, torch.float16], ids=str)
def test_layouts(layout, kind, dtype, device):
    inputs = Inputs("odd", kind, device, layout, form="int64")
    check_masked_mse(inputs, dtype, layout="transposed" if layout == "cropped" else "contiguous")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scored(reduction, dtype, device):
    inputs = Inputs("seven_channels", "uint8", device)
    check_masked_mse(inputs, dtype, scored=inputs.scored(), reduction=reduction)


def test_more_pixels_than_a_program_holds(device):
    """They are left to plain PyTorch, or refused where Triton is demanded."""
    inputs = Inputs("odd", "uint8", device)
    inputs.video = make_video((1, 1, 2, 128, 256), torch.uint8).to(device)
    inputs.idx, inputs.tubelet = torch.tensor([[1]], device=device), (2, 128, 128)
    inputs.values = 2 * 128 * 128
    inputs.keywords |= {"mean": (0.4,), "std": (0.3,)}
    with pytest.raises(RuntimeError, match="more than 4096 pixels, got 32768"):
        check_masked_mse(inputs, torch.float32)
    with ops.backend("auto"):
        check_masked_mse(inputs, torch.float32)


@pytest.mark.parametrize("kind", ["uint8", torch.float32], ids=str)
@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("case", ["odd", "videomae", "no_tokens"])
def test_zero_prediction_mse(case, norm_pix, kind, device):
    inputs = Inputs(case, kind, device, norm_pix=norm_pix)
    arguments = (inputs.video, inputs.idx, inputs.tubelet)
    if case == "no_tokens":
        assert zero_prediction_mse(*arguments, **inputs.keywords).isnan()
        return
    per_token = inputs.target().square().mean(dim=2)
    got = zero_prediction_mse(*arguments, **inputs.keywords)
    assert got.dtype == torch.float32
    assert relative_error(got, per_token.mean()) < FP32_RTOL
    weights = inputs.scored()
    got = zero_prediction_mse(*arguments, scored=weights, **inputs.keywords)
    assert relative_error(got, (per_token * weights).sum() / weights.sum()) < FP32_RTOL


@pytest.mark.parametrize(
    ("case", "level"),
    [
        ("odd", 0),
        ("odd", 77),
        ("videomae", 1),
        ("patch_14", 77),
        ("patch_32", 77),
        ("patch_32", 255),
    ],
)
def test_flat_tubelets(case, level, device):
    """Their deviation is zero, and what is divided by 1e-6 has to be zero too, exactly."""
    inputs = Inputs(case, "uint8", device)
    inputs.video.fill_(level)
    arguments = (inputs.video, inputs.idx, inputs.tubelet)
    assert zero_prediction_mse(*arguments, **inputs.keywords).item() == 0
    pred = torch.zeros(*inputs.idx.shape, inputs.values, device=device, requires_grad=True)
    loss = masked_mse(pred, *arguments, **inputs.keywords)
    assert loss.item() == 0
    loss.backward()
    assert not pred.grad.any()


@pytest.mark.parametrize("case", ["odd", "patch_14", "patch_32"])
def test_flat_floating_tubelets(case, device):
    """Rounding may leave the mean a little off, but not by more than makes it count as texture."""
    inputs = Inputs(case, torch.float32, device)
    inputs.video.fill_(0.7)
    arguments = (inputs.video, inputs.idx, inputs.tubelet)
    assert zero_prediction_mse(*arguments, **inputs.keywords).item() < 0.1


@pytest.mark.parametrize("base", [(0, 1), (254, 255), (128, 0)], ids=str)
@pytest.mark.parametrize("case", ["odd", "videomae", "patch_32"])
def test_one_pixel_that_differs(case, base, device):
    """The variance is a small difference of large sums."""
    inputs = Inputs(case, "uint8", device)
    inputs.video.fill_(base[0])
    pt, ph, pw = inputs.tubelet
    inputs.video[:, :, pt - 1 :: pt, ph - 1 :: ph, pw // 2 :: pw] = base[1]
    check_masked_mse(inputs, torch.float32)
    arguments = (inputs.video, inputs.idx, inputs.tubelet)
    got = zero_prediction_mse(*arguments, **inputs.keywords)
    assert relative_error(got, inputs.target().square().mean()) < FP32_RTOL


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, "uint8") for case in CASES),
        *((case, torch.float32) for case in ("odd", "videomae", "seven_channels")),
    ],
)
def test_linear_masked_mse(case, kind, dtype, device):
    check_linear_masked_mse(Inputs(case, kind, device), dtype)


@pytest.mark.parametrize("rows", [3, 5, 7])
@pytest.mark.parametrize("scored", [True, False], ids=["scored", "all"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_chunks(bias, scored, rows, dtype, device, monkeypatch):
    """Twelve tokens of three clips, cut within clips, and in a last chunk that is shorter."""
    monkeypatch.setattr(kernel, "_chunk_rows", lambda x, targets: rows)
    inputs = Inputs("three_clips", "uint8", device)
    weights = inputs.scored() if scored else None
    check_linear_masked_mse(inputs, dtype, width=7, bias=bias, scored=weights)


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("layout", ["contiguous", "cropped", "expanded"])
def test_linear_layouts(layout, norm_pix, dtype, device):
    inputs = Inputs("odd", "uint8", device, layout, form="int64", norm_pix=norm_pix)
    check_linear_masked_mse(inputs, dtype, width=33)


def test_the_same_from_run_to_run(dtype, device):
    inputs = Inputs("one_more_token", "uint8", device)
    x = inputs.random(*inputs.idx.shape, 16, dtype=dtype)
    weight = inputs.random(inputs.values, 16, dtype=dtype, seed=1)
    bias = inputs.random(inputs.values, dtype=dtype, seed=2)
    arguments = (inputs.video, inputs.idx, inputs.tubelet)

    def run():
        leaves = [one.detach().requires_grad_() for one in (x, weight, bias)]
        loss = linear_masked_mse(*leaves, *arguments, **inputs.keywords)
        return loss, *torch.autograd.grad(loss, leaves)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
