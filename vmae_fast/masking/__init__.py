"""Masks: who sees what, as index tensors drawn on the device."""

from .hashing import clip_keys
from .mask import Mask
from .maskings import Masking

__all__ = ["Mask", "Masking", "clip_keys"]
