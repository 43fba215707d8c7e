"""Shared by the tests: Hugging Face models, videos, one table of tolerances."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import transformers

# Relative error of loss and gradients against Hugging Face's classes. In fp64 the bound is
# what their float32 mean, std and position constants allow.
PARITY_RTOL = {torch.float64: 1e-7, torch.float32: 1e-5}
# Relative error against a formula written out in the test, in fp64 throughout: rounding only.
EXACT_RTOL = 1e-12
# In a lower precision: this many times the error of the same computation done eagerly in it.
EAGER_FACTOR = 2.0

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def hf_config(**settings) -> transformers.VideoMAEConfig:
    """A small configuration with every dimension different."""
    # Here, so that what needs no Hugging Face model can be tested without the package.
    import transformers

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


def assert_as_accurate_as_eager(got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """``got`` may be at most EAGER_FACTOR times as far from the fp64 truth as ``eager``."""
    assert got.dtype == eager.dtype
    bound = EAGER_FACTOR * relative_error(eager, truth) + 1e-15
    assert relative_error(got, truth) <= bound


def make_video(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", seed: int = 0
) -> Tensor:
    """A ``(B, C, T, H, W)`` video of noise.

    ``layout`` "decoder" has the storage of a decoder's (B, T, H, W, C), permuted; "cropped" is a
    window of a larger video with every second frame.
    """
    generator = torch.Generator().manual_seed(seed)
    b, c, t, h, w = shape
    stored = {
        "contiguous": shape,
        "decoder": (b, t, h, w, c),
        "cropped": (b, c, 2 * t, h + 3, w + 5),
    }[layout]
    if dtype == torch.uint8:
        video = torch.randint(0, 256, stored, generator=generator, dtype=dtype)
    else:
        video = torch.randn(stored, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "decoder":
        return video.permute(0, 4, 1, 2, 3)
    return video if layout == "contiguous" else video[:, :, ::2, 2 : 2 + h, 1 : 1 + w]


def random_positions(batch: int, num_tokens: int, count: int, seed: int = 0) -> Tensor:
    """``(B, count)`` int64 distinct positions of each clip, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, num_tokens, generator=generator).argsort(dim=1)[:, :count]


def loss_and_gradients(
    model: torch.nn.Module,
    video: Tensor,
    mask: object,
    autocast: torch.dtype | None = None,
    **options: bool,
) -> dict[str, Tensor]:
    """The loss of a VideoMAE's step, as "loss", and every parameter's gradient by its name."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(video.device.type, autocast, enabled=autocast is not None):
        loss = model(video, mask, **options).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def joined(tensors: dict[str, Tensor]) -> Tensor:
    """All gradients of :func:`loss_and_gradients` in one fp64 vector, without the loss."""
    parts = [tensor.double().flatten() for name, tensor in tensors.items() if name != "loss"]
    return torch.cat(parts)
