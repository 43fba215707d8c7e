"""What --help prints, from a dataclass of flags: fields are flags, their docstrings the help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

_OF_POSITIONALS = typing.cast(Any, Positional)[Any].__metadata__
# Group of what is given without a flag's name.
ARGUMENTS = "arguments"
# What a docstring says of a flag that is not given: "None: the list's own folder".
_UNLESS_GIVEN = re.compile(r"(?:^|(?<=[.;]))\s*None:? (?P<what>[^.;]*[^.;\s])[.;]?")
# As much of a docstring as a brief line takes.
_FIRST_CLAUSE = re.compile(r".*?(?=;|[.](?:\s|$)|\s[(]|$)")
# Longer lists of choices stand in the text.
_LONGEST_METAVAR = 13
# Narrower than this no text is laid out.
_NARROWEST = 40


@dataclass(frozen=True)
class Flag:
    """A line of the help.

    Attributes:
        group: title it stands under.
        about: what that group is, in a sentence.
        name: of the field, with hyphens.
        usage: as it is typed.
        text: what it does.
        default: what holds unless it is given, in words; empty for what must be given.
    """

    group: str
    about: str
    name: str
    usage: str
    text: str
    default: str


def flags_of(kind: type, default: Any, own: str, shown: Mapping[str, object]) -> list[Flag]:
    """The flags of a dataclass, and of the dataclasses in its fields, which are groups.

    Args:
        kind: the dataclass.
        default: an instance whose values are the defaults; None takes those of the fields.
        own: title of the group of its own flags.
        shown: by field, what to say of its default in the default's place.
    """
    return list(_walk(kind, default, own, "", shown))


def _walk(
    kind: type, default: Any, group: str, about: str, shown: Mapping[str, object]
) -> Iterator[Flag]:
    docs, types_of = _field_docs(kind), typing.get_type_hints(kind, include_extras=True)
    nested: list[Iterator[Flag]] = []
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        hint, value = types_of[field.name], _default(field, default)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            what = " ".join((hint.__doc__ or "").split())
            nested.append(_walk(hint, value, field.name, what, shown))
        else:
            yield _flag(field.name, hint, value, docs.get(field.name, ""), group, about, shown)
    for part in nested:
        yield from part


def _flag(
    field: str, hint: Any, value: Any, doc: str, group: str, about: str, shown: Mapping[str, object]
) -> Flag:
    name = field.replace("_", "-")
    positional = False
    if typing.get_origin(hint) is typing.Annotated:
        positional = any(mark in _OF_POSITIONALS for mark in hint.__metadata__)
        hint = hint.__origin__
    what = _UNLESS_GIVEN.search(doc)
    if what:
        doc = (doc[: what.start()] + doc[what.end() :]).strip().rstrip(";")
        doc += "" if doc.endswith(".") or not doc else "."
    metavar = _metavar(hint, field)
    if len(metavar) > _LONGEST_METAVAR and "|" in metavar:
        doc += f" One of {metavar.replace('|', ', ')}."
        metavar = field.rpartition("_")[2].upper()
    if field in shown:
        text = str(shown[field]) if metavar == "True|False" else _words(shown[field])
    elif value is None:
        text = what["what"] if what else ""
    else:
        text = "" if value is dataclasses.MISSING else _words(value)
    usage = f"--{name} {metavar}".rstrip()
    if positional:
        needed = value is dataclasses.MISSING
        return Flag(ARGUMENTS, "", name, name.upper() if needed else f"[{name.upper()}]", doc, text)
    if hint is bool and value is True:
        usage = f"--{name}, --no-{name}"
    return Flag(group, about, name, usage, doc, text)


def _default(field: dataclasses.Field[Any], default: Any) -> Any:
    if default is not None and default is not dataclasses.MISSING:
        return getattr(default, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, in one line."""
    docs = {}
    for one in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(one):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def _metavar(hint: Any, field: str) -> str:
    """What stands for the value: N, X, PATH, auto|on|off, or the field's own name."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        several = [_metavar(one, field) for one in options if one is not type(None)]
        return several[0].replace("", "True|False", not several[0]) if len(several) == 1 else (
            "|".join(several)
        )  # fmt: skip
    if origin is Literal:
        return "|".join(map(str, options))
    if origin in (tuple, list):
        repeated = options[-1] is Ellipsis or origin is list
        return _metavar(options[0], field) + " ..." if repeated else (
            " ".join(_metavar(one, field) for one in options)
        )  # fmt: skip
    known = {bool: "", int: "N", float: "X", Path: "PATH"}
    return known.get(hint, field.rpartition("_")[2].upper())


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return " ".join(map(_words, value)) or "none"
    return str(value) or "none"


def layout(
    head: str,
    description: str,
    flags: Sequence[Flag],
    *,
    width: int,
    brief: bool = False,
    examples: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """The help as text, no line of it wider than a terminal.

    Args:
        head: the usage, in a line.
        description: what the command does.
        flags: those to list.
        width: columns of the terminal.
        brief: a line each where that will do: the first clause of what it does, no empty lines.
        examples: command lines.
        notes: sentences at the end.
    """
    width = max(width, _NARROWEST)
    column = min(max((len(flag.usage) for flag in flags), default=0) + 4, width * 3 // 8)
    sections = [_wrapped(head, width, below="  " * 4), _wrapped(description, width)]
    for group in dict.fromkeys(flag.group for flag in flags):
        rows = [flag for flag in flags if flag.group == group]
        about = "" if brief else rows[0].about
        lines = [_wrapped(f"{group}: {about}".removesuffix(": "), width, below="  ")]
        lines += [_row(flag, column, width, brief) for flag in rows]
        sections.append("\n".join(lines))
    if brief:
        sections[2:] = ["\n".join(sections[2:])]
    if examples:
        lines = [_command(example, width) for example in examples]
        sections.append("\n".join(["examples", *lines]))
    if notes:
        sections.append("\n".join(_wrapped(note, width, below="  ") for note in notes))
    return "\n\n".join(sections)


def _row(flag: Flag, column: int, width: int, brief: bool) -> str:
    text = flag.text
    if brief and (first := _FIRST_CLAUSE.match(text)):
        text = first[0]
    default = f"[{flag.default}]" if flag.default else ""
    if not text and not default:
        return f"  {flag.usage}"
    # The default stays in one piece where a line takes it.
    kept = default.replace(" ", "\0") if len(default) < width - column else default
    left = f"  {flag.usage}"
    first_line = left.ljust(column) if len(left) <= column - 2 else " " * column
    lines = _wrapped(f"{text} {kept}".strip(), width, above=first_line, below=" " * column)
    lines = lines.replace("\0", " ")
    return lines if first_line.strip() else f"{left}\n{lines}"


def _wrapped(text: str, width: int, *, above: str = "", below: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=above, subsequent_indent=below, break_on_hyphens=False
    )


def _command(line: str, width: int) -> str:
    """A command line that can be pasted, however many lines it takes."""
    parts = textwrap.wrap(
        line, width - 6, break_on_hyphens=False, break_long_words=False
    )  # fmt: skip
    return "\n".join(
        ("  " if number == 0 else "    ") + part + (" \\" if number < len(parts) - 1 else "")
        for number, part in enumerate(parts)
    )
