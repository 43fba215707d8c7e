"""Figures of features: answers known by hand, whole evaluations, what a run writes."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from vmae_fast import VideoMAE
from vmae_fast.data import VideoFile
from vmae_fast.train import pretrain
from vmae_fast.train.distributed import Ranks
from vmae_fast.train.evaluate import evaluate
from vmae_fast.train.features import (
    FeatureFigures,
    bank_of,
    effective_rank,
    feature_std,
    figures_of,
    knn_classes,
    standardise,
)
from vmae_fast.train.inputs import Inputs
from vmae_fast.train.metrics import read_metrics


def at_angles(*degrees):
    """Unit vectors of the plane: their cosine similarities can be worked out."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


# ---- neighbours ---------------------------------------------------------------------------


def test_the_nearest_neighbour_decides_alone():
    bank, classes = at_angles(0, 90, 180), torch.tensor([0, 1, 2])
    found = knn_classes(bank, classes, at_angles(10, 80, 170, -100), k=1)
    assert found.tolist() == [0, 1, 2, 2]


def test_length_does_not_matter():
    bank, classes = at_angles(0, 30) * torch.tensor([[0.01], [100.0]]), torch.tensor([0, 1])
    assert knn_classes(bank, classes, 7 * at_angles(10, 20), k=1).tolist() == [0, 1]


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, 0), (10.0, 1)])
def test_votes_weigh_by_similarity(temperature, expected):
    """One neighbour at 0 degrees against two at 60: exp(1/t) against 2 exp(0.5/t)."""
    assert (math.exp(1 / temperature) > 2 * math.exp(0.5 / temperature)) == (expected == 0)
    bank, classes = at_angles(0, 60, -60), torch.tensor([0, 1, 1])
    found = knn_classes(bank, classes, at_angles(0), k=3, temperature=temperature)
    assert found.tolist() == [expected]


def test_only_k_vote():
    """At a high temperature votes are counts: of the 3 nearest two are 0, of all 7 five are 1."""
    bank, classes = at_angles(0, 1, 2, 40, 41, 42, 43), torch.tensor([0, 0, 1, 1, 1, 1, 1])
    for k, expected in ((3, 0), (7, 1), (50, 1)):
        assert knn_classes(bank, classes, at_angles(0), k=k, temperature=1e3).tolist() == [expected]


def test_equal_votes_go_to_the_lower_class():
    bank = at_angles(20, -20)
    for classes in ([3, 1], [1, 3]):
        assert knn_classes(bank, torch.tensor(classes), at_angles(0), k=2).tolist() == [1]


def test_of_equally_similar_clips_the_earlier_votes():
    bank = at_angles(*[20] * 40)
    classes = torch.arange(40).flip(0)
    assert knn_classes(bank, classes, at_angles(0), k=1).tolist() == [39]


def test_clips_of_the_query_s_file_have_no_vote():
    bank, classes = at_angles(0, 1, 90), torch.tensor([0, 0, 1])
    queries = at_angles(0, 0, 0)
    same = torch.tensor([[False] * 3, [True, True, False], [True] * 3])
    assert knn_classes(bank, classes, queries, k=2, same_file=same).tolist() == [0, 1, -1]


def test_a_small_temperature_overflows_nothing():
    assert knn_classes(at_angles(0, 90), torch.tensor([0, 1]), at_angles(80), temperature=1e-4) == 1


@pytest.mark.parametrize("wrong", [{"k": 0}, {"temperature": 0.0}])
def test_what_cannot_vote_is_an_error(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        knn_classes(at_angles(0), torch.tensor([0]), at_angles(0), **wrong)
    with pytest.raises(ValueError, match="at least 1 clip"):
        knn_classes(torch.empty(0, 2), torch.empty(0, dtype=torch.int64), at_angles(0))


# ---- spread and rank ----------------------------------------------------------------------


def test_effective_rank_counts_directions():
    # With their mean taken out, n orthonormal rows have n - 1 equal singular values.
    for n in (2, 5, 16):
        assert effective_rank(torch.eye(n)) == pytest.approx(n - 1)
    line = torch.randn(50, 1) * torch.randn(1, 8) + 3
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    # Singular values 3 and 1: exp of the entropy of (3/4, 1/4).
    cross = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(cross + 5) == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize("shape", [(3, 40), (300, 40), (40, 40)])
def test_effective_rank_is_that_of_the_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 2
    values = torch.linalg.svdvals(x.double() - x.double().mean(0))
    shares = values / values.sum()
    expected = math.exp(-sum(p * math.log(p) for p in shares.tolist() if p > 1e-12))
    assert effective_rank(x) == pytest.approx(expected, rel=1e-5)
    assert effective_rank(x) <= min(shape[0] - 1, shape[1]) + 1e-6


def test_clips_that_are_all_alike():
    for clips in (torch.zeros(10, 4), torch.full((10, 4), 0.1), torch.randn(1, 4).repeat(10, 1)):
        assert effective_rank(clips) == 0
        assert feature_std(clips) < 1e-6
    assert effective_rank(torch.randn(1, 4)) == 0


def test_spread():
    assert feature_std(torch.cat([torch.eye(6), -torch.eye(6)])) == pytest.approx(1)
    # 60 degrees from each other: half of the unit vectors' mean square is left to them.
    assert feature_std(at_angles(30, -30)) == pytest.approx(0.5)
    assert feature_std(9 * at_angles(30, -30)) == pytest.approx(0.5)


def test_collapse_is_noticed():
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(64, 32, generator=generator)

    def of(features):
        return FeatureFigures(feature_std(features), effective_rank(features), len(features))

    assert not of(random).collapsed
    assert of(torch.ones(64, 32)).collapsed
    assert of(1 + 1e-4 * random).collapsed
    assert of(random[:, :1] * random[:1] + 1e-3 * random).collapsed
    # Three clips have no more than two directions.
    assert not of(random[:3]).collapsed
    assert "64 clips" in of(torch.ones(64, 32)).warning()


def test_one_line_says_them_all():
    figures = FeatureFigures(0.5, 17.04, 256)
    assert figures.describe() == "features of 256 clips: spread 0.50, effective rank 17.0"
    text = FeatureFigures(0.5, 17.04, 256, 0.125, 0.375, 0.13).describe()
    assert text.endswith("; k-NN accuracy on held-out clips 0.125, 0.375 by motion, chance 0.130")


# ---- clips --------------------------------------------------------------------------------


def test_the_bank_is_all_or_the_same_part():
    assert bank_of([5, 3, 9]) == [3, 5, 9]
    train = list(range(0, 4000, 2))
    chosen = bank_of(train, 500)
    assert chosen == bank_of(train, 500)
    assert len(set(chosen)) == 500
    assert set(chosen) <= set(train)
    # Not every fourth, which may all be of one class.
    assert len({index // 2 % 4 for index in chosen}) == 4


def rows_at(*degrees):
    """Clips of one row of tubelets, ``(1, 2)`` each."""
    return at_angles(*degrees)[:, None]


def files_of(*labels):
    return [VideoFile(f"{n}.mp4", label) for n, label in enumerate(labels)]


def test_figures_of_labelled_clips():
    files = files_of("a", "a", "b", "b", "b", "a", "c", None)
    bank = dict(enumerate(rows_at(0, 10, 90, 100)))
    held_out = dict(zip((4, 5, 6, 7), rows_at(95, 5, 0, 0), strict=True))
    found = figures_of(files, bank, held_out)
    # 4 and 5 are right; nothing in the bank is a "c"; 7 has no class.
    assert found.knn_accuracy == pytest.approx(2 / 3)
    assert found.knn_chance == pytest.approx(3 / 7)
    assert found.num_clips == 8
    # One row of tubelets does not change.
    assert found.knn_motion is None
    assert set(found.row()) == {
        "val_feature_std", "val_feature_rank", "val_knn_accuracy", "val_knn_chance",
    }  # fmt: skip


@pytest.mark.parametrize("labels", [(None,) * 4, ("a",) * 4, ("a", "b", None, None)])
def test_without_classes_there_is_no_accuracy(labels):
    features = rows_at(0, 50, 90, 140)
    found = figures_of(
        files_of(*labels), dict(enumerate(features[:2])), dict(enumerate(features[2:], 2))
    )
    assert found.knn_accuracy is None
    assert set(found.row()) == {"val_feature_std", "val_feature_rank"}


def test_a_file_that_is_listed_twice_does_not_vote_for_itself():
    files = [VideoFile("same.mp4", "a"), VideoFile("other.mp4", "b"), VideoFile("same.mp4", "a")]
    bank = dict(enumerate(rows_at(0, 90)))
    assert figures_of(files, bank, {2: rows_at(0)[0]}).knn_accuracy == 0


def test_motion_is_change_whatever_a_clip_looks_like():
    """Two looks cross two motions: the look says nothing of the class, the change everything."""
    files = files_of(*("up", "down") * 40)
    generator = torch.Generator().manual_seed(0)
    looks = torch.randn(80, 1, 6, generator=generator) * 5
    up = torch.tensor([0.0, 1, 2, 3])[:, None] * torch.ones(6)
    clips = [look + (up if n % 2 == 0 else -up) for n, look in enumerate(looks)]
    clips = [clip - clip.mean(dim=0) + look for clip, look in zip(clips, looks, strict=True)]
    found = figures_of(files, dict(enumerate(clips[:60])), dict(enumerate(clips[60:], 60)))
    assert found.knn_motion == 1
    assert found.knn_accuracy < 0.8


def test_standardising_is_by_the_bank_alone():
    bank = torch.tensor([[1.0, 5, 2], [3, 5, 2.5]])
    queries = torch.tensor([[5.0, 5, 2]])
    ours, theirs = standardise(bank, queries)
    torch.testing.assert_close(ours, torch.tensor([[-1.0, 0, -1], [1, 0, 1]]), rtol=1e-4, atol=0)
    torch.testing.assert_close(theirs, torch.tensor([[3.0, 0, -1]]), rtol=1e-4, atol=0)


def inputs_of(config, ranks):
    model = VideoMAE("tiny", frames=4, image_size=32)
    return Inputs(config, model.config, ranks), model


def test_evaluation_against_a_second_one(config):
    """Features clip by clip through the public model, in another order."""
    from vmae_fast.data import ClipRequest

    config.loading.val = 0.5
    torch.manual_seed(3)
    inputs, model = inputs_of(config, Ranks(0, 1, torch.device("cpu")))
    dataset = inputs.validation_dataset()
    model.train()
    state = torch.get_rng_state()
    found = evaluate(model, inputs, dataset, 3, nullcontext())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())

    with torch.no_grad():
        tokens = {
            index: model.eval().encode(
                dataset[ClipRequest(0, index)].crops[0].permute(3, 0, 1, 2)[None]
            )[0]
            for index in reversed(range(16))
        }
    tokens = torch.stack([tokens[index] for index in (*inputs.train, *inputs.val)])
    features = tokens.mean(dim=1)
    assert found.features.num_clips == 16
    assert found.features.std == pytest.approx(feature_std(features), rel=1e-4)
    assert found.features.rank == pytest.approx(effective_rank(features), rel=1e-4)
    # Two rows of 16 tubelets.
    change = tokens[:, 16:].mean(dim=1) - tokens[:, :16].mean(dim=1)
    labels = [inputs.files[index].label for index in (*inputs.train, *inputs.val)]
    for figure, x in ((found.features.knn_accuracy, features), (found.features.knn_motion, change)):
        x = (x - x[:8].mean(dim=0)) / x[:8].std(dim=0, correction=0)
        unit = torch.nn.functional.normalize(x, dim=1)
        right = 0
        for query in range(8, 16):
            # 16 files of 8 classes: all eight of the bank vote.
            votes = {}
            for n in range(8):
                vote = math.exp(float(unit[query] @ unit[n]) / 0.07)
                votes[labels[n]] = votes.get(labels[n], 0) + vote
            right += max(votes, key=votes.get) == labels[query]
        assert figure == pytest.approx(right / 8)
    assert found.features.knn_chance == pytest.approx(1 / 8)


def test_a_held_out_clip_in_place_of_a_bad_file_does_not_get_into_the_bank(
    config, videos, tmp_path
):
    for file in videos.rglob("*.mp4"):
        copy = tmp_path / "data" / file.parent.name / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    config.data.data, config.loading.val = str(tmp_path / "data"), 0.25
    inputs, model = inputs_of(config, Ranks(0, 1, torch.device("cpu")))
    broken = inputs.files[inputs.train[0]]
    with open(broken.path, "wb") as file:
        file.write(b"no video")
    found = evaluate(model, inputs, inputs.validation_dataset(), 4, nullcontext())
    assert [bad.path for bad in found.bad] == [broken.path]
    assert found.features.num_clips == 15


# ---- runs ---------------------------------------------------------------------------------

NAMES = (
    *("val_knn_accuracy", "val_knn_motion", "val_knn_chance"),
    *("val_feature_std", "val_feature_rank"),
)


def test_features_are_looked_at_for_some_of_many_clips(config, monkeypatch):
    """The loss is of all held-out clips, with or without features of some of them."""
    from vmae_fast.train import evaluate as module

    config.loading.val = 0.5
    inputs, model = inputs_of(config, Ranks(0, 1, torch.device("cpu")))
    counted = []

    def found(most):
        def figures(files, bank, held_out):
            counted.append((len(bank), len(held_out)))
            assert set(bank) <= set(inputs.train)
            assert set(held_out) <= set(inputs.val)
            return figures_of(files, bank, held_out)

        monkeypatch.setattr(module, "bank_of", lambda indices: bank_of(indices, most))
        monkeypatch.setattr(module, "figures_of", figures)
        dataset = inputs.validation_dataset()
        return [
            evaluate(model, inputs, dataset, 3, nullcontext(), loss=loss) for loss in (True, False)
        ]

    (whole, _), (part, features_alone) = found(100), found(5)
    assert counted == [(8, 8), (8, 8), (5, 5), (5, 5)]
    assert whole.loss == part.loss
    assert features_alone.loss is None
    assert part.features.rank == pytest.approx(features_alone.features.rank, rel=1e-4)


def test_a_run_writes_them(config):
    result = pretrain(config)
    rows = [row for row in read_metrics(result.path / "metrics.jsonl") if NAMES[0] in row]
    assert [row["step"] for row in rows] == [0, 4, 8]
    assert all(name in row for row in rows for name in NAMES)
    assert ["val_loss" in row for row in rows] == [False, True, True]
    assert result.features.row() == {name: rows[-1][name] for name in NAMES}
    assert rows[0]["val_feature_rank"] != rows[-1]["val_feature_rank"]


def test_a_run_without_held_out_files_follows_its_features(config):
    config.loading.val = 0.0
    result = pretrain(config)
    rows = [row for row in read_metrics(result.path / "metrics.jsonl") if "val_feature_std" in row]
    assert [row["step"] for row in rows] == [0, 4, 8]
    assert not any("val_loss" in row or NAMES[0] in row for row in rows)
    assert result.val_loss is None


def test_a_collapse_is_said(config, capsys, monkeypatch):
    monkeypatch.setattr(VideoMAE, "encode", lambda self, video: torch.ones(len(video), 32, 128))
    config.optim.steps, config.optim.warmup_steps = 1, 0
    pretrain(config)
    said = [line for line in capsys.readouterr().err.splitlines() if "collapsed" in line]
    assert [line.split(":")[0] for line in said] == ["step 0", "step 1"]


def test_two_processes_find_what_one_finds(config, tmp_path):
    alone = pretrain(config).features
    both = tmp_path / "both"
    arguments = [
        "--model", "tiny", "--frames", "4", "--image-size", "32", "--data", config.data.data,
        "--stride", "2", "--val", "0.125", "--workers", "0", "--batch-size", "8", "--steps", "8",
        "--lr", "1e-3", "--warmup-steps", "2", "--out", str(both), "--val-every", "4",
        "--log-every", "1", "--device", "cpu",
    ]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "vmae_fast.cli", "pretrain", *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    rows = [json.loads(line) for line in (both / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if NAMES[0] in row][-1]
    assert last["step"] == 8
    assert last["val_knn_accuracy"] == alone.knn_accuracy
    assert last["val_knn_motion"] == alone.knn_motion
    assert last["val_feature_std"] == pytest.approx(alone.std, rel=1e-3)
    assert last["val_feature_rank"] == pytest.approx(alone.rank, rel=1e-3)
