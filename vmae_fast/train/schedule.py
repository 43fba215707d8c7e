"""What follows from settings, data and the number of processes: steps, rates, batches."""

from __future__ import annotations

from dataclasses import dataclass

from .config import ConfigError, PretrainConfig

# Files per step that the published base learning rates are stated for.
LR_REFERENCE_FILES = 256
# Warm-up where none is set: V1 warms up for 40 of its 800 epochs.
WARMUP_SHARE = 0.05
# Largest micro-batch chosen without being asked; larger ones are the user's to try.
AUTO_MICRO_BATCH = 32


@dataclass(frozen=True)
class Schedule:
    """Numbers that follow from settings, data and the number of processes."""

    total_steps: int
    warmup_steps: int
    lr: float
    min_lr: float
    micro_batch: int
    accumulate: int
    files_per_step: float
    files_per_epoch: int

    @classmethod
    def of(
        cls,
        config: PretrainConfig,
        num_files: int,
        world_size: int,
        clips_per_epoch: int | None = None,
    ) -> Schedule:
        """Work out the schedule.

        Args:
            config: checked settings.
            num_files: files decoded in an epoch, held-out ones not counted.
            world_size: number of processes.
            clips_per_epoch: clips made of them; None takes the repeats of the settings, which are
                those of the first source.

        Raises:
            ConfigError: batch, micro-batch and processes do not divide, or the warm-up is longer
                than the run.
        """
        optim = config.optim
        if clips_per_epoch is None:
            clips_per_epoch = num_files * config.sources[0].repeats
        files_per_step = optim.batch_size * num_files / clips_per_epoch
        micro, per_rank = _micro_batch(config, world_size)

        def steps(epochs: float) -> int:
            return max(round(epochs * num_files / files_per_step), 1)

        total = optim.steps if optim.steps is not None else steps(optim.epochs)
        warmup = optim.warmup_steps
        if warmup is None:
            share = optim.warmup_epochs
            warmup = round(WARMUP_SHARE * total) if share is None else steps(share) if share else 0
        if warmup >= total and warmup:
            raise ConfigError(
                f"the warm-up of {warmup} steps is as long as the run of {total}; set "
                "--warmup-steps or --warmup-epochs"
            )
        scale = files_per_step / LR_REFERENCE_FILES
        return cls(
            total_steps=total,
            warmup_steps=warmup,
            lr=optim.base_lr * scale if optim.lr is None else optim.lr,
            min_lr=optim.base_min_lr * scale if optim.min_lr is None else optim.min_lr,
            micro_batch=micro,
            accumulate=per_rank // micro,
            files_per_step=files_per_step,
            files_per_epoch=num_files,
        )


def micro_batches(config: PretrainConfig, world_size: int) -> list[int]:
    """The micro-batches that can be chosen, smallest first; the last is all of a process's step.

    Raises:
        ConfigError: the batch does not divide over the processes.
    """
    optim = config.optim
    several = {source.repeats for source in config.sources}
    # Where sources differ, a file may be cut between two micro-batches and is decoded for both.
    repeats = several.pop() if len(several) == 1 else 1
    per_rank, rest = divmod(optim.batch_size, world_size)
    if rest or per_rank % repeats:
        raise ConfigError(
            f"batch_size={optim.batch_size} does not divide over {world_size} processes into "
            f"whole files of {repeats} repeats; {world_size * repeats} and its multiples do"
        )
    return [m for m in range(repeats, per_rank + 1, repeats) if per_rank % m == 0]


def _micro_batch(config: PretrainConfig, world_size: int) -> tuple[int, int]:
    """Clips at a time on each process, and in a step."""
    possible, micro = micro_batches(config, world_size), config.optim.micro_batch
    per_rank = possible[-1]
    if micro is None:
        micro = max([m for m in possible if m <= AUTO_MICRO_BATCH], default=possible[0])
    elif micro not in possible:
        raise ConfigError(
            f"micro_batch={micro} must divide the {per_rank} clips of each process and be a "
            f"multiple of repeats={possible[0]}; {', '.join(map(str, possible))} do"
        )
    return micro, per_rank
