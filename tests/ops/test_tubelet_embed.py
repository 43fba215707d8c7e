"""tubelet_embed is a Conv3d with kernel = stride, gathered."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EXACT_RTOL,
    IMAGENET_MEAN,
    IMAGENET_STD,
    assert_as_accurate_as_eager,
    make_video,
    random_positions,
    relative_error,
)

from vmae_fast.ops import debug, tubelet_embed

# batch, channels, tubelet, grid, width
CASES = {
    "one_pixel": (1, 1, (1, 1, 1), (1, 1, 1), 1),
    "one_tubelet": (2, 3, (2, 4, 4), (1, 1, 1), 5),
    "square": (2, 3, (2, 4, 4), (3, 5, 2), 7),
    "rectangular": (3, 4, (3, 5, 2), (1, 2, 5), 11),
    "image": (2, 5, (1, 3, 3), (1, 4, 3), 17),
    "two_channels": (2, 2, (4, 7, 2), (2, 1, 3), 13),
}
LAYOUTS = ["contiguous", "decoder", "cropped"]


def video_shape(case):
    batch, channels, tubelet, grid, _ = case
    return (batch, channels, *(n * p for n, p in zip(grid, tubelet, strict=True)))


def parameters(case, dtype=torch.float64):
    _, channels, tubelet, grid, width = case
    generator = torch.Generator().manual_seed(1)
    num_tokens = grid[0] * grid[1] * grid[2]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((width, channels, *tubelet), (width,), (num_tokens, width))
    ]


def conv3d_gathered(video, weight, bias, pos, idx):
    """The published computation: embed everything, add positions, keep some."""
    tokens = F.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if pos is not None:
        tokens = tokens + pos
    if idx is None:
        return tokens
    return torch.stack([tokens[b, idx[b].long()] for b in range(len(tokens))])


def normalised(video, mean, std):
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(mean, dtype=torch.float64).view(shape)
    std = torch.tensor(std, dtype=torch.float64).view(shape)
    return (video.double() / 255 - mean) / std


def some_positions(case):
    """None, and index tensors that take few and nearly all of the tubelets, in both dtypes."""
    batch, _, _, grid, _ = case
    n = grid[0] * grid[1] * grid[2]
    counts = sorted({1, max(1, n // 3), max(1, n - 1), n})
    tensors = [random_positions(batch, n, count) for count in counts]
    return [None, *tensors, *(t.int() for t in tensors)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_conv3d(case, layout):
    video = make_video(video_shape(case), torch.float64, layout)
    weight, bias, pos = parameters(case)
    for idx in some_positions(case):
        for b, p in ((bias, pos), (None, pos), (bias, None), (None, None)):
            got = tubelet_embed(video, weight, b, p, idx)
            expected = conv3d_gathered(video, weight, b, p, idx)
            assert got.shape == expected.shape
            assert relative_error(got, expected) < EXACT_RTOL


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_uint8_is_normalised(case, layout):
    video = make_video(video_shape(case), torch.uint8, layout)
    before = video.clone()
    weight, bias, pos = parameters(case)
    mean = tuple(0.3 + 0.1 * c for c in range(case[1]))
    std = tuple(0.2 + 0.05 * c for c in range(case[1]))
    for idx in some_positions(case):
        got = tubelet_embed(video, weight, bias, pos, idx, mean=mean, std=std)
        expected = conv3d_gathered(normalised(video, mean, std), weight, bias, pos, idx)
        assert relative_error(got, expected) < EXACT_RTOL
    assert torch.equal(video, before)


def test_default_statistics_are_imagenets():
    video = make_video((2, 3, 2, 6, 4), torch.uint8)
    weight = torch.randn(5, 3, 2, 3, 2, dtype=torch.float64)
    expected = conv3d_gathered(
        normalised(video, IMAGENET_MEAN, IMAGENET_STD), weight, None, None, None
    )
    assert relative_error(tubelet_embed(video, weight), expected) < EXACT_RTOL


def test_floating_video_is_not_normalised_again():
    video = make_video((2, 3, 2, 6, 4), torch.float64)
    weight = torch.randn(5, 3, 2, 3, 2, dtype=torch.float64)
    strange = tubelet_embed(video, weight, mean=(9, 9, 9), std=(7, 7, 7))
    assert torch.equal(strange, tubelet_embed(video, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_as_accurate_as_conv3d(dtype):
    case = (3, 3, (2, 7, 5), (3, 3, 5), 29)
    video = make_video(video_shape(case), dtype)
    weight, bias, pos = parameters(case, dtype)
    idx = random_positions(3, 45, 13)
    truth = conv3d_gathered(video.double(), weight.double(), bias.double(), pos.double(), idx)
    eager = conv3d_gathered(video, weight, bias, pos, idx)
    assert_as_accurate_as_eager(tubelet_embed(video, weight, bias, pos, idx), eager, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_uint8_is_normalised_before_rounding(dtype):
    """Grey video, whose normalised values are small differences of large numbers."""
    case = (3, 3, (2, 7, 5), (3, 3, 5), 29)
    video = 105 + make_video(video_shape(case), torch.uint8) // 16
    weight, bias, _ = parameters(case, dtype)
    exact = normalised(video, IMAGENET_MEAN, IMAGENET_STD)
    truth = conv3d_gathered(exact, weight.double(), bias.double(), None, None)
    eager = conv3d_gathered(exact.float().to(dtype), weight, bias, None, None)
    assert_as_accurate_as_eager(tubelet_embed(video, weight, bias), eager, truth)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients(case, layout):
    for idx in some_positions(case)[:4]:
        grads = []
        for function in (tubelet_embed, conv3d_gathered):
            video = make_video(video_shape(case), torch.float64, layout).detach()
            leaves = [t.requires_grad_() for t in (video, *parameters(case))]
            out = function(*leaves, idx)
            upstream = torch.randn(
                out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype
            )
            grads.append(torch.autograd.grad(out, leaves, upstream))
        for got, expected in zip(*grads, strict=True):
            assert got.shape == expected.shape
            assert relative_error(got, expected) < EXACT_RTOL


def test_a_position_named_twice_is_against_the_contract():
    case = CASES["square"]
    video, weight = make_video(video_shape(case), torch.float64), parameters(case)[0]
    idx = torch.tensor([[4, 7, 0], [29, 0, 29]])
    message = "visible_idx holds 29 more than once in clip 1; positions must be distinct"
    with debug(), pytest.raises(IndexError, match=message):
        tubelet_embed(video, weight, visible_idx=idx)


def test_inputs_are_left_alone():
    case = CASES["one_tubelet"]
    video = make_video(video_shape(case), torch.float64)
    inputs = [video, *parameters(case), torch.zeros(2, 1, dtype=torch.int64)]
    copies = [t.clone() for t in inputs]
    tubelet_embed(*inputs)
    tubelet_embed(*inputs[:4])
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, copy)


VIDEO = torch.zeros(2, 3, 4, 6, 8)
WEIGHT = torch.zeros(5, 3, 2, 3, 4)
ERRORS = {
    "weight_rank": (
        (VIDEO, torch.zeros(5, 3)), {},
        r"weight must be \(D, C, pt, ph, pw\), got shape \(5, 3\)",
    ),
    "video_rank": (
        (VIDEO[0], WEIGHT), {},
        r"video must be \(B, C, T, H, W\), 5 dimensions, got shape \(3, 4, 6, 8\)",
    ),
    "video_dtype": (
        (VIDEO.long(), WEIGHT), {}, r"video must be uint8 .* or floating point .*torch.int64",
    ),
    "frames": ((VIDEO[:, :, :3], WEIGHT), {}, "video has 3 frames, .* multiple of .* 2"),
    "height": ((VIDEO[..., :5, :], WEIGHT), {}, "video has 5 height, .* multiple of .* 3"),
    "width": ((VIDEO[..., :6], WEIGHT), {}, "video has 6 width, .* multiple of .* 4"),
    "no_frames": ((VIDEO[:, :, :0], WEIGHT), {}, "video has 0 frames"),
    "channels": ((VIDEO[:, :1], WEIGHT), {}, "video has 1 channels but weight expects 3"),
    "mean": ((VIDEO.byte(), WEIGHT), {"mean": (0.5,)}, r"mean must .* channel \(3\), got 1"),
    "std": ((VIDEO.byte(), WEIGHT), {"std": (0.5,) * 4}, r"std must .* channel \(3\), got 4"),
    "pos_embed": (
        (VIDEO, WEIGHT), {"pos_embed": torch.zeros(7, 5)},
        r"pos_embed must be \(N, D\) = \(8, 5\), got shape \(7, 5\)",
    ),
    "idx_dtype": (
        (VIDEO, WEIGHT), {"visible_idx": torch.zeros(2, 3)},
        "visible_idx must be int32 or int64, got torch.float32",
    ),
    "idx_batch": (
        (VIDEO, WEIGHT), {"visible_idx": torch.zeros(3, 3, dtype=torch.int64)},
        r"visible_idx must be \(B, n\) with B=2, got shape \(3, 3\)",
    ),
    "idx_rank": (
        (VIDEO, WEIGHT), {"visible_idx": torch.zeros(2, dtype=torch.int64)},
        r"visible_idx must be \(B, n\) with B=2, got shape \(2,\)",
    ),
    # Promised by the docstring: "a shape or dtype does not fit; the message names it".
    "bias_shape": ((VIDEO, WEIGHT, torch.zeros(4)), {}, r"bias must be .*5.*\(4,\)"),
    "video_other_dtype": (
        (VIDEO.double(), WEIGHT), {}, r"video .*torch.float64.* weight .*torch.float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "keywords", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        tubelet_embed(*arguments, **keywords)


@pytest.mark.parametrize("name", ["weight", "bias", "pos_embed", "visible_idx"])
def test_tensors_on_two_devices(name):
    arguments = {
        "video": VIDEO, "weight": WEIGHT, "bias": torch.zeros(5), "pos_embed": torch.zeros(8, 5),
        "visible_idx": torch.zeros(2, 3, dtype=torch.int64),
    }  # fmt: skip
    arguments[name] = arguments[name].to("meta")
    message = f"^{name} is on meta but video is on cpu; move one of them$"
    with pytest.raises(ValueError, match=message):
        tubelet_embed(**arguments)
