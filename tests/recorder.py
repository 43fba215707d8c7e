"""What a CUDA graph does, on the CPU: the same ops on the same memory with the same host values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostReadError(RuntimeError):
    """A value came to the host, as nothing can while a graph is recorded."""


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs, out))):
            return out
        results = tree_leaves(out)
        host = any(isinstance(result, bool | int | float) for result in results)
        # The shape of what nonzero gives is read from the device.
        if host or func.overloadpacket is torch.ops.aten.nonzero:
            raise HostReadError(f"{func} tells the host {out}")
        returns = func._schema.returns
        if not (returns and all(r.alias_info and not r.alias_info.is_write for r in returns)):
            # Views are not computed: what they look at is.
            self.calls.append((func, args, kwargs, results))
        return out


class Recorder:
    """Records a function's ops with the tensors they had; ``replays`` counts what was repeated."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(
        self, function: Callable[[], None], prepare: Callable[[], None] = lambda: None
    ) -> Callable[[], None]:
        prepare()
        function()  # the warm-up
        prepare()
        with _Recording() as recording:
            function()

        @torch.no_grad()
        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, results in recording.calls:
                again = tree_leaves(func(*args, **kwargs))
                for held, fresh in zip(results, again, strict=True):
                    if isinstance(held, Tensor) and held is not fresh:
                        held.detach().copy_(fresh)

        return replay
