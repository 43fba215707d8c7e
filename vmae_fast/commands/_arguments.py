"""Flags that are read before the rest."""

from __future__ import annotations


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
