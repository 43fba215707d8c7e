"""vmae-fast convert: every dialect to every other, checked by those who read them."""

import argparse

import pytest
import torch
import transformers
from helpers import PARITY_RTOL, hf_config, make_video, random_mask, randomise, relative_error
from safetensors.torch import load_file, save_file

from vmae_fast import CheckpointError, VideoMAE
from vmae_fast.commands import convert
from vmae_fast.models.checkpoint import save_model
from vmae_fast.models.licence import UNSTATED
from vmae_fast.train import ConfigError
from vmae_fast.train.optimizer import AveragedWeights
from vmae_fast.train.run_folder import RunFolder

RTOL = PARITY_RTOL[torch.float32]
NC = "cc-by-nc-4.0"
SMALL = {
    "frames": 4, "image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3,
    "decoder_width": 20, "decoder_depth": 2, "decoder_heads": 2,
}  # fmt: skip
FINE_TUNED = {"decoder_depth": 0, "num_classes": 5, "final_norm": False}
KINDS = {"pretraining": {}, "fine_tuned": FINE_TUNED, "encoder": {"decoder_depth": 0}}
NAMES = {"vmae-fast": "folder", "huggingface": "folder", "videomae": "file.pth"}
CLASSES = {
    "pretraining": transformers.VideoMAEForPreTraining,
    "fine_tuned": transformers.VideoMAEForVideoClassification,
    "encoder": transformers.VideoMAEModel,
}


def small_model(seed=0, **settings):
    # The epsilon that Hugging Face's classes have fixed, so that they agree as closely as can be.
    model = VideoMAE("tiny", **{**SMALL, "decoder_norm_eps": 1e-5, "fc_norm_eps": 1e-5, **settings})
    randomise(model, seed)
    return model.eval()


def saved(path, dialect="vmae-fast", **settings):
    return str(small_model(**settings).save_pretrained(path, dialect=dialect))


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def outputs(model, video, mask):
    """What a model of ours or of Hugging Face's makes of a clip."""
    ours = isinstance(model, VideoMAE)
    clip = video if ours else video.transpose(1, 2)
    with torch.no_grad():
        if ours and model.decoder is not None:
            out = model(clip, mask, return_pred=True)
            return out.pred, out.loss
        if ours:
            return (model.encode(clip) if model.classifier is None else model.classify(clip),)
        if isinstance(model, transformers.VideoMAEForPreTraining):
            out = model(clip, bool_masked_pos=mask)
            return out.logits, out.loss
        out = model(clip)
        return (out.logits if hasattr(out, "logits") else out.last_hidden_state,)


def assert_same_outputs(first, second):
    settings = first.config if isinstance(first, VideoMAE) else second.config
    video = make_video((2, 3, settings.frames, *settings.size), torch.float32)
    mask = random_mask(2, settings.num_tokens, settings.num_tokens * 3 // 4)
    pairs = zip(*(outputs(m, video, mask) for m in (first, second)), strict=True)
    for got, expected in pairs:
        assert relative_error(got, expected) < RTOL


# ---- every dialect ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_every_dialect_to_every_other(tmp_path, capsys, first, second, kind):
    source = saved(tmp_path / "in" / NAMES[first], first, **KINDS[kind], license=NC)
    out = tmp_path / "out" / NAMES[second]
    assert convert.run([source, str(out), "--dialect", second]) == 0
    model, again = VideoMAE.from_pretrained(source), VideoMAE.from_pretrained(out).eval()
    assert same_weights(model, again)
    assert_same_outputs(again, small_model(**KINDS[kind]))
    text = capsys.readouterr().out
    count = sum(parameter.numel() for parameter in model.parameters())
    for part in (
        f"read {source}", f"wrote {out}", f"dialect        {first}", f"dialect        {second}",
        f"{count:,} (", "4 frames of 32x32, tubelets of 2x8x8: 2x4x4 = 32 tokens", NC,
        f"checked: {len(model.state_dict())} tensors read back, all bitwise equal",
    ):  # fmt: skip
        assert part in text
    assert "not kept" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_is_written(tmp_path, kind):
    source = saved(tmp_path / "in.pth", "videomae", **KINDS[kind])
    convert.run([source, str(tmp_path / "out"), "--dialect", "huggingface"])
    theirs, info = CLASSES[kind].from_pretrained(tmp_path / "out", output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(problem), (problem, info[problem])
    assert_same_outputs(VideoMAE.from_pretrained(source).eval(), theirs.eval())


@pytest.mark.parametrize("second", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_writes_is_read(tmp_path, second, kind):
    settings = {"use_mean_pooling": True, "num_labels": 7} if kind == "fine_tuned" else {}
    theirs = CLASSES[kind](hf_config(**settings))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "in")
    out = tmp_path / "out" / NAMES[second]
    convert.run([str(tmp_path / "in"), str(out), "--dialect", second])
    assert_same_outputs(VideoMAE.from_pretrained(out).eval(), theirs)
    if second == "huggingface":
        before, after = (load_file(p / "model.safetensors") for p in (tmp_path / "in", out))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_deepspeed_file_of_unpublished_width(tmp_path, capsys):
    small_model().save_pretrained(tmp_path / "in.pth", dialect="videomae")
    weights = torch.load(tmp_path / "in.pth", weights_only=True)["model"]
    args = argparse.Namespace(num_frames=4, input_size=32)
    torch.save({"module": weights, "args": args, "epoch": 3}, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="--heads"):
        convert.run([str(tmp_path / "in.pth"), str(tmp_path / "out")])
    flags = ["--heads", "3", "--decoder-heads", "2", "--license", NC]
    convert.run([str(tmp_path / "in.pth"), str(tmp_path / "out"), *flags])
    model = VideoMAE.from_pretrained(tmp_path / "out")
    assert same_weights(model, small_model())
    assert model.config.license == NC
    text = capsys.readouterr().out
    assert "'module', beside args, epoch" in text
    assert "licence from   --license" in text


# ---- what it says -------------------------------------------------------------------------


def test_what_a_dialect_has_no_word_for_is_said(tmp_path, capsys):
    source = saved(tmp_path / "in", mask_ratio=0.75, decoder_norm_eps=1e-6)
    convert.run([source, str(tmp_path / "out"), "--dialect", "huggingface"])
    text = capsys.readouterr().out
    assert "not kept by huggingface: mask_ratio=0.75 is read back as 0.9" in text
    assert "not kept by huggingface: decoder_norm_eps=1e-06 is read back as 1e-05" in text
    assert text.count("not kept") == 2


def test_names_of_classes_are_not_lost_silently(tmp_path, capsys):
    config = hf_config(use_mean_pooling=True, id2label={0: "running", 1: "jumping"})
    theirs = transformers.VideoMAEForVideoClassification(config)
    theirs.save_pretrained(tmp_path / "in")
    convert.run([str(tmp_path / "in"), str(tmp_path / "out")])
    assert "not kept: the names of the classes" in capsys.readouterr().out


def test_a_licence_that_nobody_states(tmp_path, capsys):
    transformers.VideoMAEModel(hf_config()).save_pretrained(tmp_path / "in")
    convert.run([str(tmp_path / "in"), str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert UNSTATED in text
    assert "--license NAME says which" in text
    assert VideoMAE.from_pretrained(tmp_path / "out").config.license == UNSTATED


def test_half_precision_becomes_single(tmp_path, capsys):
    source = saved(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    convert.run([source, str(tmp_path / "out")])
    assert "converted from float16 to float32" in capsys.readouterr().out
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weights[n], t.float()) for n, t in load_file(file).items())


@pytest.mark.parametrize("fault", ["value", "sign_of_zero", "missing"])
def test_a_file_that_is_not_what_was_written_is_noticed(tmp_path, monkeypatch, fault):
    source = saved(tmp_path / "in")

    def faulty(model, path, dialect):
        save_model(model, path, dialect)
        state = load_file(path / "model.safetensors")
        if fault == "missing":
            del state["mask_token"]
        elif fault == "value":
            state["decoder.head.bias"][3] += 1e-7
        save_file(state, path / "model.safetensors")
        return path

    if fault == "sign_of_zero":
        state = load_file(tmp_path / "in" / "model.safetensors")
        state["mask_token"].zero_()
        save_file(state, tmp_path / "in" / "model.safetensors")
        monkeypatch.setattr(
            "vmae_fast.models.checkpoint.save_model",
            lambda model, path, dialect: (
                model.mask_token.data.neg_(), save_model(model, path, dialect)
            )[1],
        )  # fmt: skip
    else:
        monkeypatch.setattr("vmae_fast.models.checkpoint.save_model", faulty)
    with pytest.raises(CheckpointError, match=r"read back with other .*do not use it"):
        convert.run([source, str(tmp_path / "out")])


# ---- flags --------------------------------------------------------------------------------


def test_encoder_only(tmp_path, capsys):
    source = saved(tmp_path / "in")
    convert.run([source, str(tmp_path / "out"), "--encoder-only", "--dialect", "huggingface"])
    theirs = transformers.VideoMAEModel.from_pretrained(tmp_path / "out").eval()
    model = VideoMAE.from_pretrained(tmp_path / "out")
    assert model.decoder is None
    assert_same_outputs(model, theirs)
    left_out = len(small_model().state_dict()) - len(model.state_dict())
    text = capsys.readouterr().out
    assert f"left out: {left_out} tensors of the decoder" in text
    assert "not kept" not in text


def test_another_grid_only_on_request(tmp_path, capsys):
    source = saved(tmp_path / "in")
    flags = [source, str(tmp_path / "out"), "--frames", "8", "--image-size", "48"]
    with pytest.raises(CheckpointError, match="--interpolate-positions"):
        convert.run(flags)
    assert not (tmp_path / "out").exists()
    convert.run([*flags, "--interpolate-positions"])
    model = VideoMAE.from_pretrained(tmp_path / "out")
    assert model.config.grid == (4, 6, 6)
    assert model.config.positions_from == (2, 4, 4)
    assert capsys.readouterr().out.count("interpolated from 2x4x4 tokens") == 2


def test_a_file_that_does_not_say_its_grid(tmp_path, capsys):
    source = saved(tmp_path / "in.pth", "videomae")
    weights = torch.load(source, weights_only=True)["model"]
    torch.save(weights, source)
    said = ["--heads", "3", "--decoder-heads", "2"]
    convert.run([source, str(tmp_path / "a"), *said, "--frames", "4", "--image-size", "32"])
    assert "--frames and --image-size say it" in capsys.readouterr().out
    wide = ["--frames", "8", "--image-size", "32", "--interpolate-positions"]
    with pytest.raises(CheckpointError, match="--positions-from"):
        convert.run([source, str(tmp_path / "b"), *said, *wide])
    convert.run([source, str(tmp_path / "b"), *said, *wide, "--positions-from", "2", "4", "4"])
    assert VideoMAE.from_pretrained(tmp_path / "b").config.positions_from == (2, 4, 4)


@pytest.fixture
def run_folder(tmp_path):
    """A run with checkpoints of steps 1 and 2, and the average of both."""
    folder = RunFolder.open(tmp_path / "run", resume=False, overwrite=False)
    folder.write("config.toml", "[optim]\nbatch_size = 2\n")
    model = small_model(license=NC)
    average = AveragedWeights(model, 0.5)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        model.load_state_dict(small_model(seed=step).state_dict())
        average.update(model, torch.zeros(()))
        folder.save(step, model, optimizer, average, {"seed": 5}, keep=2)
    return folder.path


def test_a_run_folder_gives_its_latest_checkpoint(tmp_path, run_folder):
    convert.run([str(run_folder), str(tmp_path / "out.pth"), "--dialect", "videomae"])
    model = VideoMAE.from_pretrained(tmp_path / "out.pth")
    assert same_weights(model, small_model(seed=2))
    assert model.config.license == NC
    convert.run([str(run_folder), str(tmp_path / "ema"), "--ema"])
    averaged = VideoMAE.from_pretrained(tmp_path / "ema").state_dict()
    states = [small_model(seed=seed).state_dict() for seed in (0, 1, 2)]
    for name, tensor in averaged.items():
        expected = 0.25 * states[0][name] + 0.25 * states[1][name] + 0.5 * states[2][name]
        torch.testing.assert_close(tensor, expected)


# ---- overwriting --------------------------------------------------------------------------


def test_what_is_there_is_not_overwritten_unasked(tmp_path):
    source = saved(tmp_path / "in", seed=1)
    for out, dialect in (("folder", "vmae-fast"), ("file.pth", "videomae")):
        saved(tmp_path / out, dialect)
        flags = [source, str(tmp_path / out), "--dialect", dialect]
        with pytest.raises(ConfigError, match="exists; --overwrite replaces it"):
            convert.run(flags)
        assert same_weights(VideoMAE.from_pretrained(tmp_path / out), small_model())
        convert.run([*flags, "--overwrite"])
        assert same_weights(VideoMAE.from_pretrained(tmp_path / out), small_model(seed=1))


def test_nothing_of_another_checkpoint_is_left_in_a_folder(tmp_path):
    source = saved(tmp_path / "in")
    saved(tmp_path / "out", "huggingface", license="mit")
    convert.run([source, str(tmp_path / "out"), "--overwrite"])
    names = sorted(entry.name for entry in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path, run_folder):
    source = saved(tmp_path / "in")
    saved(tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for out in (tmp_path / "out", run_folder, run_folder / "checkpoints" / "step-00000002"):
        with pytest.raises(ConfigError, match="no part of a checkpoint and would be lost"):
            convert.run([source, str(out), "--overwrite"])
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_checkpoint_can_be_converted_onto_itself(tmp_path):
    source = saved(tmp_path / "in")
    convert.run([source, source, "--dialect", "huggingface", "--overwrite"])
    assert same_weights(VideoMAE.from_pretrained(source), small_model())
    assert (tmp_path / "in" / "preprocessor_config.json").exists()


def test_a_refused_conversion_leaves_what_was_there(tmp_path):
    source = saved(tmp_path / "in", init_values=0.1)
    saved(tmp_path / "out", "huggingface")
    with pytest.raises(CheckpointError, match="no layer scale"):
        convert.run([source, str(tmp_path / "out"), "--dialect", "huggingface", "--overwrite"])
    assert same_weights(VideoMAE.from_pretrained(tmp_path / "out"), small_model())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out"]


# ---- errors that say what to do -----------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["IN", "out", "--dialect", "huggingfce"], "did you mean 'huggingface'"),
        (["IN", "out", "--dialect", "x"], "'vmae-fast', 'huggingface' or 'videomae', got 'x'"),
        (["IN", "out", "--dialect", "videomae"], "name it .pth, not 'out'"),
        (["IN", "out.pth"], "give another name, or --dialect videomae"),
        (["IN", "out", "--license", "mit"], "states the licence cc-by-nc-4.0"),
        (["IN", "out", "--frames", "7", "--interpolate-positions"], "6 or 8 would do"),
        (["IN", "out", "--positions-from", "1", "2", "3"], "goes with --interpolate-positions"),
        (["IN", "out", "--ema"], "holds no averaged weights.*--ema-decay"),
        (["IN", "IN", "--overwrite", "--dialect", "videomae"], "name it .pth"),
        (["IN/model.safetensors", "out"], "Give the folder"),
        (["empty", "out"], "holds no config.json: is it a checkpoint folder"),
        (["files", "out"], "It holds net.pth: give the file"),
        (["above", "out"], "There is one in .*inner"),
        (["weights", "out"], "put the config.json that belongs to them"),
        (["text.pth", "out"], "a text file"),
        (["lfs.pth", "out"], "git lfs pull"),
        (["page.pth", "out"], "a web page"),
        (["hf.pth", "out"], "have Hugging Face's names.*config.json"),
        (["scale", "out", "--dialect", "huggingface"], "no layer scale.*'vmae-fast'.*do"),
        (["both", "out", "--dialect", "huggingface"], "--encoder-only"),
        (["nowhere", "out"], "no checkpoint at .*: give a checkpoint's folder, a .pth file"),
    ],
)  # fmt: skip
def test_errors(tmp_path, flags, message):
    saved(tmp_path / "IN", license=NC)
    saved(tmp_path / "scale", init_values=0.1)
    saved(tmp_path / "both", num_classes=5, final_norm=False)
    saved(tmp_path / "above" / "inner")
    saved(tmp_path / "weights")
    (tmp_path / "weights" / "config.json").unlink()
    (tmp_path / "empty").mkdir()
    saved(tmp_path / "files" / "net.pth", "videomae")
    torch.save(transformers.VideoMAEModel(hf_config()).state_dict(), tmp_path / "hf.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint\n")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>\n<html>404</html>\n")
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    first = [str(tmp_path / flag) for flag in flags[:2]]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((CheckpointError, ConfigError, FileNotFoundError), match=f"(?s){message}"):
        convert.run([*first, *flags[2:]])
    assert sorted(tmp_path.rglob("*")) == before
