"""Every kernel compiled for every target, as its launcher would launch it.

Those of attention are in test_compile_attention.py.
"""

import os
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from aot import Recorder, kernel_modules, kernels_of

from vmae_fast.kernels import linear_masked_mse, masked_mse, token_gather, tubelet_embed
from vmae_fast.kernels._launch import FLOAT_DTYPES, TARGETS, Row

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

# For which every variant is compiled; the others get the usual one.
VARIANTS_TARGET = 90


@dataclass(frozen=True)
class Sizes:
    """What a model and its input are like; the defaults are VideoMAE base's."""

    channels: int = 3
    tubelet: tuple[int, int, int] = (2, 16, 16)
    frames: int = 16
    image: int = 224
    width: int = 768
    decoder_width: int = 384
    video: str = "uint8"
    layout: str = "contiguous"
    index: torch.dtype = torch.int64
    wide_position: bool = False

    @property
    def grid(self):
        pt, ph, pw = self.tubelet
        return self.frames // pt, self.image // ph, self.image // pw

    @property
    def values(self):
        pt, ph, pw = self.tubelet
        return self.channels * pt * ph * pw


BASE = Sizes()
VARIANTS = {
    "int32": replace(BASE, index=torch.int32),
    "channels_last": replace(BASE, layout="decoder"),
    "fp32_position": replace(BASE, wide_position=True),
    "giant": replace(BASE, tubelet=(2, 14, 14), width=1408, decoder_width=512),
    "patch_32": replace(BASE, tubelet=(4, 32, 32)),
    "four_channels": replace(BASE, channels=4, video="floating"),
    "no_index": BASE,
}
# Nothing divides by 16, or is as large as a block.
ODD = Sizes(channels=1, tubelet=(1, 7, 7), width=13, decoder_width=7)


class Inputs:
    """Tensors without data."""

    def __init__(self, sizes, dtype, batch=2):
        self.sizes, self.dtype, self.batch = sizes, dtype, batch
        t, h, w = sizes.grid
        self.num_tokens = t * h * w
        self.num_visible = max(self.num_tokens // 10, 1)
        order = self.empty(batch, self.num_tokens, dtype=sizes.index)
        # Slices of one order of all tokens, as a mask makes them.
        self.visible_idx = order[:, : self.num_visible]
        self.decode_idx = order[:, self.num_visible :]
        shape = (batch, sizes.channels, sizes.frames, sizes.image, sizes.image)
        kind = torch.uint8 if sizes.video == "uint8" else dtype
        if sizes.layout == "decoder":
            shape = (batch, sizes.frames, sizes.image, sizes.image, sizes.channels)
        self.video = self.empty(*shape, dtype=kind)
        if sizes.layout == "decoder":
            self.video = self.video.permute(0, 4, 1, 2, 3)
        self.statistics = ((0.5,) * sizes.channels, (0.25,) * sizes.channels)

    def empty(self, *shape, dtype=None):
        return torch.empty(*shape, dtype=dtype or self.dtype, device="meta")


def launch_token_gather(given):
    width, narrow = given.sizes.width, given.sizes.decoder_width
    x = given.empty(given.batch, given.num_tokens, width)
    token_gather.gather_tokens_triton(x, given.visible_idx)
    grad = given.empty(given.batch, given.num_visible, width)
    token_gather.gather_tokens_backward_triton(grad, given.visible_idx, given.num_tokens)
    position = torch.float32 if given.sizes.wide_position else given.dtype
    out = token_gather.decoder_tokens_triton(
        given.empty(given.batch, given.num_visible, narrow),
        given.empty(narrow),
        given.empty(given.num_tokens, narrow, dtype=position),
        given.visible_idx,
        given.decode_idx,
    )
    token_gather.shared_tokens_triton(
        given.empty(given.batch, given.num_visible, 3 * narrow),
        given.empty(given.num_tokens, 3 * narrow),
        given.decode_idx,
    )
    unseen = out[:, given.num_visible :]
    token_gather.column_sum_triton(unseen)
    token_gather.position_gradient_triton(unseen, given.decode_idx, given.num_tokens)


def launch_embed(given, idx, ways=tubelet_embed.FORWARD_WAYS, backward=True):
    sizes = given.sizes
    tubelets = tubelet_embed.Tubelets(
        given.video, idx, sizes.tubelet, *given.statistics, given.dtype
    )
    weight = given.empty(sizes.width, sizes.channels, *sizes.tubelet)
    bias = given.empty(sizes.width)
    position = torch.float32 if sizes.wide_position else given.dtype
    pos = given.empty(given.num_tokens, sizes.width, dtype=position)
    for way in ways:
        with mock.patch.object(tubelet_embed, "forward_way", way):
            out = tubelet_embed.tubelet_embed_triton(tubelets, weight, bias, pos)
    if backward:
        needs = (True, True, True, given.video.is_floating_point())
        tubelet_embed.tubelet_embed_backward_triton(tubelets, weight, out, *needs)


def targets_of(given):
    return masked_mse.Targets(
        given.video, given.decode_idx, given.sizes.tubelet, True, *given.statistics
    )


def launch_losses(given):
    sizes, targets = given.sizes, targets_of(given)
    rows = given.decode_idx.shape
    scored = given.empty(*rows, dtype=torch.float32)
    _, kept = masked_mse.masked_mse_triton(given.empty(*rows, sizes.values), targets, True)
    masked_mse.scale_rows_triton(kept, scored.flatten(), 0.1, sizes.channels, given.dtype)
    x = given.empty(*rows, sizes.decoder_width)
    weight, bias = given.empty(sizes.values, sizes.decoder_width), given.empty(sizes.values)
    loss, *kept = linear_masked_mse.linear_masked_mse_triton(x, weight, bias, targets, scored, True)
    linear_masked_mse.linear_masked_mse_backward(loss, *kept, True)
    masked_mse.masked_mse_triton(None, targets._replace(norm_pix=False), False)


def launch_every_kernel(sizes, dtype, index=True):
    given = Inputs(sizes, dtype)
    launch_token_gather(given)
    launch_embed(given, given.visible_idx if index else None)
    launch_losses(given)


def launch_floating(dtype):
    """Floating video, and the one kernel more that its gradient needs."""
    given = Inputs(replace(BASE, video="floating"), dtype)
    launch_embed(given, given.visible_idx)
    launch_losses(given)


def launch_scattered(dtype):
    """Tubelets whose lines of 14 pixels are not of 16 bytes: another table of the embedding."""
    given = Inputs(VARIANTS["giant"], dtype)
    launch_embed(given, given.visible_idx, ways=("one_kernel",), backward=False)


def launch_large_tubelets(dtype):
    """Tubelets for the row of the loss's table that base does not need."""
    given = Inputs(replace(BASE, tubelet=(4, 32, 32), image=128), dtype)
    pred = given.empty(*given.decode_idx.shape, given.sizes.values)
    masked_mse.masked_mse_triton(pred, targets_of(given), True)


@pytest.fixture(scope="module")
def base():
    """What is compiled for every target and dtype: a recorder of each."""
    recorders = {}
    for target in TARGETS:
        for dtype in FLOAT_DTYPES:
            with Recorder(target) as recorders[target, dtype]:
                launch_every_kernel(BASE, dtype)
                launch_scattered(dtype)
                if dtype == torch.bfloat16:
                    launch_floating(dtype)
                    launch_large_tubelets(dtype)
    return recorders


@pytest.fixture
def check(compile_and_check):
    """Compile launches of a dtype and look at what came out."""

    def product_of(launch):
        if launch.kernel != "_embed_kernel":
            return ""
        return "wgmma.mma_async" if launch.target == 90 else "mma"

    return lambda launches, dtype: compile_and_check(launches, dtype, product_of)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_base(target, dtype, base, check):
    check(base[target, dtype].launches, dtype)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, check):
    with Recorder(VARIANTS_TARGET) as recorder:
        launch_every_kernel(VARIANTS[name], torch.bfloat16, index=name != "no_index")
    check(recorder.launches, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_variants_in_other_dtypes(dtype, check):
    with Recorder(VARIANTS_TARGET) as recorder:
        launch_floating(dtype)
        launch_large_tubelets(dtype)
    check(recorder.launches, dtype)


def test_odd_sizes(check):
    """That they compile: with no vectors to load, spills are no surprise, hence fp32."""
    with Recorder(VARIANTS_TARGET) as recorder:
        launch_every_kernel(ODD, torch.float32)
    check(recorder.launches, torch.float32)


def test_strides_beyond_32_bits(check):
    """A clip of more than 2^31 values: its strides arrive as 64-bit integers."""
    sizes = replace(BASE, video="floating", frames=1024, image=1024)
    given = Inputs(sizes, torch.bfloat16)
    assert given.video.stride(0) > 2**31
    with Recorder(VARIANTS_TARGET) as recorder:
        launch_embed(given, given.visible_idx)
        masked_mse.masked_mse_triton(None, targets_of(given), False)
    read = [one for one in recorder.launches if "stride_clip" in dict(one.signature)]
    kernels = {"_move_kernel", "_embed_kernel", "_masked_mse_kernel"}
    assert {one.kernel for one in read} == kernels
    assert {dict(one.signature)["stride_clip"] for one in read} == {"i64"}
    check(read, torch.bfloat16)


# ---- nothing is left out ------------------------------------------------------------------


MODULES = kernel_modules(attention=False)


def test_every_kernel_is_compiled(base):
    written = kernels_of(MODULES)
    assert len(written) >= 10
    for target in TARGETS:
        launches = [one for dtype in FLOAT_DTYPES for one in base[target, dtype].launches]
        assert {launch.kernel for launch in launches} == written


def rows_not_launched(recorders):
    """Table rows that are not launched on some target that they are for.

    A row keyed by target and dtype is for that target and those up to the next one listed; any
    other row is for all of them.
    """

    def launched(row, target, dtypes):
        return any(row is one for dtype in dtypes for one in recorders[target, dtype].rows)

    wanted = []  # name, row, targets, dtypes
    keyed = []
    for module in MODULES:
        for name, value in vars(module).items():
            if isinstance(value, Row):
                wanted.append((name, value, TARGETS, FLOAT_DTYPES))
            if not isinstance(value, dict):
                continue
            for key, row in value.items():
                if not isinstance(row, Row):
                    continue
                if isinstance(key, tuple):
                    keyed.append(row)
                    later = [t for t, dtype in value if dtype == key[1] and t > key[0]]
                    served = [t for t in TARGETS if key[0] <= t < min(later, default=10**3)]
                    wanted.append((f"{name}{key}", row, served or [None], [key[1]]))
                else:
                    wanted.append((f"{name}[{key}]", row, TARGETS, FLOAT_DTYPES))
    return [
        f"{name} on {target}"
        for name, row, targets, dtypes in wanted
        # A row with a name of its own, for use in a table, is for where the table says.
        if not (targets is TARGETS and any(row is one for one in keyed))
        for target in targets
        if target is None or not launched(row, target, dtypes)
    ]


def test_every_table_row_is_compiled(base):
    assert rows_not_launched(base) == []


def test_a_row_that_is_not_compiled_is_noticed(base, monkeypatch):
    monkeypatch.setattr(token_gather, "_NEW", Row(), raising=False)
    assert rows_not_launched(base) == [f"_NEW on {target}" for target in TARGETS]
    monkeypatch.undo()
    monkeypatch.setitem(masked_mse._LOSS, 1 << 16, Row())
    assert rows_not_launched(base) == [f"_LOSS[65536] on {target}" for target in TARGETS]
    monkeypatch.undo()
    half = torch.float16
    monkeypatch.setitem(tubelet_embed._GEMM, (89, half), Row())
    assert rows_not_launched(base) == ["_GEMM(89, torch.float16) on 89"]
    monkeypatch.undo()
    monkeypatch.setitem(tubelet_embed._GEMM, (130, half), Row())
    assert rows_not_launched(base) == ["_GEMM(130, torch.float16) on None"]
