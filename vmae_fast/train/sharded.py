"""A model sharded over processes by FSDP2: each keeps a part of weights, gradients and moments."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmae_fast.models import VideoMAE

from .distributed import Ranks
from .graph import is_sharded

# Of AdamW's state those that are as large as the weights.
_MOMENTS = ("exp_avg", "exp_avg_sq")


def shard(model: VideoMAE, ranks: Ranks, autocast_dtype: torch.dtype | None) -> None:
    """Shard a model in place, block by block; what is outside of blocks is one more unit.

    The weights stay fp32. Under autocast they are gathered in its dtype, and gradients are summed
    in fp32. Where FSDP cannot be had, or there is one process, nothing is done.

    Args:
        model: whole, on its device, the same on all processes.
        ranks: this process.
        autocast_dtype: of the forward pass; None without autocast.
    """
    if ranks.world_size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # Blocks return views that nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    # Autocast casts what goes into a layer; the residual stream keeps its own dtype.
    policy = MixedPrecisionPolicy(
        param_dtype=autocast_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for part in (model.encoder, model.decoder):
        for block in part.blocks if part is not None else ():
            fully_shard(block, mesh=mesh, mp_policy=policy)
    sharded: Any = fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(sharded, "encode")


def sync_gradients(model: VideoMAE, exchange: bool) -> None:
    """Say whether the next backward pass sums the gradients over processes, or adds to its own."""
    sharded: Any = model
    sharded.set_requires_gradient_sync(exchange)


@contextmanager
def gathered(model: VideoMAE) -> Iterator[None]:
    """Hold all weights on every process, so that each may run the model as often as it likes."""
    units = list(_units(model))
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            # As fully_shard has it: the outermost unit's weights are wanted again at once.
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def _units(model: VideoMAE) -> Iterator[Any]:
    if not is_sharded(model):
        return
    from torch.distributed.fsdp import FSDPModule

    yield from (module for module in model.modules() if isinstance(module, FSDPModule))


# ---- checkpoints --------------------------------------------------------------------------


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write sharded tensors as safetensors, a file a process; all processes call this.

    Raises:
        OSError: this process or another one could not write its part.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(tensors, storage_writer=writer)
    except CheckpointException as error:
        failed, (reason, _trace) = next(iter(sorted(error.failures.items())))
        raise OSError(f"process {failed} could not write to {folder}: {reason}") from error


def write_moments(folder: Path, model: VideoMAE, optimizer: torch.optim.Optimizer) -> None:
    """Write AdamW's moments with :func:`write_shards`."""
    moments = {
        f"{kind}.{name}": optimizer.state[parameter][kind]
        for name, parameter in model.named_parameters()
        for kind in _MOMENTS
        if parameter in optimizer.state
    }
    write_shards(folder, moments)


def read_moments(
    folder: Path, model: VideoMAE, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """``state`` with the moments that :func:`write_moments` wrote.

    Args:
        folder: where they are; nothing is read where it is not there.
        model: sharded in any way, or whole: each process reads its part.
        optimizer: AdamW over its parameters.
        state: an optimiser's state dict without moments.

    Raises:
        CheckpointError: they cannot be read, or are another model's.
    """
    from vmae_fast.models.shards import read_shards

    if not folder.is_dir():
        return state
    named = {parameter: name for name, parameter in model.named_parameters()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = {
        f"{kind}.{named[parameter]}": torch.zeros_like(parameter.detach())
        for parameter in order
        for kind in _MOMENTS
    }
    read_shards(folder, found)
    states = {
        place: state["state"][place]
        | {kind: found[f"{kind}.{named[parameter]}"] for kind in _MOMENTS}
        for place, parameter in enumerate(order)
    }
    return {**state, "state": states}


def without_moments(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state dict, of each parameter's state what is small."""
    small = {
        place: {name: value for name, value in values.items() if name not in _MOMENTS}
        for place, values in state["state"].items()
    }
    return {**state, "state": small}
