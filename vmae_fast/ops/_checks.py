"""Argument checks shared by the ops: each names the argument, what was expected, what came."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class BackendError(RuntimeError):
    """The implementation that was demanded cannot run, or one that was built cannot be loaded."""


_debug = os.environ.get("VMAE_FAST_DEBUG", "0") not in ("", "0")


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Check the values of indices too, in all threads, while the context lasts.

    Every index tensor must lie within the tokens it counts and be distinct within each clip;
    reading them back stalls a GPU, so this is off unless asked for. The environment variable
    ``VMAE_FAST_DEBUG=1`` asks for it everywhere. Not in effect inside ``torch.compile``.

    Args:
        enabled: False turns the checks off.

    Example:
        >>> import torch
        >>> from vmae_fast import ops
        >>> with ops.debug():
        ...     ops.gather_tokens(torch.randn(1, 4, 8), torch.tensor([[4, 0]]))
        Traceback (most recent call last):
        IndexError: idx holds 4 in clip 0; positions must lie in 0..3
    """
    global _debug
    before, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = before


def check(condition: bool, message: Callable[[], str]) -> None:
    """Raise ValueError unless ``condition`` holds.

    The message is made only then: it costs time, and writing out a shape would make the compiler
    take it for a constant.
    """
    if not condition:
        raise ValueError(message())


def check_video(video: Tensor, tubelet: tuple[int, int, int]) -> tuple[int, int, int]:
    """Check a ``(B, C, T, H, W)`` video against a tubelet; return its grid ``(t, h, w)``."""
    check(
        video.dim() == 5,
        lambda: f"video must be (B, C, T, H, W), 5 dimensions, got shape {tuple(video.shape)}",
    )
    check(
        video.dtype == torch.uint8 or video.is_floating_point(),
        lambda: f"video must be uint8 (0..255) or floating point (normalised), got {video.dtype}",
    )
    check(
        len(tubelet) == 3 and min(tubelet) > 0,
        lambda: f"tubelet must be three positive sizes (pt, ph, pw), got {tuple(tubelet)}",
    )
    for name, size, step in zip(
        ("frames", "height", "width"), video.shape[2:], tubelet, strict=True
    ):
        if size == 0 or size % step:
            raise ValueError(
                f"video has {size} {name}, which is not a multiple of the tubelet's {step}"
            )
    t, h, w = (size // step for size, step in zip(video.shape[2:], tubelet, strict=True))
    return t, h, w


def check_index(name: str, idx: Tensor, batch: int, num_tokens: int) -> None:
    """Check an integer ``(B, n)`` index tensor, and in debug mode what it holds."""
    check(
        idx.dtype in (torch.int32, torch.int64),
        lambda: f"{name} must be int32 or int64, got {idx.dtype}",
    )
    check(
        idx.dim() == 2 and idx.shape[0] == batch,
        lambda: f"{name} must be (B, n) with B={batch}, got shape {tuple(idx.shape)}",
    )
    if _debug and not torch.compiler.is_compiling():
        _check_positions(name, idx.detach().cpu(), num_tokens)


def _check_positions(name: str, idx: Tensor, num_tokens: int) -> None:
    outside = ((idx < 0) | (idx >= num_tokens)).nonzero()
    if len(outside):
        clip, place = outside[0].tolist()
        raise IndexError(
            f"{name} holds {idx[clip, place].item()} in clip {clip}; "
            f"positions must lie in 0..{num_tokens - 1}"
        )
    ordered = idx.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).nonzero()
    if len(twice):
        clip, place = twice[0].tolist()
        raise IndexError(
            f"{name} holds {ordered[clip, place].item()} more than once in clip {clip}; "
            "positions must be distinct within each clip"
        )


def check_channels(name: str, values: tuple[float, ...], channels: int) -> None:
    """Check one value per video channel."""
    check(
        len(values) == channels,
        lambda: f"{name} must hold one value per channel ({channels}), got {len(values)}",
    )


def check_same_device(first: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Check that tensors that meet in one kernel are on one device."""
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ValueError(
                f"{name} is on {other.device} but {first} is on {tensor.device}; move one of them"
            )
