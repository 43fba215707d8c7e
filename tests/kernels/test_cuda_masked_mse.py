"""The CUDA C++ kernel of the masked losses against the published target, written out in fp64.

On a GPU where there is one, else the same source in the emulator.
"""

import pytest
import torch
from helpers import EXACT_RTOL, make_video, random_positions, relative_error
from loss_truth import FP32_RTOL, LossInputs, check_linear_masked_mse, check_masked_mse

from vmae_fast import ops
from vmae_fast.kernels import linear_masked_mse as kernel
from vmae_fast.ops import _extension, masked_mse, zero_prediction_mse

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []

# A warp has a token of up to 32 rows of 16 pixels, a block four of them or one that is larger.
CASES = {  # batch, channels, tubelet, grid, tokens
    "videomae": (2, 3, (2, 16, 16), (2, 2, 3), 5),
    "one_row": (2, 1, (1, 1, 16), (1, 3, 2), 5),
    "odd": (3, 3, (3, 5, 16), (2, 3, 5), 3),
    "two_channels": (1, 2, (1, 17, 16), (1, 2, 2), 3),
    "four_channels": (1, 4, (3, 11, 16), (2, 1, 3), 4),
    "largest": (1, 3, (8, 32, 16), (1, 1, 3), 2),
    "no_tokens": (2, 3, (2, 16, 16), (2, 2, 1), 0),
    "no_clips": (0, 3, (2, 16, 16), (2, 2, 1), 3),
}
# Left to what the other backends have.
OTHERS = {
    "narrow": (1, 3, (2, 8, 8), (2, 2, 4), 3),
    "wide": (1, 3, (2, 4, 32), (2, 2, 2), 3),
    "seven_channels": (1, 7, (2, 2, 16), (2, 2, 2), 3),
    "many_rows": (1, 1, (16, 17, 16), (1, 1, 2), 2),
}
NORM_PIX = pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
LAYOUT = pytest.mark.parametrize("layout", ["contiguous", "decoder"])


class Inputs(LossInputs):
    cases = CASES | OTHERS


@pytest.fixture
def launches(request, device, monkeypatch):
    """Demand the kernel, fill what it leaves unwritten with NaN, and list its launches."""
    if device.type == "cuda":
        module = _extension.extension()
        if module is None or _extension.why_not(device):
            pytest.skip(f"needs the CUDA C++ extension: {_extension.why_not(device)}")
    else:
        module = request.getfixturevalue("emulated")
    listed = []

    class Listing:
        def __getattr__(self, name):
            return getattr(module, name)

        def masked_mse(self, *given):
            listed.append(given)
            module.masked_mse(*given)

    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Warnings only: what other operations do is of no interest here.
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    with _extension.use(Listing()), ops.backend("cuda"):
        yield listed
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@NORM_PIX
@LAYOUT
@pytest.mark.parametrize("case", CASES)
def test_masked_mse(case, layout, norm_pix, dtype, device, launches):
    inputs = Inputs(case, "uint8", device, layout, norm_pix=norm_pix)
    check_masked_mse(inputs, dtype, reduction="none")
    # Two or four channels lie together in no whole number of loads.
    taken = layout == "contiguous" or inputs.video.shape[1] in (1, 3)
    assert len(launches) == taken


@NORM_PIX
@LAYOUT
@pytest.mark.parametrize("case", CASES)
def test_linear_masked_mse(case, layout, norm_pix, dtype, device, launches):
    """Predictions are channel-major and replaced by the differences."""
    inputs = Inputs(case, "uint8", device, layout, norm_pix=norm_pix)
    check_linear_masked_mse(inputs, dtype)
    taken = layout == "contiguous" or inputs.video.shape[1] in (1, 3)
    assert len(launches) == (taken and inputs.idx.numel() > 0)


@pytest.mark.parametrize("rows", [3, 4, 5])
@pytest.mark.parametrize("scored", [True, False], ids=["scored", "all"])
def test_chunks(scored, rows, dtype, device, launches, monkeypatch):
    """Nine tokens of three clips, cut within clips, and in a last chunk that may be shorter."""
    monkeypatch.setattr(kernel, "_chunk_rows", lambda x, targets: rows)
    inputs = Inputs("odd", "uint8", device)
    weights = inputs.scored() if scored else None
    check_linear_masked_mse(inputs, dtype, width=7, bias=False, scored=weights)
    assert len(launches) == -(-9 // rows)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", ["odd", "largest"])
def test_scored(case, reduction, dtype, device, launches):
    inputs = Inputs(case, "uint8", device, form="int64")
    check_masked_mse(inputs, dtype, scored=inputs.scored(), reduction=reduction)
    assert len(launches) == 1


@pytest.mark.parametrize("layout", ["expanded", "window", "decoder_window", "flat"])
def test_strides(layout, dtype, device, launches):
    """Windows of larger videos whose rows still start at 16 bytes; no stride where size is 1."""
    inputs = Inputs("odd", "uint8", device, "expanded" if layout == "expanded" else "contiguous")
    batch, channels, frames, height, width = inputs.video.shape
    if layout == "window":
        larger = make_video((batch, channels, 2 * frames, height + 3, width + 32), torch.uint8)
        inputs.video = larger.to(device)[:, :, ::2, 2 : 2 + height, 16 : 16 + width]
    if layout == "decoder_window":
        larger = make_video(
            (batch, channels, frames, height + 3, width + 32), torch.uint8, "decoder"
        )
        inputs.video = larger.to(device)[:, :, :, 3:, 32:]
    if layout == "flat":
        memory = make_video((1, 1, 1, 1, 5 * 16 * 5), torch.uint8).to(device).flatten()
        inputs.video = memory.as_strided((1, 1, 1, 5, 80), (7, 13, 11, 80, 1))
        inputs.idx = torch.tensor([[4, 0, 2]], device=device)
        inputs.tubelet, inputs.values = (1, 5, 16), 80
        inputs.keywords |= {"mean": (0.4,), "std": (0.3,)}
    check_masked_mse(inputs, dtype, layout="transposed")
    assert len(launches) == 1


@pytest.mark.parametrize("case", OTHERS)
def test_other_tubelets(case, dtype, device, launches):
    check_masked_mse(Inputs(case, "uint8", device), dtype)
    check_linear_masked_mse(Inputs(case, "uint8", device), dtype)
    assert not launches


@pytest.mark.parametrize("why", ["floating", "off", "row", "step"])
def test_other_videos(why, dtype, device, launches):
    """Floating, or with rows of pixels that start elsewhere than at 16 bytes."""
    inputs = Inputs("odd", torch.float32 if why == "floating" else "uint8", device, "contiguous")
    if why != "floating":
        batch, channels, frames, height, width = inputs.video.shape
        wider = make_video((batch, channels, frames, height, 2 * width + 32), torch.uint8)
        if why == "row":
            wider = wider[..., : width + 8].contiguous()
        first, step = {"off": (8, 1), "row": (0, 1), "step": (0, 2)}[why]
        inputs.video = wider.to(device)[..., first : first + step * width : step]
    check_masked_mse(inputs, dtype)
    check_linear_masked_mse(inputs, dtype)
    assert not launches


def test_predictions_off_alignment(device, launches):
    inputs = Inputs("videomae", "uint8", device)
    memory = inputs.random(inputs.idx.numel() * inputs.values + 1, dtype=torch.float16)
    pred = memory[1:].view(*inputs.idx.shape, inputs.values)
    got = masked_mse(pred, inputs.video, inputs.idx, inputs.tubelet, **inputs.keywords)
    true = (pred.double() - inputs.target()).square().mean()
    assert relative_error(got, true) < FP32_RTOL
    assert len(launches) == 1


def test_double_predictions(device, launches):
    inputs = Inputs("odd", "uint8", device)
    pred = inputs.random(*inputs.idx.shape, inputs.values)
    got = masked_mse(pred, inputs.video, inputs.idx, inputs.tubelet, **inputs.keywords)
    assert got.dtype == torch.float64
    assert relative_error(got, (pred - inputs.target()).square().mean()) < EXACT_RTOL
    assert not launches


@NORM_PIX
@LAYOUT
@pytest.mark.parametrize("case", ["videomae", "odd", "one_row", "largest"])
def test_zero_prediction_mse(case, layout, norm_pix, device, launches):
    inputs = Inputs(case, "uint8", device, layout, norm_pix=norm_pix)
    per_token = inputs.target().square().mean(dim=2)
    weights = inputs.scored()
    got = zero_prediction_mse(
        inputs.video, inputs.idx, inputs.tubelet, scored=weights, **inputs.keywords
    )
    assert got.dtype == torch.float32
    assert relative_error(got, (per_token * weights).sum() / weights.sum()) < FP32_RTOL
    assert len(launches) == 1


@LAYOUT
@pytest.mark.parametrize("level", [0, 77, 255])
@pytest.mark.parametrize("case", ["videomae", "odd", "largest"])
def test_flat_tubelets(case, level, layout, dtype, device, launches):
    """Their deviation is zero, and what is divided by 1e-6 has to be zero too, exactly."""
    inputs = Inputs(case, "uint8", device, layout)
    inputs.video.fill_(level)
    arguments = (inputs.video, inputs.idx, inputs.tubelet)
    assert zero_prediction_mse(*arguments, **inputs.keywords).item() == 0
    pred = inputs.random(*inputs.idx.shape, inputs.values, dtype=dtype).requires_grad_()
    loss = masked_mse(pred, *arguments, reduction="none", **inputs.keywords)
    factor = 2 ** torch.arange(inputs.idx.numel(), device=device).view(inputs.idx.shape).float()
    (grad,) = torch.autograd.grad(loss, pred, factor)
    expected = pred.detach().float() * (factor * (2 / inputs.values)).unsqueeze(2)
    assert torch.equal(grad, expected.to(dtype))
    assert len(launches) == 2


@pytest.mark.parametrize("base", [(0, 1), (254, 255), (128, 0)], ids=str)
@pytest.mark.parametrize("case", ["odd", "largest"])
def test_one_pixel_that_differs(case, base, device, launches):
    """The variance is a small difference of large sums."""
    inputs = Inputs(case, "uint8", device)
    inputs.video.fill_(base[0])
    pt, ph, pw = inputs.tubelet
    inputs.video[:, :, pt - 1 :: pt, ph - 1 :: ph, pw // 2 :: pw] = base[1]
    check_masked_mse(inputs, torch.float32)
    assert len(launches) == 1


@pytest.mark.parametrize("case", ["videomae", "largest"])
def test_the_same_from_run_to_run(case, dtype, device, launches):
    inputs = Inputs(case, "uint8", device)
    pred = inputs.random(*inputs.idx.shape, inputs.values, dtype=dtype).requires_grad_()

    def run():
        loss = masked_mse(
            pred, inputs.video, inputs.idx, inputs.tubelet, reduction="none", **inputs.keywords
        )
        return loss, *torch.autograd.grad(loss.sum(), pred)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
    assert len(launches) == 2


@pytest.mark.parametrize("case", ["videomae", "largest"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_wrong_prediction_stays_with_its_token(wrong, case, dtype, device, launches):
    inputs = Inputs(case, "uint8", device)
    pred = inputs.random(*inputs.idx.shape, inputs.values, dtype=dtype)

    def run(pred):
        pred = pred.clone().requires_grad_()
        loss = masked_mse(
            pred, inputs.video, inputs.idx, inputs.tubelet, reduction="none", **inputs.keywords
        )
        return loss.detach(), *torch.autograd.grad(loss.sum(), pred)

    loss, grad = run(pred)
    bad = (0, 1, 3 * inputs.values // 4)
    pred[bad] = wrong
    got_loss, got_grad = run(pred)
    assert not got_loss[bad[:2]].isfinite()
    assert not got_grad[bad].isfinite()
    # Elsewhere the same numbers, to the bit.
    got_loss[bad[:2]], got_grad[bad] = loss[bad[:2]], grad[bad]
    assert torch.equal(got_loss, loss)
    assert torch.equal(got_grad, grad)
    assert len(launches) == 2


def test_positions_at_the_end(device, launches):
    """Every position of a grid in one call, the last included."""
    inputs = Inputs("odd", "uint8", device, form="int64")
    inputs.idx = random_positions(3, 2 * 3 * 5, 2 * 3 * 5, seed=1).to(device)
    check_masked_mse(inputs, torch.float16)
    assert len(launches) == 1
