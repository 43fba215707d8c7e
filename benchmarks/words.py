"""Figures, their names and tables of them, as people read them."""

from typing import Any

Figures = dict[str, Any]

NOTHING = "-"
NOT_YET = "not yet measured"
# How a name ends, and the unit that it is in.
UNITS = {
    "_gflop_per_s": "GFLOP/s",
    "_tflop_per_s": "TFLOP/s",
    "_clips_per_s": "clips/s",
    "_gb_per_s": "GB/s",
    "_percent_of_matmul": "% of a large product",
    "_percent_of_copy": "% of a large copy",
    "_percent": "%",
    "_gflop": "GFLOP",
    "_tflop": "TFLOP",
    "_gmac": "GMAC",
    "_flops": "FLOP",
    "_gpu_hours": "GPU-hours",
    "_bytes": "bytes",
    "_mib": "MiB",
    "_mb": "MB",
    "_gib": "GiB",
    "_ms": "ms",
    "_s": "s",
    "_m": "millions",
}
BARE_UNITS = {ending[1:]: unit for ending, unit in UNITS.items() if len(ending) > 2}
# Words that are written otherwise than in a name.
SPELT = BARE_UNITS | {"huggingface": "Hugging Face", "sdpa": "SDPA", "v1": "V1", "v2": "V2"}
SPELT |= {"h200": "H200", "gmacs": "GMACs", "gpu": "GPU"}


def number(value: float) -> str:
    """Three digits, without exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(value: object, nothing: str = NOTHING) -> str:
    """A figure of any kind: five digits, as papers print, thousands apart; ``nothing`` for None."""
    if value is None:
        return nothing
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
    if isinstance(value, list):
        # Without commas inside of a number.
        return ", ".join(cell(one, nothing).replace(",", "") for one in value)
    if isinstance(value, dict):
        return ", ".join(f"{in_words(key)} {cell(one, nothing)}" for key, one in value.items())
    # A bar would end the cell.
    return str(value).replace("|", "\\|")


def in_words(name: str) -> str:
    """The name of a figure with its unit: forward_ms is "forward, ms"."""
    if name in BARE_UNITS:
        return BARE_UNITS[name]
    ending = next((ending for ending in UNITS if name.endswith(ending)), "")
    words = [SPELT.get(word, word) for word in name.removesuffix(ending).split("_")]
    return " ".join(words) + (f", {UNITS[ending]}" if ending else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def sentence(text: str) -> str:
    """Text that begins with a capital letter."""
    return text[:1].upper() + text[1:]


def versions(environment: Figures, names: tuple[str, ...]) -> str:
    """When, of which commit, and with which versions a file was made."""
    known = [f"{name} {environment[name]}" for name in names if name in environment]
    return ", ".join([environment["date"], f"commit {environment['commit']}", *known])
