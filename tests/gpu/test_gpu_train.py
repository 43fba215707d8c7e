"""The trainer on a GPU, and the model under DDP and FSDP2 in a single process."""

import copy
import math
import os

import pytest
import torch
import torch.distributed as dist
from helpers import loss_and_gradients, make_video, relative_error
from torch.nn.parallel import DistributedDataParallel

from vmae_fast import VideoMAE, clip_keys

# The same fp32 step with other kernels around it.
FP32_RTOL = 1e-5
BF16_RTOL = 1e-2


@pytest.fixture
def one_process(device, tmp_path, monkeypatch):
    """A process group of this process alone."""
    kind = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_available() or not dist.is_backend_available(kind):
        pytest.skip(f"this build of torch has no {kind}")
    if "NCCL_SOCKET_IFNAME" not in os.environ:
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")  # there may be no other interface
    store = dist.FileStore(str(tmp_path / "store"), 1)
    bound = device if kind == "nccl" else None
    dist.init_process_group(kind, store=store, rank=0, world_size=1, device_id=bound)
    yield
    dist.destroy_process_group()


def make_step(device, **settings):
    torch.manual_seed(0)
    model = VideoMAE("tiny", **settings).to(device)
    config = model.config
    shape = (2, config.in_channels, config.frames, *config.size)
    video = make_video(shape, torch.uint8, "decoder").to(device)
    return model, video, model.masking(clip_keys(0, 0, torch.arange(2, device=device)))


CASES = {
    "v1-fp32": ({}, None, FP32_RTOL),
    "v2-fp32": ({"decoder_mask_ratio": 0.5}, None, FP32_RTOL),
    "v1-bf16": ({}, torch.bfloat16, BF16_RTOL),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("settings", "autocast", "rtol"), CASES.values(), ids=CASES)
def test_ddp_gives_the_gradients(device, settings, autocast, rtol):
    model, video, mask = make_step(device, **settings)
    expected = loss_and_gradients(copy.deepcopy(model), video, mask, autocast)
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids)
    got = loss_and_gradients(wrapped, video, mask, autocast)
    assert {name.removeprefix("module.") for name in got} == expected.keys()
    for name, tensor in got.items():
        assert relative_error(tensor, expected[name.removeprefix("module.")]) < rtol, name


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("settings", "autocast", "rtol"), CASES.values(), ids=CASES)
def test_fsdp_gives_the_gradients(device, settings, autocast, rtol):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, video, mask = make_step(device, **settings)
    expected = loss_and_gradients(copy.deepcopy(model), video, mask, autocast)
    mesh = init_device_mesh(device.type, (1,))
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    got = loss_and_gradients(model, video, mask, autocast)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        whole = tensor if name == "loss" else tensor.full_tensor()
        assert relative_error(whole, expected[name]) < rtol, name


@pytest.fixture
def config(tmp_path):
    """Two steps of 8 clips; skips where a run's packages are missing."""
    for package in ("av", "safetensors", "tensorboard", "tomli_w", "tqdm"):
        pytest.importorskip(package, reason=f"a run needs {package}")
    from vmae_fast.data import synthetic_videos
    from vmae_fast.train import PretrainConfig

    config = PretrainConfig()
    config.model.model = "tiny"
    config.model.frames, config.model.image_size = 4, 32
    config.data.data = str(synthetic_videos(tmp_path / "videos", count=16, size=40, frames=24))
    config.data.stride, config.loading.val, config.loading.workers = 2, 0.125, 0
    config.optim.batch_size, config.optim.micro_batch, config.optim.steps = 8, 4, 2
    config.optim.lr, config.optim.warmup_steps = 1e-3, 0
    config.run.out = str(tmp_path / "run")
    config.run.log_every = 1
    return config


def run_on(config, device, precision):
    from vmae_fast.train import pretrain
    from vmae_fast.train.metrics import read_metrics

    config.run.device, config.run.precision = str(device), precision
    config.run.out = f"{config.run.out}-{device.type}-{precision}"
    result = pretrain(config)
    assert result.steps == 2
    return result, [row for row in read_metrics(result.path / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("kind", ["tube", "random"])
def test_a_run_equals_the_one_on_the_cpu(config, device, kind):
    """Clips, masks and all: the data are drawn alike everywhere."""
    if kind == "random":
        config.model.mask_kind, config.model.decoder_mask_ratio = "random", 0.5
    out = config.run.out
    rows = []
    for where in (device, torch.device("cpu")):
        config.run.out = f"{out}-{kind}"
        rows.append(run_on(config, where, "fp32")[1])
    for got, expected in zip(*rows, strict=True):
        for figure in ("loss", "zero_prediction", "grad_norm"):
            assert got[figure] == pytest.approx(expected[figure], rel=1e-3), figure


def test_a_run_in_the_default_precision(config, device):
    result, rows = run_on(config, device, "auto")
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    assert math.isfinite(result.val_loss)
    again = VideoMAE.from_pretrained(result.checkpoint)
    assert again.config.frames == 4


@pytest.mark.parametrize("setting", ["on", "off"])
def test_a_run_resumes_with_and_without_graphs(config, device, setting):
    """What a run with graphs saved goes on without them, and the other way round."""
    from vmae_fast.train import pretrain

    config.run.cuda_graph = setting
    config.model.drop_path, config.optim.ema_decay = 0.3, 0.9
    first, _ = run_on(config, device, "fp32")
    config.run.out, config.run.resume = str(first.path), True
    config.optim.steps = 4
    config.run.cuda_graph = "off" if setting == "on" else "on"
    assert pretrain(config).steps == 4


@pytest.mark.usefixtures("one_process")
def test_a_sharded_model_is_not_recorded(device):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from vmae_fast.train.distributed import Ranks
    from vmae_fast.train.graph import choose_capture

    model = VideoMAE("tiny").to(device)
    fully_shard(model, mesh=init_device_mesh(device.type, (1,)))
    with pytest.raises(ValueError, match="sharded by FSDP"):
        choose_capture("on", model, Ranks(0, 1, device))
    assert choose_capture("auto", model, Ranks(0, 1, device)) is None
