"""The licence goes where the weights go."""

import argparse
import json
import shutil
from fnmatch import fnmatch

import pytest
import torch
from helpers import hf_config
from safetensors.torch import load_file

from vmae_fast import CheckpointError, VideoMAE
from vmae_fast.models.licence import UNSTATED, model_card, read_front_matter
from vmae_fast.models.reading import read_checkpoint
from vmae_fast.train import ModelSettings

NC = "cc-by-nc-4.0"
SMALL = {
    "frames": 4, "image_size": 16, "patch_size": 8, "width": 24, "depth": 1, "heads": 3,
    "decoder_width": 20, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
DIALECTS = {"vmae-fast": "folder", "huggingface": "folder", "videomae": "file.pth"}


def saved(path, dialect="vmae-fast", **settings):
    return VideoMAE("tiny", **{**SMALL, **settings}).save_pretrained(path, dialect=dialect)


def licence_of(path):
    found = read_checkpoint(path, {}, shapes_only=True)
    return found.config.license, found.license_from


@pytest.mark.parametrize("licence", [NC, "mit", UNSTATED, None], ids=str)
@pytest.mark.parametrize("first", DIALECTS)
@pytest.mark.parametrize("second", DIALECTS)
def test_from_every_dialect_to_every_other(tmp_path, first, second, licence):
    path = saved(tmp_path / "a" / DIALECTS[first], first, license=licence)
    model = VideoMAE.from_pretrained(path)
    assert model.config.license == licence
    model.save_pretrained(tmp_path / "b" / DIALECTS[second], dialect=second)
    assert VideoMAE.from_pretrained(tmp_path / "b" / DIALECTS[second]).config.license == licence


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_run_that_starts_from_them_keeps_it(tmp_path, dialect):
    path = saved(tmp_path / "a" / DIALECTS[dialect], dialect, license=NC)
    model = ModelSettings(mask_ratio=0.75).build(path)
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["license"] == NC
    assert licence_of(tmp_path / "out") == (NC, "config.json")


def test_it_changes_nothing_else(tmp_path):
    torch.manual_seed(0)
    plain = VideoMAE("tiny", **SMALL)
    torch.manual_seed(0)
    licensed = VideoMAE("tiny", **SMALL, license=NC)
    assert plain.config.license is None
    first, second = plain.state_dict(), licensed.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stated_licence_is_not_replaced(tmp_path):
    saved(tmp_path, license=NC)
    with pytest.raises(CheckpointError, match=r"states the licence cc-by-nc-4\.0"):
        VideoMAE.from_pretrained(tmp_path, license="mit")
    assert VideoMAE.from_pretrained(tmp_path, license=NC).config.license == NC


@pytest.mark.parametrize("stated", [None, UNSTATED], ids=["none", "unknown"])
def test_where_none_is_stated_it_can_be_said(tmp_path, stated):
    saved(tmp_path, license=stated)
    assert VideoMAE.from_pretrained(tmp_path, license="mit").config.license == "mit"


# ---- files of others ----------------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.VideoMAEForPreTraining(hf_config()).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_a_hub_folder_states_it_in_its_readme(theirs):
    (theirs / "README.md").write_text(
        '---\nlicense: "cc-by-nc-4.0"\ntags:\n- vision\n---\n# Model\n'
    )
    assert licence_of(theirs) == (NC, "README.md")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_the_readme_is_fetched_from_the_hub(tmp_path, monkeypatch, theirs, weights):
    hub = pytest.importorskip("huggingface_hub")
    (theirs / "README.md").write_text("---\nlicense: mit\n---\n")
    if weights == "pytorch_model.bin":
        torch.save(load_file(theirs / "model.safetensors"), theirs / weights)
        (theirs / "model.safetensors").unlink()

    def snapshot_download(repo, *, allow_patterns):
        for file in theirs.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                (tmp_path / "cache").mkdir(exist_ok=True)
                shutil.copy(file, tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert licence_of("someone/videomae") == ("mit", "README.md")


def test_a_folder_that_says_where_it_comes_from(theirs):
    settings = json.loads((theirs / "config.json").read_text())
    settings["_name_or_path"] = "MCG-NJU/videomae-base"
    (theirs / "config.json").write_text(json.dumps(settings))
    licence, known_from = licence_of(theirs)
    assert licence == NC
    assert "MCG-NJU/videomae-base" in known_from


@pytest.mark.parametrize("readme", [None, "# Model", "---\nlicense: unknown\n---\n"], ids=str)
def test_a_folder_that_does_not_say(theirs, readme):
    if readme is not None:
        (theirs / "README.md").write_text(readme)
    licence, known_from = licence_of(theirs)
    assert licence == UNSTATED
    assert "neither" in known_from


def test_transformers_carries_it_through(tmp_path):
    """What their class loads and writes again, without our README.md, still says it."""
    transformers = pytest.importorskip("transformers")
    saved(tmp_path / "ours", "huggingface", license=NC)
    model = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "README.md").exists()
    assert licence_of(tmp_path / "again") == (NC, "config.json")


@pytest.mark.parametrize("args", [argparse.Namespace(num_frames=4, input_size=16), None])
def test_a_pth_of_others_does_not_say(tmp_path, args):
    saved(tmp_path / "file.pth", "videomae")
    weights = torch.load(tmp_path / "file.pth", weights_only=True)["model"]
    torch.save({"module": weights, "args": args}, tmp_path / "file.pth")
    said = {"heads": 3, "decoder_heads": 2, "frames": 4, "image_size": 16}
    model = VideoMAE.from_pretrained(tmp_path / "file.pth", **said)
    assert model.config.license == UNSTATED
    assert UNSTATED.startswith("unknown")
    assert NC in UNSTATED


def test_our_names_in_a_pth_are_ours(tmp_path):
    torch.save({"model": VideoMAE("tiny", **SMALL).state_dict()}, tmp_path / "f.pth")
    said = {"heads": 3, "decoder_heads": 2, "frames": 4, "image_size": 16}
    assert VideoMAE.from_pretrained(tmp_path / "f.pth", **said).config.license is None


# ---- README.md ----------------------------------------------------------------------------


def test_the_card_beside_theirs(tmp_path):
    saved(tmp_path / "nc", "huggingface", license=NC)
    text = (tmp_path / "nc" / "README.md").read_text()
    assert text.startswith("---\nlicense: cc-by-nc-4.0\n")
    saved(tmp_path / "none", "huggingface")
    assert not (tmp_path / "none" / "README.md").exists()
    # A card that its owner wrote is his.
    (tmp_path / "none" / "README.md").write_text("mine")
    saved(tmp_path / "none", "huggingface", license=NC)
    assert (tmp_path / "none" / "README.md").read_text() == "mine"
    assert licence_of(tmp_path / "none") == (NC, "config.json")


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\ntags: [a]\nlicense: 'apache-2.0'\n---\ntext", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: my-own\n---\n", "my-own"),
        ("---\nlicense: unknown\n---\n", None),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
        (model_card(NC), NC),
        (model_card(UNSTATED), None),
    ],
)
def test_front_matter(text, licence):
    assert read_front_matter(text) == licence
