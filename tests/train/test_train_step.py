"""The step on the device: what it computes, what a bad one leaves alone, what a graph repeats."""

import contextlib
import copy
import math

import pytest
import torch
from helpers import EXACT_RTOL, make_video, relative_error
from recorder import HostReadError, Recorder

from vmae_fast import VideoMAE, clip_keys
from vmae_fast.train.config import OptimSettings
from vmae_fast.train.optimizer import (
    AveragedWeights,
    gradient_norm,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
)
from vmae_fast.train.step import TrainStep

CLIPS = 3
KINDS = {
    "v1": {},
    "v2": {"decoder_mask_ratio": 0.5},
    "scored": {"mask_kind": "random", "decoder_mask_ratio": 0.5},
}


def make_model(**settings):
    torch.manual_seed(0)
    return VideoMAE("tiny", frames=8, image_size=32, **settings).double().train()


def make_step(model, *, ema=0.0, clip=None, **options):
    average = AveragedWeights(model, ema) if ema else None
    optimizer = make_optimizer(model, OptimSettings())
    return TrainStep(model, optimizer, average=average, clip_grad=clip, **options)


def batches(step, count):
    """Other clips and other masks at every step."""
    for number in range(count):
        clip = torch.arange(CLIPS) + 10 * number
        yield (
            make_video((CLIPS, 3, 8, 32, 32), torch.uint8, "decoder", seed=100 * step + number),
            clip_keys(0, step, clip),
        )


def rate(number):
    """One that fp32 holds exactly."""
    return 2**-10 * (number + 1)


def run(step, first, last, poison=None):
    """Steps with a rate each; returns their figures."""
    figures = []
    for number in range(first, last):
        torch.manual_seed(number)
        drawn = list(batches(number, step.accumulate))
        shares = [None] * len(drawn)
        if step.model.masking.num_unscored is None:
            shares = step.shares([keys for _, keys in drawn])
        for micro, ((video, keys), share) in enumerate(zip(drawn, shares, strict=True)):
            if number == poison:
                share = torch.tensor(math.nan)
            step.forward_backward(video, keys, share, micro)
        figures.append(step.update(rate(number)).clone())
    return torch.stack(figures)


def state_of(step):
    """Weights, AdamW's state and averaged weights, copied."""
    tensors = [p.detach() for p in step.model.parameters()]
    for state in step.optimizer.state.values():
        tensors += [state["step"], state["exp_avg"], state["exp_avg_sq"]]
    tensors += step.average.average if step.average is not None else []
    return [tensor.clone() for tensor in tensors]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# Below all norms, and between them.
@pytest.mark.parametrize("clip", [None, 0.05, 0.35])
def test_a_step_is_adamw_on_the_clipped_gradient(clip):
    """Against PyTorch's own clipping and an AdamW of its other implementation."""
    model = make_model()
    plain = copy.deepcopy(model)
    step = make_step(model, clip=clip)
    groups = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in plain.named_parameters():
        groups[parameter.dim() == 1 or name == "mask_token"]["params"].append(parameter)
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.05, "foreach": False, "fused": False}
    adamw = torch.optim.AdamW(groups, **settings)
    figures = run(step, 0, 3)
    for number in range(3):
        ((video, keys),) = batches(number, 1)
        adamw.zero_grad()
        loss = plain(video, plain.masking(keys)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf)
        assert (norm > 0.35) == (number == 0)
        for group in adamw.param_groups:
            group["lr"] = rate(number)
        adamw.step()
        assert figures[number].tolist() == pytest.approx([loss.item(), norm.item(), 0], rel=1e-6)
    zero = plain.zero_prediction(video, plain.masking(keys))
    assert torch.equal(step.zero_prediction(), zero)
    # The scale of the gradients is fp32.
    rtol = EXACT_RTOL if clip is None else 1e-6
    for got, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative_error(got.detach(), expected.detach()) < rtol
        mean = step.optimizer.state[got]["exp_avg"]
        assert relative_error(mean, adamw.state[expected]["exp_avg"]) < rtol


@pytest.mark.parametrize("recorded", [False, True])
def test_a_bad_step_changes_nothing_and_neither_do_those_after_it(recorded):
    step = make_step(make_model(), ema=0.9, clip=0.5, capture=Recorder() if recorded else None)
    run(step, 0, 2)
    before = state_of(step)
    figures = run(step, 2, 5, poison=2)
    assert_equal(state_of(step), before)
    assert not torch.isfinite(figures[0, :2]).any()
    # The steps after it are sound, and wait for the host all the same.
    assert torch.isfinite(figures[1:]).all()
    assert figures[:, 2].tolist() == [1, 1, 1]


def test_an_infinite_gradient_of_a_finite_loss_is_bad():
    model = make_model()
    step = make_step(model)
    before = [p.detach().clone() for p in model.parameters()]
    hook = model.mask_token.register_hook(lambda grad: grad * math.inf)
    figures = run(step, 0, 1)
    hook.remove()
    assert torch.isfinite(figures[0, 0])
    assert figures[0, 2] == 1
    assert_equal([p.detach() for p in model.parameters()], before)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_equals_one_op_by_op(kind, accumulate):
    """Rates, clips, masks and drop path of each step; a validation and a checkpoint between."""
    model = make_model(drop_path=0.3, **KINDS[kind])
    recorder = Recorder()
    options = {"accumulate": accumulate, "ema": 0.9, "clip": 0.5}
    plain = make_step(copy.deepcopy(model), **options)
    recorded = make_step(model, capture=recorder, **options)
    found = []
    for step in (plain, recorded):
        figures = [run(step, 0, 2)]
        generator = torch.get_rng_state()
        step.model.eval()
        with torch.no_grad():
            ((video, keys),) = batches(50, 1)
            figures.append(step.model(video, step.model.masking(keys)).loss.view(1))
        step.model.train()
        with step.average.in_place(step.model):
            pass
        torch.set_rng_state(generator)
        figures.append(run(step, 2, 4))
        figures.append(step.zero_prediction().view(1))
        found.append(figures)
    assert_equal(found[1], found[0])
    assert_equal(state_of(recorded), state_of(plain))
    assert recorder.replays == 4 * (accumulate + 1)
    losses = torch.cat([found[0][0], found[0][2]])[:, 0]
    assert len(losses.unique()) == 4


def test_recording_counts_as_no_step():
    """The state, the generator and a flag that is up stay what they were."""
    model = make_model(drop_path=0.3)
    step = make_step(model, ema=0.9)
    run(step, 0, 1)
    later = make_step(model, capture=Recorder())
    load_optimizer_state(later.optimizer, copy.deepcopy(optimizer_state(step.optimizer)))
    later.average = step.average
    before, generator = state_of(later), torch.get_rng_state()
    later.video, later.keys = next(batches(3, 1))
    later.share.fill_(1)
    later._record(later._capture)
    assert_equal(state_of(later), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert later.found_inf == 0
    assert later.loss == 0


@pytest.mark.parametrize("allowed", [0, 2])
def test_a_recorded_step_skips_the_same_bad_steps(allowed):
    model = make_model()
    found = []
    for capture in (None, Recorder()):
        step = make_step(copy.deepcopy(model), ema=0.9, skip_nonfinite=allowed, capture=capture)
        figures = []
        for number, (video, keys) in enumerate(batches(0, 9)):
            bad = number in (2, 4, 5, 6)
            step.forward_backward(video, keys, float("nan") if bad else None)
            figures.append(step.update(1e-3).clone())
        found.append((torch.stack(figures)[:, 2], state_of(step)))
    assert_equal([found[1][0], *found[1][1]], [found[0][0], *found[0][1]])
    expected = {0: [0, 0, 1, 1, 1, 1, 1, 1, 1], 2: [0, 0, 1, 0, 1, 2, 3, 3, 3]}
    assert found[0][0].tolist() == expected[allowed]


FAULTS = {
    "rate": lambda step: step.optimizer.param_groups[0].update(lr=1e-3),
    "masks": lambda step: vars(step.model).update(masking=BakedMasks(step.model.masking)),
    "host read": lambda step: vars(step.model).update(masking=ReadMasks(step.model.masking)),
}


class BakedMasks:
    """Masks drawn from a host value: what a graph would repeat."""

    def __init__(self, masking):
        self.masking = masking
        self.num_unscored = masking.num_unscored

    def __call__(self, keys):
        with torch.utils._python_dispatch._disable_current_modes():
            drawn = torch.tensor(keys.tolist())
        return self.masking(drawn)


class ReadMasks(BakedMasks):
    def __call__(self, keys):
        return self.masking(keys * (1 if keys.sum() > 0 else 0))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_recorder_shows_host_values(fault):
    """What the tests above would not see otherwise."""
    model = make_model()
    plain = make_step(copy.deepcopy(model))
    recorded = make_step(model, capture=Recorder())
    FAULTS[fault](recorded)
    run(plain, 0, 3)
    refused = pytest.raises(HostReadError) if fault == "host read" else contextlib.nullcontext()
    with refused:
        run(recorded, 0, 3)
    weights = [torch.cat([p.detach().flatten() for p in s.model.parameters()])
               for s in (plain, recorded)]  # fmt: skip
    assert relative_error(*weights) > 1e-6


def test_a_recorded_step_refuses_another_shape():
    step = make_step(make_model(), capture=Recorder())
    run(step, 0, 1)
    video, keys = next(batches(1, 1))
    with pytest.raises(ValueError, match=r"video must be \(3, 3, 8, 32, 32\) torch.uint8 .* got"):
        step.forward_backward(video.float(), keys)
    with pytest.raises(ValueError, match=r"keys must be \(3,\)"):
        step.forward_backward(video, keys[:2])


def test_only_a_fused_optimiser_can_be_gated():
    model = make_model()
    with pytest.raises(ValueError, match="fused=True"):
        TrainStep(model, torch.optim.AdamW(model.parameters()))


def test_a_state_of_another_adamw_is_taken_up():
    """As checkpoints held it before: a float rate, and steps of the implementation by loops."""
    model = make_model()
    groups = make_optimizer(model, OptimSettings()).param_groups
    groups = [{"params": group["params"]} for group in groups]
    old = torch.optim.AdamW(groups, lr=0.25, foreach=True)
    video, keys = next(batches(0, 1))
    model(video, model.masking(keys)).loss.backward()
    old.step()
    new = make_step(model)
    load_optimizer_state(new.optimizer, old.state_dict())
    assert all(group["lr"] is new.lr and group["fused"] for group in new.optimizer.param_groups)
    run(new, 1, 2)
    assert all(state["step"] == 2 for state in new.optimizer.state.values())
    kept = optimizer_state(new.optimizer)
    assert {type(group["lr"]) for group in kept["param_groups"]} == {float}


def test_gradient_norm():
    model = make_model()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number) if number % 3 else None
    expected = sum(p.numel() * n**2 for n, p in enumerate(model.parameters()) if n % 3)
    assert abs(gradient_norm(model.parameters()).item() / expected**0.5 - 1) < EXACT_RTOL
