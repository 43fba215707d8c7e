"""The trainer: settings, the loop, checkpoints, metrics.

Importing this needs no more than the models do; what a run writes and reads with (safetensors,
tensorboard, tqdm, PyAV) is imported when it starts.
"""

from .config import ConfigError, DataSettings, ModelSettings, PretrainConfig
from .inputs import RunError
from .loop import RunResult, pretrain
from .recipe import load_config, to_toml
from .schedule import Schedule

__all__ = [
    "ConfigError",
    "DataSettings",
    "ModelSettings",
    "PretrainConfig",
    "RunError",
    "RunResult",
    "Schedule",
    "load_config",
    "pretrain",
    "to_toml",
]
