"""Token ops against plain PyTorch: times, bytes, percent of what the machine reaches, memory.

On a GPU at the base model's sizes, on a CPU small, to see that everything runs. Peers get video
that is normalised and in the working precision already. Bytes are those that must move at least:
each input read once as far as it is used, each result written once. A missed target is recorded,
not asserted.
"""

import pytest
import token_peers
import torch
from rows import (
    DEVICE,
    backward,
    by_backend,
    evaluation,
    extension_calls,
    forward,
    forward_and_backward,
    row_of,
    timed,
    without_cuda_kernels,
)
from timing import num_sets, peak_memory_bytes
from token_batch import TUBELET, Batch, size_for

from vmae_fast import ops
from vmae_fast.kernels import tubelet_embed as embedding

SIZE = size_for(DEVICE)
# Clips, all, visible and masked tokens, widths, values a tubelet, and bytes a value.
B, N, V = SIZE.clips, SIZE.masking.num_tokens, SIZE.masking.num_visible
M, D, E = N - V, SIZE.width, SIZE.decoder_width
P = 3 * TUBELET[0] * TUBELET[1] * TUBELET[2]
W = SIZE.dtype.itemsize
INDEX = 8


def tubelet_embed(batch):
    visible_idx = batch.mask.visible_idx
    return ops.tubelet_embed(batch.video, batch.weight, batch.bias, batch.pos_embed, visible_idx)


def in_one_kernel(batch):
    before, embedding.forward_way = embedding.forward_way, "one_kernel"
    try:
        return tubelet_embed(batch)
    finally:
        embedding.forward_way = before


def gather_tokens(batch):
    return ops.gather_tokens(batch.tokens, batch.mask.visible_idx)


def decoder_tokens(batch):
    return ops.decoder_tokens(*decoder_parts(batch))


def masked_mse(batch):
    return ops.masked_mse(batch.pred, batch.video, batch.mask.target_idx, TUBELET)


def linear_masked_mse(batch):
    return ops.linear_masked_mse(*head_and_video(batch), batch.mask.target_idx, TUBELET)


def on_pixels(peer):
    """A peer of tubelet_embed, on normalised video."""
    return lambda batch: peer(
        batch.pixels, batch.weight, batch.bias, batch.pos_embed, batch.mask.visible_idx
    )


def decoder_parts(batch):
    table = batch.decoder_pos_embed
    idx = (batch.mask.visible_idx, batch.mask.decode_idx)
    return batch.visible, batch.mask_token, table, *idx


def head_and_video(batch):
    return batch.decoded, batch.head_weight, batch.head_bias, batch.video


def eager_loss(batch):
    return token_peers.eager_loss(batch.pred, batch.pixels_fp32, batch.hidden, TUBELET)


def head_then_loss(batch):
    return token_peers.head_then_loss(*head_and_video(batch), batch.mask.target_idx, TUBELET)


def measure(op, direction, peers, moved_bytes, flops=0, leaves=()):
    """One row: ours, the peers, the op's definition and a copy of as many bytes, interleaved."""
    (row,) = _measure(op, direction, peers, moved_bytes, flops, leaves, ())
    return row


def measure_twins(op, direction, peers, moved_bytes, leaves=()):
    """A row of the op and, in the same run, one of its CUDA C++ kernel, with "triton" as a peer."""
    missing = why_no_cuda(op)
    twins = () if missing else ("cuda", "triton")
    rows = _measure(op, direction, peers, moved_bytes, 0, leaves, twins)
    rows[0]["left_out"] = {"cuda": missing} if missing else {}
    return rows


def why_no_cuda(op):
    """Why no CUDA C++ kernel computes an op here, in words; "" where one does."""
    if missing := without_cuda_kernels():
        return missing
    with extension_calls() as called, ops.backend("cuda"):
        op(Batch(SIZE, 0))
    return "" if op.__name__ in called else "it does not take these arguments"


def _measure(op, direction, peers, moved_bytes, flops, leaves, twins):
    ways = {name: direction(way, leaves) for name, way in {"ours": op, **peers}.items()}
    if DEVICE.type == "cuda":
        ways["reference"] = by_backend(ways["ours"], "reference")
    ways |= {backend: by_backend(ways["ours"], backend) for backend in twins}
    sets = [Batch(SIZE, seed) for seed in range(num_sets(moved_bytes, DEVICE))]
    times = timed(ways, sets, moved_bytes)
    ours, copy = times.pop("ours"), times.pop("copy")
    cuda, triton = times.pop("cuda", None), times.pop("triton", None)
    counted = (moved_bytes, flops, SIZE.dtype)
    rows = [row_of(op.__name__, direction, ours, copy, times, *counted)]
    if cuda:
        beside, name = times | {"triton": triton}, f"{op.__name__} cuda"
        rows.append(row_of(name, direction, cuda, copy, beside, *counted))
    return rows


@pytest.fixture
def finish(finish_rows):
    """Record the rows of an op."""

    def write(op, rows):
        batch = Batch(SIZE, 0)
        finish_rows(op.__name__, SIZE.what, rows, lambda: op(batch))

    return write


@pytest.fixture(autouse=True)
def quickest_convolutions():
    """The peer's convolution by cuDNN's quickest algorithm, as trainers ask for."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    yield
    torch.backends.cudnn.benchmark = before


def test_tubelet_embed(finish):
    peers = {
        "conv3d": on_pixels(token_peers.conv3d_then_gather),
        "unfold": on_pixels(token_peers.unfold_then_linear),
    }
    seen, learned, out = B * V * (P + INDEX), W * D * (P + 1), W * B * V * D
    flops, leaves = 2 * B * V * P * D, ("weight", "bias")
    # The other way that the kernels know: to be kept where it is the quicker one.
    both_ways = peers | ({"one_kernel": in_one_kernel} if DEVICE.type == "cuda" else {})
    rows = [
        measure(tubelet_embed, forward, both_ways, seen + learned + W * N * D + out, flops),
        measure(tubelet_embed, backward, peers, seen + learned + out, flops, leaves),
    ]
    finish(tubelet_embed, rows)


def test_gather_tokens(finish):
    peers = {
        "gather": lambda batch: token_peers.torch_gather(batch.tokens, batch.mask.visible_idx),
        "index": lambda batch: token_peers.indexed(batch.tokens, batch.mask.visible_idx),
    }
    taken, idx = W * B * V * D, INDEX * B * V
    rows = [
        measure(gather_tokens, forward, peers, 2 * taken + idx),
        measure(gather_tokens, backward, peers, taken + idx + W * B * N * D, leaves=("tokens",)),
    ]
    finish(gather_tokens, rows)


def test_decoder_tokens(finish):
    peers = {"cat": lambda batch: token_peers.concatenated(*decoder_parts(batch))}
    visible, masked, mask_token = W * B * V * E, W * B * M * E, W * E
    inputs = visible + mask_token + W * N * E + INDEX * B * N
    leaves = ("visible", "mask_token")
    rows = [
        measure(decoder_tokens, forward, peers, inputs + visible + masked),
        # The gradient of visible is a part of the upstream one, as it lies.
        measure(decoder_tokens, backward, peers, masked + mask_token, leaves=leaves),
    ]
    finish(decoder_tokens, rows)


def test_masked_mse(finish):
    peers = {"eager": eager_loss}
    pred, video = W * B * M * P, B * M * (P + INDEX)
    rows = [
        *measure_twins(masked_mse, evaluation, peers, pred + video),
        # The gradient, or what it is made of, is written once: in which pass is ours to choose.
        *measure_twins(masked_mse, forward, peers, pred + video + pred),
        *measure_twins(masked_mse, forward_and_backward, peers, pred + video + pred, ("pred",)),
    ]
    finish(masked_mse, rows)


def test_linear_masked_mse(finish):
    peers = {"head_then_loss": head_then_loss}
    leaves = ("decoded", "head_weight", "head_bias")
    moved_bytes = B * M * (P + INDEX) + 2 * W * (B * M * E + P * E + P)
    flops = 3 * 2 * B * M * E * P
    row = measure(linear_masked_mse, forward_and_backward, peers, moved_bytes, flops, leaves)
    batch = Batch(SIZE, 0)
    peak_bytes = {
        way.__name__: peak_memory_bytes(forward_and_backward(way, leaves)(batch), DEVICE)
        for way in (linear_masked_mse, head_then_loss)
    }
    saved_bytes = peak_bytes["head_then_loss"] - peak_bytes["linear_masked_mse"]
    row["peak_mib"] = {name: size / 2**20 for name, size in peak_bytes.items()}
    row["predictions_saved"] = saved_bytes / (W * B * M * P)
    finish(linear_masked_mse, [row])
