"""vmae-fast: masked video pretraining (VideoMAE V1 and V2), exact and quick.

>>> from vmae_fast import VideoMAE
>>> model = VideoMAE("base")
"""

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
