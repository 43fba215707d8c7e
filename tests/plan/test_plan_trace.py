"""A step followed without data, against what really runs, is kept and is allocated."""

from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vmae_fast import VideoMAE, VideoMAEConfig
from vmae_fast.plan.trace import trace_step

LOW = torch.bfloat16
# Activations outweigh gradients, and pixels are few beside them: on a CPU, unlike on a GPU, the
# loss makes a copy of its targets.
BATCH = 12
CONFIG = VideoMAEConfig(
    frames=8, image_size=32, in_channels=1, patch_size=8, width=192, depth=4, heads=2, mlp_dim=400,
    decoder_width=96, decoder_depth=2, decoder_heads=1, decoder_mlp_dim=210, mask_ratio=0.75,
)  # fmt: skip
V2 = {"decoder_mask_ratio": 0.5, "init_values": 0.1, "drop_path": 0.2}
KINDS = {
    "v1": {},
    "v2": V2,
    # Tokens are scored by weight: their number differs from clip to clip.
    "random": {"mask_kind": "random", "decoder_mask_ratio": 0.5, "decoder_mask_kind": "random"},
}
OPTIONS = [
    ("none", None, None),
    ("mlp", None, None),
    ("block", None, None),
    ("none", LOW, None),
    ("mlp", LOW, LOW),
    ("block", LOW, None),
]


def real_model(checkpointing="none", residual_dtype=None, **settings):
    torch.manual_seed(0)
    model = VideoMAE(CONFIG, **settings)
    model.checkpointing, model.residual_dtype = checkpointing, residual_dtype
    return model


def traced(model, **options):
    return trace_step(
        model.config,
        BATCH,
        residual_dtype=model.residual_dtype,
        checkpointing=model.checkpointing,
        **options,
    )


def real_step(model, autocast_dtype=None, backward=True):
    """What takes a step of the model itself and gives what is then held: the loss, if any."""
    video = torch.randint(0, 256, (BATCH, 1, 8, 32, 32), dtype=torch.uint8)
    model.zero_grad(set_to_none=True)

    def step():
        with torch.autocast("cpu", autocast_dtype or LOW, enabled=autocast_dtype is not None):
            loss = model(video, model.masking(torch.arange(BATCH))).loss
        return loss.backward() if backward else loss

    return step


def allocated(call):
    """Bytes by which what is allocated rose and fell during a call, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        held = call()
    del held
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


@pytest.fixture(scope="module", autouse=True)
def _warm():
    """What is made once and for good is none of a step's."""
    for dtype in (None, LOW):
        real_step(real_model(), dtype)()


@pytest.mark.parametrize(("checkpointing", "autocast_dtype", "residual_dtype"), OPTIONS, ids=str)
def test_memory_is_what_is_allocated(checkpointing, autocast_dtype, residual_dtype):
    model = real_model(checkpointing, residual_dtype, **V2)
    trace = traced(model, autocast_dtype=autocast_dtype)
    kept = sum(allocated(real_step(model, autocast_dtype, backward=False)))
    assert trace.kept_bytes == pytest.approx(kept, rel=1e-3)
    running = list(accumulate(allocated(real_step(model, autocast_dtype))))
    # Under autocast the definitions that run on a CPU compute some of it in fp32.
    tolerance = 0.02 if autocast_dtype is None else 0.1
    assert trace.peak_bytes == pytest.approx(max(running), rel=tolerance)
    assert trace.weight_bytes == pytest.approx(running[-1], rel=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_and_memory_of_each_kind_of_masks(kind):
    model = real_model(**KINDS[kind])
    trace = traced(model)
    step = real_step(model)
    with FlopCounterMode(display=False) as counted:
        step()
    assert trace.flops() == counted.get_total_flops()
    parts = [trace.flops(one) for one in ("product", "attention", "pass")]
    assert sum(parts) == trace.flops()
    assert min(parts[:2]) > 0
    assert parts[2] == 0
    running = list(accumulate(allocated(real_step(model))))
    assert trace.peak_bytes == pytest.approx(max(running), rel=0.02)
    assert trace.kept_bytes == pytest.approx(
        sum(allocated(real_step(model, backward=False))), rel=1e-3
    )


class Ran(TorchDispatchMode):
    """Names of our ops, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_calls_are_those_of_a_real_step_in_their_order(checkpointing):
    model = real_model(checkpointing, **V2)
    with Ran() as forward:
        loss = real_step(model, backward=False)()
    with Ran() as backward:
        loss.backward()
    calls = traced(model).calls
    assert [call.phase for call in calls] == sorted((c.phase for c in calls), reverse=True)
    for phase, ran in (("forward", forward), ("backward", backward)):
        names = [name for name in ran.names if name.startswith("vmae_fast::")]
        ours = [c.name for c in calls if c.phase == phase and c.name.startswith("vmae_fast::")]
        assert ours == names
        assert names.count("vmae_fast::attention") >= 4 * (
            phase == "forward" or checkpointing == "block"
        )
    assert all(call.moved_bytes >= 0 for call in calls)
    assert not [c for c in traced(model, backward=False).calls if c.phase == "backward"]


def test_nothing_is_allocated_and_nothing_drawn():
    """Giant's width, so that a single real matrix would show; drop path draws."""
    config = VideoMAEConfig.of("giant", depth=2, decoder_depth=1, drop_path=0.1)
    state, kept = torch.get_rng_state(), []
    rises = allocated(lambda: kept.append(trace_step(config, 64)))
    assert kept[0].peak_bytes > 2**30
    assert sum(rise for rise in rises if rise > 0) < 2**16
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_at_the_peak_are_all_of_them_where_it_lies_at_the_end():
    def every_parameter(model, video, mask):
        return sum(p.sum() for p in model.parameters())

    trace = trace_step(CONFIG, 1, loss=every_parameter)
    assert trace.num_parameters == sum(p.numel() for p in VideoMAE(CONFIG).parameters())
    assert trace.peak_gradient_bytes == trace.weight_bytes == 4 * trace.num_parameters
    assert trace.peak_bytes == pytest.approx(trace.weight_bytes, rel=5e-3)


def test_memory_that_was_freed_is_nobodys():
    """Gradients come to lie where it was."""
    size = 1 << 26

    def with_others_before(model, video, mask):
        held = [torch.empty(size, dtype=torch.uint8) for _ in range(500)]
        del held
        return sum(p.sum() for p in model.parameters())

    trace = trace_step(CONFIG, 1, loss=with_others_before)
    assert trace.peak_bytes == pytest.approx(500 * size, rel=1e-3)
    assert trace.peak_gradient_bytes == 0
    assert trace.peak_kept_bytes < 2**16
    assert trace.kept_bytes < 2**16


def test_views_and_changes_in_place_make_no_memory():
    def viewed(model, video, mask):
        x = torch.zeros(1 << 20)
        assert x.view(2, -1).t()[0].add_(1).shape == (2,)
        weight = model.encoder.blocks[0].mlp.fc1.weight.view(-1)
        return (weight[:1] * x).sum()

    trace = trace_step(CONFIG, 1, loss=viewed, backward=False)
    # x, what it was multiplied by, and small change; the product is not kept.
    assert trace.kept_bytes == pytest.approx(4 << 20, rel=0.01)
    assert trace.peak_bytes == pytest.approx(8 << 20, rel=0.01)
    assert "aten::add_" in [call.name for call in trace.calls]
