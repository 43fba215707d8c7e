"""README's headline, rendered from the result files by report.py: what a step takes, one picture.

What the target device has not run is not yet measured there. Files of a CPU that were made before
blocks were fused, or against a revision, are in RESULTS.md alone.
"""

import json
from pathlib import Path
from textwrap import fill

from targets import DEVICE
from words import NOT_YET, Figures, number, sentence, table, versions

BEGIN = "<!-- headline: rendered by benchmarks/report.py -->"
END = "<!-- end of headline -->"
HEAD = ["a training step of", "by", "clips/s", "ours is quicker", "peak memory"]
# Like with like: Hugging Face's residual stream is in fp32 too.
GPU_FILE, GPU_ROW = "step_base_v1", ("step base v1", "graph, fp32 residual")
OURS = "**vmae-fast**"
GPU_PEERS = {
    "huggingface_eager": "Hugging Face, eager",
    "huggingface": "Hugging Face, SDPA",
    "huggingface_compiled": "Hugging Face, SDPA, compiled",
}
# By how the figures of a file of a CPU begin.
CPU_PEERS = {
    "huggingface_eager": "Hugging Face, eager",
    "huggingface_sdpa": "Hugging Face, SDPA",
    "huggingface_compiled": "Hugging Face, SDPA, compiled",
    "plain": "the same model in plain PyTorch",
}
OLDER = ("_avx512", "_against_")
# The first of these that was drawn.
PICTURES = ("flops_decoder_masking", "mask_ratio")
NOTES = (
    "The steps of a device are of one run. Hugging Face's model is `VideoMAEForPreTraining`. Peak "
    "memory is all that is held at once on a GPU (weights, gradients and optimiser state too), and "
    "on a CPU what the step's own tensors take."
)
COLUMNS = 100


class MissingMarker(Exception):
    """README has no place for the headline."""


def with_headline(readme: Path, results: Path) -> str:
    """README's text with what the result files say between the markers.

    Raises:
        MissingMarker: one of the two markers is not there exactly once, or they are the wrong way
            round.
    """
    text = readme.read_text() if readme.exists() else ""
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise MissingMarker(f"{readme} has {text.count(marker)} lines {marker}, not one")
    before, rest = text.split(BEGIN)
    if END not in rest:
        raise MissingMarker(f"{readme} has {END} before {BEGIN}")
    return f"{before}{BEGIN}\n{headline(results)}{END}{rest.split(END)[1]}"


def headline(results: Path) -> str:
    """The block: a table of steps, what it is of, and the picture."""
    steps = {
        file: json.loads(file.read_text())
        for file in sorted(results.glob("cpu/step_*.json"))
        if not any(word in file.stem for word in OLDER)
    }
    cpu = [figures for figures in steps.values() if "ours_s" in figures]
    gpu = _of_target_device(results)
    lines = [*_gpu_lines(gpu), *(line for figures in cpu for line in _cpu_lines(figures))]
    origins = dict.fromkeys(_origin(figures) for figures in [*filter(None, [gpu]), *cpu])
    said = [NOTES, *origins]
    said += [_kept(figures) for figures in cpu if "saved_ratio_a_clip" in figures]
    text = fill(" ".join(said), COLUMNS, break_long_words=False, break_on_hyphens=False)
    return "\n".join([table(HEAD, lines), f"{text}\n", *_picture(results)])


def _of_target_device(results: Path) -> Figures | None:
    """The file of the step on the device that the targets are for, if it ran it."""
    for file in sorted(results.glob(f"*/{GPU_FILE}.json")):
        figures: Figures = json.loads(file.read_text())
        if DEVICE in figures["environment"]["device"]:
            return figures
    return None


def _gpu_lines(figures: Figures | None) -> list[list[str]]:
    rows = figures["rows"] if figures else []
    row = next((row for row in rows if (row["op"], row["direction"]) == GPU_ROW), None)
    step = f"base V1 on an {DEVICE}, bf16, with AdamW"
    if row is None:
        return [
            [step, OURS, NOT_YET, "", NOT_YET],
            *(["", name, NOT_YET, NOT_YET, NOT_YET] for name in GPU_PEERS.values()),
        ]
    step += f", {row['clips']} clips"
    lines = [[step, OURS, number(row["clips_per_s"]), "", f"{number(row['peak_gib'])} GiB"]]
    for key, name in GPU_PEERS.items():
        if key not in row["peers"]:
            lines.append(["", name, NOT_YET, NOT_YET, NOT_YET])
            continue
        peer, speedup = row["peers"][key], row["speedup"][key]
        clips_per_s = 1e3 * row["clips"] / peer["time_ms"]
        memory = f"{number(peer['peak_gib'])} GiB"
        lines.append(["", name, number(clips_per_s), f"{speedup:.2f}x", memory])
    return lines


def _cpu_lines(figures: Figures) -> list[list[str]]:
    environment = figures["environment"]
    units = f" ({environment['vector_units']})" if "vector_units" in environment else ""
    cores = f", {environment['threads']} cores" if "threads" in environment else ""
    step = f"{figures['what']}, on an {environment['device']}{units}{cores}"

    def line(first: str, name: str, prefix: str, speedup: str) -> list[str]:
        clips_per_s = figures["ours_clips_per_s"] * figures["ours_s"] / figures[f"{prefix}_s"]
        memory = f"{number(figures[f'{prefix}_peak_tensors_mib'])} MiB"
        return [first, name, number(clips_per_s), speedup, memory]

    lines = [line(step, OURS, "ours", "")]
    for prefix, name in CPU_PEERS.items():
        if f"{prefix}_s" in figures:
            speedup = figures[f"{prefix}_s"] / figures["ours_s"]
            lines.append(line("", name, prefix, f"{speedup:.2f}x"))
    return lines


def _origin(figures: Figures) -> str:
    names = ("torch", "transformers", "driver")
    return f"{figures['environment']['device']}: {versions(figures['environment'], names)}."


def _kept(figures: Figures) -> str:
    return (
        f"For the backward pass a clip keeps {number(figures['saved_ratio_a_clip'])} of what it "
        f"keeps in plain PyTorch ({figures['what'].split(', ')[-1]})."
    )


def _picture(results: Path) -> list[str]:
    """The picture, with its caption for those who cannot see it."""
    found = [file for name in PICTURES for file in sorted(results.glob(f"*/{name}.png"))]
    if not found:
        return []
    kept = json.loads(found[0].with_suffix(".json").read_text())
    alt = sentence(kept.get("title", kept["what"]))
    return [f"![{alt}](benchmarks/{'/'.join(found[0].parts[-3:])})\n"]
