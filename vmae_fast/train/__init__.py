"""The trainer: settings, the loop, checkpoints, metrics.

Importing this needs no more than the models do; what a run writes and reads with (safetensors,
tensorboard, tqdm, PyAV) is imported when it starts.
"""

from .config import ConfigError, ModelSettings, PretrainConfig, Schedule, load_config
from .inputs import RunError
from .loop import RunResult, pretrain

__all__ = [
    "ConfigError",
    "ModelSettings",
    "PretrainConfig",
    "RunError",
    "RunResult",
    "Schedule",
    "load_config",
    "pretrain",
]
