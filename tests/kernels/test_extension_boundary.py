"""What vmae_fast._C says to arguments that it does not take, before any kernel runs.

On the emulated module, whose boundary is compiled from the same source.
"""

import math

import pytest
import torch

B, T, H, K = 2, 8, 2, 64
TUBELET = (2, 16, 16)
C, VALUES = 3, 3 * 2 * 16 * 16


def packed():
    """q, k and v, or their gradients, side by side."""
    return torch.zeros(B, T, 3, H, K, dtype=torch.float16).unbind(2)


def sequences():
    return {"count": 2, "length": 4, "step": 4, "stride": 1, "scale": 0.2}


def attention():
    q, k, v = packed()
    out, lse = torch.zeros(B, T, H, K, dtype=torch.float16), torch.zeros(B * 2, H, 4)
    return {"q": q, "k": k, "v": v, "out": out, "lse": lse, **sequences()}


def attention_backward():
    grad_q, grad_k, grad_v = packed()
    grads = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    grad_out = torch.zeros(B, T, H, K, dtype=torch.float16)
    given = {key: x for key, x in attention().items() if key != "out"}
    return {"grad_out": grad_out, **given, **grads}


def loss():
    return {
        "pred": torch.zeros(2 * 3, VALUES),
        "video": torch.zeros(2, C, 4, 32, 16, dtype=torch.uint8),
        "idx": torch.zeros(2, 3, dtype=torch.int64),
        "weight": torch.ones(2 * 3),
        "loss": torch.zeros(2 * 3),
        "difference": torch.zeros(2 * 3, VALUES),
        "first_row": 0,
        "rows_per_clip": 3,
        "tubelet": TUBELET,
        "norm_pix": True,
        "channel_major": True,
        "eps": 1e-6,
    }


CALLS = {"short_attention": attention, "short_attention_backward": attention_backward,
         "masked_mse": loss}  # fmt: skip


def call(module, name, **changes):
    """A call of a function with good arguments but for these; a function changes a tensor."""
    given = CALLS[name]()
    for key, change in changes.items():
        given[key] = change(given[key]) if callable(change) else change
    # Views do not keep tensors alive.
    views = {key: view(module, x) for key, x in given.items() if isinstance(x, torch.Tensor)}
    getattr(module, name)(**{**given, **views}, stream=0)


def view(module, x):
    dtype = str(x.dtype).removeprefix("torch.")
    return module.View(x.data_ptr(), dtype, x.shape, x.stride(), -1)


def strided(**strides):
    """A function that gives a tensor other strides, in memory enough for them."""

    def change(x):
        found = [strides.get(f"d{i}", stride) for i, stride in enumerate(x.stride())]
        space = torch.zeros(1 << 16, dtype=x.dtype)
        return space.as_strided(x.shape, found)

    return change


def off_by_one_value(x):
    return torch.zeros(1 << 16, dtype=x.dtype)[1:].as_strided(x.shape, x.stride())


@pytest.mark.parametrize("name", CALLS)
def test_good_arguments_are_taken(emulated, name):
    call(emulated, name)


def test_what_a_size_of_one_has_for_strides_does_not_matter(emulated):
    one = torch.zeros(K, dtype=torch.float16).as_strided((1, 1, 1, K), (3, 5, 7, 1))
    names = ("q", "k", "v", "grad_out", "grad_q", "grad_k", "grad_v")
    changes = {name: one.clone(memory_format=torch.preserve_format) for name in names}
    whole = {"count": 1, "length": 1, "step": 0, "stride": 0, "lse": torch.zeros(1, 1, 1)}
    call(emulated, "short_attention_backward", **changes, **whole)


@pytest.mark.parametrize("name", CALLS)
def test_no_clips_are_no_work(emulated, name):
    none = {key: x[:0] for key, x in CALLS[name]().items() if isinstance(x, torch.Tensor)}
    # Without memory of their own, as PyTorch has it.
    none = {key: torch.empty_like(x) for key, x in none.items()}
    assert all(x.data_ptr() == 0 for x in none.values())
    call(emulated, name, **none)


# Argument, change, message: of all calls with an argument of that name.
BAD_ATTENTION = [
    ("q", torch.Tensor.float, "q must be float16 or bfloat16, got float32"),
    *[
        (name, change, f"{name} must be {message}")
        for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
        for change, message in [
            (lambda x: x[0], r"\(clips, tokens, heads, head width\), got shape \(8, 2, 64\)"),
            (off_by_one_value, "16-byte aligned, got an address 2 bytes past that"),
            (strided(d3=2), "contiguous in its last dimension, got strides "),
            (strided(d2=128), "dense in its heads, 64 apart, got strides "),
            (strided(d1=388), "at distances that are multiples of 8 values, got strides "),
            (strided(d0=8 * 384 + 4), "at distances that are multiples of 8 values, got strides "),
        ]
    ],
    *[
        (name, change, f"{name} must be {message}")
        for name in ("k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
        for change, message in [
            (torch.Tensor.bfloat16, "float16, got bfloat16"),
            (lambda x: x[:, :7], r"of shape \(2, 8, 2, 64\), got \(2, 7, 2, 64\)"),
        ]
    ],
    *[
        (name, strided(d1=392, d0=3136), rf"{name} must be at the strides of {like}, \(3072, 384,")
        for name, like in [("k", "q"), ("v", "q"), ("grad_k", "grad_q"), ("grad_v", "grad_q")]
    ],
    ("lse", torch.Tensor.half, "lse must be float32, got float16"),
    ("lse", lambda x: x[1:], r"lse must be of shape \(4, 2, 4\), got \(3, 2, 4\)"),
    ("lse", lambda x: x.flatten(), r"lse must be of shape \(4, 2, 4\), got \(32\)"),
    ("lse", strided(d1=8, d0=16), r"lse must be contiguous, got strides \(16, 8, 1\)"),
    ("lse", off_by_one_value, "lse must be 16-byte aligned, got an address 4 bytes past that"),
    ("length", 0, "length must be 1 to 256, got 0"),
    ("length", 257, "length must be 1 to 256, got 257"),
    ("count", 0, "count must be 1 to 8, the tokens of a clip, got 0"),
    ("count", 9, "count must be 1 to 8, the tokens of a clip, got 9"),
    ("step", -1, "step must be 0 to 8, the tokens of a clip, got -1"),
    ("step", 2**62, f"step must be 0 to 8, the tokens of a clip, got {2**62}"),
    ("stride", -1, "stride must be 0 to 8, the tokens of a clip, got -1"),
    ("stride", 2**62, f"stride must be 0 to 8, the tokens of a clip, got {2**62}"),
    ("step", 5, "count, length, step and stride must be sequences within the 8 tokens of a clip, "
     "got 2, 4, 5 and 1"),
    ("length", 5, "count, length, step and stride must be sequences within the 8 tokens"),
    ("stride", 0, "count, length, step and stride must be sequences that share no token, "),
    ("step", 0, "count, length, step and stride must be sequences that share no token, "),
    ("step", 3, "count, length, step and stride must be sequences that share no token, "),
    *[
        ("scale", scale, "scale must be positive and finite in float32, got ")
        for scale in (0.0, -1.0, math.inf, math.nan, 1e-60, 1e60)
    ],
]  # fmt: skip

# Strides of what is written.
OVER_EACH_OTHER = [
    {"d1": 0}, {"d0": 0}, {"d1": 120}, {"d0": 7 * 128, "d1": 128}, {"d0": 8, "d1": 512},
    {"d0": 128, "d1": 128},
]  # fmt: skip

BAD_LOSS = [
    ("video", torch.Tensor.float, "video must be uint8, got float32"),
    ("video", lambda x: x[0], r"video must be \(clips, channels, frames, height, width\), got"),
    ("video", lambda x: x[:1], "idx must be of 1 clips as the video is, and at most "),
    ("video", off_by_one_value, "video must be 16-byte aligned, got an address 1 bytes past that"),
    ("video", strided(d3=24), "masked_mse takes video strides that are multiples of 16"),
    ("video", lambda x: x[:1].expand(2**31, *x.shape[1:]), "video must be of sizes up to 21474"),
    ("tubelet", (3, 16, 16), r"tubelet must be sizes that divide the video's \(2, 3, 4, 32"),
    ("tubelet", (2, 0, 16), r"tubelet must be .* got \(2, 0, 16\)"),
    ("tubelet", (-2, 16, 16), r"tubelet must be .* got \(-2, 16, 16\)"),
    ("tubelet", (2, 16, 8), "pred must be of shape|masked_mse takes tubelets of 16 pixels' width"),
    ("idx", torch.Tensor.float, "idx must be int32 or int64, got float32"),
    ("idx", torch.Tensor.flatten, r"idx must be \(clips, tokens\), got shape \(6\)"),
    ("idx", lambda x: x[:1], "idx must be of 2 clips as the video is, and at most "),
    ("rows_per_clip", 2, "rows_per_clip must be 3, the tokens of idx, got 2"),
    ("first_row", 1, "first_row must be 0 to 6, the tokens of all clips, less 6 of loss, got 1"),
    ("first_row", -1, "first_row must be .* got -1"),
    ("first_row", 2**62, f"first_row must be .* got {2**62}"),
    ("loss", lambda x: x[:, None], r"loss must be \(tokens,\), got shape \(6, 1\)"),
    ("loss", torch.Tensor.half, "loss must be float32, got float16"),
    ("loss", lambda x: torch.zeros(7), "first_row must be .* less 7 of loss, got 0"),
    ("weight", lambda x: x[:5], r"weight must be of shape \(6\), got \(5\)"),
    ("weight", torch.Tensor.half, "weight must be float32, got float16"),
    ("weight", strided(d0=2), r"weight must be contiguous, got strides \(2\)"),
    ("pred", torch.Tensor.double, "dtype must be uint8, .* got float64"),
    ("pred", torch.Tensor.int, "pred must be float16, bfloat16 or float32, got int32"),
    ("pred", lambda x: x[:, 1:], r"pred must be of shape \(6, 1536\), got \(6, 1535\)"),
    ("pred", strided(d0=2 * VALUES), "pred must be contiguous, got strides "),
    ("pred", off_by_one_value, "pred must be 16-byte aligned, got an address 4 bytes past that"),
    ("difference", torch.Tensor.half, "difference must be float32, got float16"),
    ("difference", lambda x: x[1:], r"difference must be of shape \(6, 1536\), got \(5, 1536\)"),
    ("difference", off_by_one_value, "difference must be 16-byte aligned, got an address 4"),
    ("eps", -1e-6, "eps must be at least 0 and finite in float32, got "),
    ("eps", math.nan, "eps must be at least 0 and finite in float32, got "),
    ("eps", 1e60, "eps must be at least 0 and finite in float32, got "),
]


def cases():
    for name in ("short_attention", "short_attention_backward"):
        known = CALLS[name]()
        yield from ((name, *case) for case in BAD_ATTENTION if case[0] in known)
        argument = "out" if name == "short_attention" else "grad_q"
        for strides in OVER_EACH_OTHER:
            message = f"{argument} must be without tokens over each other, got strides"
            yield name, argument, strided(**strides), message
    yield from (("masked_mse", *case) for case in BAD_LOSS)


@pytest.mark.parametrize(
    ("name", "argument", "change", "message"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}-{i}") for i, case in enumerate(cases())],
)
def test_bad_arguments(emulated, name, argument, change, message):
    emulated.emulator.reset()
    with pytest.raises(ValueError, match=f"^(?:{message})"):
        call(emulated, name, **{argument: change})
    assert emulated.emulator.counts()["launches"] == 0


def test_one_dtype_and_one_shape_for_all(emulated):
    for change in (torch.Tensor.bfloat16, lambda x: x[:, :7], lambda x: x[..., :24].contiguous()):
        with pytest.raises(ValueError, match=r"^[kv] must be"):
            call(emulated, "short_attention", q=change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1].expand(2**30, T, H, K), "of at most 2147483647 heads of sequences"),
        (lambda x: x[:, :1].expand(B, 2**31, H, K), "of at most 2147483647 tokens"),
        (lambda x: x[:, :, :0], "of at least one head and value"),
    ],
)
def test_numbers_that_kernels_do_not_count(emulated, change, message):
    changes = dict.fromkeys(("q", "k", "v", "out"), change)
    with pytest.raises(ValueError, match=f"^q must be {message}, got "):
        call(emulated, "short_attention", **changes)


def test_the_stream_must_be_said(emulated):
    with pytest.raises(TypeError, match="stream"):
        emulated.short_attention(*[None] * 5, 1, 1, 0, 1, 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((64, "float64", [1], [1], -1), "dtype must be uint8, float16, .* or int64, got float64"),
        ((64, "", [1], [1], -1), "dtype must be .*, got $"),
        ((0, "uint8", [1, 2], [2, 1], -1), "data_ptr must be an address, got null"),
        ((64, "uint8", [1, 2], [1], -1), r"strides must be as many as sizes in \(1, 2\), got "),
        ((64, "uint8", [-1], [1], -1), r"shape must be without negative sizes, got \(-1\)"),
        ((64, "uint8", [1], [-1], -1), r"strides must be without negative ones, got \(-1\)"),
        ((64, "uint8", [1], [1], 0), "device must be -1, the CPU, which is all that .*, got 0"),
        ((64, "uint8", [1], [1], -2), "device must be -1, the CPU, which is all that .*, got -2"),
    ],
)
def test_views(emulated, given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        emulated.View(*given)


def test_lengths_and_widths_without_a_kernel(emulated):
    assert emulated.short_attention_fits(4, K, True, -1)
    for length, width in [(0, K), (-1, K), (257, K), (4, 0), (4, 36)]:
        assert not emulated.short_attention_fits(length, width, False, -1)
    for name, which in [("short_attention", "forward"), ("short_attention_backward", "backward")]:
        emulated.emulator.set_most_shared_bytes(16)
        message = (
            f"^length and head width must be such as the {which} kernels are written for on this "
            "device, got 4 and 64"
        )
        try:
            assert not emulated.short_attention_fits(4, K, which == "backward", -1)
            with pytest.raises(ValueError, match=message):
                call(emulated, name)
        finally:
            emulated.emulator.set_most_shared_bytes(227 << 10)


def test_memory_is_allowed_for_one_call(emulated):
    """Even after one that fails."""
    pixels = torch.zeros(2, 2, C, 4, 32, 16, dtype=torch.uint8)
    # Past the first two clips, and within all four.
    past = torch.full((2, 3), 4 + 2)
    call(emulated, "masked_mse", video=pixels[0])
    with pytest.raises(RuntimeError) as first:
        call(emulated, "masked_mse", video=pixels[0], idx=past)
    both = pixels.flatten(0, 1)
    wide = {"video": both, "idx": past.repeat(2, 1), "rows_per_clip": 3}
    rows = {"pred": torch.zeros(12, VALUES), "difference": None, "weight": None,
            "loss": torch.zeros(12)}  # fmt: skip
    with pytest.raises(RuntimeError):
        call(emulated, "masked_mse", **wide, **rows)
    with pytest.raises(RuntimeError) as again:
        call(emulated, "masked_mse", video=pixels[0], idx=past)
    assert type(first.value) is type(again.value)


def test_what_the_module_says_of_itself(emulated):
    assert emulated.about() == {"architectures": "", "cuda": 0, "emulated": True}
    assert emulated.driver_version() == 0
