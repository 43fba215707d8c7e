"""Argument checks shared by the ops: each names the argument, what was expected, what came."""

import torch
from torch import Tensor


def check(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def check_video(video: Tensor, tubelet: tuple[int, int, int]) -> tuple[int, int, int]:
    """Check a ``(B, C, T, H, W)`` video against a tubelet; return its grid ``(t, h, w)``."""
    check(
        video.dim() == 5,
        f"video must be (B, C, T, H, W), 5 dimensions, got shape {tuple(video.shape)}",
    )
    check(
        video.dtype == torch.uint8 or video.is_floating_point(),
        f"video must be uint8 (0..255) or floating point (normalised), got {video.dtype}",
    )
    for name, size, step in zip(
        ("frames", "height", "width"), video.shape[2:], tubelet, strict=True
    ):
        check(
            size > 0 and size % step == 0,
            f"video has {size} {name}, which is not a multiple of the tubelet's {step}",
        )
    t, h, w = (size // step for size, step in zip(video.shape[2:], tubelet, strict=True))
    return t, h, w


def check_index(name: str, idx: Tensor, batch: int) -> None:
    """Check an integer ``(B, n)`` index tensor."""
    check(
        idx.dtype in (torch.int32, torch.int64),
        f"{name} must be int32 or int64, got {idx.dtype}",
    )
    check(
        idx.dim() == 2 and idx.shape[0] == batch,
        f"{name} must be (B, n) with B={batch}, got shape {tuple(idx.shape)}",
    )


def check_channels(name: str, values: tuple[float, ...], channels: int) -> None:
    """Check one value per video channel."""
    check(
        len(values) == channels,
        f"{name} must hold one value per channel ({channels}), got {len(values)}",
    )
