"""A plan as text."""

from __future__ import annotations

import textwrap

from .communication import BUCKET_BYTES
from .flops import FLOP_PER_MAC, published_macs
from .planner import Plan, StepTime, parameters_of

_LABEL, _VALUE, _WIDTH = 24, 14, 96


def describe(plan: Plan) -> str:
    """The plan for a terminal: model, memory of a GPU, time of a step, and of the run."""
    sections = [_head(plan), _model(plan), _memory(plan), _step(plan)]
    if plan.settings.gpus > 1:
        sections += [_exchange(plan), _scaling(plan)]
    sections.append(_run(plan))
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
        f"{settings.gpus} x {plan.gpu.name}" + f", {settings.parallel}" * (settings.gpus > 1),
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
    other = " or fsdp" * (plan.settings.gpus > plan.settings.shards)
    note = "a GPU at a time" if largest else f"not even one clip fits; try checkpointing{other}"
    lines.append(("largest batch", f"{largest:,} clips" if largest else "none", note))
    batch = plan.settings.batch
    return _table(f"memory of a GPU with {clips(batch)}, when it holds most", lines)


def _step(plan: Plan) -> str:
    settings, floor = plan.settings, plan.floor
    lines = [
        *(
            (name, f"{ms:,.1f} ms", f"{ms / floor.total:.0%}")
            for name, ms in parts_of(floor).items()
        ),
        ("at these rates", f"{floor.total:,.1f} ms", ""),
        ("expected", f"{plan.compute_ms:,.1f} ms", f"{plan.efficiency.share:.0%} of these rates"),
        *(
            [
                ("waiting for exchange", f"{plan.exchange.exposed_ms:,.1f} ms", ""),
                ("in all", f"{plan.step_ms:,.1f} ms", ""),
            ]
            if settings.gpus > 1
            else ()
        ),
        ("clips/s", f"{plan.clips_per_s:,.0f}", f"{plan.clips_per_s / settings.gpus:,.0f} a GPU"),
        (
            "model FLOP utilization",
            f"{plan.model_flop_utilization:.0%}",
            f"of {plan.gpu.tflop_per_s(settings.precision):g} TFLOP/s published",
        ),
    ]
    notes = [f"rates {plan.rates.source}"]
    notes.append(f"share of them {plan.efficiency.source}")
    alone = settings.gpus == 1
    notes.append(
        f"loading of clips {'and exchange of gradients are' if alone else 'is'} not counted"
    )
    title = f"an optimiser step of {settings.clips_per_step:,} clips"
    return "\n".join([_table(title, lines), *(_note(note) for note in notes)])


def _exchange(plan: Plan) -> str:
    settings, found = plan.settings, plan.exchange
    nodes = plan.links.nodes(settings.gpus)
    lines = [(name, _gib(size), "sent by each GPU") for name, size in found.sent_bytes.items()]
    busy = f"at {plan.links.rate_gb_per_s(settings.gpus):,.1f} GB/s a GPU"
    lines.append(("links are busy", f"{found.busy_ms:,.1f} ms", busy))
    hidden = f"the rest goes on behind {found.busy_ms - found.exposed_ms:,.1f} ms of computing"
    lines.append(("computing waits", f"{found.exposed_ms:,.1f} ms", hidden))
    title = f"what {settings.gpus} GPUs of {nodes} node{'s' * (nodes > 1)} exchange in a step"
    return "\n".join([_table(title, lines), _note(plan.links.source), _note(_how(plan))])


def _how(plan: Plan) -> str:
    """What the exchange is taken to be."""
    rings = "taken to go round rings at the rate of the slowest link, and to slow nothing down"
    copies = "; copies to and from what is sent are among the passes over memory"
    if plan.settings.shards == 1:
        return (
            f"gradients, in fp32, once a step, {rings}: behind the last backward pass, but for the "
            f"last {BUCKET_BYTES >> 20} MiB{copies}"
        )
    dtype = "bf16" if plan.settings.gathered_itemsize == 2 else "fp32"
    return (
        f"weights in {dtype} for each forward and each backward pass, gradients in fp32 once a "
        f"step, {rings}: behind the passes, but for the first weights and the last "
        f"gradients{copies}"
    )


def _scaling(plan: Plan) -> str:
    heads = ("GPUs", "nodes", "GiB a GPU", "ms a step", "waiting", "clips/s", "efficiency")
    rows = [
        (
            f"{one.settings.gpus:,}",
            f"{one.links.nodes(one.settings.gpus):,}",
            f"{one.memory_bytes / 2**30:,.2f}",
            f"{one.step_ms:,.1f}",
            f"{one.exchange.exposed_ms:,.1f}",
            f"{one.clips_per_s:,.0f}",
            f"{one.scaling_efficiency:.0%}",
        )
        for one in plan.scaling
    ]
    notes = ["" if one.fits else "   does not fit" for one in plan.scaling]
    lines = [
        "  " + "".join(f"{value:>12}" for value in row) + note
        for row, note in zip([heads, *rows], ["", *notes], strict=True)
    ]
    title = f"scaling with {clips(plan.settings.batch)} a GPU at a time, predicted"
    if any(one.scaling_efficiency > 1 for one in plan.scaling):
        lines.append(
            _note("over 100%: saved of AdamW's work and of casts of weights is more than is lost")
        )
    return "\n".join([title, *lines])


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


def clips(count: int) -> str:
    """So many of them, in words."""
    return f"{count:,} clip{'s' * (count != 1)}"
