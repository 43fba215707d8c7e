"""linear_masked_mse is masked_mse of a linear layer, without its predictions in memory."""

import pytest
import torch
import torch.nn.functional as F
from helpers import EXACT_RTOL, make_video, random_positions, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from vmae_fast.kernels import linear_masked_mse as kernel
from vmae_fast.ops import linear_masked_mse, masked_mse
from vmae_fast.ops.masked_mse import targets_of

SIZE = (1, 4, 3)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
P = 3 * 12


class Given:
    """``batch`` clips of 2 x 5 x 8 tubelets."""

    def __init__(self, batch=2, count=61, width=7, video="uint8", dtype=torch.float64):
        shape = (batch, 3, 2, 20, 24)
        self.video = make_video(shape, torch.uint8 if video == "uint8" else dtype, "decoder")
        self.idx = random_positions(batch, 80, count)
        generator = torch.Generator().manual_seed(1)
        self.x, self.weight, self.bias = (
            torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for s in ((batch, count, width), (P, width), (P,))
        )
        self.scored = (torch.arange(batch * count).view(batch, count) % 4).to(dtype)

    def fused(self, bias=True, **keywords):
        return linear_masked_mse(
            self.x, self.weight, self.bias if bias else None, self.video, self.idx, SIZE,
            **{"mean": MEAN, "std": STD, **keywords},
        )  # fmt: skip

    def two_steps(self, bias=True, **keywords):
        predictions = F.linear(self.x, self.weight, self.bias if bias else None)
        keywords = {"mean": MEAN, "std": STD, **keywords}
        return masked_mse(predictions, self.video, self.idx, SIZE, **keywords)

    def leaves(self, bias=True):
        return (self.x, self.weight, self.bias) if bias else (self.x, self.weight)


@pytest.fixture(params=[None, 1, 7, 100, 122], ids=lambda rows: f"{rows}_rows")
def rows(request, monkeypatch):
    """Tokens a chunk; all 122 in one unless said otherwise."""
    if request.param is not None:
        monkeypatch.setattr(kernel, "_chunk_rows", lambda x, targets: request.param)


def assert_equal_losses(given, scale=0.3, bias=True, **keywords):
    mine, theirs = given.fused(bias, **keywords), given.two_steps(bias, **keywords)
    assert mine.shape == ()
    assert mine.dtype == theirs.dtype
    assert relative_error(mine, theirs) < EXACT_RTOL
    pairs = zip(
        torch.autograd.grad(scale * mine, given.leaves(bias)),
        torch.autograd.grad(scale * theirs, given.leaves(bias)),
        strict=True,
    )
    for got, expected in pairs:
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert relative_error(got, expected) < EXACT_RTOL


@pytest.mark.parametrize("scored", [True, False], ids=["scored", "all"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_equals_two_steps(bias, scored, rows):
    given = Given()
    assert_equal_losses(given, bias=bias, scored=given.scored if scored else None)


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("video", ["uint8", "floating"])
def test_targets(video, norm_pix):
    assert_equal_losses(Given(video=video), norm_pix=norm_pix)


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (3, 80), (5, 2)])
def test_sizes(batch, count):
    assert_equal_losses(Given(batch, count))


def test_boolean_weights():
    given = Given()
    assert_equal_losses(given, scored=given.scored > 0)


def test_more_than_one_chunk_of_the_usual_size():
    """On a CPU 1024 tokens at least."""
    given = Given(batch=16, count=80)
    targets = targets_of(given.video, given.idx, SIZE, True, MEAN, STD)
    assert kernel._chunk_rows(given.x.flatten(0, 1), targets) >= 1024
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
        assert kernel._chunk_rows(given.x.flatten(0, 1), targets) == 1024
        assert_equal_losses(given)


@pytest.mark.parametrize("nothing", ["tokens", "clips"])
def test_nothing_to_predict(nothing):
    given = Given(*((0, 5) if nothing == "clips" else (2, 0)))
    loss = given.fused()
    assert loss.isnan()
    grads = torch.autograd.grad(loss, given.leaves())
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in given.leaves()]


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_frozen_parts(wanted):
    given = Given()
    expected = torch.autograd.grad(given.two_steps(), getattr(given, wanted))[0]
    for name in ("x", "weight", "bias"):
        getattr(given, name).requires_grad_(name == wanted)
    loss = given.fused()
    loss.backward()
    for name in ("x", "weight", "bias"):
        assert (getattr(given, name).grad is not None) == (name == wanted)
    assert relative_error(getattr(given, wanted).grad, expected) < EXACT_RTOL


def test_upstream_gradient_and_other_uses_of_the_loss():
    given = Given()
    factor = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    loss = given.fused()
    (factor * loss + loss.square()).backward()
    assert relative_error(factor.grad, loss) < EXACT_RTOL
    theirs = given.two_steps()
    expected = torch.autograd.grad(-3 * theirs + theirs.square(), given.leaves())
    for leaf, gradient in zip(given.leaves(), expected, strict=True):
        assert relative_error(leaf.grad, gradient) < EXACT_RTOL


# ---- memory -------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Notes the sizes in bytes of the floating tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor) and one.is_floating_point():
                self.sizes.append(one.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("keep", [True, False], ids=["training", "inference"])
def test_predictions_never_exist_in_full(keep, monkeypatch):
    given = Given(batch=8, count=80, dtype=torch.float32)
    monkeypatch.setattr(kernel, "_chunk_rows", lambda x, targets: 64)
    targets = targets_of(given.video, given.idx, SIZE, True, MEAN, STD)
    leaves = [leaf.detach() for leaf in given.leaves()]
    with Allocations() as made:
        kernel.linear_masked_mse_reference(*leaves, targets, None, keep)
    full = given.idx.numel() * P * 4
    assert max(made.sizes) <= full / 4
    # The mode does see them where they are made.
    with Allocations() as made:
        F.linear(*leaves)
    assert max(made.sizes) == full


def saved_by(function):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return saved


def test_gradients_are_kept_instead_of_predictions():
    given = Given(batch=8, count=80, width=5, dtype=torch.float32)
    kept = saved_by(given.fused)
    assert sum(one.numel() for one in kept) == sum(leaf.numel() for leaf in given.leaves())
    two_steps = saved_by(given.two_steps)
    assert max(one.numel() for one in two_steps) == given.idx.numel() * P


def test_nothing_is_kept_where_nothing_needs_a_gradient():
    given = Given()
    with torch.no_grad():
        assert saved_by(given.fused) == []
    for leaf in given.leaves():
        leaf.requires_grad_(False)
    assert saved_by(given.fused) == []
    raw = torch.ops.vmae_fast.linear_masked_mse(
        *given.leaves(), None, given.video, given.idx, SIZE, True, MEAN, STD, False
    )
    assert [one.numel() for one in raw] == [1, 0, 0, 0]


# ---- arguments ----------------------------------------------------------------------------

VIDEO = torch.zeros(2, 3, 2, 20, 24)
GOOD = {
    "x": torch.zeros(2, 5, 7),
    "weight": torch.zeros(36, 7),
    "bias": torch.zeros(36),
    "video": VIDEO,
    "target_idx": torch.zeros(2, 5, dtype=torch.int64),
    "tubelet": SIZE,
}
ERRORS = {
    "x_rank": (
        {"x": torch.zeros(10, 7)},
        r"^x must be \(B, S, E\) with \(B, S\) = \(2, 5\), got shape \(10, 7\)$",
    ),
    "x_tokens": ({"x": torch.zeros(2, 4, 7)}, r"^x must be .* = \(2, 5\), got shape \(2, 4, 7\)$"),
    "weight_values": (
        {"weight": torch.zeros(35, 7)},
        r"^weight must be \(P, E\) = \(36, 7\), got shape \(35, 7\)$",
    ),
    "weight_width": (
        {"weight": torch.zeros(36, 8)},
        r"^weight must be \(P, E\) = \(36, 7\), got shape \(36, 8\)$",
    ),
    "bias": (
        {"bias": torch.zeros(7)},
        r"^bias must be \(P,\) = \(36,\), got shape \(7,\)$",
    ),
    "scored": (
        {"scored": torch.ones(5)},
        r"^scored must be \(B, S\) = \(2, 5\), got shape \(5,\)$",
    ),
    "dtypes": (
        {"x": torch.zeros(2, 5, 7, dtype=torch.float16)},
        r"^x is torch.float16 but weight is torch.float32; cast one of them$",
    ),
    "video_rank": ({"video": VIDEO[0]}, r"^video must be .*, got shape \(3, 2, 20, 24\)$"),
    "video_dtype": ({"video": VIDEO.int()}, r"^video must be uint8 .*, got torch.int32$"),
    "video_width": ({"video": VIDEO[..., :23]}, r"^video has 23 width, .* multiple of .* 3$"),
    "idx_dtype": (
        {"target_idx": torch.zeros(2, 5)},
        r"^target_idx must be int32 or int64, got torch.float32$",
    ),
    "idx_batch": (
        {"target_idx": torch.zeros(1, 5, dtype=torch.int64)},
        r"^target_idx must be \(B, n\) with B=2, got shape \(1, 5\)$",
    ),
    "tubelet": ({"tubelet": (1, 4)}, r"^tubelet must be three positive sizes .*, got \(1, 4\)$"),
    "mean": ({"mean": (0.5,)}, r"^mean must hold one value per channel \(3\), got 1$"),
    "std": ({"std": (0.5,) * 4}, r"^std must hold one value per channel \(3\), got 4$"),
}


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        linear_masked_mse(**{**GOOD, **changes})


@pytest.mark.parametrize("name", ["x", "weight", "bias", "target_idx", "scored"])
def test_tensors_on_two_devices(name):
    arguments = {**GOOD, "scored": torch.ones(2, 5)}
    arguments[name] = arguments[name].to("meta")
    message = f"^{name} is on meta but video is on cpu; move one of them$"
    with pytest.raises(ValueError, match=message):
        linear_masked_mse(**arguments)
