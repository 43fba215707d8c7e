"""The model with its weights sharded by FSDP2, block by block."""

import subprocess
import sys
import textwrap

import pytest
import torch

SCRIPT = textwrap.dedent("""
    import copy, sys, torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from vmae_fast import VideoMAE

    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    torch.manual_seed(0)
    model = VideoMAE("tiny", drop_path=0.2, init_values=0.1)
    model.checkpointing = sys.argv[2]
    plain = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    video = torch.randint(0, 256, (4, 3, 8, 64, 64), dtype=torch.uint8)
    for one in (model, plain):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = one(video, one.masking(torch.arange(4))).loss
        loss.backward()
        print(loss.item())
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad.full_tensor(), theirs.grad)
    dist.destroy_process_group()
""")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it")
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_sharded_blocks_give_the_same(checkpointing, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "store"), checkpointing]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sharded, plain = done.stdout.split()
    assert sharded == plain
