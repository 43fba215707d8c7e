"""Our own format, strictness, and files that are not what they should be."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections import OrderedDict
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from helpers import hf_config, make_video, randomise, relative_error
from safetensors.torch import load_file, save_file

from vmae_fast import CheckpointError, VideoMAE
from vmae_fast.models.checkpoint import load_strictly

SMALL = {
    "frames": 4, "image_size": 16, "patch_size": 8,
    "width": 24, "depth": 2, "heads": 3, "mlp_dim": 37,
    "decoder_width": 20, "decoder_depth": 2, "decoder_heads": 2, "decoder_mlp_dim": 31,
    "mask_ratio": 0.75,
}  # fmt: skip
WEIGHTS = "model.safetensors"


def small_model(seed=0, **settings):
    model = VideoMAE("tiny", **{**SMALL, **settings})
    randomise(model, seed)
    return model


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def edit(file, change):
    """Apply ``change`` to the dictionary of tensors in a safetensors file."""
    state = load_file(file)
    change(state)
    save_file(state, file)


# ---- our own format -----------------------------------------------------------------------


KINDS = {
    "pretraining": {},
    "v2": {"decoder_mask_ratio": 0.5, "mask_kind": "random", "norm_pix": False},
    "encoder": {"decoder_depth": 0},
    "fine_tuned": {"decoder_depth": 0, "num_classes": 5, "final_norm": False},
    "layer_scale": {"init_values": 0.1},
    "one_channel_tall": {"in_channels": 1, "image_size": (24, 16), "patch_size": (8, 4)},
    "own_numbers": {
        "norm_eps": 1e-3, "decoder_norm_eps": 1e-4, "image_mean": (0.5, 0.4, 0.3), "drop_path": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_round_trip(tmp_path, settings):
    model = small_model(**settings)
    assert model.save_pretrained(tmp_path / "saved") == tmp_path / "saved"
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", WEIGHTS]
    again = VideoMAE.from_pretrained(str(tmp_path / "saved"))
    assert again.config == model.config
    assert same_weights(again, model)


def test_config_is_readable(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["format"] == "vmae-fast"
    assert content["version"] == 1
    assert content["model"]["frames"] == 4
    assert content["model"]["image_size"] == [16, 16]


def test_saving_again_replaces(tmp_path):
    small_model(0).save_pretrained(tmp_path)
    other = small_model(1, depth=1)
    other.save_pretrained(tmp_path)
    again = VideoMAE.from_pretrained(tmp_path)
    assert same_weights(again, other)
    assert again.config == other.config


def test_overrides(tmp_path):
    small_model().save_pretrained(tmp_path)
    model = VideoMAE.from_pretrained(tmp_path, mask_ratio=0.5, drop_path=0.2, norm_pix=False)
    assert model.config.mask_ratio == 0.5
    assert model.masking.num_visible == 2 * (4 - 2)
    assert model.encoder.blocks[1].drop_path.rate == pytest.approx(0.2)
    assert not model.loss.norm_pix
    # What was recorded may be said again.
    assert VideoMAE.from_pretrained(tmp_path, frames=4, image_size=16).config.frames == 4
    with pytest.raises(TypeError, match=r"unknown model settings \['num_frames'\]"):
        VideoMAE.from_pretrained(tmp_path, num_frames=4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"frames": 8}, r"trained with frames=4 \(asked for 8\), a grid of \(2, 2, 2\) tokens"),
        ({"image_size": 32}, r"trained with image_size=\(16, 16\) \(asked for \(32, 32\)\)"),
        ({"patch_size": 4}, r"trained with patch_size=\(8, 8\) \(asked for \(4, 4\)\)"),
        ({"tubelet_size": 1}, r"trained with tubelet_size=2 \(asked for 1\)"),
    ],
)
def test_another_grid_is_an_error(tmp_path, override, message):
    small_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        VideoMAE.from_pretrained(tmp_path, **override)


@pytest.mark.parametrize("override", [{"heads": 2}, {"decoder_heads": 4}], ids=str)
def test_heads_other_than_recorded_are_an_error(tmp_path, override):
    """The same tensors fit any number of heads and would compute something else."""
    small_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="heads"):
        VideoMAE.from_pretrained(tmp_path, **override)


def test_saved_from_and_loaded_into_other_dtypes(tmp_path):
    model = small_model()
    model.double().save_pretrained(tmp_path / "double")
    again = VideoMAE.from_pretrained(tmp_path / "double")
    assert again.mask_token.dtype == torch.float32
    assert same_weights(again, model.float())


# ---- strictness ---------------------------------------------------------------------------


def break_everything(state):
    del state["mask_token"], state["encoder.blocks.1.attn.q_bias"]
    state["rogue.weight"] = torch.zeros(3)
    state["encoder.blocks.7.norm1.bias"] = torch.zeros(24)
    state["decoder.head.bias"] = torch.zeros(17)


def test_all_problems_are_listed_at_once(tmp_path):
    small_model().save_pretrained(tmp_path)
    edit(tmp_path / WEIGHTS, break_everything)
    with pytest.raises(CheckpointError) as caught:
        VideoMAE.from_pretrained(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "nothing was loaded" in text
    for part in (
        "2 missing", "mask_token", "encoder.blocks.1.attn.q_bias",
        "2 unexpected", "rogue.weight", "encoder.blocks.7.norm1.bias",
        "1 of another shape", "decoder.head.bias: (17,) in the file, (384,) in the model",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("decoder.norm.bias"),
        lambda s: s.update(extra=torch.zeros(1)),
        lambda s: s.update({"mask_token": torch.zeros(20)}),
    ],
    ids=["missing", "extra", "reshaped"],
)
def test_each_problem_alone_is_an_error(tmp_path, change):
    small_model().save_pretrained(tmp_path)
    edit(tmp_path / WEIGHTS, change)
    with pytest.raises(CheckpointError, match=r"1 (missing|unexpected|of another shape)"):
        VideoMAE.from_pretrained(tmp_path)


def test_a_refused_state_changes_nothing():
    model, other = small_model(0), small_model(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = dict(other.state_dict())
    break_everything(state)
    with pytest.raises(CheckpointError, match="nowhere"):
        load_strictly(model, state, "nowhere")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    load_strictly(model, other.state_dict(), "here")
    assert same_weights(model, other)


def test_long_lists_are_cut():
    model = small_model(depth=9)
    with pytest.raises(CheckpointError, match=r"and \d+ more") as caught:
        load_strictly(model, small_model(depth=1).state_dict(), "x")
    assert len(str(caught.value).splitlines()) < 30


# ---- files that are not whole, or not what they say ----------------------------------------

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
NOT_TENSORS = {
    "empty": b"",
    "html": b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "lfs_pointer": LFS_POINTER,
    "json": b'{"error": "Invalid username or password."}',
    "text": b"hello world\n",
    "one_byte": b"\x80",
    "binary": bytes(range(256)) * 40,
    "zip_magic": b"PK\x03\x04" + b"\0" * 60,
}


@pytest.mark.parametrize("content", NOT_TENSORS.values(), ids=NOT_TENSORS)
@pytest.mark.parametrize("name", ["file.pth", WEIGHTS, "pytorch_model.bin"])
def test_files_of_something_else(tmp_path, name, content):
    small_model().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name if name == "file.pth" else tmp_path
    with pytest.raises(CheckpointError, match=name):
        VideoMAE.from_pretrained(path)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_files(tmp_path, kind, share):
    """Legacy: torch's format before zip files, which V1's earliest checkpoints may have."""
    model = small_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    if kind != "safetensors":
        file = tmp_path / "file.pth"
        content = {"model": model.state_dict()}
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"not a whole|not whole|not a torch"):
        VideoMAE.from_pretrained(tmp_path if kind == "safetensors" else file)


def test_folders_without_parts(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config.json: is it a checkpoint"):
        VideoMAE.from_pretrained(tmp_path)
    small_model().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"holds no model.safetensors or pytorch_model"):
        VideoMAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON"),
        ("\udcff", "config.json is not JSON"),
        ("[1]", "config.json holds a list, not settings"),
        ("{}", "config.json is of a None, not a videomae"),
        ('{"model_type": "vit"}', "config.json is of a 'vit', not a videomae"),
        ('{"format": "vmae-fast", "version": 99}', "format version 99, this release reads 1"),
        ('{"format": "vmae-fast", "version": 1}', "config.json|settings"),
        ('{"format": "vmae-fast", "version": 1, "model": {"dept": 1}}', "dept"),
        ('{"model_type": "videomae", "hidden_act": "relu"}', "hidden_act 'relu'"),
    ],
    ids=["half", "not_utf8", "list", "nothing", "vit", "version", "no_model", "unknown", "relu"],
)
def test_settings_that_are_wrong(tmp_path, text, message):
    small_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        VideoMAE.from_pretrained(tmp_path)


NO_CHECKPOINTS = {
    "list": [1, 2],
    "tensor": torch.zeros(3),
    "nothing": {},
    "no_tensors": {"epoch": 3},
    "no_weights": {"model": {}},
    "list_as_model": {"model": [1, 2]},
    "tensor_as_model": {"model": torch.zeros(3)},
    "numbers_as_names": {"model": {1: torch.zeros(3)}},
    "flat_patch_embed": {"model": {"encoder.patch_embed.proj.weight": torch.zeros(3)}},
    "number_as_args": {
        "model": {"encoder.patch_embed.proj.weight": torch.zeros(3, 3, 2, 8, 8)}, "args": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("content", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_torch_files_that_are_no_checkpoints(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(CheckpointError):
        VideoMAE.from_pretrained(tmp_path / "file.pth")


def test_index_that_names_lost_files(tmp_path):
    small_model().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "model-00001-of-00002.safetensors")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names files that are not there.*00002-of-00002"):
        VideoMAE.from_pretrained(tmp_path)


# ---- files that want to run code ----------------------------------------------------------


class Custom:
    """An object that is no tensor."""


class Attack:
    """Unpickled naively, it runs a shell command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["args", "model", "alone", "namespace", "folder"])
@pytest.mark.parametrize("kind", ["custom", "attack"])
def test_nothing_is_executed(tmp_path, kind, where, zipped):
    marker = tmp_path / "executed"
    thing = Custom() if kind == "custom" else Attack(marker)
    state = dict(small_model().state_dict())
    content = {
        "args": {"model": state, "args": thing},
        "model": {"model": {**state, "extra": thing}},
        "alone": thing,
        "namespace": {"model": state, "args": argparse.Namespace(num_frames=thing)},
        "folder": {**state, "extra": thing},
    }[where]
    path = tmp_path / "file.pth"
    if where == "folder":
        small_model().save_pretrained(tmp_path / "folder")
        (tmp_path / "folder" / WEIGHTS).unlink()
        path = tmp_path / "folder" / "pytorch_model.bin"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="only tensors and plain values") as caught:
        VideoMAE.from_pretrained(path.parent if where == "folder" else path)
    assert ("Custom" if kind == "custom" else "system") in str(caught.value)
    assert not marker.exists()


def test_the_attack_would_work(tmp_path):
    """Otherwise the test above proves nothing."""
    marker = tmp_path / "executed"
    torch.save(Attack(marker), tmp_path / "file.pth")
    torch.load(tmp_path / "file.pth", weights_only=False)
    assert marker.exists()


def test_ordered_dictionaries_and_namespaces_are_plain(tmp_path):
    model = small_model()
    args = argparse.Namespace(num_frames=4, input_size=16, model="pretrain_videomae", lr=0.1)
    model.save_pretrained(tmp_path / "file.pth", dialect="videomae")
    content = torch.load(tmp_path / "file.pth", weights_only=True)
    content = {"model": OrderedDict(content["model"]), "args": args, "epoch": 3}
    torch.save(content, tmp_path / "file.pth")
    again = VideoMAE.from_pretrained(tmp_path / "file.pth", heads=3, decoder_heads=2)
    assert same_weights(again, model)


# ---- where from ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/no/such/place", "no/such/place.pth", "weights.pth"])
def test_no_such_path(path):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}"):
        VideoMAE.from_pretrained(path)


class Hub:
    """Stands in for huggingface_hub.snapshot_download; honours the patterns it is given."""

    def __init__(self, monkeypatch, remote, local):
        self.remote, self.local, self.calls = remote, local, []
        module = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(module, "snapshot_download", self)

    def __call__(self, repo_id, *, allow_patterns=None, **_):
        self.calls.append(repo_id)
        self.local.mkdir(exist_ok=True)
        for file in self.remote.iterdir():
            if allow_patterns is None or any(fnmatch(file.name, p) for p in allow_patterns):
                shutil.copy(file, self.local / file.name)
        return str(self.local)


def to_bin(folder, sharded):
    """Rewrite a folder's weights as pytorch_model.bin, in one or two files."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if not sharded:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = sorted(state)
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for shard, part in zip(shards, (names[::2], names[1::2]), strict=True):
        torch.save({name: state[name] for name in part}, folder / shard)
    index = {"weight_map": {name: shards[i % 2] for i, name in enumerate(names)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("weights", ["safetensors", "bin", "sharded_bin"])
def test_hub_id(tmp_path, monkeypatch, weights):
    model = small_model()
    remote = tmp_path / "remote"
    model.save_pretrained(remote, dialect="huggingface")
    if weights != "safetensors":
        to_bin(remote, weights == "sharded_bin")
    hub = Hub(monkeypatch, remote, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    again = VideoMAE.from_pretrained("someone/video-mae.base_1")
    assert set(hub.calls) == {"someone/video-mae.base_1"}
    assert same_weights(again, model)


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    module = pytest.importorskip("huggingface_hub")

    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(module, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"some/one.*hub id failed: no route to host"):
        VideoMAE.from_pretrained("some/one")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        VideoMAE.from_pretrained("some/one")


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, tmp_path, tmp_path / "cache")
    small_model().save_pretrained(tmp_path / "some" / "one")
    monkeypatch.chdir(tmp_path)
    VideoMAE.from_pretrained("some/one")
    assert hub.calls == []


# ---- saving that cannot be done ------------------------------------------------------------


def test_unknown_dialect(tmp_path):
    with pytest.raises(CheckpointError, match=r"dialect must be .* got 'onnx'"):
        small_model().save_pretrained(tmp_path / "x", dialect="onnx")
    assert not (tmp_path / "x").exists()


def test_places_that_do_not_fit_the_dialect(tmp_path):
    model = small_model()
    file = tmp_path / "file.pth"
    file.write_text("precious")
    for dialect in ("vmae-fast", "huggingface"):
        with pytest.raises(CheckpointError, match="is a file; this dialect writes a folder"):
            model.save_pretrained(file, dialect=dialect)
    assert file.read_text() == "precious"
    with pytest.raises(CheckpointError, match=r"one file: name it .pth, not 'folder'"):
        model.save_pretrained(tmp_path / "folder", dialect="videomae")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from vmae_fast import VideoMAE

folder = Path({folder!r})
settings = dict(frames=2, image_size=16, depth=1, width=32, heads=2, decoder_width=16,
                decoder_heads=1, mask_ratio=0.5)
places = {{"vmae-fast": folder / "ours", "huggingface": folder / "theirs",
          "videomae": folder / "file.pth"}}
torch.manual_seed(0)
first, second = VideoMAE("tiny", **settings), VideoMAE("tiny", **settings)
for dialect, place in places.items():
    first.save_pretrained(place, dialect=dialect)
before = sorted(str(p) for p in folder.rglob("*"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
failed = 0
for dialect, place in places.items():
    try:
        second.save_pretrained(place, dialect=dialect)
    except Exception as error:
        failed += 1
assert failed == 3, failed
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert sorted(str(p) for p in folder.rglob("*")) == before
for place in places.values():
    again = VideoMAE.from_pretrained(place).state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(again[name], tensor), (place, name)
print("intact")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files by RLIMIT_FSIZE")
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    code = FULL_DISK.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "intact", done.stderr


@pytest.mark.parametrize("dialect", ["vmae-fast", "huggingface"])
def test_a_disk_that_fills_between_the_files(tmp_path, monkeypatch, dialect):
    """Weights of one model beside the settings of another are no checkpoint."""
    earlier = small_model(0)
    earlier.save_pretrained(tmp_path, dialect=dialect)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(self, *_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="No space left"):
            small_model(1, depth=1).save_pretrained(tmp_path, dialect=dialect)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_saving_over_a_sharded_checkpoint(tmp_path):
    """The folder then holds a whole file and an old index; the whole file is what was saved."""
    import transformers

    theirs = transformers.VideoMAEForPreTraining(hf_config())
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / f"{WEIGHTS}.index.json").exists()
    model = VideoMAE.from_pretrained(tmp_path)
    randomise(model, 5)
    for dialect in ("huggingface", "vmae-fast"):
        model.save_pretrained(tmp_path, dialect=dialect)
        assert same_weights(VideoMAE.from_pretrained(tmp_path), model)


def test_outputs_survive(tmp_path):
    model = small_model().eval()
    video = make_video((2, 3, 4, 16, 16), torch.uint8)
    for dialect, name in (("vmae-fast", "a"), ("huggingface", "b"), ("videomae", "c.pth")):
        model.save_pretrained(tmp_path / name, dialect=dialect)
        again = VideoMAE.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            assert relative_error(again.encode(video), model.encode(video)) < 1e-6
