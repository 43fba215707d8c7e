"""A small set of real videos, and settings of a run that takes a second."""

import pytest

from vmae_fast.data import synthetic_videos
from vmae_fast.train import PretrainConfig


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Folder of 16 real H.264 files of 24 frames of 40 pixels."""
    return synthetic_videos(tmp_path_factory.mktemp("videos"), count=16, size=40, frames=24)


@pytest.fixture
def config(videos, tmp_path):
    """Eight steps of 8 clips, a model of 32 tokens."""
    config = PretrainConfig()
    config.model.model = "tiny"
    config.model.frames, config.model.image_size = 4, 32
    config.data.data = str(videos)
    config.data.stride, config.loading.val, config.loading.workers = 2, 0.125, 0
    config.optim.batch_size, config.optim.steps = 8, 8
    config.optim.lr, config.optim.warmup_steps = 1e-3, 2
    config.run.out = str(tmp_path / "run")
    config.run.save_every = config.run.val_every = 4
    config.run.log_every = 1
    config.run.device = "cpu"
    return config
