"""A whole step: recorded in a CUDA graph, and without one never waiting for the GPU."""

import copy
from contextlib import contextmanager

import pytest
import torch
from helpers import relative_error

from vmae_fast import VideoMAE, clip_keys

MASKS = {
    "v1": {},
    "v2": {"decoder_mask_ratio": 0.5},
    "v2_random": {"decoder_mask_ratio": 0.5, "mask_kind": "random"},
}
BASE = {"depth": 1, "decoder_depth": 2}
STEPS = {
    f"{size}-{mask}-{'pred' if pred else 'loss'}": (size, {**more, **MASKS[mask]}, pred)
    for size, more, masks in (("tiny", {}, MASKS), ("base", BASE, ("v1", "v2")))
    for mask in masks
    for pred in ((False, True) if size == "tiny" else (False,))
}
BATCH = 2
# Between two runs of one bf16 step: attention's backward pass adds in no fixed order, and what
# comes out is rounded to bf16.
REPLAY_RTOL = 1e-2


class Step:
    """Forward, backward and perhaps an optimiser's step on inputs that stay where they are."""

    def __init__(self, model, device, return_pred=False, optimizer=None):
        self.model, self.return_pred, self.optimizer = model, return_pred, optimizer
        self.video, self.mask = self.drawn(0, device)

    def drawn(self, seed, device):
        config = self.model.config
        generator = torch.Generator().manual_seed(seed)
        shape = (BATCH, config.in_channels, config.frames, *config.size)
        video = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return video.to(device), self.model.masking(
            clip_keys(seed, 0, torch.arange(BATCH, device=device))
        )

    def load(self, seed):
        """Other pixels and another mask, into the same memory."""
        video, mask = self.drawn(seed, self.video.device)
        self.video.copy_(video)
        self.mask.visible_idx.copy_(mask.visible_idx)
        self.mask.decode_idx.copy_(mask.decode_idx)
        if mask.scored is not None:
            self.mask.scored.copy_(mask.scored)

    def __call__(self):
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.video.device.type, torch.bfloat16):
            output = self.model(self.video, self.mask, return_pred=self.return_pred)
        output.loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        # Detached: autograd's graph would tie later backward passes to this one's stream.
        self.found = {"loss": output.loss.detach()}
        if self.return_pred:
            self.found["pred"] = output.pred.detach()

    def results(self):
        """Copies of loss, predictions and gradients."""
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        return {name: tensor.clone() for name, tensor in {**self.found, **gradients}.items()}


def captured(step):
    """The step as a CUDA graph, after running it as often as libraries want."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph


@contextmanager
def never_waiting():
    """Operations that make the host wait for the GPU are errors."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def make_model(size, settings, device):
    torch.manual_seed(0)
    return VideoMAE(size, **settings).to(device)


@pytest.mark.parametrize(("size", "settings", "return_pred"), STEPS.values(), ids=STEPS)
def test_replays_give_what_eager_gives(device, size, settings, return_pred):
    step = Step(make_model(size, settings, device), device, return_pred)
    expected = {}
    for seed in (1, 2):
        step.load(seed)
        step()
        expected[seed] = step.results()
    embedding = "encoder.patch_embed.weight"
    assert relative_error(expected[1][embedding], expected[2][embedding]) > 10 * REPLAY_RTOL
    step.load(0)
    graph = captured(step)
    for seed in (1, 2, 1):
        step.load(seed)
        graph.replay()
        for name, tensor in step.results().items():
            assert relative_error(tensor, expected[seed][name]) < REPLAY_RTOL, name


def test_replays_train_as_eager_does(device):
    """With the optimiser in the graph; each loss depends on all updates before it."""
    model = make_model("tiny", MASKS["v2"], device)
    twin = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    # With an eps of 1 updates follow the gradients; else rounding would decide the sign of those
    # that are nearly zero.
    settings = {"lr": 1.0, "eps": 1.0, "weight_decay": 0.0, "fused": True}
    step, eager = (
        Step(m, device, optimizer=torch.optim.AdamW(m.parameters(), capturable=True, **settings))
        for m in (model, twin)
    )
    graph = captured(step)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(value)
        for state in step.optimizer.state.values():
            for value in state.values():
                value.zero_()
    losses = []
    for number in range(5):
        for each, run in ((step, graph.replay), (eager, eager)):
            each.load(number)
            run()
        losses.append(eager.found["loss"].item())
        assert relative_error(step.found["loss"], eager.found["loss"]) < REPLAY_RTOL
    assert abs(losses[-1] - losses[0]) > 10 * REPLAY_RTOL * losses[0]
    for parameter, other, value in zip(model.parameters(), twin.parameters(), start, strict=True):
        assert relative_error(parameter - value, other - value) < 10 * REPLAY_RTOL


@pytest.mark.parametrize(("size", "settings", "return_pred"), STEPS.values(), ids=STEPS)
def test_a_step_never_waits(device, size, settings, return_pred):
    model = make_model(size, settings, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step = Step(model, device, return_pred, optimizer)
    clips = torch.arange(BATCH, device=device)
    step()
    with never_waiting():
        step()
        # Masks drawn in the step, from keys and by the model itself.
        with torch.autocast(device.type, torch.bfloat16):
            model(step.video, model.masking(clip_keys(3, 0, clips))).loss.backward()
            model(step.video).loss.backward()
    assert step.found["loss"].isfinite()


def test_waiting_is_seen(device):
    value = torch.ones((), device=device)
    before = torch.cuda.get_sync_debug_mode()
    with pytest.raises(RuntimeError, match="synchroniz"), never_waiting():
        value.item()
    assert torch.cuda.get_sync_debug_mode() == before


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("mask", MASKS)
def test_a_step_is_the_same_bits_every_time(device, mask):
    """Where torch is told so: attention is then one whose backward pass can be."""
    step = Step(make_model("tiny", MASKS[mask], device), device)
    step()
    first = step.results()
    step()
    for name, tensor in step.results().items():
        assert torch.equal(tensor, first[name]), name
