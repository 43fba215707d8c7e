"""Tensors that several processes wrote, each its part: ``shard-*.safetensors`` in a folder.

torch.distributed.checkpoint writes and reads them; the parts may be those of any number of
processes.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dialects import CheckpointError, State


def shard_files(folder: Path) -> list[Path]:
    """The files of a folder of shards; none where it is something else."""
    return sorted(folder.glob("shard-*-of-*.safetensors"))


def read_all_shards(folder: Path, *, shapes_only: bool = False) -> State:
    """Whole tensors of a folder of shards.

    Args:
        folder: holds nothing but the shards of one set of tensors.
        shapes_only: give tensors without data (on the device "meta").

    Raises:
        CheckpointError: a file is damaged or missing.
    """
    device = "meta" if shapes_only else "cpu"
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype, device=device)
        for name, about in _described(folder).items()
    }
    if not shapes_only:
        read_shards(folder, tensors)
    return tensors


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors from a folder of shards, by name.

    Args:
        folder: holds the shards; may hold further tensors.
        tensors: whole, or sharded in any way: of those only this process's part is read.

    Raises:
        CheckpointError: a file is damaged or missing, or there is no such tensor of this shape.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    held = _described(folder)
    for name, tensor in tensors.items():
        if name not in held or held[name].size != tensor.shape:
            found = tuple(held[name].size) if name in held else "none"
            raise CheckpointError(
                f"{folder}: {name} should have the shape {tuple(tensor.shape)}, found {found}"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            # Each process reads for itself.
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"{folder} cannot be read: {error}") from error


def _described(folder: Path) -> dict[str, Any]:
    """Shape, dtype and parts of every tensor, as torch.distributed.checkpoint has them."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        held = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: a shard is not a whole file: {error}") from error
    found: dict[str, Any] = dict(held)
    for name, about in found.items():
        size = math.prod(about.size)
        if sum(math.prod(chunk.sizes) for chunk in about.chunks) != size:
            raise CheckpointError(f"{folder}: a part of {name} is missing; were all shards copied?")
    return found
