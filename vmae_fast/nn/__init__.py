"""Drop-in modules over the ops: parameters named and shaped as in what they replace."""

from .attention import Attention
from .block import MLP, Block, DropPath
from .embed import GatherVisible, TubeletEmbed
from .linear import Linear
from .loss import MaskedMSELoss

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "DropPath",
    "GatherVisible",
    "Linear",
    "MaskedMSELoss",
    "TubeletEmbed",
]
