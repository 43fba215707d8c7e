"""Settings of commands that look at data without training: those that pretrain would take."""

from __future__ import annotations

from typing import Any, Protocol

from vmae_fast.models import VideoMAEConfig
from vmae_fast.train import (
    ConfigError,
    DataSettings,
    ModelSettings,
    PretrainConfig,
    load_config,
)

from ._arguments import take_option
from .pretrain import DEFAULT_RECIPE


class Looking(Protocol):
    """Flags that such commands have in common."""

    videos: str | None
    model: ModelSettings
    data: DataSettings


def settings_before_flags(args: list[str]) -> tuple[PretrainConfig, str | None, list[str]]:
    """What flags are laid over: a config file's or a recipe's settings, or the default recipe's.

    Returns:
        The settings, where they are from, and the flags that are left.
    """
    source, rest = take_option(args, "--config")
    flags = {arg.split("=")[0] for arg in rest}
    if source is None and "--model" not in flags:
        source = DEFAULT_RECIPE
        if not flags & {"-h", "--help", "--help-all"}:
            print(f"no --model or --config: taking the recipe {DEFAULT_RECIPE!r}, as pretrain does")
    base = PretrainConfig() if source is None else load_config(source)
    base.loading.cache = False
    return base, source, rest


def lay_over(base: PretrainConfig, options: Looking) -> None:
    """Take model and data from the flags; videos that are named take the place of all sources."""
    base.model, base.data = options.model, options.data
    if options.videos is not None:
        base.data.data, base.mixture = options.videos, []
    elif options.data.data is not None:
        base.mixture = []


def model_of(config: PretrainConfig) -> VideoMAEConfig:
    """The model's settings, without building it.

    Raises:
        ConfigError: sizes that do not divide.
    """
    try:
        model = VideoMAEConfig.of(config.model.model or "base", **config.model.overrides())
        _ = model.masking
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model


def shown_source(source: str | None) -> dict[str, Any]:
    """What help says of --config."""
    return {} if source is None else {"config": source}
