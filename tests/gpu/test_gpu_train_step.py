"""The step of the trainer on a GPU: without waiting, gated, and as CUDA graphs."""

import copy
import math

import pytest
import torch
from helpers import make_video, relative_error

from vmae_fast import VideoMAE, clip_keys
from vmae_fast.train.config import OptimSettings
from vmae_fast.train.graph import CudaCapture
from vmae_fast.train.optimizer import AveragedWeights, make_optimizer
from vmae_fast.train.readback import Readback
from vmae_fast.train.step import TrainStep

# The same kernels; a library may choose others for its products while they are recorded.
FP32_RTOL = 1e-5
BF16_RTOL = 1e-2


def drawn(device, count, **settings):
    """A small model on the GPU and clips of as many steps, pinned on the host, with their keys."""
    torch.manual_seed(0)
    model = VideoMAE("tiny", **settings).to(device).train()
    config = model.config
    shape = (4, config.in_channels, config.frames, *config.size)
    clips = [
        (
            make_video(shape, torch.uint8, "decoder", seed=step).pin_memory(),
            clip_keys(0, step, torch.arange(4)).pin_memory(),
        )
        for step in range(count)
    ]
    return model, clips


def take_steps(step, clips, first=0, poison=None):
    """Two micro-batches a step, a rate a step; returns what was read back afterwards."""
    figures = []
    for number in range(0, len(clips), step.accumulate):
        torch.manual_seed(first + number)
        for micro in range(step.accumulate):
            share = torch.full((), math.nan, device=step.device) if number == poison else None
            step.forward_backward(*clips[number + micro], share, micro)
        figures.append(step.update(1e-3 * (1 + number)).clone())
    return figures


def make_train_step(model, *, recorded, bf16=False, **options):
    device = next(model.parameters()).device
    return TrainStep(
        model,
        make_optimizer(model, OptimSettings()),
        autocast=lambda: torch.autocast("cuda", torch.bfloat16, enabled=bf16),
        clip_grad=0.5,
        average=AveragedWeights(model, 0.9),
        capture=CudaCapture(device) if recorded else None,
        **options,
    )


def state_of(step):
    tensors = [p.detach() for p in step.model.parameters()] + step.average.average
    for state in step.optimizer.state.values():
        tensors += [state["step"], state["exp_avg"], state["exp_avg_sq"]]
    return [tensor.clone() for tensor in tensors]


STEPS = {
    "v1": {},
    "v2": {"decoder_mask_ratio": 0.5},
    "scored": {"mask_kind": "random", "decoder_mask_ratio": 0.5},
    "drop_path": {"drop_path": 0.3},
}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_does_not_wait_for_the_gpu(device, kind, recorded):
    model, clips = drawn(device, 6, **STEPS[kind])
    step = make_train_step(model, recorded=recorded, bf16=True, accumulate=2)
    take_steps(step, clips[:2])
    ring = Readback(lag=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        if model.masking.num_unscored is None:
            step.shares([keys for _, keys in clips[:2]])
        for figures in take_steps(step, clips):
            ring.put(None, torch.cat([figures, step.zero_prediction().float().view(1)]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    came = [values for _, values in ring.take(everything=True)]
    assert len(came) == 3
    assert all(math.isfinite(value) for values in came for value in values)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", STEPS)
def test_a_recorded_step_equals_one_op_by_op(device, kind, accumulate, bf16):
    """Rates, clips, masks and drop path change from step to step."""
    model, clips = drawn(device, 6, **STEPS[kind])
    found = []
    for recorded in (False, True):
        step = make_train_step(
            copy.deepcopy(model), recorded=recorded, bf16=bf16, accumulate=accumulate
        )
        figures = take_steps(step, clips[:4])
        step.model.eval()
        with torch.no_grad():
            video, keys = (tensor.to(device) for tensor in clips[0])
            held_out = step.model(video, step.model.masking(keys)).loss
        step.model.train()
        with step.average.in_place(step.model):
            pass
        figures += take_steps(step, clips[4:], first=4)
        found.append((torch.stack(figures), held_out.view(1), *state_of(step)))
    rtol = BF16_RTOL if bf16 else FP32_RTOL
    for got, expected in zip(*found[::-1], strict=True):
        assert relative_error(got, expected) < rtol
    assert len(found[0][0][:, 0].unique()) == 6 // accumulate


@pytest.mark.parametrize("recorded", [False, True])
def test_a_bad_step_changes_nothing(device, recorded):
    model, clips = drawn(device, 5)
    step = make_train_step(model, recorded=recorded)
    take_steps(step, clips[:2])
    before = state_of(step)
    figures = torch.stack(take_steps(step, clips[2:], poison=0)).tolist()
    assert all(torch.equal(*pair) for pair in zip(state_of(step), before, strict=True))
    assert [row[2] for row in figures] == [1, 1, 1]
    assert math.isnan(figures[0][0])
    assert math.isfinite(figures[1][0])
