"""Which triplets a loss takes: rules, of which a loss makes tuples of indices only where it must."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.adapters.pytorch_metric_learning.distances import PEER, check_distance
from mmfast.adapters.pytorch_metric_learning.pairs import scores
from mmfast.checks import check_number
from mmfast.losses.similarity import choice

KINDS = ("all", "hard", "semihard", "easy")


class Mined(NamedTuple):
    """What a miner gives: itself, and what it was asked about."""

    miner: Any
    embeddings: Tensor
    labels: Tensor
    ref_emb: Tensor | None
    ref_labels: Tensor | None

    @torch.no_grad()
    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """(anchors, positives, negatives), with all scores in memory."""
        refs = self.embeddings if self.ref_emb is None else self.ref_emb
        itself = self.ref_labels is None or self.ref_labels is self.labels
        same = self.labels[:, None] == (self.labels if self.ref_labels is None else self.ref_labels)
        positive = same.clone().fill_diagonal_(False) if itself else same
        return self.miner.pick(scores(self.embeddings, refs, self.miner.score), positive, ~same)


class _Miner:
    def __init__(self, distance: Any = None):
        self.score = check_distance(PEER + type(self).__name__, distance)

    def __call__(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Mined:
        return Mined(self, embeddings, labels, ref_emb, ref_labels)


def all_triplets(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.where(positive[:, :, None] & negative[:, None])


class TripletMarginMiner(_Miner):
    """Triplets that violate a margin: all, those whose negative is nearer ("hard") or farther ("semihard").

    "easy": those that do not.
    """

    def __init__(self, margin: float = 0.2, type_of_triplets: str = "all", *, distance: Any = None):
        super().__init__(distance)
        op = PEER + "TripletMarginMiner"
        self.margin = check_number(op, "margin", margin)
        self.type_of_triplets = choice(op, "type_of_triplets", type_of_triplets, KINDS)

    def pick(self, s: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        triplets = a, p, n = all_triplets(positive, negative)
        apart = s[a, p] - s[a, n]
        wanted = {
            "all": apart <= self.margin,
            "easy": apart > self.margin,
            "hard": (apart <= self.margin) & (apart <= 0),
            "semihard": (apart <= self.margin) & (apart > 0),
        }[self.type_of_triplets]
        return tuple(x[wanted] for x in triplets)


class BatchHardMiner(_Miner):
    """Of each row that has both, the farthest positive and the nearest negative."""

    def __init__(self, *, distance: Any = None):
        super().__init__(distance)

    def pick(self, s: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = torch.where(positive.any(1) & negative.any(1))[0]
        p = s.masked_fill(~positive, torch.inf).argmin(1)
        n = s.masked_fill(~negative, -torch.inf).argmax(1)
        return a, p[a], n[a]
