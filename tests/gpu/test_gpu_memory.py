"""Peak memory of the ops at base's sizes: what they are there to save."""

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
