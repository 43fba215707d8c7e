"""A plan as text."""

from __future__ import annotations

import textwrap

from .flops import FLOP_PER_MAC, published_macs
from .planner import Plan, StepTime, parameters_of

_LABEL, _VALUE, _WIDTH = 24, 14, 96


def describe(plan: Plan) -> str:
    """The plan for a terminal: model, memory of a GPU, time of a step, and of the run."""
    sections = [_head(plan), _model(plan), _memory(plan), _step(plan), _run(plan)]
    return "\n\n".join(filter(None, sections))


def parts_of(time: StepTime) -> dict[str, float]:
    """Milliseconds by what they go into, in words."""
    return {
        "products": time.products,
        "attention": time.attention,
        "passes over memory": time.passes,
        "AdamW": time.optimizer,
    }


def _head(plan: Plan) -> str:
    settings, config = plan.settings, plan.settings.config
    height, width = config.size
    left_out = config.decoder_mask_ratio
    version = f"V2, {left_out:g} not decoded" if left_out else "V1"
    words = [
        f"{config.frames}x{height}x{width} in tubelets of {'x'.join(map(str, config.tubelet))}",
        f"{config.mask_kind} masks {config.mask_ratio:g} ({version})",
        f"{settings.precision}" + (f", {settings.residual} residual stream" * _autocast(plan)),
        f"checkpointing {settings.checkpointing}",
        f"{settings.gpus} x {plan.gpu.name}",
    ]
    return textwrap.fill("; ".join(words), _WIDTH)


def _autocast(plan: Plan) -> bool:
    return plan.settings.precision == "bf16"


def _model(plan: Plan) -> str:
    config, trace = plan.settings.config, plan.trace
    masking, parameters = config.masking, parameters_of(config)
    unscored = masking.num_unscored
    scored = f"{masking.num_decoded - unscored:,} scored" if unscored is not None else "some scored"
    encoder, decoder = (f"{count / 1e6:,.1f} {part}" for part, count in parameters.items())
    gflop = trace.flops() / trace.batch / 1e9
    share = trace.flops() / (FLOP_PER_MAC * published_macs(config) * trace.batch)
    lines = [
        ("parameters", f"{trace.num_parameters / 1e6:,.1f} M", f"{encoder}, {decoder}"),
        (
            "tokens a clip",
            f"{config.num_tokens:,}",
            f"{masking.num_visible:,} visible, {masking.num_decoded:,} decoded, {scored}",
        ),
        ("GMACs a clip", f"{published_macs(config) / 1e9:,.2f}", "forward, as the papers count"),
        ("GFLOP a clip", f"{gflop:,.0f}", f"executed forward and backward: {share:.2f} of papers'"),
    ]
    return _table("model", lines)


def _memory(plan: Plan) -> str:
    trace, notes = plan.trace, {}
    if plan.settings.accumulate == 1:
        in_full = _gib(trace.weight_bytes)
        notes["gradients"] = f"{in_full} in full, when activations are gone"
    notes["activations"] = f"{_gib(trace.kept_bytes)} at the end of the forward pass"
    lines = [(name, _gib(size), notes.get(name, "")) for name, size in plan.memory.items()]
    limit = f"of {plan.gpu.memory_gib:g} GiB: " + ("fits" if plan.fits else "DOES NOT FIT")
    lines.append(("in all", _gib(plan.memory_bytes), limit))
    largest = plan.largest_batch
    note = "a GPU at a time" if largest else "not even one clip fits; try checkpointing"
    lines.append(("largest batch", f"{largest:,} clips" if largest else "none", note))
    batch = plan.settings.batch
    return _table(f"memory of a GPU with {_clips(batch)}, when it holds most", lines)


def _step(plan: Plan) -> str:
    settings, floor = plan.settings, plan.floor
    lines = [
        *(
            (name, f"{ms:,.1f} ms", f"{ms / floor.total:.0%}")
            for name, ms in parts_of(floor).items()
        ),
        ("at these rates", f"{floor.total:,.1f} ms", ""),
        ("expected", f"{plan.step_ms:,.1f} ms", f"{plan.efficiency.share:.0%} of these rates"),
        ("clips/s", f"{plan.clips_per_s:,.0f}", f"{plan.clips_per_s / settings.gpus:,.0f} a GPU"),
        (
            "model FLOP utilization",
            f"{plan.model_flop_utilization:.0%}",
            f"of {plan.gpu.tflop_per_s(settings.precision):g} TFLOP/s published",
        ),
    ]
    notes = [f"rates {plan.rates.source}"]
    notes.append(f"share of them {plan.efficiency.source}")
    notes.append("loading of clips and exchange of gradients are not counted")
    title = f"an optimiser step of {settings.clips_per_step:,} clips"
    return "\n".join([_table(title, lines), *(_note(note) for note in notes)])


def _run(plan: Plan) -> str:
    if plan.clips is None or plan.hours is None:
        return ""
    steps = plan.clips / plan.settings.clips_per_step
    lines = [
        ("clips", f"{plan.clips / 1e6:,.1f} M", f"{steps:,.0f} steps"),
        ("time", f"{plan.hours:,.1f} h", f"{plan.hours / 24:,.1f} days"),
        ("GPU-hours", f"{plan.hours * plan.settings.gpus:,.0f}", ""),
    ]
    return _table("the run", lines)


def _table(title: str, lines: list[tuple[str, str, str]]) -> str:
    rows = [f"  {name:<{_LABEL}}{value:>{_VALUE}}   {note}".rstrip() for name, value, note in lines]
    return "\n".join([title, *rows])


def _note(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.2f} GiB"


def _clips(count: int) -> str:
    return f"{count:,} clip{'s' * (count != 1)}"
