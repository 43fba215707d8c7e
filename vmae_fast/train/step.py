"""An optimiser step that runs on the device from end to end: nothing in it waits for the host."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vmae_fast.models import VideoMAE
from vmae_fast.profiling import span

from .distributed import Ranks
from .graph import Capture, is_sharded
from .optimizer import AveragedWeights, gradient_norm
from .sharded import sync_gradients
from .stop import STOP_SIGNALS

# Figures every process adds to the exchange of the loss: bad files, and each signal to stop.
NUM_FLAGS = 1 + len(STOP_SIGNALS)
# What clip_grad_norm_ adds to the norm.
_CLIP_EPS = 1e-6


class TrainStep:
    """Forward, backward and update, all of it enqueued.

    The update of a step whose loss or gradient norm is not finite is skipped: the weights, AdamW's
    state and the averaged weights stay as they were. With the bad step in a row that is one more
    than ``skip_nonfinite``, all later updates are skipped too, until the host has seen its figures.

    Args:
        model: on its device, with its parameters' gradients its own.
        optimizer: fused AdamW over them; its learning rate becomes a tensor on the device.
        autocast: gives the context of a forward pass.
        trained: the model wrapped in DistributedDataParallel, where there are several processes.
        ranks: the processes; None is this one alone.
        clip_grad: largest gradient norm; None does not clip.
        average: averaged weights to keep.
        accumulate: micro-batches of a step.
        skip_nonfinite: bad steps in a row after which a good one goes on.
        capture: records the step at its first micro-batch and repeats it from then on; all
            batches must have the shape of the first. None launches it op by op.

    Attributes:
        loss: the step's loss so far on this process, scalar on the device.
        found_inf: 1 where the last update was skipped, scalar on the device.
        bad_in_a_row: bad steps without a good one since, scalar on the device.

    Raises:
        ValueError: the optimiser is not fused, or what is to be recorded is one of several
            processes or a sharded model.

    Example:
        >>> import torch
        >>> from vmae_fast import VideoMAE, clip_keys
        >>> from vmae_fast.train.step import TrainStep
        >>> model = VideoMAE("tiny", frames=4, image_size=32)
        >>> step = TrainStep(model, torch.optim.AdamW(model.parameters(), fused=True))
        >>> video = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
        >>> step.forward_backward(video, clip_keys(0, 0, torch.arange(2)))
        >>> step.update(1e-4).shape
        torch.Size([3])
    """

    def __init__(
        self,
        model: VideoMAE,
        optimizer: torch.optim.Optimizer,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        trained: Any = None,
        ranks: Ranks | None = None,
        clip_grad: float | None = None,
        average: AveragedWeights | None = None,
        accumulate: int = 1,
        skip_nonfinite: int = 0,
        capture: Capture | None = None,
    ) -> None:
        self.device = device = next(model.parameters()).device
        self.model = model
        self.trained: Any = model if trained is None else trained
        self.ranks = Ranks(0, 1, device) if ranks is None else ranks
        self.autocast, self.clip_grad = autocast, clip_grad
        self.average, self.accumulate = average, accumulate
        self.skip_nonfinite = skip_nonfinite
        if not all(group.get("fused") for group in optimizer.param_groups):
            raise ValueError("optimizer must be AdamW(fused=True): only that skips on the device")
        if capture is not None and (self.ranks.world_size > 1 or is_sharded(model)):
            raise ValueError("capture records the steps of one process with all of the weights")
        self.optimizer, self._capture = optimizer, capture
        self._replay: dict[str, Callable[[], None]] = {}

        def scalar() -> Tensor:
            return torch.zeros((), device=device)

        self.loss, self.found_inf, self.lr, self.share = (scalar() for _ in range(4))
        self.bad_in_a_row = scalar()
        several = self.ranks.world_size > 1
        self.flags = torch.zeros(NUM_FLAGS if several else 0, device=device)
        self.stats = torch.zeros(3 + len(self.flags), device=device)
        self.video, self.keys = torch.empty(0), torch.empty(0)
        gated: Any = optimizer
        gated.found_inf = self.found_inf
        gated.grad_scale = None if clip_grad is None else scalar() + 1
        for group in optimizer.param_groups:
            group["lr"] = self.lr
            group["capturable"] = capture is not None

    def forward_backward(
        self, video: Tensor, keys: Tensor, share: float | Tensor | None = None, number: int = 0
    ) -> None:
        """Add a micro-batch to the gradients and to ``loss``.

        Args:
            video: as :class:`VideoMAE` takes it; on the device, or on the host and pinned.
            keys: ``(B,)`` int64, one a clip for its mask (:func:`~vmae_fast.clip_keys`), there too.
            share: the micro-batch's part of the step's loss; None is 1 / accumulate.
            number: which micro-batch of the step it is; 0 starts anew.

        Raises:
            ValueError: the step is recorded, and this batch has another shape or dtype.
        """
        share = 1 / self.accumulate if share is None else share
        if isinstance(share, Tensor):
            self.share.copy_(share, non_blocking=True)
        else:
            self.share.fill_(share)
        with span("copy to device"):
            self._stage(video, keys)
        if self._capture is not None and not self._replay:
            self._record(self._capture)
        if number == 0:
            self.loss.zero_()
        if self._replay:
            with span("recorded step"):
                self._replay["more" if number else "first"]()
            return
        if number == 0:
            self._drop_gradients()
        # Gradients are exchanged once a step, with the last micro-batch.
        with self._exchange(number == self.accumulate - 1):
            self._micro_step()

    def update(self, lr: float, *flags: float) -> Tensor:
        """Move the weights, unless this step or one before it was bad.

        Args:
            lr: learning rate.
            *flags: with several processes, :data:`NUM_FLAGS` figures to sum over them.

        Returns:
            fp32 vector on the device, overwritten by the next update: loss over all processes,
            gradient norm before clipping, bad steps in a row, sums of ``flags``.
        """
        self.lr.fill_(lr)
        if flags:
            self.flags.copy_(self._pinned(torch.tensor(flags).float()), non_blocking=True)
        with span("update"):
            if self._replay:
                self._replay["update"]()
            else:
                self._update()
        return self.stats

    def shares(self, keys: list[Tensor]) -> Tensor:
        """Each micro-batch's part of the step's loss: its part of all scored tokens.

        Args:
            keys: of each micro-batch.

        Returns:
            ``(accumulate,)`` fp32 on the device. DDP averages over processes, and over all of
            them these sum to their number.
        """
        with span("masks"):
            masks = [self.model.masking(self._here(each)) for each in keys]
        counts = torch.stack([torch.as_tensor(mask.scored_count()) for mask in masks]).float()
        total = self.ranks.sum(counts.sum())
        return counts / total * self.ranks.world_size

    def zero_prediction(self) -> Tensor:
        """Loss of predicting zeros for the last micro-batch, scalar on the device."""
        return self.model.zero_prediction(self.video, self.model.masking(self.keys))

    def _exchange(self, last: bool) -> AbstractContextManager[Any]:
        """Context of a micro-batch, in which gradients are summed over processes if it is last."""
        if is_sharded(self.model):
            sync_gradients(self.model, last)
            return nullcontext()
        return nullcontext() if last or self.ranks.world_size == 1 else self.trained.no_sync()

    def _micro_step(self) -> None:
        with span("masks"):
            mask = self.model.masking(self.keys)
        with span("forward"), self.autocast():
            part = self.trained(self.video, mask).loss * self.share
        with span("backward"):
            part.backward()
        self.loss += part.detach()

    @torch.no_grad()
    def _update(self) -> None:
        summed = self.loss.view(1)
        if self.ranks.world_size > 1:
            summed = self.ranks.sum(torch.cat([summed, self.flags]))
        loss = summed[0] / self.ranks.world_size
        norm = gradient_norm(self.model.parameters()).float()
        bad = 1 - (torch.isfinite(loss) & torch.isfinite(norm)).float()
        # Sticky once there are too many: what the host is to see must still be there.
        ended = (self.bad_in_a_row > self.skip_nonfinite).float()
        self.bad_in_a_row.copy_(torch.lerp((self.bad_in_a_row + 1) * bad, self.bad_in_a_row, ended))
        self.found_inf.copy_(torch.maximum(bad, ended))
        if self.clip_grad is not None:
            # AdamW divides the gradients by it as it reads them.
            scale = ((norm + _CLIP_EPS) / self.clip_grad).clamp(min=1)
            self.optimizer.grad_scale.copy_(scale)  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, self.found_inf)
        self.stats.copy_(torch.cat([torch.stack([loss, norm, self.bad_in_a_row]), summed[1:]]))

    def _stage(self, video: Tensor, keys: Tensor) -> None:
        if self._capture is None:
            self.video, self.keys = self._here(video), self._here(keys)
            return
        if not self._replay:
            # The memory layout of a batch is kept, so that the copy is one of bytes.
            self.video = torch.empty_like(video, device=self.device)
            self.keys = torch.empty_like(keys, device=self.device)
        for name, given, held in (("video", video, self.video), ("keys", keys, self.keys)):
            if given.shape != held.shape or given.dtype != held.dtype:
                raise ValueError(
                    f"{name} must be {tuple(held.shape)} {held.dtype} as in the step that was "
                    f"recorded, got {tuple(given.shape)} {given.dtype}"
                )
            held.copy_(given, non_blocking=True)

    def _record(self, capture: Capture) -> None:
        held = (self.bad_in_a_row, self.found_inf, self.loss)
        kept = [(tensor, tensor.clone()) for tensor in held]
        # The real step warms up, with its update skipped: AdamW makes its state, and no more.
        self.bad_in_a_row.fill_(self.skip_nonfinite + 1)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # Where there is no gradient yet, one is assigned, and nothing need be zeroed.
            self._replay["first"] = capture(self._micro_step, self._drop_gradients)
            if self.accumulate > 1:
                self._replay["more"] = capture(self._micro_step)
            self._replay["update"] = capture(self._update)
        for tensor, value in kept:
            tensor.copy_(value)

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor
