"""What convert and inspect share: which checkpoint is meant, and words about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from vmae_fast.models import SIZES, CheckpointError, VideoMAEConfig

# What the names of a part's tensors start with; the rest is the encoder's.
_PARTS = {
    "decoder": ("decoder.", "encoder_to_decoder.", "mask_token"),
    "classifier": ("classifier.",),
}


def find_checkpoint(path: str, *, ema: bool = False) -> str:
    """The checkpoint meant by ``path``: of a run's folder its latest one.

    Args:
        path: a checkpoint, or a run's folder.
        ema: take its averaged weights.

    Raises:
        CheckpointError: it has no averaged weights.
    """
    from vmae_fast.train.run_folder import RunFolder

    found = RunFolder(Path(path).expanduser()).latest()
    checkpoint = path if found is None else str(found)
    if not ema:
        return checkpoint
    averaged = Path(checkpoint).expanduser() / "ema"
    if not averaged.is_dir():
        raise CheckpointError(
            f"--ema: {checkpoint} holds no averaged weights; a run keeps them where it was given "
            "--ema-decay. Without --ema the weights themselves are taken"
        )
    return str(averaged)


def part_of(name: str) -> str:
    """The part that a tensor of ours is in: encoder, decoder or classifier."""
    for part, starts in _PARTS.items():
        if name.startswith(starts):
            return part
    return "encoder"


def parameters(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Parameters of each part that ``state``, under our names, has."""
    counts: dict[str, int] = {}
    for name, tensor in state.items():
        counts[part_of(name)] = counts.get(part_of(name), 0) + tensor.numel()
    return counts


def millions(count: int) -> str:
    """A number of parameters as people say it: 86.2 M, 12.3 k."""
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return str(count)


def dtypes(state: Iterable[Tensor]) -> list[str]:
    """Names of the dtypes, the commonest first."""
    counts: dict[str, int] = {}
    for tensor in state:
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + tensor.numel()
    return sorted(counts, key=lambda name: -counts[name])


def published_size(config: VideoMAEConfig) -> tuple[str, bool] | None:
    """Name of the published size whose encoder this is, and whether the decoder is its too."""
    for name in SIZES:
        published = VideoMAEConfig.of(name)
        if _encoder(config) == _encoder(published):
            return name, _decoder(config) == _decoder(published)
    return None


def by(sizes: Iterable[int]) -> str:
    """Sizes as people write them: 8x14x14."""
    return "x".join(map(str, sizes))


def describe_grid(config: VideoMAEConfig) -> str:
    """Frames, pixels and tokens in a line."""
    return (
        f"{config.frames} frames of {by(config.size)}, tubelets of {by(config.tubelet)}: "
        f"{by(config.grid)} = {config.num_tokens} tokens"
    )


def _encoder(config: VideoMAEConfig) -> tuple[object, ...]:
    return (config.width, config.depth, config.heads, config.encoder_hidden, config.tubelet)


def _decoder(config: VideoMAEConfig) -> tuple[object, ...]:
    return (
        config.decoder_width, config.decoder_depth, config.decoder_heads, config.decoder_hidden
    )  # fmt: skip
