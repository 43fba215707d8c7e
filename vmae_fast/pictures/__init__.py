"""Pictures of what a model is fed and makes of it, and of how its loss went.

Pillow and matplotlib are imported where they are used.
"""

from .curves import save_loss_curve
from .preview import PreviewClip, save_preview
from .reconstruction import (
    NORM_PIX_NOTE,
    Reconstruction,
    reconstruct,
    save_contact_sheet,
    save_video,
)

__all__ = [
    "NORM_PIX_NOTE",
    "PreviewClip",
    "Reconstruction",
    "reconstruct",
    "save_contact_sheet",
    "save_loss_curve",
    "save_preview",
    "save_video",
]
