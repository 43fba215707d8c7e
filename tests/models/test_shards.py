"""Weights that several processes wrote, each its part."""

import copy
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from vmae_fast import VideoMAE, cli
from vmae_fast.models import CheckpointError
from vmae_fast.models.shards import read_all_shards, read_shards, shard_files

# Of three processes: rows of odd sizes, tensors with fewer rows than processes, one value.
SCRIPT = textwrap.dedent("""
    import sys, torch
    import torch.distributed as dist
    from pathlib import Path
    from vmae_fast import VideoMAE
    from vmae_fast.train.checkpoint import write_checkpoint
    from vmae_fast.train.distributed import Ranks
    from vmae_fast.train.optimizer import AveragedWeights, make_optimizer
    from vmae_fast.train.config import OptimSettings
    from vmae_fast.train.sharded import shard

    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    torch.manual_seed(0)
    model = VideoMAE("tiny", frames=4, image_size=32, init_values=0.1)
    shard(model, ranks, None)
    average = AveragedWeights(model, 0.5)
    optimizer = make_optimizer(model, OptimSettings(lr=1e-3))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for step in range(2):
        video = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
        model(video, model.masking(torch.arange(2))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, torch.zeros(()))
    write_checkpoint(Path(sys.argv[1]), 2, model, optimizer, average, {"seed": 0}, ranks)
    whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    averaged = [tensor.full_tensor() for tensor in average.average]
    moments = {
        name: optimizer.state[parameter]["exp_avg_sq"].full_tensor()
        for name, parameter in model.named_parameters()
    }
    if ranks.is_main:
        torch.save({"whole": whole, "averaged": averaged, "moments": moments}, sys.argv[2])
    dist.destroy_process_group()
""")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint by three processes, and what they held."""
    folder = tmp_path_factory.mktemp("shards")
    script = folder / "write.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run(
        [*launcher, str(script), str(folder / "checkpoint"), str(folder / "held.pt")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "checkpoint", torch.load(folder / "held.pt")


@pytest.fixture
def copied(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_one_process_reads_all(written):
    checkpoint, held = written
    assert len(shard_files(checkpoint)) == 3
    model = VideoMAE.from_pretrained(checkpoint)
    state = model.state_dict()
    assert state.keys() == held["whole"].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in held["whole"].items())
    averaged = VideoMAE.from_pretrained(checkpoint / "ema").parameters()
    for mine, theirs in zip(averaged, held["averaged"], strict=True):
        assert torch.equal(mine, theirs)
    moments = read_all_shards(checkpoint / "optimizer")
    for name, tensor in held["moments"].items():
        assert torch.equal(moments[f"exp_avg_sq.{name}"], tensor)


def test_shapes_without_data(written):
    checkpoint, held = written
    found = read_all_shards(checkpoint, shapes_only=True)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in held["whole"].items()
    }
    assert {tensor.device.type for tensor in found.values()} == {"meta"}


def test_inspect_and_convert(written, tmp_path, capsys):
    checkpoint, held = written
    assert cli.main(["inspect", str(checkpoint)]) == 0
    assert "vmae-fast" in capsys.readouterr().out
    assert cli.main(["convert", str(checkpoint), str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    state = VideoMAE.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in held["whole"].items())


def test_a_whole_file_goes_before_older_shards(copied):
    model = VideoMAE.from_pretrained(copied)
    with torch.no_grad():
        model.mask_token.fill_(3)
    model.save_pretrained(copied)
    assert VideoMAE.from_pretrained(copied).mask_token.unique().tolist() == [3]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_shard_is_an_error(lost, copied):
    shard_files(copied)[lost].unlink()
    with pytest.raises(CheckpointError, match=r"missing|shape|first.*last|should have|of another"):
        VideoMAE.from_pretrained(copied)
    tensors = {"mask_token": torch.zeros(1, 1, 64), "encoder.norm.weight": torch.zeros(128)}
    with pytest.raises(CheckpointError):
        read_shards(copied, tensors)


@pytest.mark.parametrize("keep", [0, 5, 1000])
def test_a_shard_cut_off_is_an_error(keep, copied):
    os.truncate(shard_files(copied)[1], keep)
    with pytest.raises(CheckpointError, match="a shard is not a whole file"):
        VideoMAE.from_pretrained(copied)


def test_a_tensor_of_another_shape_is_named(written):
    with pytest.raises(CheckpointError, match=r"mask_token should have the shape \(2, 1, 64\)"):
        read_shards(written[0], {"mask_token": torch.zeros(2, 1, 64)})
    with pytest.raises(CheckpointError, match=r"nothing should have the shape .* found none"):
        read_shards(written[0], {"nothing": torch.zeros(2)})


def test_strangers_among_the_files_are_no_shards(copied):
    before = copy.deepcopy(VideoMAE.from_pretrained(copied).state_dict())
    (copied / "notes.safetensors.txt").write_text("mine")
    after = VideoMAE.from_pretrained(copied).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
