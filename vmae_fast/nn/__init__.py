"""Drop-in modules over the ops: parameters named and shaped as in what they replace."""

from .attention import Attention, DividedAttention
from .block import DividedSpaceTimeBlock, DropPath, JointSpaceTimeBlock, SharedTokens
from .embed import GatherVisible, TubeletEmbed
from .linear import Linear
from .loss import MaskedMSELoss
from .mlp import MLP
from .norm import LayerNorm, Residual

__all__ = [
    "MLP",
    "Attention",
    "DividedAttention",
    "DividedSpaceTimeBlock",
    "DropPath",
    "GatherVisible",
    "JointSpaceTimeBlock",
    "LayerNorm",
    "Linear",
    "MaskedMSELoss",
    "Residual",
    "SharedTokens",
    "TubeletEmbed",
]
