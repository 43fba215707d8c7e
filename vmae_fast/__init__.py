"""vmae-fast: masked video pretraining (VideoMAE V1 and V2), exact and quick.

>>> from vmae_fast import VideoMAE
>>> model = VideoMAE("base")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .masking import Mask, Masking, clip_keys
    from .models import SIZES, CheckpointError, VideoMAE, VideoMAEConfig, VideoMAEOutput

__version__ = "0.1.0"

__all__ = [
    "SIZES",
    "CheckpointError",
    "Mask",
    "Masking",
    "VideoMAE",
    "VideoMAEConfig",
    "VideoMAEOutput",
    "__version__",
    "clip_keys",
]


def __getattr__(name: str) -> Any:
    # On first use, so that the command line can set up its process before torch is loaded.
    if name in ("Mask", "Masking", "clip_keys"):
        return getattr(import_module("vmae_fast.masking"), name)
    if name in __all__:
        return getattr(import_module("vmae_fast.models"), name)
    if name in ("data", "masking", "models", "nn", "ops", "train"):
        return import_module(f"vmae_fast.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
