"""Shared by the tests: Hugging Face models, videos, one table of tolerances."""

import torch
import transformers
from torch import Tensor

# Relative error of loss and gradients against Hugging Face's classes. In fp64 the bound is
# what their float32 mean, std and position constants allow.
PARITY_RTOL = {torch.float64: 1e-7, torch.float32: 1e-5}


def hf_config(**settings) -> transformers.VideoMAEConfig:
    """A small configuration with every dimension different."""
    values = {
        "image_size": 32,
        "patch_size": 8,
        "num_frames": 8,
        "tubelet_size": 2,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "decoder_hidden_size": 36,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 3,
        "decoder_intermediate_size": 60,
        "use_mean_pooling": False,
        "attn_implementation": "sdpa",
    }
    return transformers.VideoMAEConfig(**{**values, **settings})


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter a value that matters: biases, norms and mask token included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            # Norm weights stay near 1; everything else gets spread enough to be seen.
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.1 * noise)


def random_mask(batch: int, num_tokens: int, num_masked: int, seed: int = 0) -> Tensor:
    """``(B, N)`` boolean, True = masked, by argsort of noise."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, num_tokens, generator=generator).argsort(dim=1)
    return order < num_masked


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    truth = truth.double()
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()
