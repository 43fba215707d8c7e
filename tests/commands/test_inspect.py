"""vmae-fast inspect: what a checkpoint is, of every kind there is, without reading its weights."""

import argparse
import json

import pytest
import torch
import transformers
from helpers import hf_config
from safetensors.torch import load_file, save_file

from vmae_fast import CheckpointError, VideoMAE
from vmae_fast.commands import inspect
from vmae_fast.models.licence import UNSTATED
from vmae_fast.train.optimizer import AveragedWeights
from vmae_fast.train.run_folder import RunFolder

NC = "cc-by-nc-4.0"
SMALL = {
    "frames": 4, "image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3,
    "decoder_width": 20, "decoder_depth": 2, "decoder_heads": 2,
}  # fmt: skip
NAMES = {"vmae-fast": "folder", "huggingface": "folder", "videomae": "file.pth"}


def small_model(**settings):
    return VideoMAE("tiny", **{**SMALL, **settings})


def saved(path, dialect="vmae-fast", **settings):
    return str(small_model(**settings).save_pretrained(path, dialect=dialect))


def text_of(capsys, *flags, status=0):
    assert inspect.run([str(flag) for flag in flags]) == status
    return capsys.readouterr().out


def row(text, name):
    """The value of a line by its name."""
    (found,) = [line for line in text.splitlines() if line.startswith(f"{name:16} ")]
    return found[17:]


# ---- every kind ---------------------------------------------------------------------------

KINDS = {
    "pretraining": {},
    "fine_tuned": {"decoder_depth": 0, "num_classes": 5, "final_norm": False},
    "encoder": {"decoder_depth": 0},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", NAMES)
def test_every_dialect(tmp_path, capsys, dialect, kind):
    path = saved(tmp_path / NAMES[dialect], dialect, **KINDS[kind], license=NC)
    about = inspect.describe(path)
    model = VideoMAE.from_pretrained(path)
    assert about["dialect"] == dialect
    assert about["model"] == model.config.to_dict()
    counts = {"encoder": sum(p.numel() for p in model.encoder.parameters())}
    if model.decoder is not None:
        counts["decoder"] = model.mask_token.numel() + model.encoder_to_decoder.weight.numel()
        counts["decoder"] += sum(p.numel() for p in model.decoder.parameters())
    if model.classifier is not None:
        counts["classifier"] = sum(p.numel() for p in model.classifier.parameters())
    assert about["parameters"] == counts
    assert about["weights_bytes"] == 4 * sum(counts.values())
    assert about["dtypes"] == ["float32"]
    assert about["license"] == NC
    assert about["misfits"] == {"missing": [], "unexpected": [], "of another shape": []}
    assert about["run"] is None
    text = text_of(capsys, path)
    assert row(text, "dialect").startswith(dialect)
    assert row(text, "grid") == "4 frames of 32x32, tubelets of 2x8x8: 2x4x4 = 32 tokens"
    assert row(text, "encoder").startswith("2 blocks, width 24, 3 heads, MLP 96")
    assert ("decoder  " in text) == (kind == "pretraining")
    assert ("classifier  " in text) == (kind == "fine_tuned")
    assert row(text, "licence") == NC


@pytest.mark.parametrize("kind", ["ForPreTraining", "ForVideoClassification", "Model"])
def test_what_transformers_writes(tmp_path, capsys, kind):
    classification = kind == "ForVideoClassification"
    settings = {"id2label": {0: "run", 1: "jump"}} if classification else {}
    config = hf_config(use_mean_pooling=classification, **settings)
    theirs = getattr(transformers, f"VideoMAE{kind}")(config)
    theirs.save_pretrained(tmp_path)
    about = inspect.describe(str(tmp_path))
    assert not any(about["misfits"].values())
    # Theirs holds a buffer or two beside; parameters are what is compared.
    assert sum(about["parameters"].values()) == sum(p.numel() for p in theirs.parameters())
    assert about["license"] == UNSTATED
    # Their folder has no preprocessor_config.json: nothing says what video is normalised by.
    assert {"image_mean", "image_std"} <= set(about["assumed"])
    text = text_of(capsys, tmp_path)
    if classification:
        assert row(text, "classes") == "run, jump"
        assert row(text, "classifier") == "2 classes, mean, LayerNorm eps 1e-05"
    assert "LayerNorm eps 1e-12" in row(text, "encoder")
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]})
    )
    text = text_of(capsys, tmp_path)
    assert row(text, "normalised by") == "mean 0.5, 0.4, 0.3; std 0.1, 0.2, 0.3"


def published(tmp_path, container, args, **settings):
    """A file with the published code's names, and nothing of ours in its args."""
    path = tmp_path / "checkpoint.pth"
    saved(path, "videomae", **settings)
    weights = torch.load(path, weights_only=True)["model"]
    content = {container: weights, "args": args, "optimizer": {"a": 1}, "epoch": 799}
    torch.save(weights if container == "bare" else content, path)
    return path


@pytest.mark.parametrize("container", ["model", "module", "state_dict", "bare"])
def test_files_of_the_published_code(tmp_path, capsys, container):
    args = argparse.Namespace(
        num_frames=4, input_size=32, mask_ratio=0.75, decoder_mask_ratio=0.5,
        decoder_mask_type="run_cell", normlize_target=False,
    )  # fmt: skip
    path = published(tmp_path, container, args, image_size=32, frames=4)
    if container == "bare":
        # 16 frames of 224 pixels, as published, though they are not.
        text = text_of(capsys, path)
        assert row(text, "grid").startswith("16 frames of 224x224")
        for name in ("frames", "image_size", "heads", "mask_ratio"):
            assert name in row(text, "not in the file")
        return
    text = text_of(capsys, path)
    dialect = row(text, "dialect")
    assert f"weights under {container!r}" in dialect
    assert ("DeepSpeed" in dialect) == (container == "module")
    assert dialect.endswith("beside args, optimizer, epoch")
    assert "heads unknown" in row(text, "encoder")
    assert "heads unknown" in row(text, "decoder")
    assert row(text, "mask") == "tube 0.75: 8 visible"
    assert row(text, "target") == "pixels"
    assert row(text, "licence") == UNSTATED
    missing = row(text, "not in the file")
    assert "heads, " in missing
    assert "mask_ratio" not in missing
    assert "frames" not in missing


def test_running_cell_counts(tmp_path, capsys):
    """At V2's masks 8x14x14 tokens: 160 visible, 784 decoded, 704 of them scored."""
    path = saved(
        tmp_path, frames=16, image_size=224, patch_size=16, decoder_mask_ratio=0.5, mask_ratio=0.9
    )
    text = text_of(capsys, path)
    assert row(text, "mask") == "tube 0.9: 160 visible"
    assert row(text, "decoder mask") == "running_cell 0.5: 784 decoded, 704 scored"


def test_settings_that_no_mask_can_be_drawn_with(tmp_path, capsys):
    path = saved(tmp_path / "f.pth", "videomae", decoder_depth=2)
    content = torch.load(path, weights_only=True)
    content["args"]["mask_type"] = "part_window"
    torch.save(content, path)
    text = text_of(capsys, path)
    assert row(text, "mask").startswith("none can be drawn: ")
    assert "part_window" in row(text, "mask")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "base"),
        ({"decoder_depth": 2}, "base (the encoder; the decoder is another)"),
        ({"decoder_depth": 0}, "base"),
        ({"depth": 11}, "of no published model"),
        ({"heads": 6}, "of no published model"),
    ],
    ids=str,
)
def test_published_sizes(tmp_path, monkeypatch, capsys, settings, expected):
    """Without writing 400 MB: the file's shapes are those of a model without data."""
    with torch.device("meta"):
        model = VideoMAE("base", **settings)
    VideoMAE("tiny").save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    description["model"] = model.config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(description))
    monkeypatch.setattr(
        "vmae_fast.models.files.read_tensors", lambda *_, **__: dict(model.state_dict())
    )
    text = text_of(capsys, tmp_path)
    assert row(text, "size") == expected
    if not settings:
        assert "encoder 86.2 M" in row(text, "weights")


# ---- weights are not read -----------------------------------------------------------------


@pytest.mark.parametrize("dialect", NAMES)
def test_no_tensor_is_read(tmp_path, dialect):
    path = saved(tmp_path / NAMES[dialect], dialect)
    found, _ = inspect._read(path)
    assert found.state
    assert all(tensor.device.type == "meta" for tensor in found.state.values())


def test_dtypes(tmp_path, capsys):
    path = saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {name: t.bfloat16() for name, t in state.items()}
    state["mask_token"] = state["mask_token"].double()
    save_file(state, tmp_path / "model.safetensors")
    about = inspect.describe(path)
    assert about["dtypes"] == ["bfloat16", "float64"]
    assert about["weights_bytes"] == sum(t.numel() * t.element_size() for t in state.values())


# ---- tensors that do not fit --------------------------------------------------------------


def test_misfits_are_listed_and_the_status_says_so(tmp_path, capsys):
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["encoder.blocks.1.attn.q_bias"], state["mask_token"]
    state["rogue.weight"] = torch.zeros(3)
    state["decoder.head.bias"] = torch.zeros(17)
    save_file(state, file)
    text = text_of(capsys, tmp_path, status=1)
    tail = text[text.index("will not load") :]
    for part in (
        "2 missing:\n    encoder.blocks.1.attn.q_bias\n    mask_token",
        "1 unexpected:\n    rogue.weight",
        "1 of another shape:\n    decoder.head.bias: (17,) in the file, (384,) in the model",
    ):
        assert part in tail
    with pytest.raises(CheckpointError):
        VideoMAE.from_pretrained(tmp_path)


def test_a_published_file_with_strange_tensors(tmp_path, capsys):
    args = argparse.Namespace(num_frames=4, input_size=32)
    path = published(tmp_path, "model", args)
    content = torch.load(path, weights_only=False)
    content["model"]["encoder.rel_pos_bias"] = torch.zeros(3)
    for name in [n for n in content["model"] if n.startswith("encoder.blocks.1.mlp")]:
        del content["model"][name]
    torch.save(content, path)
    about = inspect.describe(str(path))
    assert about["misfits"]["unexpected"] == ["encoder.rel_pos_bias"]
    assert len(about["misfits"]["missing"]) == 4


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        inspect.run([str(tmp_path)])
    torch.save({"model": {"conv1.weight": torch.zeros(3)}}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"is this a VideoMAE checkpoint\?.*conv1"):
        inspect.run([str(tmp_path / "resnet.pth")])


# ---- a run --------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    folder = RunFolder.open(tmp_path / "run", resume=False, overwrite=False)
    folder.write("config.toml", '[data]\ndata = "clips"\n[optim]\nbatch_size = 2\nlr = 0.5\n')
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 3, 4, 32, 32)).loss.backward()
    optimizer.step()
    for step in (1, 2):
        folder.save(step, model, optimizer, AveragedWeights(model, 0.5), {"seed": 5}, keep=2)
    return folder.path


def test_of_a_run(capsys, run_folder):
    text = text_of(capsys, run_folder)
    assert row(text, "checkpoint").endswith("checkpoints/step-00000002")
    assert row(text, "run") == str(run_folder)
    assert row(text, "step") == "2, seed 5"
    assert row(text, "averaged") == "kept beside them (--ema)"
    assert row(text, "  [data]") == "data=clips"
    assert row(text, "  [optim]") == "batch_size=2, lr=0.5"
    text = text_of(capsys, run_folder, "--ema")
    assert row(text, "checkpoint").endswith("step-00000002/ema")
    assert row(text, "step") == "2, seed 5"
    assert row(text, "averaged") == "these"
    text = text_of(capsys, run_folder / "checkpoints" / "step-00000001")
    assert row(text, "step") == "1, seed 5"


# ---- output -------------------------------------------------------------------------------


def test_json_holds_the_same(tmp_path, capsys, run_folder):
    printed = json.loads(text_of(capsys, run_folder, "--json", "--tensors"))
    assert printed["run"]["step"] == 2
    assert printed["run"]["settings"]["optim"] == {"batch_size": 2, "lr": 0.5}
    assert printed["grid"]["tokens"] == [2, 4, 4]
    assert printed["mask"] == {"visible": 4, "decoded": 28, "scored": 28}
    assert printed["tensors"]["mask_token"] == {"shape": [1, 1, 20], "dtype": "float32"}
    assert printed["model"]["image_mean"] == [0.485, 0.456, 0.406]


def test_tensors_under_the_names_of_the_file(tmp_path, capsys):
    path = saved(tmp_path, "huggingface")
    text = text_of(capsys, path, "--tensors")
    name = "videomae.encoder.layer.1.attention.attention.key.weight"
    (line,) = [line for line in text.splitlines() if line.endswith(f" {name}")]
    assert line.split() == ["24x24", "float32", name]
    assert sum(" float32 " in line for line in text.splitlines()) == len(
        load_file(tmp_path / "model.safetensors")
    )


def test_interpolated_positions_are_said(tmp_path, capsys):
    assert row(text_of(capsys, saved(tmp_path / "a")), "positions") == "of this grid"
    path = saved(tmp_path / "b", frames=8, positions_from=(2, 4, 4))
    assert row(text_of(capsys, path), "positions") == "interpolated from 2x4x4 tokens"
