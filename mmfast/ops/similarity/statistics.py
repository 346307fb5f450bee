"""What scores say beside a loss: of all pairs, in a sweep of its own that nothing pays for who does not ask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.ops.products import product
from mmfast.ops.similarity.op import strips
from mmfast.ops.similarity.passes import Rule
from mmfast.ops.similarity.rows import rows_of
from mmfast.ops.similarity.triplet_scores import Scored

Pair = tuple[Tensor, Tensor]


class Statistics(NamedTuple):
    """Scalars of the compute type, NaN where they are means of nothing."""

    mean_positive: Tensor
    """score of a row and a positive, over all such pairs"""
    mean_negative: Tensor
    """score of a row and a negative, over all such pairs"""
    accuracy: Tensor
    """share of the rows with positives whose nearest candidate is one, nearer than all negatives"""
    zero_rows: Tensor
    """valid rows shorter than 1e-12"""


class Compared:
    """What one call of a loss compared, detached: rows q (B, D), candidates k (C, D), None for q itself, and who
    belongs to whom, see :func:`mmfast.ops.similarity.op.similarity`.

    score: "cosine", "dot", or for rows among themselves another of ``triplet_scores.SCORES``. both: candidates are
    rows, too, with the rows as candidates.
    """

    def __init__(
        self, q, k, labels: Pair, ids: Pair | None, valid: Pair | None, score, itself=False, both=False
    ):
        self.q, self.k = q.detach(), None if k is None else k.detach()
        self.labels, self.ids, self.valid = labels, ids, valid
        self.score, self.itself, self.both = score, itself or k is None, both
        self.found = None

    def statistics(self) -> Statistics:
        """Of scores in strips, none of which are kept; computed once. No device is waited for."""
        if self.found is None:
            with torch.no_grad(), torch.autocast(self.q.device.type, enabled=False):
                self.found = self._swept()
        return self.found

    def _swept(self) -> Statistics:
        rule = Rule(self.labels, self.ids, self.valid, self.itself)
        parts = [(self.q, self.k, rule)]
        if self.both:
            parts.append((self.k, self.q, rule.turned()))
        found = [_swept(*part, self.score) for part in parts]
        zero = [_zero_rows(self.q, None if self.valid is None else self.valid[0])]
        if not self.itself:
            zero.append(_zero_rows(self.k, None if self.valid is None else self.valid[1]))
        sums, numbers = (sum(x) for x in zip(*found, strict=True))
        means = (sums / numbers).to(_one(self.q).dtype)
        return Statistics(*means.unbind(), sum(zero).to(means.dtype))


def _one(x: Tensor) -> Tensor:
    return x.new_ones((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _swept(q: Tensor, k: Tensor | None, rule: Rule, score: str) -> tuple[Tensor, Tensor]:
    """(3,) sums: of the scores of positives, of negatives, and of the rows that are right; and (3,) of how many."""
    own, other = (None, None) if rule.valid is None else rule.valid
    if k is None:
        scored = Scored.of(q, own, score)
        candidates, scores = len(q), scored.scores
    else:
        u, v = (rows_of(x, score == "cosine", there).unit for x, there in ((q, own), (k, other)))
        candidates = len(k)

        def scores(start, stop):
            return product(u[start:stop], v)

    sums, numbers = (torch.zeros(3, dtype=torch.float64, device=q.device) for _ in range(2))
    for start, stop in strips(len(q), candidates, _one(q)):
        s = scores(start, stop)
        same, neither = rule.masks(start, stop)
        positive, negative = (same, ~same) if neither is None else (same & ~neither, ~(same | neither))
        for i, mask in enumerate((positive, negative)):
            sums[i] += s.masked_fill(~mask, 0).sum(dtype=torch.float64)
            numbers[i] += mask.sum()
        nearest, next_best = (s.masked_fill(~mask, -torch.inf).amax(1) for mask in (positive, negative))
        has = positive.any(1)
        sums[2] += (has & (nearest > next_best)).sum()
        numbers[2] += has.sum()
    return sums, numbers


def _zero_rows(x: Tensor, valid: Tensor | None) -> Tensor:
    zero = rows_of(x, True, valid).scale[:, 0] == 0
    return (zero if valid is None else zero & valid).sum()
