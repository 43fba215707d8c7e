"""Models composed of the modules in :mod:`vmae_fast.nn`."""

from .config import SIZES, VideoMAEConfig
from .dialects import CheckpointError
from .videomae import VideoMAE, VideoMAEOutput

__all__ = ["SIZES", "CheckpointError", "VideoMAE", "VideoMAEConfig", "VideoMAEOutput"]
