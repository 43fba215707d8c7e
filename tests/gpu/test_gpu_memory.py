"""Peak memory of the ops at base's sizes: what they are there to save."""

from itertools import pairwise

import pytest
import torch

from vmae_fast import ops

NUM_TOKENS, VISIBLE, WIDTH, DECODER_WIDTH = 1568, 160, 768, 384
TUBELET, VALUES, VIDEO = (2, 16, 16), 1536, (3, 16, 224, 224)
# Sums, losses, index tensors: anything small.
SMALL = 4 << 20
# cuBLAS may take its workspace (32 MiB since compute capability 9.0) from the same allocator.
WORKSPACE = 32 << 20


def peak_bytes(function, device):
    """What a call allocates at most, beyond what there was; the second call's."""
    for _ in range(2):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = function()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
    return peak


class Batch:
    """Random inputs of base for so many clips."""

    def __init__(self, clips, dtype, device):
        torch.manual_seed(0)
        self.dtype, self.device, self.clips = dtype, device, clips
        self.video = torch.randint(0, 256, (clips, *VIDEO), device=device, dtype=torch.uint8)
        order = torch.rand(clips, NUM_TOKENS, device=device).argsort(dim=1)
        self.visible, self.masked = order[:, :VISIBLE], order[:, VISIBLE:]

    def normal(self, *shape, dtype=None):
        """Noise that wants a gradient."""
        drawn = torch.randn(shape, device=self.device, dtype=dtype or self.dtype)
        return drawn.requires_grad_()

    def size_bytes(self, *shape):
        """Of a tensor of the batch's dtype."""
        return torch.Size(shape).numel() * self.dtype.itemsize


def peaks_of_loss(clips, dtype, device):
    """Peaks of head and loss with their gradients, apart and together; bytes of predictions."""
    batch = Batch(clips, dtype, device)
    x = batch.normal(*batch.masked.shape, DECODER_WIDTH)
    weight, bias = batch.normal(VALUES, DECODER_WIDTH), batch.normal(VALUES)
    targets = (batch.video, batch.masked, TUBELET)

    def apart():
        loss = ops.masked_mse(ops.linear(x, weight, bias), *targets)
        return torch.autograd.grad(loss, (x, weight, bias))

    def together():
        loss = ops.linear_masked_mse(x, weight, bias, *targets)
        return torch.autograd.grad(loss, (x, weight, bias))

    with ops.backend("triton"):
        peaks = peak_bytes(apart, device), peak_bytes(together, device)
    return (*peaks, batch.size_bytes(*batch.masked.shape, VALUES))


@pytest.mark.parametrize(
    ("clips", "dtype"),
    [(16, torch.bfloat16), (16, torch.float32), (64, torch.bfloat16), (64, torch.float32)],
    ids=["16-bf16", "16-fp32", "64-bf16", "64-fp32"],
)
def test_no_predictions_are_made(device, need_gib, clips, dtype):
    need_gib(8)
    apart, together, pred_bytes = peaks_of_loss(clips, dtype, device)
    assert together <= apart - pred_bytes


def test_masked_mse_makes_no_targets(device, need_gib):
    need_gib(4)
    clips = 64
    batch = Batch(clips, torch.bfloat16, device)
    pred = batch.normal(*batch.masked.shape, VALUES)
    one = batch.size_bytes(*pred.shape)

    def forward():
        return ops.masked_mse(pred, batch.video, batch.masked, TUBELET)

    def both():
        return torch.autograd.grad(forward(), pred)

    with ops.backend("triton"):
        # The kept difference; in the backward pass also the gradient.
        assert peak_bytes(forward, device) <= one + SMALL
        assert peak_bytes(both, device) <= 2 * one + SMALL
        with torch.no_grad():
            assert peak_bytes(forward, device) <= SMALL


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_tubelets_that_are_not_visible_are_not_copied(device, need_gib, backward):
    need_gib(4)
    clips = 64
    batch = Batch(clips, torch.bfloat16, device)
    weight = batch.normal(WIDTH, 3, *TUBELET, dtype=torch.float32)
    bias = batch.normal(WIDTH, dtype=torch.float32)
    # The position table is fp32, so that the tokens are: the residual stream under autocast.
    pos = torch.randn(NUM_TOKENS, WIDTH, device=device)
    upstream = torch.randn(clips, VISIBLE, WIDTH, device=device)

    def run():
        with torch.autocast(device.type, torch.bfloat16):
            out = ops.tubelet_embed(batch.video, weight, bias, pos, batch.visible)
        return torch.autograd.grad(out, (weight, bias), upstream) if backward else out

    rows = batch.size_bytes(clips, VISIBLE, VALUES)
    output = 2 * batch.size_bytes(clips, VISIBLE, WIDTH)
    weights = 4 * weight.numel()
    # Scaled, rounded, and what its sums are taken of; backward: the gradient, unfolded, its sums.
    allowed = rows + output + 4 * weights + WORKSPACE + SMALL
    with ops.backend("triton"):
        peak = peak_bytes(run, device)
    assert peak <= allowed
    # That allows neither the tokens of all tubelets nor the clips in another dtype.
    assert allowed < min(batch.size_bytes(clips, NUM_TOKENS, WIDTH), 2 * batch.video.numel())


def attention_calls(batch, num_tokens, heads, device):
    """Every attention on as many tokens, with their inputs."""
    width, t = heads * 64, 8

    def normal(tokens, columns):
        shape = (batch, tokens, columns * width)
        return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    grid = (t, num_tokens // t)
    return {
        "joint": (lambda qkv: ops.attention(qkv, heads), [normal(num_tokens, 3)]),
        "cross": (
            lambda q, kv: ops.cross_attention(q, kv, heads),
            [normal(num_tokens, 1), normal(num_tokens, 2)],
        ),
        "time": (
            lambda qkv: ops.divided_attention(qkv, heads, grid, "time"), [normal(num_tokens, 3)]
        ),
        "space": (
            lambda qkv: ops.divided_attention(qkv, heads, grid, "space"), [normal(num_tokens, 3)]
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [("triton", kind) for kind in ("joint", "cross", "time", "space")]
    + [(kernel, kind) for kernel in ("auto", "cudnn", "flash") for kind in ("joint", "cross")],
)
def test_attention_holds_no_matrix_of_logits(device, need_gib, kernel, kind):
    """Forward and backward at most so many times what comes in, at every length."""
    need_gib(4)
    batch, heads = 8, 6
    lengths = (784, 1568, 3136, 6272)
    peaks = {}
    for num_tokens in lengths:
        function, inputs = attention_calls(batch, num_tokens, heads, device)[kind]
        upstream = torch.randn(batch, num_tokens, heads * 64, device=device, dtype=torch.bfloat16)

        def both(function=function, inputs=inputs, upstream=upstream):
            return torch.autograd.grad(function(*inputs), inputs, upstream)

        with ops.attention_kernel(kernel):
            peaks[num_tokens] = peak_bytes(both, device)
        tokens = batch * num_tokens
        one, statistics = tokens * heads * 64 * 2, 4 * tokens * heads
        if kernel == "triton":
            # Output, gradients of q, k and v; log-sum-exp, and the backward pass's sums.
            assert peaks[num_tokens] <= 4 * one + 2 * statistics + SMALL
        # PyTorch's: gradients apart and put together, that of q in fp32 while it is added up.
        assert peaks[num_tokens] <= 16 * one + WORKSPACE + SMALL
    for shorter, longer in pairwise(lengths):
        assert peaks[longer] <= 2 * peaks[shorter] + WORKSPACE + SMALL
    if kind in ("joint", "cross"):
        # In bf16 alone that matrix, at the longest, would take more than all that is allowed.
        assert 2 * batch * heads * lengths[-1] ** 2 > 16 * one + WORKSPACE + SMALL


def test_attention_without_gradients_keeps_nothing(device, need_gib):
    need_gib(4)
    batch, num_tokens, heads = 8, 6272, 6
    tokens = batch * num_tokens
    one, statistics = tokens * heads * 64 * 2, 4 * tokens * heads
    for function, inputs in attention_calls(batch, num_tokens, heads, device).values():
        with torch.no_grad(), ops.backend("triton"):
            peak = peak_bytes(lambda f=function, x=inputs: f(*x), device)
        assert peak <= one + statistics + SMALL
