"""The licence of weights, and how a checkpoint states it.

What was released with VideoMAE (V1) is CC BY-NC 4.0, and that holds for whatever is made from it.
So the licence is a setting of the model: it goes from a checkpoint into a run that starts from it,
and into whatever is saved.

A checkpoint states its licence itself ("license" in our config.json, in Hugging Face's, in the
args of a .pth), or in the front matter of its README.md, as folders from the hub do, or by saying
that it comes from one of V1's folders on the hub. A foreign one that states none gets
:data:`UNSTATED`: nobody but its owner knows where it came from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RELEASED = "cc-by-nc-4.0"
UNSTATED = f"unknown: {RELEASED} if these are weights released with VideoMAE"

# Where V1's weights lie on the hub; transformers writes the name of what a model started from.
_RELEASED_NAMES = re.compile(r"MCG-NJU/videomae-", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def is_stated(licence: str | None) -> bool:
    """Whether a checkpoint names a licence, rather than leaving open which one."""
    return licence is not None and licence != UNSTATED


def of_huggingface(folder: Path, settings: Mapping[str, Any]) -> tuple[str | None, str]:
    """Licence of a Hugging Face folder, and what that is known from."""
    if settings.get("license"):
        return str(settings["license"]), "config.json"
    readme = folder / "README.md"
    if readme.is_file():
        stated = read_front_matter(readme.read_text(errors="replace"))
        if stated is not None:
            return stated, "README.md"
    if _RELEASED_NAMES.match(str(settings.get("_name_or_path") or "")):
        return RELEASED, f"config.json, which says it comes from {settings['_name_or_path']}"
    if "license" in settings:
        # Written here, from weights that nothing is known to restrict.
        return None, "config.json"
    return UNSTATED, "neither config.json nor README.md states one"


def of_args(args: Mapping[str, Any]) -> tuple[str | None, str]:
    """Licence of a ``.pth`` by its args, and what that is known from."""
    if "license" in args:
        return args["license"], "args"
    return UNSTATED, "the file states none"


def read_front_matter(text: str) -> str | None:
    """The licence in a README's front matter; None where it has none, or says "unknown"."""
    block = _FRONT_MATTER.match(text.lstrip("\ufeff").replace("\r\n", "\n"))
    if block is None:
        return None
    said = dict(re.findall(r"^(license|license_name):[ \t]*(.*?)[ \t]*$", block[1], re.MULTILINE))
    # Of a licence without a name of its own on the hub, license_name says which.
    value = said.get("license", "").strip("\"'")
    value = said.get("license_name", "").strip("\"'") or value if value == "other" else value
    return value if value not in ("", "unknown") else None


def model_card(licence: str) -> str:
    """A README.md whose front matter the hub, and :func:`read_front_matter`, read."""
    identifier = licence if is_stated(licence) else "unknown"
    about = (
        f"The weights they come from are under {licence}, and so are these."
        if is_stated(licence)
        else f"Licence: {licence}."
    )
    return (
        f"---\nlicense: {identifier}\nlibrary_name: transformers\n---\n\n"
        f"VideoMAE weights, written by vmae-fast. {about}\n"
    )
