"""The model on a GPU against itself in fp64 on the CPU, which runs the reference."""

import copy
import math

import pytest
import torch
from helpers import EAGER_FACTOR, joined, loss_and_gradients, make_video, relative_error

from vmae_fast import VideoMAE, clip_keys, ops

FP32_RTOL = 1e-4
# Loss and gradients of single parameters: below a quarter of bf16's rounding step luck decides.
LUCK = 2**-10
MASKS = {
    "v1": {},
    "v2": {"decoder_mask_ratio": 0.5},
    "v2_random": {"decoder_mask_ratio": 0.5, "mask_kind": "random"},
    "raw_pixels": {"norm_pix": False},
}


def make_model(size, **settings):
    torch.manual_seed(0)
    return VideoMAE(size, **settings)


def make_batch(model, seed, batch=2):
    config = model.config
    shape = (batch, config.in_channels, config.frames, *config.size)
    video = make_video(shape, torch.uint8, "decoder", seed)
    return video, model.masking(clip_keys(seed, 0, torch.arange(batch)))


@pytest.mark.parametrize("return_pred", [False, True], ids=["loss", "pred"])
@pytest.mark.parametrize("settings", MASKS.values(), ids=MASKS)
def test_fp32_is_the_truth(device, settings, return_pred):
    check_fp32(device, make_model("tiny", **settings), return_pred)


@pytest.mark.parametrize("mask", ["v1", "v2"])
def test_fp32_is_the_truth_at_full_size(device, mask):
    check_fp32(device, make_model("base", depth=1, decoder_depth=1, **MASKS[mask]), False)


def check_fp32(device, model, return_pred):
    assert torch.get_float32_matmul_precision() == "highest"
    video, mask = make_batch(model, 0)
    truth = loss_and_gradients(copy.deepcopy(model).double(), video, mask, return_pred=return_pred)
    with ops.backend("triton"):
        got = loss_and_gradients(
            model.to(device), video.to(device), mask.to(device), return_pred=return_pred
        )
    for name, tensor in got.items():
        assert relative_error(tensor.cpu(), truth[name]) < FP32_RTOL, name


@pytest.mark.parametrize("return_pred", [False, True], ids=["loss", "pred"])
@pytest.mark.parametrize("mask", ["v1", "v2"])
def test_bf16_is_as_accurate_as_the_reference(device, mask, return_pred):
    model = make_model("tiny", **MASKS[mask])
    truths, on_device = copy.deepcopy(model).double(), model.to(device)
    batches = 6
    errors = {"reference": [], "triton": []}
    for seed in range(batches):
        video, mask = make_batch(model, seed, batch=4)
        truth = loss_and_gradients(truths, video, mask)
        for name, kept in errors.items():
            with ops.backend(name):
                got = loss_and_gradients(
                    on_device, video.to(device), mask.to(device), torch.bfloat16,
                    return_pred=return_pred,
                )  # fmt: skip
            got = {key: tensor.cpu() for key, tensor in got.items()}
            each = {key: relative_error(tensor, truth[key]) for key, tensor in got.items()}
            kept.append({**each, "all": relative_error(joined(got), joined(truth))})
    # Root mean squares over the batches: one small tensor's error in one batch is mostly chance.
    for key in errors["triton"][0]:
        eager, ours = (
            math.sqrt(sum(error[key] ** 2 for error in errors[name]) / batches)
            for name in ("reference", "triton")
        )
        assert ours <= EAGER_FACTOR * eager + (0 if key == "all" else LUCK), key
