"""Memory that runs out: what the command line says, and whether what it names would fit."""

import multiprocessing
import re
import shlex
import time

import pytest
import torch

from vmae_fast import VideoMAEConfig, cli
from vmae_fast.data import synthetic_videos
from vmae_fast.plan import Gpu, Settings, make_plan
from vmae_fast.train import out_of_memory
from vmae_fast.train.out_of_memory import Memory
from vmae_fast.train.step import TrainStep

GIB = 2**30
CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 1.53 GiB. GPU 0 has a total capacity of 4.00 GiB of "
    "which 512.00 MiB is free."
)
# Batches of 48 clips: divisors that are no powers of two are among them.
RUN = [
    "--model", "small", "--decoder-depth", "1", "--batch-size", "48", "--micro-batch", "48",
    "--steps", "4", "--warmup-steps", "0", "--workers", "0", "--device", "cpu", "--val", "0",
    "--stride", "1",
]  # fmt: skip
TINY = [
    "--model", "tiny", "--frames", "4", "--image-size", "32", "--stride", "2", "--batch-size", "4",
    "--micro-batch", "4", "--steps", "4", "--warmup-steps", "0", "--lr", "1e-3", "--workers", "0",
    "--device", "cpu", "--val", "0.2", "--save-every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return synthetic_videos(tmp_path_factory.mktemp("videos"), count=8, size=40, frames=24)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch, videos):
    """Run pretrain into a folder of its own; exit status and all it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        data = [] if "--resume" in args else ["--data", str(videos)]
        status = cli.main(["pretrain", *data, *map(str, args)])
        seen = capsys.readouterr()
        return status, seen.out + seen.err

    return run


def fail(monkeypatch, error, at=1):
    """Let the device step numbered ``at`` (from 1) raise what ``error`` makes."""
    count = 0
    real = TrainStep.forward_backward

    def step(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == at:
            raise error()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(TrainStep, "forward_backward", step)


def pretend(monkeypatch, available, total=None):
    memory = Memory(round(total or available), round(available))
    monkeypatch.setattr(out_of_memory, "memory_of", lambda device: memory)


def out_of_cuda():
    return torch.OutOfMemoryError(CUDA_SAYS)


def out_of_cpu():
    """The allocator's own error."""
    try:
        torch.empty(1 << 50)
    except RuntimeError as error:
        return error


def fits(batch, memory_gib, accumulate, **settings):
    """By the planner's own word, with a GPU of that size."""
    config = VideoMAEConfig.of("small", decoder_depth=1)
    settings = Settings(config, batch, accumulate=accumulate, precision="fp32", **settings)
    return make_plan(settings, Gpu("pretended", memory_gib, 1, 1, 1)).fits


def last_line(text):
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("vmae-fast: ")]
    return line


@pytest.mark.parametrize("memory_gib", [2.0, 2.5, 4.0])
def test_the_batch_it_names_fits_and_no_larger_one_does(run, monkeypatch, memory_gib):
    fail(monkeypatch, out_of_cuda)
    pretend(monkeypatch, memory_gib * GIB)
    status, text = run(*RUN)
    assert status == 1
    line = last_line(text)
    assert "48 clips at a time do not fit (it asked for 1.53 GiB more)" in line
    assert f"It has {memory_gib:.1f} GiB." in line
    assert "the batch stays 48: gradients accumulate, with the same result" in line
    (named,) = {int(number) for number in re.findall(r"--micro-batch (\d+)", line)}
    divisors = [d for d in range(1, 49) if 48 % d == 0]
    assert named in divisors
    assert fits(named, memory_gib, 48 // named)
    larger = divisors[divisors.index(named) + 1]
    assert larger == 48 or not fits(larger, memory_gib, 48 // larger)


def test_the_batch_that_failed_is_never_named(run, monkeypatch):
    """Though the planner takes it to fit."""
    fail(monkeypatch, out_of_cuda)
    pretend(monkeypatch, 500 * GIB)
    line = last_line(run(*RUN)[1])
    assert "--micro-batch 24 fits" in line


def test_of_files_with_repeats_whole_ones_are_named(run, monkeypatch):
    fail(monkeypatch, out_of_cuda)
    pretend(monkeypatch, 500 * GIB)
    line = last_line(run(*RUN, "--batch-size", "60", "--micro-batch", "60", "--repeats", "4")[1])
    assert "--micro-batch 20 fits" in line


def test_what_others_leave_is_said(run, monkeypatch):
    fail(monkeypatch, out_of_cuda)
    pretend(monkeypatch, 3 * GIB, total=24 * GIB)
    line = last_line(run(*RUN)[1])
    assert "It has 24.0 GiB, of which this process can have 3.0 GiB." in line


def test_checkpointing_where_no_batch_fits(run, monkeypatch):
    """A memory between what the clips of one file take with and without it."""
    one = VideoMAEConfig.of("small", decoder_depth=1)
    plain, saved = (
        make_plan(
            Settings(one, 24, accumulate=2, precision="fp32", checkpointing=kind),
            Gpu("", 1, 1, 1, 1),
        ).memory_bytes
        for kind in ("none", "block")
    )
    assert saved < plain
    fail(monkeypatch, out_of_cuda)
    pretend(monkeypatch, (saved + plain) / 2)
    line = last_line(run(*RUN, "--repeats", "24")[1])
    found = re.search(r"--micro-batch (\d+) --checkpointing block fits", line)
    memory_gib = (saved + plain) / 2 / GIB
    assert fits(int(found[1]), memory_gib, 48 // int(found[1]), checkpointing="block")


def test_nothing_fits(run, monkeypatch):
    fail(monkeypatch, out_of_cuda)
    pretend(monkeypatch, 0.5 * GIB)
    line = last_line(run(*RUN)[1])
    assert "Even 1 at a time" in line
    assert "smaller --model" in line
    assert "--micro-batch" not in line


def test_what_was_saved_goes_on_as_it_says(run, monkeypatch, tmp_path):
    fail(monkeypatch, out_of_cuda, at=4)
    pretend(monkeypatch, 4 * GIB)
    status, text = run(*TINY, "--out", "mine")
    assert status == 1
    line = last_line(text)
    assert "The state up to mine/checkpoints/step-00000002 is kept" in line
    command = shlex.split(line.partition("go on with: vmae-fast ")[2])
    assert command == ["pretrain", "--out", "mine", "--resume", "--micro-batch", "2"]
    status, text = run(*command[1:])
    assert status == 0, text
    assert (tmp_path / "mine/checkpoints/step-00000004").is_dir()


@pytest.mark.parametrize(("out", "end"), [([], "--micro-batch 2"), (["--out", "x"], "--overwrite")])
def test_before_the_first_checkpoint(run, monkeypatch, out, end):
    fail(monkeypatch, out_of_cuda)
    pretend(monkeypatch, 4 * GIB)
    line = last_line(run(*TINY, *out)[1])
    assert "No checkpoint was written yet: start again with --micro-batch 2" in line
    assert line.endswith(end)


def test_a_planner_that_fails_is_no_second_error(run, monkeypatch):
    def broken(settings):
        raise torch.OutOfMemoryError("no memory to plan in")

    fail(monkeypatch, out_of_cuda)
    pretend(monkeypatch, 4 * GIB)
    monkeypatch.setattr(out_of_memory, "needed_bytes", broken)
    status, text = run(*TINY)
    assert status == 1
    line = last_line(text)
    assert "could not be worked out" in line
    assert "try --micro-batch 2" in line


@pytest.mark.parametrize(
    "error",
    [
        out_of_cpu,
        lambda: MemoryError(),
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_a_cpu_and_libraries(run, monkeypatch, error):
    fail(monkeypatch, error)
    status, text = run(*TINY)
    assert status == 1
    line = last_line(text)
    assert "out of memory on cpu: 4 clips at a time do not fit" in line
    assert "--micro-batch 2" in line


def test_an_error_behind_another(run, monkeypatch):
    """What ends a recording may speak of the recording alone."""

    def recording():
        error = RuntimeError("operation failed due to a previous error during capture")
        error.__context__ = out_of_cuda()
        return error

    fail(monkeypatch, recording)
    assert "out of memory on cpu" in last_line(run(*TINY)[1])


def test_in_validation(run, monkeypatch):
    def validate(self, step):
        if step == 4:
            raise out_of_cuda()

    monkeypatch.setattr("vmae_fast.train.loop.Pretraining._validate", validate)
    pretend(monkeypatch, 4 * GIB)
    status, text = run(*TINY)
    assert status == 1
    # It was due after the last step: the checkpoint of an earlier one is there.
    assert "step-00000002 is kept" in last_line(text)


def test_before_the_first_step(run, monkeypatch):
    def move(self, *args, **kwargs):
        raise out_of_cuda()

    monkeypatch.setattr("vmae_fast.models.VideoMAE.to", move)
    line = last_line(run(*TINY)[1])
    assert "out of memory on cpu before the first step: take a smaller --model" in line


def test_a_decoding_process_that_is_killed(run, monkeypatch):
    """As the kernel does where the machine's memory runs out."""

    def step(self, *args, **kwargs):
        for child in multiprocessing.active_children():
            child.kill()
        time.sleep(0.5)

    monkeypatch.setattr(TrainStep, "forward_backward", step)
    status, text = run(*TINY, "--workers", "2", "--steps", "50", "--out", "x")
    assert status == 1
    line = last_line(text)
    assert "a process that decodes ended 4 times in a row (SIGKILL)" in line
    assert "out of memory" in line
    # By when a step was saved, or not.
    assert line.endswith(("start again with --workers 1 --overwrite", "--resume --workers 1"))


def test_other_errors_stay_what_they_are(run, monkeypatch):
    fail(monkeypatch, lambda: RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(*TINY)


def test_memory_of_this_machine():
    memory = out_of_memory.memory_of(torch.device("cpu"))
    assert 2**28 < memory.available <= memory.total < 2**50


def test_memory_of_a_gpu(monkeypatch):
    """Free memory, this process's own, and its context, which the planner counts as well."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GIB)
    memory = out_of_memory.memory_of(torch.device("cuda", 0))
    assert memory == (24 * GIB, 8 * GIB)
