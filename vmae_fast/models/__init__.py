"""Models composed of the modules in :mod:`vmae_fast.nn`."""

from .checkpoint import CheckpointError
from .config import SIZES, VideoMAEConfig
from .videomae import VideoMAE, VideoMAEOutput

__all__ = ["SIZES", "CheckpointError", "VideoMAE", "VideoMAEConfig", "VideoMAEOutput"]
