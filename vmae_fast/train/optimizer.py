"""AdamW with VideoMAE's parameter groups, its learning rate schedule, and averaged weights."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vmae_fast.models import VideoMAE

from .config import OptimSettings
from .schedule import Schedule


def make_optimizer(model: VideoMAE, settings: OptimSettings) -> torch.optim.AdamW:
    """Fused AdamW; no decay on vectors (biases, norms, layer scale) and the mask token.

    The learning rate is set before every step by :func:`learning_rate`.
    """
    undecayed = model.no_weight_decay()
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.dim() > 1 and name not in undecayed].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": settings.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )


def learning_rate(step: int, schedule: Schedule) -> float:
    """Rate of step 0, 1, ...: linear from 0 over the warm-up, then half a cosine to min_lr.

    Source: VideoMAE's recipe (arXiv 2203.12602, appendix).
    """
    if step < schedule.warmup_steps:
        return schedule.lr * step / schedule.warmup_steps
    rest = schedule.total_steps - schedule.warmup_steps
    done = (step - schedule.warmup_steps) / rest
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return schedule.min_lr + (schedule.lr - schedule.min_lr) * cosine


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint keeps of it: its state dict with learning rates as numbers."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load :func:`optimizer_state`, also one that another implementation of AdamW wrote."""
    # How the update runs is this optimiser's own; its learning rate may be a tensor.
    names = ("lr", "fused", "foreach", "capturable")
    own = [{name: group[name] for name in names} for group in optimizer.param_groups]
    saved = state["param_groups"]
    groups = [{**group, **ours} for group, ours in zip(saved, own, strict=True)]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        place: {name: placed_as(parameters[place], value) for name, value in values.items()}
        for place, values in state["state"].items()
    }
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    for group, ours in zip(optimizer.param_groups, own, strict=True):
        group["lr"] = ours["lr"]


def placed_as(parameter: Any, value: Any) -> Any:
    """What is as large as a parameter sharded as it is; anything else as it came."""
    if not hasattr(parameter, "placements") or not isinstance(value, Tensor):
        return value
    if hasattr(value, "placements") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Each process has the whole of it, and takes its part.
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Global 2-norm of the gradients, as a scalar on their device; of sharded ones, of all."""
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class AveragedWeights:
    """Exponential moving average of a model's parameters.

    Args:
        model: averaged from its present weights on.
        decay: share of the average kept at each step, in (0, 1).
    """

    def __init__(self, model: VideoMAE, decay: float) -> None:
        self.decay = decay
        self.average = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: VideoMAE, skipped: Tensor) -> None:
        """Move the average towards the model's weights; not where ``skipped``, a scalar, is 1."""
        weights = [p.detach() for p in model.parameters()]
        share = (1 - self.decay) * (1 - skipped)
        torch._foreach_lerp_(self.average, weights, [share.to(w.dtype) for w in weights])

    @contextmanager
    def in_place(self, model: VideoMAE) -> Iterator[None]:
        """Context in which the model's weights are the average."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: VideoMAE) -> None:
        for average, parameter in zip(self.average, model.parameters(), strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)
