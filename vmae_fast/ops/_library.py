"""Registration of ops with torch.library: one function, the same for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmae_fast import profiling

NAMESPACE = "vmae_fast"


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
) -> Any:
    """Define an op and return it, for calling.

    Args:
        schema: as torch.library's, without the namespace.
        implementation: for every device; runs below autograd, with autocast off.
        fake: the same for tensors without data: shapes, dtypes and strides only.
        flops: from the arguments' shapes to floating-point operations, a multiply-add counting
            2; None counts 0.
    """
    short, signature = schema.split("(", 1)
    name = f"{NAMESPACE}::{short}"
    torch.library.define(name, f"({signature}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd")(_runner(name, implementation))
    torch.library.register_fake(name, fake)
    op = getattr(getattr(torch.ops, NAMESPACE), short)
    register_flop_formula(op)(flops or (lambda *shapes, **more: 0))
    return op.default


def once_differentiable(op: Any, name: str) -> None:
    """Make a second derivative through a backward op an error that names the public op."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"{name} cannot be differentiated twice")

    torch.library.register_autograd(op, refuse)


def refuse_double_backward(name: str) -> None:
    """To be called in the backward pass of an op that keeps more than its inputs.

    Autograd cannot see how what was kept depends on the inputs: a second derivative would leave
    that out without a word.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} cannot be differentiated twice (create_graph=True)")


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What a product with ``weight`` is computed in: autocast's dtype where that is on."""
    kind = weight.device.type
    if weight.dtype != torch.float64 and autocasting(weight):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def autocasting(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor; never for those that have none."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _runner(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation in a range of the op's name, where those are on, and without autocast.

    Autocast would give other dtypes than the fake says; the public op has done its casts.
    """

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        if profiling.enabled():
            with profiling.span(name):
                return without_autocast(*args)
        return without_autocast(*args)

    def without_autocast(*args: Any) -> Any:
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        if not autocasting(tensor):
            return implementation(*args)
        with torch.autocast(tensor.device.type, enabled=False):
            return implementation(*args)

    return run
