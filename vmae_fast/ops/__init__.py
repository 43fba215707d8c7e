"""The operations everything is built from: public functions that check their arguments.

Implementations live in :mod:`vmae_fast.kernels`; models and trainer never call those directly.
"""

from ._attention_choice import attention_kernel
from ._backend import backend, backend_summary
from ._checks import BackendError, debug
from .attention import attention, cross_attention
from .bias_gelu import bias_gelu
from .bias_gelu_linear import bias_gelu_linear
from .divided_attention import ATTENTION_AXES, divided_attention
from .layer_norm import add_layer_norm, layer_norm
from .layer_norm_linear import (
    add_layer_norm_linear,
    add_layer_norm_query_key_value,
    layer_norm_linear,
)
from .linear import linear
from .linear_masked_mse import linear_masked_mse
from .masked_mse import masked_mse, pixel_targets, weighted_mean, zero_prediction_mse
from .token_gather import decoder_tokens, gather_tokens, shared_tokens
from .tubelet_embed import tubelet_embed

__all__ = [
    "ATTENTION_AXES",
    "BackendError",
    "add_layer_norm",
    "add_layer_norm_linear",
    "add_layer_norm_query_key_value",
    "attention",
    "attention_kernel",
    "backend",
    "backend_summary",
    "bias_gelu",
    "bias_gelu_linear",
    "cross_attention",
    "debug",
    "decoder_tokens",
    "divided_attention",
    "gather_tokens",
    "layer_norm",
    "layer_norm_linear",
    "linear",
    "linear_masked_mse",
    "masked_mse",
    "pixel_targets",
    "shared_tokens",
    "tubelet_embed",
    "weighted_mean",
    "zero_prediction_mse",
]
