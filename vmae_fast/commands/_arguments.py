"""Command lines: what is read before the rest, tyro's parser, and help that fits the screen."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from ._help import ARGUMENTS, Flag, flags_of, layout

T = TypeVar("T")


def parse(
    kind: type[T],
    *,
    prog: str,
    description: str,
    args: list[str],
    default: T | None = None,
    usual: Sequence[str] = (),
    examples: Sequence[str] = (),
    config: bool = False,
    shown: Mapping[str, object] | None = None,
) -> T:
    """Read a command's flags into a dataclass, or print its help and exit.

    ``--help`` shows the usual flags, ``--help-all`` all of them, ``--help GROUP`` those of one
    field of the dataclass that is a dataclass itself. A flag is named after its field alone.

    Args:
        kind: the dataclass; the string under each field is its help, in which "None: ..." says
            what holds where None is the default.
        prog: how the command is called.
        description: what it does.
        args: the command line after the command.
        default: values of what is not given; None takes those of the fields.
        usual: names of the flags that ``--help`` shows; none is all of them.
        examples: command lines to show.
        config: the command takes ``--config`` too (:func:`take_option` reads it before).
        shown: by field, what help says of its default in the default's place.

    Raises:
        SystemExit: help was asked for (status 0), or a flag is wrong (status 2).
    """
    import tyro

    topic = _topic(args)
    if topic is not None:
        flags = flags_of(kind, default, "options", shown or {})
        if config:
            flags.insert(0, _config_flag((shown or {}).get("config", "")))
        flags.sort(key=lambda flag: flag.group != ARGUMENTS)
        _show(_help(topic, flags, prog, description, usual, examples), topic)
        raise SystemExit(0)
    given: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        kind,
        prog=prog,
        description=description,
        args=args,
        config=(tyro.conf.OmitArgPrefixes,),
        **given,
    )


def _config_flag(default: object) -> Flag:
    """``--config``, which is no field of a dataclass."""
    folder = resources.files("vmae_fast.configs")
    recipes = sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml"))
    text = f"Settings to start from: a TOML file, or a recipe ({', '.join(recipes)})."
    return Flag("options", "", "config", "--config TOML", text, str(default))


def _topic(args: list[str]) -> str | None:
    """What help is asked for: "" the usual flags, "all", or a group; None is no help."""
    for number, arg in enumerate(args):
        if arg == "--help-all":
            return "all"
        if arg in ("-h", "--help"):
            following = args[number + 1 : number + 2]
            return following[0] if following and not following[0].startswith("-") else ""
    return None


def _help(
    topic: str,
    flags: list[Flag],
    prog: str,
    description: str,
    usual: Sequence[str],
    examples: Sequence[str],
) -> str:
    groups = list(dict.fromkeys(flag.group for flag in flags))
    several = len(groups) > 1 and usual
    if topic not in ("", "all", *groups) and several:
        there_are = ", ".join(groups)
        print(f"{prog}: no group of flags {topic!r}; there are {there_are}", file=sys.stderr)
        raise SystemExit(2)
    arguments = [flag.usage for flag in flags if flag.group == ARGUMENTS]
    notes = ["[ ] is what holds unless given."] if any(flag.default for flag in flags) else []
    brief = topic == "" and bool(usual)
    if brief:
        group = next((name for name in groups if name not in (ARGUMENTS, "options")), "options")
        notes.append(f"all flags: {prog} --help-all; one group: --help {group}")
        wanted = {name.removeprefix("--").replace("_", "-") for name in usual} | {"config"}
        flags = [flag for flag in flags if flag.name in wanted or flag.group == ARGUMENTS]
    elif topic in groups and several:
        flags, examples = [flag for flag in flags if flag.group == topic], ()
    return layout(
        " ".join([f"usage: {prog}", *arguments, *["[options]"] * (len(flags) > len(arguments))]),
        description,
        flags,
        width=shutil.get_terminal_size().columns,
        brief=brief,
        examples=examples,
        notes=notes,
    )


def _show(text: str, topic: str) -> None:
    """Print it, by the pager where it is all flags and a terminal."""
    if topic == "all" and sys.stdout.isatty():
        import pydoc

        pydoc.pager(text)
        return
    print(text)


def shown_of_model(model: Any, args: list[str], of_checkpoint: bool = False) -> dict[str, object]:
    """What help says of the settings of a model that are not set.

    Args:
        model: the settings (:class:`~vmae_fast.train.ModelSettings`).
        args: flags, for ``--model``.
        of_checkpoint: a checkpoint decides them, not the size.
    """
    from vmae_fast.models import SIZES, VideoMAEConfig

    unset = [name for name, value in vars(model).items() if value is None and name != "model"]
    if of_checkpoint:
        return dict.fromkeys(unset, "the checkpoint's")
    size = peek_option(args, "--model") or model.model or "base"
    if size not in SIZES:
        return {}
    config = VideoMAEConfig.of(size)
    square = {"image_size": config.size[0], "patch_size": config.tubelet[1]}
    return {name: square.get(name, getattr(config, name)) for name in unset}


def take_option(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of an option and the arguments without it."""
    rest, value = [], None
    remaining = iter(args)
    for arg in remaining:
        if arg == name:
            value = next(remaining, None)
            if value is None:
                from vmae_fast.train import ConfigError

                raise ConfigError(f"{name} needs a value")
        elif arg.startswith(f"{name}="):
            value = arg.split("=", 1)[1]
        else:
            rest.append(arg)
    return value, rest


def peek_option(args: list[str], name: str) -> str | None:
    """The value of an option."""
    return take_option(args, name)[0]
