"""fp16 under a gradient scaler."""

import copy

import pytest
import torch
from helpers import loss_and_gradients, make_video, relative_error

from vmae_fast import VideoMAE, clip_keys, ops

# The scale that torch.amp.GradScaler starts with.
SCALE = 2.0**16
# Half of fp16's smallest number: what rounds to nothing.
NOTHING = 2.0**-25
# fp16 has 11 bits; a gradient comes of a chain of some tens of rounded products.
FP16_RTOL = 2e-2
# base, V1.
CLIPS, MASKED, VALUES, TUBELET = 64, 1408, 1536, (2, 16, 16)
VIDEO = (3, 16, 224, 224)


@pytest.mark.parametrize("return_pred", [False, True], ids=["loss", "pred"])
@pytest.mark.parametrize("ratio", [0.0, 0.5], ids=["v1", "v2"])
def test_a_model_trains(device, ratio, return_pred):
    torch.manual_seed(0)
    model = VideoMAE("tiny", decoder_mask_ratio=ratio).to(device)
    config = model.config
    shape = (8, config.in_channels, config.frames, *config.size)
    video = make_video(shape, torch.uint8).to(device)
    mask = model.masking(clip_keys(0, 0, torch.arange(8, device=device)))
    expected = loss_and_gradients(copy.deepcopy(model), video, mask, return_pred=return_pred)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device.type)
    assert scaler.get_scale() == SCALE
    losses = []
    for step in range(8):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.float16):
            loss = model(video, mask, return_pred=return_pred).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        if step == 0:
            assert relative_error(loss.detach(), expected["loss"]) < 1e-3
            for name, gradient in gradients.items():
                assert relative_error(gradient, expected[name]) < FP16_RTOL, name
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert scaler.get_scale() == SCALE, "a step was left out"


@pytest.mark.parametrize("scored", [False, True], ids=["all", "scored"])
def test_gradients_of_the_loss_do_not_vanish(device, need_gib, scored):
    """At the size of a real batch, where each is 1.4e-8 times a difference."""
    need_gib(6)
    torch.manual_seed(0)
    video = torch.randint(0, 256, (CLIPS, *VIDEO), device=device, dtype=torch.uint8)
    idx = torch.rand(CLIPS, MASKED + 160, device=device).argsort(dim=1)[:, :MASKED]
    weights = (torch.rand(CLIPS, MASKED, device=device) < 0.5).float() if scored else None
    pred = torch.randn(CLIPS, MASKED, VALUES, device=device, dtype=torch.float16)

    def gradient(pred):
        pred = pred.detach().requires_grad_()
        loss = ops.masked_mse(pred, video, idx, TUBELET, scored=weights)
        return torch.autograd.grad(loss * SCALE, pred)[0]

    wide, narrow = gradient(pred.float()), gradient(pred)
    assert narrow.dtype == torch.float16
    # The difference was rounded to fp16 before it was scaled: 2^-11 of it, and what lies that
    # close to the border may fall on either side.
    vanished = narrow == 0
    assert not (vanished & (wide.abs() > NOTHING * (1 + 2.0**-9))).any()
    share = (vanished & (wide != 0)).float().mean().item()
    assert share < 1e-4
    assert relative_error(narrow, wide) < 1e-3
