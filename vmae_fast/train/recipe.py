"""Settings in TOML: files, and the recipes that come with the package.

A table of the file is a group of settings. The sources of several ``[[data]]`` tables are mixed.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from .config import ConfigError, DataSettings, PretrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Settings by the name they have in a table where that is not their own.
_KEYS = {"path": "data", "root": "data_root"}
# What was asked of one start is not what the run is, whose settings are read when it goes on.
_OF_ONE_START = ("resume", "auto_resume", "overwrite", "profile")


def load_config(source: str | Path) -> PretrainConfig:
    """Read a TOML file, or a recipe by name ("tiny", "v1-base-k400", ...).

    Raises:
        ConfigError: no such file or recipe, not TOML, an unknown table or key (the nearest real
            one is named), or a value of the wrong type.
    """
    path = Path(source)
    if path.suffix == ".toml" or path.exists():
        if not path.is_file():
            raise ConfigError(f"no config file at {path}; {_recipes()}")
        text, name = path.read_text(), str(path)
    else:
        recipes = {Path(f.name).stem: f for f in _recipe_files()}
        if str(source) not in recipes:
            near = difflib.get_close_matches(str(source), recipes, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"no config file or recipe {str(source)!r}{hint}; {_recipes()}")
        text, name = recipes[str(source)].read_text(), f"recipe {source}"
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}") from error
    return _from_tables(tables, name)


def _recipes() -> str:
    names = sorted(Path(f.name).stem for f in _recipe_files())
    return f"recipes are {', '.join(names)}"


def _recipe_files() -> list[Any]:
    folder = resources.files("vmae_fast.configs")
    return [entry for entry in folder.iterdir() if entry.name.endswith(".toml")]


def to_toml(config: PretrainConfig) -> str:
    """The settings as TOML, those that are None left out, and those of one start too."""
    import tomli_w

    tables = dataclasses.asdict(config)
    mixture = tables.pop("mixture")
    for name in _OF_ONE_START:
        del tables["run"][name]
    written: dict[str, Any] = {table: _given(values) for table, values in tables.items()}
    written["data"] = _given_source(tables["data"])
    if mixture:
        written["data"] = [_given_source(source) for source in mixture]
    return tomli_w.dumps(written)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _given_source(values: dict[str, Any]) -> dict[str, Any]:
    spelt = {name: key for key, name in _KEYS.items()}
    return {spelt.get(name, name): value for name, value in _given(values).items()}


def _from_tables(tables: dict[str, Any], source: str) -> PretrainConfig:
    config = PretrainConfig()
    groups = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    home = {f.name: table for table, group in groups.items() for f in dataclasses.fields(group)}
    for table, values in tables.items():
        if table not in groups:
            if table in home and not isinstance(values, dict):
                raise ConfigError(f"{source}: {table!r} belongs into the table [{home[table]}]")
            raise ConfigError(f"{source}: unknown table [{table}]{_suggest(table, groups)}")
        if table == "data" and isinstance(values, list):
            config.mixture = [DataSettings() for _ in values]
            for number, (group, part) in enumerate(zip(config.mixture, values, strict=True)):
                _fill(group, part, home, f"{source}: [[data]] number {number + 1}")
            continue
        _fill(groups[table], values, home, f"{source}: [{table}]")
    if len(config.mixture) == 1:
        config.data, config.mixture = config.mixture[0], []
    return config


def _fill(group: Any, values: Any, home: dict[str, str], where: str) -> None:
    """Set the fields of a group from a table."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is a table, got {values!r}")
    types = typing.get_type_hints(type(group))
    for key, value in values.items():
        name = str(_KEYS.get(key, key)) if isinstance(group, DataSettings) else key
        if name not in types:
            belongs = home.get(name)
            hint = f"; it belongs into [{belongs}]" if belongs else _suggest(key, home)
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
        setattr(group, name, _typed(value, types[name], f"{where} {key}"))


def _typed(value: Any, kind: Any, where: str) -> Any:
    options = typing.get_args(kind) if not isinstance(kind, type) else (kind,)
    if typing.get_origin(kind) is Literal:
        options = (kind,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif type(value) is option:
            return value
        elif option is float and type(value) is int:
            return float(value)
    expected = " or ".join(
        ", ".join(map(repr, typing.get_args(option)))
        if typing.get_origin(option) is Literal
        else option.__name__
        for option in options
        if option is not type(None)
    )
    raise ConfigError(f"{where} must be {expected}, got {value!r}")


def _suggest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
