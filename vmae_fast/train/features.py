"""What an encoder's features are worth, without a label in training: neighbours, spread, rank.

A clip is encoded with none of its tokens masked, and its tokens averaged over space. The mean of
that over time is its feature: what is in the clip. The change from each row of tubelets to the next
is its motion: what happens in it, whatever it looks like. Of both it is counted how often the
nearest training clips vote for a held-out clip's own class. How far the features of clips lie
apart, and over how many directions they spread, needs no class, and says when all clips come out
alike.

Shapes: n clips, t rows of tubelets, D encoder width; q queries, b clips of the bank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae_fast.data import VideoFile
from vmae_fast.data.rng import SPLIT, host_rng

# Neighbours that vote, and the temperature of their weights: those of Wu et al. (2018) and, with
# 20 for k, of DINO (Caron et al., 2021). Not tuned to anything here.
NEIGHBOURS: Final = 20
TEMPERATURE: Final = 0.07
# Of a small bank no more than this share votes: else the commonest class wins whatever the query.
VOTING_SHARE: Final = 1 / 8
# What a feature's variance over the bank is never divided by less than: BatchNorm's, as in the
# linear probe of MAE (He et al., 2022), which standardises features the same way.
_EPS: Final = 1e-6
# Training clips of the bank, and held-out clips compared with them, at most: enough for some
# neighbours of each of some hundred classes, and few beside the thousands of steps from one
# validation to the next.
BANK: Final = 1024
# Features have collapsed below either: fewer directions than two, or clips so near to each other
# that their cosine similarity is above 0.9999 (spread as 1 is for features in all directions).
COLLAPSED_RANK: Final = 2.0
COLLAPSED_STD: Final = 0.01
# Fewer clips have a rank of 2 or less for being few.
_FEWEST_CLIPS: Final = 8


def standardise(bank_bD: Tensor, queries_qD: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the bank's mean and deviation of each dimension taken out, fp32.

    Standardised so, as by a BatchNorm without parameters, a direction in which all clips agree
    does not decide their similarity.
    """
    bank, queries = bank_bD.float(), queries_qD.float()
    var, mean = torch.var_mean(bank, dim=0, correction=0)
    scale = (var + _EPS).rsqrt()
    return (bank - mean) * scale, (queries - mean) * scale


def knn_classes(
    bank_bD: Tensor,
    bank_classes: Tensor,
    queries_qD: Tensor,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    same_file: Tensor | None = None,
) -> Tensor:
    """The class that the ``k`` most similar clips of the bank vote for, each query's.

    A neighbour of cosine similarity ``s`` votes with ``exp(s / temperature)``. With equal votes
    the class of the lower number wins.

    Args:
        bank_bD: features of the bank, floating point; a row's length does not matter.
        bank_classes: ``(b,)`` int64, from 0.
        queries_qD: features to classify.
        k: how many vote; the whole bank where it holds fewer.
        temperature: above 0.
        same_file: ``(q, b)`` boolean, True where bank clip and query come from one file: such a
            clip has no vote.

    Returns:
        ``(q,)`` int64; -1 where nothing in the bank may vote.

    Raises:
        ValueError: the bank is empty, or k or temperature is out of its range.

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination"
    (CVPR 2018), section 3.4.
    """
    if not len(bank_bD) or k < 1 or temperature <= 0:
        raise ValueError(
            f"a bank of at least 1 clip, k of at least 1 and a temperature above 0 are needed, got "
            f"{len(bank_bD)}, {k} and {temperature}"
        )
    bank, queries = (F.normalize(x.float(), dim=1) for x in (bank_bD, queries_qD))
    similarity_qb = queries @ bank.T
    if same_file is not None:
        similarity_qb = similarity_qb.masked_fill(same_file, -math.inf)
    # Stable, so that which of two equally similar clips votes does not hang on the device.
    similarity, nearest = similarity_qb.sort(dim=1, descending=True, stable=True)
    similarity, nearest = similarity[:, :k], nearest[:, :k]
    # Relative to the nearest: a small temperature overflows nothing.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    weight = torch.where(similarity.isinf(), 0.0, weight)
    votes = weight.new_zeros(len(queries), int(bank_classes.max()) + 1)
    votes.scatter_add_(1, bank_classes[nearest], weight)
    return torch.where(votes.sum(dim=1) > 0, votes.argmax(dim=1), -1)


def feature_std(features_nD: Tensor) -> float:
    """How far clips lie apart: 0 where all are alike, 1 where they point in all directions.

    The deviation over clips of each dimension of the L2-normalised features, averaged (as a root
    mean square) over dimensions and times sqrt(D). SimSiam watches the same deviation, which is
    1 / sqrt(D) for features spread evenly over the sphere.

    Source: Chen and He, "Exploring simple Siamese representation learning" (CVPR 2021), section
    4.1.
    """
    unit = F.normalize(features_nD.double(), dim=1)
    return float(unit.var(dim=0, correction=0).sum().sqrt()) if len(unit) else 0.0


def effective_rank(features_nD: Tensor) -> float:
    """Over how many directions clips spread: exp of the entropy of the singular values' shares.

    Of the features with their mean over clips taken out: at most ``min(n - 1, D)``; 1 where all lie
    on a line, 0 where all are alike.

    Sources: Roy and Vetterli, "The effective rank" (EUSIPCO 2007); of features, Garrido et al.,
    "RankMe" (ICML 2023), which does not take the mean out.
    """
    x = features_nD.double()
    x = x - x.mean(dim=0, keepdim=True)
    # What fp32's rounding leaves of features that are all alike is no direction.
    if not len(x) or x.norm() <= 1e-6 * features_nD.double().norm():
        return 0.0
    # Of the smaller Gram matrix: some thousand clips then take no longer than some hundred.
    gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


@dataclass(frozen=True)
class FeatureFigures:
    """What the features of a model's clips come to.

    Attributes:
        std: see :func:`feature_std`; over all clips that were encoded.
        rank: see :func:`effective_rank`; over the same.
        num_clips: how many those are.
        knn_accuracy: share of the held-out clips whose class their neighbours in the bank vote
            for, by their features; None where there is nothing to compare.
        knn_motion: the same by how their tokens change over time; None too where clips are one
            row of tubelets long.
        knn_chance: what always naming the commonest class would get: its share of those clips.
    """

    std: float
    rank: float
    num_clips: int
    knn_accuracy: float | None = None
    knn_motion: float | None = None
    knn_chance: float | None = None

    @property
    def collapsed(self) -> bool:
        """Whether the clips come out (nearly) alike, or differ in one direction only."""
        few = self.num_clips < _FEWEST_CLIPS
        return not few and (self.rank < COLLAPSED_RANK or self.std < COLLAPSED_STD)

    def describe(self) -> str:
        """One line of them all."""
        text = (
            f"features of {self.num_clips} clips: spread {self.std:.2f}, effective rank "
            f"{self.rank:.1f}"
        )
        if self.knn_accuracy is None or self.knn_chance is None:
            return text
        motion = "" if self.knn_motion is None else f", {self.knn_motion:.3f} by motion"
        return (
            f"{text}; k-NN accuracy on held-out clips {self.knn_accuracy:.3f}{motion}, chance "
            f"{self.knn_chance:.3f}"
        )

    def warning(self) -> str:
        """What to tell the user where they have collapsed."""
        return (
            f"the features have collapsed: {self.num_clips} clips spread by {self.std:.3g} (of 1) "
            f"in {self.rank:.3g} directions, so the encoder hardly tells them apart. A lower --lr, "
            "a longer warm-up or --clip-grad may help"
        )

    def row(self) -> dict[str, float]:
        """For the metrics."""
        found: dict[str, float] = {"val_feature_std": self.std, "val_feature_rank": self.rank}
        votes = {
            "val_knn_accuracy": self.knn_accuracy,
            "val_knn_motion": self.knn_motion,
            "val_knn_chance": self.knn_chance,
        }
        return found | {name: value for name, value in votes.items() if value is not None}


def bank_of(indices: Sequence[int], most: int = BANK) -> list[int]:
    """Clips whose features are looked at: all, or ``most`` of them, drawn once for all.

    Drawn and not every so-many-th, which in a list that deals its classes in turn would be of one
    class.
    """
    order = host_rng(0, stream=SPLIT, epoch=1).permutation(len(indices))[:most]
    return sorted(indices[n] for n in order)


def figures_of(
    files: Sequence[VideoFile], bank: dict[int, Tensor], held_out: dict[int, Tensor]
) -> FeatureFigures:
    """The figures of encoded clips.

    Args:
        files: what the clips are of; their labels, where they have one, are the classes.
        bank: tokens averaged over space ``(t, D)`` of training clips, by index into ``files``.
        held_out: the same of held-out clips.
    """
    everything = torch.stack([*bank.values(), *held_out.values()]).mean(dim=1)
    spread = (feature_std(everything), effective_rank(everything), len(everything))
    asked = [index for index in held_out if files[index].label is not None]
    voting = [index for index in bank if files[index].label is not None]
    labels = [str(files[index].label) for index in (*voting, *asked)]
    number = {label: n for n, label in enumerate(sorted(set(labels)))}
    if not asked or len(set(labels[: len(voting)])) < 2:
        return FeatureFigures(*spread)
    classes = torch.tensor([number[label] for label in labels])
    place = {path: n for n, path in enumerate({file.path for file in files})}
    paths = torch.tensor([place[files[index].path] for index in (*voting, *asked)])
    bank_btD = torch.stack([bank[index] for index in voting])
    queries_qtD = torch.stack([held_out[index] for index in asked])

    def accuracy(bank_bX: Tensor, queries_qX: Tensor) -> float:
        predicted = knn_classes(
            bank_bX, classes[: len(voting)], queries_qX,
            k=min(NEIGHBOURS, max(int(VOTING_SHARE * len(voting)), 1)),
            same_file=paths[len(voting) :, None] == paths[: len(voting)],
        )  # fmt: skip
        return (predicted == classes[len(voting) :]).float().mean().item()

    moves = bank_btD.shape[1] > 1
    return FeatureFigures(
        *spread,
        knn_accuracy=accuracy(*standardise(bank_btD.mean(dim=1), queries_qtD.mean(dim=1))),
        knn_motion=accuracy(*standardise(_motion(bank_btD), _motion(queries_qtD)))
        if moves
        else None,
        knn_chance=classes.bincount().max().item() / len(classes),
    )


def _motion(rows_ntD: Tensor) -> Tensor:
    """Change from each row of tubelets to the next, ``(n, (t - 1) * D)``."""
    return rows_ntD.float().diff(dim=1).flatten(1)
