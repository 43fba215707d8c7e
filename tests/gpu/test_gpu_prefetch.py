"""Batches that reach the GPU ahead of the step: unchanged, beside its computing, unwaited for."""

import pytest
import torch

from vmae_fast import clip_keys
from vmae_fast.data import ClipBatch
from vmae_fast.train.prefetch import prefetched


def pinned_batches(count, clips=8, size=112):
    """As a loader gives them: ``(B, T, H, W, C)`` memory, pinned."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        stored = torch.randint(
            0, 256, (clips, 16, size, size, 3), dtype=torch.uint8, generator=generator
        )
        yield ClipBatch(
            stored.permute(0, 4, 1, 2, 3), torch.arange(clips), torch.zeros(clips).long(),
            torch.full((clips,), number), [f"{number}.mp4"] * clips, [],
        ).pin_memory()  # fmt: skip


class Ready:
    """Batches that are there before they are asked for."""

    def __init__(self, batches):
        self.batches = list(batches)

    def ready(self):
        return True

    def __next__(self):
        if not self.batches:
            raise StopIteration
        return self.batches.pop(0)


def busy(device, matrix):
    """Some milliseconds of computing."""
    for _ in range(20):
        matrix = matrix @ matrix * 1e-3
    return matrix


def test_content_and_layout_are_kept(device):
    """Also where memory is used again at once: the next copies must wait for what reads it."""
    expected = [batch.video.long().sum((1, 2, 3, 4)) for batch in pinned_batches(12)]
    matrix, sums = torch.randn(2048, 2048, device=device), []
    for number, batch in enumerate(prefetched(Ready(pinned_batches(12)), device)):
        assert batch.video.device == device
        assert batch.video.permute(0, 2, 3, 4, 1).is_contiguous()
        assert {batch.clip.device.type, batch.epoch.device.type} == {"cpu"}
        assert batch.epoch.tolist() == [number] * 8
        clip_keys(0, batch.epoch, batch.clip, batch.repeat).pin_memory()
        matrix = busy(device, matrix)
        sums.append(batch.video.long().sum((1, 2, 3, 4)))
        del batch
    for got, wanted in zip(sums, expected, strict=True):
        assert torch.equal(got.cpu(), wanted)


def test_nothing_waits(device):
    matrix = torch.randn(2048, 2048, device=device)
    source = Ready(pinned_batches(6))
    list(prefetched(Ready(pinned_batches(2)), device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in prefetched(source, device):
            busy(device, matrix)
            batch.video.float().mean()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_copies_run_beside_the_computing(device):
    from torch.profiler import ProfilerActivity, profile

    matrix = torch.randn(4096, 4096, device=device)
    busy(device, matrix)
    torch.cuda.synchronize()
    source = Ready(pinned_batches(6))
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for batch in prefetched(source, device):
            busy(device, matrix)
            batch.video.float().mean()
        torch.cuda.synchronize()
    events = [event for event in record.profiler.kineto_results.events() if event.duration_ns()]
    copies = [event for event in events if "HtoD" in event.name()]
    kernels = [event for event in events if "gemm" in event.name().lower()]
    if not kernels:
        pytest.fail(f"no product among {sorted({event.name() for event in events})}")
    assert len(copies) == 6
    streams = [{event.device_resource_id() for event in group} for group in (copies, kernels)]
    assert streams[0].isdisjoint(streams[1])

    def beside(copy):
        return any(
            kernel.start_ns() < copy.start_ns() + copy.duration_ns()
            and copy.start_ns() < kernel.start_ns() + kernel.duration_ns()
            for kernel in kernels
        )

    # The first two go before anything is computed.
    assert sum(map(beside, copies)) >= 3
