"""What several GPUs exchange: predicted, and counted in real processes that train (gloo, CPU)."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from vmae_fast import VideoMAEConfig
from vmae_fast.data import synthetic_videos
from vmae_fast.plan import Links, Settings, find_gpu
from vmae_fast.plan.communication import copied_bytes, exchange_of
from vmae_fast.plan.units import units_of
from vmae_fast.train import PretrainConfig, to_toml

TINY = VideoMAEConfig.of("tiny", frames=4, image_size=32)

SCRIPT = textwrap.dedent("""
    import json, sys, torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from vmae_fast.train import load_config
    from vmae_fast.train.distributed import process_group
    from vmae_fast.train.loop import Pretraining
    from vmae_fast.train.pace import Report
    from vmae_fast.train.step import NUM_FLAGS
    from vmae_fast.train.stop import StopRequest

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name
            if name.startswith("c10d::"):
                counted.setdefault(name, []).append(max(map(size, given(args))))
            elif name.startswith("fsdp::"):
                # Of the place for all, gathering's copy fills what it was given alone.
                inner = args[:1] * 2 if name.endswith("copy_in") else (args, kwargs)
                counted.setdefault(name, []).append(sum(map(size, given(inner))))
            elif name in ("aten::copy_", "aten::mul"):
                moved = (args[:2], *(kwargs or {}).values())
                counted.setdefault(name, []).append(sum(map(size, given(moved))))
            return func(*args, **(kwargs or {}))

    def size(tensor):
        return tensor.numel() * tensor.element_size()

    def given(args):
        if isinstance(args, torch.Tensor):
            yield args
        for one in args.values() if isinstance(args, dict) else args:
            if isinstance(one, (torch.Tensor, list, tuple, dict)):
                yield from (one,) if isinstance(one, torch.Tensor) else given(one)

    config = load_config(sys.argv[1])
    base, found = config.run.out, []
    with process_group("cpu") as ranks:
        for parallel, accumulate, low in (
            ("ddp", 1, False), ("ddp", 2, True),
            ("fsdp", 1, False), ("fsdp", 1, True), ("fsdp", 2, False), ("fsdp", 3, True),
        ):
            config.run.parallel, config.run.precision = parallel, "bf16" if low else "fp32"
            config.run.out = f"{base}-{len(found)}"
            config.optim.micro_batch = 2
            config.optim.batch_size = 2 * accumulate * ranks.world_size
            run = Pretraining(config, ranks, StopRequest())
            step, report = run.train_step, Report(0)
            batches = run.setup.inputs.train_batches(run.schedule, 0)
            # In its first two steps DDP agrees on its buckets.
            for _ in range(3):
                loaded = [run._load(batches, report) for _ in range(accumulate)]
                counted = {}
                with Seen():
                    for number, (video, keys) in enumerate(loaded):
                        step.forward_backward(video, keys, number=number)
                    step.update(1e-4, *[0.0] * NUM_FLAGS)
            found.append((parallel, accumulate, low, counted))
        if ranks.is_main:
            json.dump(found, open(f"{base}.json", "w"))
""")
# The loss, counts of bad files and of signals to stop, and the norm of sharded gradients; and what
# is copied and multiplied of them.
FIGURES_BYTES, COPIES_BYTES = 256, 4096


@pytest.mark.parametrize("gpus", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_processes_send_and_copy_is_what_is_predicted(gpus, tmp_path):
    """Of all collectives of the trainer's step, and of all copies for them, but for figures."""
    config = PretrainConfig()
    config.model.model, config.model.frames, config.model.image_size = "tiny", 4, 32
    config.data.data = str(synthetic_videos(tmp_path / "videos", count=12, size=40, frames=24))
    config.data.stride, config.loading.workers, config.loading.val = 2, 0, 0
    config.optim.steps, config.run.device, config.run.out = 3, "cpu", str(tmp_path / "run")
    (tmp_path / "run.toml").write_text(to_toml(config))
    (tmp_path / "count.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}",
         str(tmp_path / "count.py"), str(tmp_path / "run.toml")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run.json").read_text())
    assert len(found) == 6
    for parallel, accumulate, low, counted in found:
        one = Settings(
            TINY, 2, gpus, accumulate, precision="bf16" if low else "fp32", parallel=parallel
        )
        compare = compare_ddp if parallel == "ddp" else compare_fsdp
        compare(one, counted, exchange_of(one, Links.of(find_gpu("h100")), 1, 1).sent_bytes)


def compare_ddp(one, counted, predicted):
    # No buffers are sent along: no broadcasts.
    assert set(counted) == {"c10d::allreduce_", "aten::mul", "aten::copy_"}
    sent = 2 * (one.gpus - 1) / one.gpus * sum(counted["c10d::allreduce_"])
    assert sent == pytest.approx(predicted["gradients, all-reduced"], abs=FIGURES_BYTES)
    # Gradients are divided into buckets, and copied out of them.
    moved = sum(counted["aten::mul"]) + sum(counted["aten::copy_"])
    assert moved == pytest.approx(copied_bytes(one), abs=COPIES_BYTES)


def compare_fsdp(one, counted, predicted):
    sent = {name: (one.gpus - 1) / one.gpus * sum(sizes) for name, sizes in counted.items()}
    gather, scatter = "c10d::_allgather_base_", "c10d::_reduce_scatter_base_"
    assert {name for name in counted if name.startswith("c10d")} == {
        gather, scatter, "c10d::allreduce_",
    }  # fmt: skip
    assert 2 * sent["c10d::allreduce_"] < FIGURES_BYTES
    assert sent[gather] == predicted["weights, gathered"]
    assert sent[scatter] == predicted["gradients, scattered"]
    # All but the root's weights are gathered twice for each batch.
    units = units_of(TINY)
    count = one.accumulate * (1 + 2 * len(units.blocks))
    assert len(counted[gather]) == count
    copies = ("all_gather_copy_in", "split_with_sizes_copy", "chunk_cat")
    moved = sum(sum(counted[f"fsdp::{name}"]) for name in copies)
    if one.precision == "bf16":
        # Casts of what is gathered; of gradients 2 and 4 bytes for the first batch of several,
        # 2, 4 and 4 for each further one.
        moved += 6 * sum(counted[gather]) // (2 * one.gpus)
        moved += {1: 0, 3: 6 + 2 * 10}[one.accumulate] * units.values
    assert moved == copied_bytes(one)
