"""Ranges: which there are, how they nest, and that they change nothing."""

import timeit
from contextlib import nullcontext

import pytest
import torch
from ops.test_registered_ops import CASES, OPS, Given

from vmae_fast import VideoMAE, clip_keys, profiling
from vmae_fast.nn import DividedSpaceTimeBlock, JointSpaceTimeBlock
from vmae_fast.train.profile import Recorder
from vmae_fast.train.step import TrainStep

CPU = torch.device("cpu")
SMALL = {
    "frames": 4, "image_size": 32, "patch_size": 8,
    "width": 32, "depth": 2, "heads": 2, "mlp_dim": 48,
    "decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2, "decoder_mlp_dim": 40,
}  # fmt: skip
# Enough clips for mask tokens to be shared in the first decoder block.
CLIPS = 3


def model_and_video(**overrides):
    torch.manual_seed(0)
    model = VideoMAE("tiny", **SMALL | overrides)
    video = torch.randint(0, 256, (CLIPS, 3, 4, 32, 32), dtype=torch.uint8)
    return model, video


def trace_of(function):
    recorder = Recorder(CPU)
    recorder.start()
    try:
        function()
    finally:
        events = recorder.stop()
    return events


def recorded(function):
    """The trace's ranges of ours: (name, start, end), in the order in which they begin."""
    events = trace_of(function)
    ranges = [
        (e["name"], e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "user_annotation" and profiling.kind_of(e["name"])
    ]
    return sorted(ranges, key=lambda one: one[1])


def names(ranges):
    return [name for name, *_ in ranges]


def nodes_of(loss):
    """Names of all nodes of the graph behind a loss."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return [type(node).__name__ for node in seen]


def blocks_of(model):
    return [name for name, m in model.named_modules() if isinstance(m, JointSpaceTimeBlock)]


@pytest.fixture
def step():
    """A training step whose learning rate changes nothing."""
    model, video = model_and_video()
    train = TrainStep(model, torch.optim.AdamW(model.parameters(), fused=True))

    def run():
        train.forward_backward(video, clip_keys(0, 0, torch.arange(CLIPS)))
        train.update(0.0)

    run.model = model
    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_op_has_a_range(case):
    arguments = next(iter(case(Given("cpu"))))
    op = getattr(OPS, case.__name__)
    assert names(recorded(lambda: op(*arguments))) == [f"vmae_fast::{case.__name__}"]


def test_a_step_has_ranges_of_its_phases_and_blocks(step):
    found = names(recorded(step))
    phases = [name for name in found if profiling.kind_of(name) == "phase"]
    assert phases == ["copy to device", "masks", "forward", "backward", "update"]
    blocks = blocks_of(step.model)
    assert len(blocks) == 4
    backward = [name + profiling.BACKWARD for name in reversed(blocks)]
    assert [name for name in found if profiling.kind_of(name) == "block"] == [*blocks, *backward]


def test_ranges_nest(step):
    """Each lies within the one that was begun before and not ended; ops in their block's."""
    ranges = recorded(step)
    around = []
    parents = []
    for name, start, end in ranges:
        while around and around[-1][2] <= start:
            around.pop()
        assert not around or end <= around[-1][2], f"{name} outlives {around[-1][0]}"
        parents.append((name, around[-1][0] if around else ""))
        around.append((name, start, end))
    kinds = {(profiling.kind_of(name), profiling.kind_of(parent)) for name, parent in parents}
    assert kinds == {("phase", ""), ("block", "phase"), ("op", "block"), ("op", "phase")}
    for name, parent in parents:
        backward = name.endswith("backward") and name != "backward"
        if profiling.kind_of(parent) == "block":
            assert parent.endswith(profiling.BACKWARD) == backward
        elif profiling.kind_of(parent) == "phase":
            assert parent == ("backward" if backward else "forward")
    # Norm with qkv, attention, norm with fc1, GELU with fc2.
    inside = [name for name, parent in parents if parent == "encoder.blocks.1"]
    assert inside == [
        f"vmae_fast::{op}"
        for op in ("layer_norm_linear", "attention", "layer_norm_linear", "bias_gelu_linear")
    ]
    inside = [name for name, parent in parents if parent == "encoder.blocks.1 backward"]
    assert inside == [
        f"vmae_fast::{op}_backward"
        for op in ("bias_gelu_linear", "layer_norm_linear", "attention", "layer_norm_linear")
    ]


def test_ranges_nest_with_everything_else(step):
    """Viewers leave out events of which neither lies within the other: autograd has some too."""
    events = [e for e in trace_of(step) if e.get("cat") in ("user_annotation", "cpu_op")]
    events.sort(key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    around = []
    for event in events:
        end = event["ts"] + event["dur"]
        while around and around[-1] <= event["ts"]:
            around.pop()
        assert not around or end <= around[-1], event["name"]
        around.append(end)


def test_what_needs_no_gradient_is_passed_on():
    wanted, other = torch.ones(2, requires_grad=True), torch.ones(2)
    with profiling.ranges():
        for edge in (profiling.backward_begins, profiling.backward_ends):
            passed, same, nothing = edge("encoder.blocks.0", wanted, other, None)
            assert passed.grad_fn is not None
            assert same is other
            assert nothing is None
            with torch.no_grad():
                assert edge("encoder.blocks.0", wanted)[0] is wanted
    assert profiling.backward_ends("encoder.blocks.0", wanted)[0] is wanted


def test_off_there_is_nothing():
    model, video = model_and_video()
    assert not profiling.enabled()
    assert profiling.span("forward") is profiling.span("backward")
    with torch.profiler.profile() as seen:
        loss = model(video).loss
        loss.backward()
    annotations = [e.name for e in seen.events() if e.is_user_annotation]
    assert annotations == []
    assert not [name for name in nodes_of(loss) if profiling.EDGE in name]
    with profiling.ranges():
        loss = model(video).loss
        with torch.no_grad():
            assert model(video).loss.grad_fn is None
    # At both ends of each block.
    assert len([n for n in nodes_of(loss) if profiling.EDGE in n]) == 2 * len(blocks_of(model))


def test_off_a_range_costs_next_to_nothing():
    def ns(function):
        return min(timeit.repeat(function, number=2000, repeat=15)) / 2000 * 1e9

    def off():
        with profiling.span("forward"):
            pass

    nothing = nullcontext()

    def empty():
        with nothing:
            pass

    # An op launches for tens of microseconds; the sum on two cores that others use too.
    assert ns(off) < ns(empty) + 2000
    with profiling.ranges():
        assert ns(off) > 2 * ns(empty)


def test_ranges_can_be_nested_and_an_error_turns_them_off():
    with profiling.ranges():
        with pytest.raises(KeyError), profiling.ranges():
            raise KeyError
        assert profiling.enabled()
    assert not profiling.enabled()


@pytest.mark.parametrize("checkpointing", ["none", "mlp", "block"])
@pytest.mark.parametrize(
    "extra",
    [{}, {"decoder_mask_ratio": 0.5, "drop_path": 0.3, "init_values": 0.1}],
    ids=["v1", "v2"],
)
def test_numbers_and_what_is_kept_are_the_same(checkpointing, extra):
    found = []
    for context in (nullcontext, profiling.ranges):
        model, video = model_and_video(**extra)
        model.checkpointing = checkpointing
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(video, model.masking(clip_keys(0, 0, torch.arange(CLIPS)))).loss
            total = sum(kept.values())
            loss.backward()
        found.append((loss.detach(), total, [p.grad for p in model.parameters()]))
    (loss, total, grads), (ranged_loss, ranged_total, ranged_grads) = found
    assert torch.equal(loss, ranged_loss)
    assert total == ranged_total > 0
    for grad, ranged in zip(grads, ranged_grads, strict=True):
        assert torch.equal(grad, ranged)


def test_recomputing_lies_within_the_backward_range():
    model, video = model_and_video()
    model.checkpointing = "block"
    ranges = recorded(lambda: model(video).loss.backward())
    (start, end) = next(one[1:] for one in ranges if one[0] == "encoder.blocks.0 backward")
    inside = [n for n, s, e in ranges if start <= s and e <= end]
    assert inside.count("vmae_fast::attention") == 1
    assert inside.count("vmae_fast::attention_backward") == 1


def test_a_frozen_part_has_no_range_in_the_backward_pass():
    """And the block after it, into which no gradient flows, ends its own."""
    model, video = model_and_video()
    model.encoder.patch_embed.requires_grad_(False)
    model.encoder.blocks[0].requires_grad_(False)

    def run():
        model(video).loss.backward()
        # With the pass, and not only with what is around it.
        assert profiling._threads.open == []

    found = names(recorded(run))
    assert "encoder.blocks.0" in found
    assert "encoder.blocks.0 backward" not in found
    assert "encoder.blocks.1 backward" in found


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise KeyError("broken")


def test_an_error_ends_ranges():
    model, video = model_and_video()
    block = model.encoder.blocks[1]
    run = block.forward

    def broken_forward(*given):
        raise KeyError("broken")

    def broken_backward(stream, *rest):
        return run(stream._replace(x=Broken.apply(stream.x)), *rest)

    for forward in (broken_forward, broken_backward):
        block.forward = forward
        with profiling.ranges(), pytest.raises(KeyError), profiling.span("step"):
            model(video).loss.backward()
        assert profiling._threads.open == []
    # Nothing is around this pass; the next one ends what it left open.
    with profiling.ranges():
        with pytest.raises(KeyError):
            model(video).loss.backward()
        assert [one.name for one in profiling._threads.open] == ["encoder.blocks.1 backward"]
        with profiling.span("step"):
            assert [one.name for one in profiling._threads.open] == ["step"]
    block.forward = run


class Nvtx:
    """Stands in for torch.cuda.nvtx: what is open, and what was."""

    def __init__(self):
        self.open, self.seen = [], []

    def range_push(self, name):
        self.open.append(name)
        self.seen.append("/".join(self.open))

    def range_pop(self):
        self.open.pop()


def test_with_a_gpu_a_range_is_nvtx_s_too(monkeypatch, step):
    nvtx = Nvtx()
    monkeypatch.setattr(torch.cuda, "nvtx", nvtx)
    monkeypatch.setattr(profiling, "_has_nvtx", lambda: True)
    with profiling.ranges():
        step()
    assert nvtx.open == []
    assert "forward/encoder.blocks.0/vmae_fast::attention" in nvtx.seen
    assert "backward/decoder.blocks.1 backward/vmae_fast::cross_attention_backward" in nvtx.seen


def test_a_model_compiles_whole(monkeypatch):
    model, video = model_and_video()
    mask = model.masking(clip_keys(0, 0, torch.arange(CLIPS)))
    expected = model(video, mask).loss
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with profiling.ranges():
        assert torch.allclose(compiled(video, mask).loss, expected)
        # Ops are called as ever, and keep their ranges; blocks are no more than their ops.
        found = names(recorded(lambda: compiled(video, mask)))
    assert {profiling.kind_of(name) for name in found} == {"op"}
    # Whether ranges are on is nothing that is compiled for.
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    assert torch.allclose(compiled(video, mask).loss, expected)
    torch.compiler.reset()


def test_a_divided_block_has_a_range_in_either_pass():
    block, x = DividedSpaceTimeBlock(16, 2, 32), torch.randn(1, 6, 16, requires_grad=True)
    found = {}
    for on in (False, True):
        block.zero_grad()
        with profiling.ranges() if on else nullcontext(), torch.profiler.profile() as seen:
            (block(x, (2, 3)) ** 2).sum().backward()
        found[on] = block.mlp.fc1.weight.grad.clone()
        names = {event.key for event in seen.key_averages()}
        for name in ("DividedSpaceTimeBlock", "DividedSpaceTimeBlock backward"):
            assert (name in names) == on
    assert torch.equal(found[False], found[True])
