"""The loss against the published target, written out with einops."""

import pytest
import torch
from einops import rearrange
from helpers import (
    EXACT_RTOL,
    IMAGENET_MEAN,
    IMAGENET_STD,
    make_video,
    random_positions,
    relative_error,
)

from vmae_fast.ops import masked_mse, pixel_targets, weighted_mean, zero_prediction_mse

# batch, channels, tubelet, grid
CASES = {
    "square": (2, 3, (2, 4, 4), (3, 5, 2)),
    "one_tubelet": (2, 3, (2, 4, 4), (1, 1, 1)),
    "rectangular": (3, 4, (3, 5, 2), (1, 2, 5)),
    "image": (2, 5, (1, 3, 3), (1, 4, 3)),
    "one_channel": (2, 1, (4, 7, 2), (2, 1, 3)),
}
LAYOUTS = ["contiguous", "decoder", "cropped"]


def setup(case, dtype=torch.float64, layout="contiguous", share=0.7):
    batch, channels, tubelet, grid = case
    num_tokens = grid[0] * grid[1] * grid[2]
    count = max(1, int(share * num_tokens))
    shape = (batch, channels, *(n * p for n, p in zip(grid, tubelet, strict=True)))
    video = make_video(shape, dtype, layout)
    idx = random_positions(batch, num_tokens, count)
    generator = torch.Generator().manual_seed(3)
    values = channels * tubelet[0] * tubelet[1] * tubelet[2]
    pred = torch.randn(batch, count, values, generator=generator, dtype=torch.float64)
    statistics = {
        "mean": tuple(0.3 + 0.1 * c for c in range(channels)),
        "std": tuple(0.2 + 0.05 * c for c in range(channels)),
    }
    return pred, video, idx, tubelet, statistics


def published_target(video, idx, tubelet, norm_pix, mean, std):
    """Un-normalise, cut into tubelets, normalise per tubelet and channel, flatten channel last."""
    column = (1, -1, 1, 1, 1)
    if video.dtype == torch.uint8:
        pixels = video.double() / 255
    else:
        mean, std = (torch.tensor(s, dtype=torch.float64).view(column) for s in (mean, std))
        pixels = video.double() * std + mean
    pt, ph, pw = tubelet
    x = rearrange(pixels, "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2) c", p0=pt, p1=ph, p2=pw)
    if norm_pix:
        n = x.shape[2]
        centred = x - x.sum(dim=2, keepdim=True) / n
        deviation = (centred.square().sum(dim=2, keepdim=True) / (n - 1)).sqrt()
        x = centred / (deviation + 1e-6)
    x = rearrange(x, "b n p c -> b n (p c)")
    return torch.stack([x[b, idx[b].long()] for b in range(len(x))])


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss(case, layout, dtype, norm_pix):
    # Few and most of the tubelets are read in different ways.
    for share in (0.3, 0.7, 1.0):
        pred, video, idx, tubelet, statistics = setup(case, dtype, layout, share)
        before = (pred.clone(), video.clone(), idx.clone())
        target = published_target(video, idx, tubelet, norm_pix, **statistics)
        expected = (pred - target).square().mean(dim=2)
        for index in (idx, idx.int()):
            keywords = {"norm_pix": norm_pix, **statistics}
            none = masked_mse(pred, video, index, tubelet, reduction="none", **keywords)
            assert none.shape == idx.shape
            assert none.dtype == torch.float64
            assert relative_error(none, expected) < EXACT_RTOL
            loss = masked_mse(pred, video, index, tubelet, **keywords)
            assert loss.shape == ()
            assert relative_error(loss, expected.mean()) < EXACT_RTOL
        for tensor, copy in zip((pred, video, idx), before, strict=True):
            assert torch.equal(tensor, copy)


def test_default_statistics_are_imagenets():
    pred, video, idx, tubelet, _ = setup(CASES["square"])
    target = published_target(video, idx, tubelet, False, IMAGENET_MEAN, IMAGENET_STD)
    loss = masked_mse(pred, video, idx, tubelet, norm_pix=False)
    assert relative_error(loss, (pred - target).square().mean()) < EXACT_RTOL


def test_normalised_pixels_are_the_default():
    pred, video, idx, tubelet, statistics = setup(CASES["square"])
    target = published_target(video, idx, tubelet, True, **statistics)
    loss = masked_mse(pred, video, idx, tubelet, **statistics)
    assert relative_error(loss, (pred - target).square().mean()) < EXACT_RTOL


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bool], ids=str)
def test_scored_weights(dtype):
    pred, video, idx, tubelet, statistics = setup(CASES["square"])
    scored = torch.rand(idx.shape, generator=torch.Generator().manual_seed(5)) < 0.6
    assert scored.sum(dim=1).unique().numel() > 1
    target = published_target(video, idx, tubelet, True, **statistics)
    # Boolean indexing: every scored token counts the same, whichever clip it is in.
    expected = (pred - target).square().mean(dim=2)[scored].mean()
    weights = scored.to(dtype)
    loss = masked_mse(pred, video, idx, tubelet, scored=weights, **statistics)
    assert relative_error(loss, expected) < EXACT_RTOL
    none = masked_mse(pred, video, idx, tubelet, scored=weights, reduction="none", **statistics)
    assert relative_error(none, (pred - target).square().mean(dim=2)) < EXACT_RTOL
    fractions = torch.tensor([[0.5, 2.0], [0.0, 1.0]])
    mean = weighted_mean(torch.tensor([[1.0, 10.0], [100.0, 1000.0]]), fractions)
    assert mean.item() == pytest.approx((0.5 + 20 + 1000) / 3.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uint8_equals_the_normalised_video(layout):
    pred, video, idx, tubelet, statistics = setup(CASES["rectangular"], torch.uint8, layout)
    column = (1, -1, 1, 1, 1)
    mean = torch.tensor(statistics["mean"], dtype=torch.float64).view(column)
    std = torch.tensor(statistics["std"], dtype=torch.float64).view(column)
    floating = (video.double() / 255 - mean) / std
    for norm_pix in (True, False):
        losses = [
            masked_mse(pred, v, idx, tubelet, norm_pix=norm_pix, **statistics)
            for v in (video, floating)
        ]
        # Un-normalising rounds once more; the standard deviation here is of order 0.3.
        assert relative_error(*losses) < EXACT_RTOL


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
def test_a_flat_tubelet_costs_its_prediction(norm_pix):
    video = torch.full((1, 3, 2, 4, 4), 200, dtype=torch.uint8)
    idx = torch.zeros(1, 1, dtype=torch.int64)
    pred = torch.full((1, 1, 96), 0.5, dtype=torch.float64)
    loss = masked_mse(pred, video, idx, (2, 4, 4), norm_pix=norm_pix)
    level = 0.0 if norm_pix else 200 / 255
    # 1e-6 divides what rounding leaves of a flat tubelet's deviation.
    assert loss.item() == pytest.approx((0.5 - level) ** 2, rel=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("weighted", [True, False], ids=["scored", "all"])
def test_gradient(norm_pix, weighted, reduction):
    pred, video, idx, tubelet, statistics = setup((2, 2, (2, 1, 3), (2, 2, 1)))
    scored = (torch.arange(idx.numel()) % 3 > 0).view(idx.shape) if weighted else None

    def loss(p):
        return masked_mse(
            p, video, idx, tubelet,
            norm_pix=norm_pix, scored=scored, reduction=reduction, **statistics,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, pred.requires_grad_())


def test_gradient_flows_to_the_prediction_only():
    pred, video, idx, tubelet, statistics = setup(CASES["square"])
    video.requires_grad_()
    pred.requires_grad_()
    masked_mse(pred, video, idx, tubelet, **statistics).backward()
    assert video.grad is None
    assert pred.grad.abs().sum() > 0


def test_non_contiguous_prediction_and_upstream_gradient():
    pred, video, idx, tubelet, statistics = setup(CASES["square"])
    target = published_target(video, idx, tubelet, True, **statistics)
    stored = pred.permute(2, 0, 1).contiguous().requires_grad_()
    view = stored.permute(1, 2, 0)
    upstream = torch.randn(idx.shape[::-1], dtype=torch.float64).t()
    got = masked_mse(view, video, idx, tubelet, reduction="none", **statistics)
    expected = (view - target).square().mean(dim=2)
    assert relative_error(got, expected) < EXACT_RTOL
    mine = torch.autograd.grad(got, stored, upstream)[0]
    truth = torch.autograd.grad(expected, stored, upstream)[0]
    assert relative_error(mine, truth) < EXACT_RTOL


def test_double_backward_through_the_upstream_gradient_is_an_error():
    pred, video, idx, tubelet, statistics = setup(CASES["square"])
    pred.requires_grad_()
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = factor * masked_mse(pred, video, idx, tubelet, **statistics)
    with pytest.raises(RuntimeError, match=r"once|twice|double"):
        torch.autograd.grad(loss, pred, create_graph=True)[0].sum().backward()


def test_a_gradient_penalty_is_an_error():
    """The gradient depends on pred: leaving that out of a second derivative would be silent."""
    pred, video, idx, tubelet, statistics = setup(CASES["square"])
    weight = torch.ones(pred.shape[2], dtype=torch.float64, requires_grad=True)
    loss = masked_mse(pred * weight.square(), video, idx, tubelet, **statistics)
    with pytest.raises(RuntimeError, match=r"once|twice|double"):
        torch.autograd.grad(loss, weight, create_graph=True)[0].square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_gradient_of_a_large_batch(dtype):
    """1 / (B*M*P) is 1e-7 here: scaled early, the gradient would be nothing in fp16."""
    case = (16, 3, (2, 4, 4), (8, 8, 8))
    pred, video, idx, tubelet, statistics = setup(case, torch.uint8)
    pred = pred.to(dtype).requires_grad_()
    loss = masked_mse(pred, video, idx, tubelet, **statistics)
    assert loss.dtype == torch.float32
    # Where a GradScaler starts.
    (loss * 2.0**16).backward()
    target = published_target(video, idx, tubelet, True, **statistics)
    truth = 2 * (pred.detach().double() - target) / target.numel()
    expected_loss = (pred.detach().double() - target).square().mean()
    assert relative_error(loss, expected_loss) < 1e-5
    assert pred.grad.dtype == dtype
    assert (pred.grad != 0).float().mean() > 0.999
    # Half a unit in the last place of each value is all that may be lost.
    assert relative_error(pred.grad.double() / 2**16, truth) < torch.finfo(dtype).eps


# What each prediction's gradient is divided by at 64 clips of 1408 decoded tokens.
TOKENS = 64 * 1408


@pytest.mark.parametrize("scale", [1.0, 2.0**16], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_do_not_vanish_at_64_clips(dtype, scale):
    """fp16 with the scale that a GradScaler starts at loses as little as fp32 without it."""
    case = (4, 3, (2, 16, 16), (2, 2, 2))
    pred, video, idx, tubelet, statistics = setup(case, torch.uint8)

    def gradient(kind, factor):
        leaf = pred.detach().to(kind, copy=True).requires_grad_()
        per_token = masked_mse(leaf, video, idx, tubelet, reduction="none", **statistics)
        (found,) = torch.autograd.grad(per_token.sum() * (factor / TOKENS), leaf)
        return found.double() / factor

    exact, got = gradient(torch.float64, 1.0), gradient(dtype, scale)
    assert exact.abs().mean() < 1e-7
    lost = (got == 0).double().mean().item()
    if dtype == torch.float16 and scale == 1:
        # Most are below the smallest fp16 above zero: this is what the scale is for.
        assert lost > 0.5
        return
    # Of the 30 thousand, those of differences below 3e-5.
    assert lost < 1e-4
    assert relative_error(got, exact) < torch.finfo(dtype).eps


def test_low_precision_video():
    pred, video, idx, tubelet, statistics = setup(CASES["square"], torch.bfloat16)
    target = published_target(video, idx, tubelet, True, **statistics)
    loss = masked_mse(pred.float(), video, idx, tubelet, **statistics)
    assert relative_error(loss, (pred - target).square().mean()) < 1e-5


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8], ids=str)
def test_zero_prediction(dtype, norm_pix):
    _, video, idx, tubelet, statistics = setup(CASES["square"], dtype)
    target = published_target(video, idx, tubelet, norm_pix, **statistics)
    scored = torch.rand(idx.shape, generator=torch.Generator().manual_seed(5)) < 0.6
    keywords = {"norm_pix": norm_pix, **statistics}
    per_token = target.square().mean(dim=2)
    # Computed in fp32 for the log.
    got = zero_prediction_mse(video, idx, tubelet, **keywords)
    assert relative_error(got, per_token.mean()) < 1e-6
    got = zero_prediction_mse(video, idx, tubelet, scored=scored, **keywords)
    assert relative_error(got, per_token[scored].mean()) < 1e-6


def test_zero_prediction_is_near_one_for_textured_video_and_less_for_flat():
    video = make_video((2, 3, 4, 32, 32), torch.uint8)
    idx = torch.arange(8).expand(2, 8)
    pixels = 2 * 16 * 16
    cost = zero_prediction_mse(video, idx, (2, 16, 16)).item()
    assert cost == pytest.approx((pixels - 1) / pixels, rel=1e-4)
    video[..., :16, :] = 16
    half = zero_prediction_mse(video, idx, (2, 16, 16)).item()
    assert half == pytest.approx(cost / 2, rel=1e-4)


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
def test_pixel_targets(norm_pix):
    _, video, idx, tubelet, statistics = setup(CASES["rectangular"], torch.uint8, "decoder")
    target = published_target(video, idx, tubelet, norm_pix, **statistics)
    got = pixel_targets(video, idx, tubelet, norm_pix=norm_pix, **statistics)
    assert got.dtype == torch.float32
    assert got.shape == target.shape
    assert relative_error(got, target) < 1e-6


VIDEO = torch.zeros(2, 3, 4, 6, 8)
GOOD = {
    "pred": torch.zeros(2, 5, 72),
    "video": VIDEO,
    "target_idx": torch.zeros(2, 5, dtype=torch.int64),
    "tubelet": (2, 3, 4),
}
ERRORS = {
    "pred_values": (
        {"pred": torch.zeros(2, 5, 71)},
        r"pred must be \(B, M, P\) = \(2, 5, 72\), got shape \(2, 5, 71\)",
    ),
    "pred_tokens": ({"pred": torch.zeros(2, 4, 72)}, r"\(2, 5, 72\), got shape \(2, 4, 72\)"),
    "pred_rank": ({"pred": torch.zeros(10, 72)}, r"\(2, 5, 72\), got shape \(10, 72\)"),
    "video_rank": ({"video": VIDEO[0]}, r"video must be .*, got shape \(3, 4, 6, 8\)"),
    "video_dtype": ({"video": VIDEO.int()}, "video must be uint8 .* got torch.int32"),
    "frames": ({"video": VIDEO[:, :, :3]}, "video has 3 frames, .* 2"),
    "height": ({"video": VIDEO[..., :5, :]}, "video has 5 height, .* 3"),
    "width": ({"video": VIDEO[..., :7]}, "video has 7 width, .* 4"),
    "idx_dtype": (
        {"target_idx": torch.zeros(2, 5)},
        "target_idx must be int32 or int64, got torch.float32",
    ),
    "idx_batch": (
        {"target_idx": torch.zeros(1, 5, dtype=torch.int64)},
        r"target_idx must be \(B, n\) with B=2, got shape \(1, 5\)",
    ),
    "mean": ({"mean": (0.5,)}, r"mean must hold one value per channel \(3\), got 1"),
    "std": ({"std": (0.5,) * 4}, r"std must hold one value per channel \(3\), got 4"),
    "scored": (
        {"scored": torch.ones(2, 4)},
        r"scored must be \(B, M\) = \(2, 5\), got shape \(2, 4\)",
    ),
    "reduction": ({"reduction": "sum"}, r"reduction must be .*'mean'.*'none'.* got 'sum'"),
}


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        masked_mse(**{**GOOD, **changes})


@pytest.mark.parametrize("name", ["video_rank", "video_dtype", "idx_dtype", "mean", "std"])
@pytest.mark.parametrize("function", [zero_prediction_mse, pixel_targets])
def test_errors_of_the_other_two(function, name):
    changes, message = ERRORS[name]
    arguments = {k: v for k, v in {**GOOD, **changes}.items() if k != "pred"}
    with pytest.raises(ValueError, match=message):
        function(**arguments)


@pytest.mark.parametrize("name", ["pred", "target_idx", "scored"])
def test_tensors_on_two_devices(name):
    arguments = {**GOOD, "scored": torch.ones(2, 5)}
    arguments[name] = arguments[name].to("meta")
    message = f"^{name} is on meta but video is on cpu; move one of them$"
    with pytest.raises(ValueError, match=message):
        masked_mse(**arguments)
    if name != "pred":
        del arguments["pred"]
        with pytest.raises(ValueError, match=message):
            zero_prediction_mse(**arguments)


def test_one_pixel_cannot_be_normalised():
    video, idx = make_video((1, 2, 1, 2, 2), torch.uint8), torch.tensor([[0, 3]])
    pred, statistics = torch.zeros(1, 2, 2), {"mean": (0.5, 0.5), "std": (0.2, 0.2)}
    with pytest.raises(ValueError, match=r"norm_pix needs tubelets of more than one pixel"):
        masked_mse(pred, video, idx, (1, 1, 1), **statistics)
    assert masked_mse(pred, video, idx, (1, 1, 1), norm_pix=False, **statistics) > 0
