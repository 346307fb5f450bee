"""Triplets (anchor, positive, negative) of strips of scores, in PyTorch, none of them ever made.

The positives of a row are sorted, and each of its negatives finds its place among them: the positives with which it
is in the wanted region are an interval there. Their number is the derivative by the negative's score; those of the
positives, and with them the loss, follow from sums of the ends of the intervals.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmfast.ops.similarity.passes import Rule

KINDS = ("all", "semihard", "hard", "semihard_nearest", "batch_hard", "smooth")
# Rows of the counts.
TERMS, EASY, SEMIHARD, HARD, POSITIVES, NEGATIVES = range(6)


class Options(NamedTuple):
    """margin: the temperature of kind "smooth". ties: a negative as near as the positive is hard, not of no region.

    soft: softplus(x) for max(x + margin, 0). lone: rows without a positive have one with the score ``of_itself``.
    """

    kind: str
    margin: float
    ties: bool = False
    soft: bool = False
    lone: bool = False
    of_itself: float = 0.0


class Classes(NamedTuple):
    """Rows ordered by label: those of row i's label are order[start[i] : stop[i]], ``most`` at most."""

    order: Tensor
    start: Tensor
    stop: Tensor
    most: int

    @classmethod
    def of(cls, labels: Tensor) -> Classes:
        ordered, order = labels.sort(stable=True)
        start, stop = torch.searchsorted(ordered, labels), torch.searchsorted(ordered, labels, right=True)
        # Nobody waits for devices.
        most = int((stop - start).max()) if len(labels) and labels.device.type == "cpu" else len(labels)
        return cls(order, start, stop, most)

    def positives(self, first: int, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Of the rows from ``first`` on: (n, most) candidates that may be positives, and whether they are."""
        rows = slice(first, first + len(positive))
        place = self.start[rows, None] + torch.arange(self.most, device=positive.device)
        there = place < self.stop[rows, None]
        index = self.order[place.clamp_(max=max(len(self.order) - 1, 0))]
        return index, there & positive.gather(1, index)


def masks(rule: Rule, start: int, stop: int) -> tuple[Tensor, Tensor]:
    same, neither = rule.masks(start, stop)
    return same & ~neither, ~(same | neither)


def strip(scores: Tensor, rule: Rule, classes: Classes, start: int, options: Options, gradient: bool):
    """(n,) sums of the terms of rows, (6, n) counts, and, for ``gradient``, their derivative by the scores (n, C)."""
    positive, negative = masks(rule, start, start + len(scores))
    index, there = classes.positives(start, positive)
    counts = torch.zeros((6, len(scores)), dtype=torch.long, device=scores.device)
    counts[POSITIVES], counts[NEGATIVES] = there.sum(1), negative.sum(1)
    if options.kind == "smooth":
        return _smooth(scores, negative, index, there, counts, options.margin, gradient)
    ordered, by = scores.gather(1, index).masked_fill_(~there, math.inf).sort(1)
    index = index.gather(1, by)
    below, up_to = torch.searchsorted(ordered, scores), torch.searchsorted(ordered, scores, right=True)
    active = torch.searchsorted(ordered - options.margin, scores)
    hard = up_to if options.ties and options.margin > 0 else below
    for row, number in ((HARD, hard), (SEMIHARD, (active - up_to).clamp_(min=0))):
        counts[row] = number.masked_fill(~negative, 0).sum(1)
    counts[EASY] = (counts[POSITIVES, :, None] - active).masked_fill_(~negative, 0).sum(1)
    if options.kind == "semihard_nearest":
        return _nearest(scores, negative, ordered, index, up_to, counts, options.margin, gradient)
    none = torch.zeros_like(active)
    first, last = {
        "all": (none, active),
        "semihard": (up_to, torch.maximum(active, up_to)),
        "hard": (none, hard),
    }[options.kind]
    first, last = (x.masked_fill(~negative, 0) for x in (first, last))
    of_negatives = last - first
    counts[TERMS] = of_negatives.sum(1)
    ends = scores.new_zeros((len(scores), ordered.shape[1] + 1))
    one = ends.new_ones(()).expand(scores.shape)
    ends.scatter_add_(1, first, one).scatter_add_(1, last, -one)
    of_positives = ends.cumsum(1)[:, :-1]
    # Relative to a mean and in double, nothing is lost between sums that nearly cancel.
    centre = scores.double().mean(1, keepdim=True)
    values = (of_negatives * (scores - centre)).sum(1) + options.margin * counts[TERMS].double()
    values -= (of_positives * (ordered.masked_fill(ordered == math.inf, 0) - centre)).sum(1)
    g = None
    if gradient:
        g = of_negatives.to(scores.dtype).scatter_add_(1, index, -of_positives)
    return values.to(scores.dtype), counts, g


def _smooth(scores, negative, index, there, counts, temperature, gradient):
    positives = scores.gather(1, index)
    values, g = torch.zeros_like(scores[:, 0]), torch.zeros_like(scores) if gradient else None
    for p in range(index.shape[1]):
        x = (scores - positives[:, p, None]) / temperature
        x = x.masked_fill_(~(negative & there[:, p, None]), -math.inf)
        if gradient:
            slope = x.sigmoid_().div_(temperature)
            g += slope
            g.scatter_add_(1, index[:, p, None], -slope.sum(1, keepdim=True))
        else:
            values -= logsigmoid(-x).sum(1)
            counts[HARD] += (x > 0).sum(1)
    counts[TERMS] = counts[POSITIVES] * counts[NEGATIVES]
    counts[EASY] = counts[TERMS] - counts[HARD]
    return values, counts, g


def _nearest(scores, negative, ordered, index, up_to, counts, margin, gradient):
    """Of each positive one negative: the nearest that is farther, or, if none is, the farthest."""
    candidates = scores.shape[1]
    shown = scores.masked_fill(~negative, -math.inf)
    # Negatives by the number of positives that are as far or farther: those up to a positive's place are farther.
    best = scores.new_full((len(scores), ordered.shape[1] + 1), -math.inf)
    best.scatter_reduce_(1, up_to, shown, "amax")
    column = torch.arange(candidates, device=scores.device).expand_as(scores)
    of_best = negative & (shown == best.gather(1, up_to))
    who = torch.full_like(best, candidates, dtype=torch.long)
    who.scatter_reduce_(1, up_to, column.masked_fill(~of_best, candidates), "amin")
    best, place = (x[:, :-1] for x in best.cummax(1))
    who = who.gather(1, place)
    farthest, at = scores.masked_fill(~negative, math.inf).min(1, keepdim=True)
    none = best == -math.inf
    best, who = torch.where(none, farthest, best), torch.where(none, at, who)
    there = (ordered < math.inf) & (best < math.inf)
    term = (best - ordered + margin).masked_fill_(~there, 0).clamp_(min=0)
    active = term > 0
    counts[TERMS] = active.sum(1)
    g = None
    if gradient:
        active = active.to(scores.dtype)
        g = torch.zeros_like(scores).scatter_add_(1, who.clamp_(max=candidates - 1), active)
        g.scatter_add_(1, index, -active)
    return term.sum(1), counts, g


def hardest(scores: Tensor, rule: Rule, start: int, options: Options):
    """(n,) terms, (6, n) counts, (2, n) the hardest positive and negative, (2, n) derivatives by their scores."""
    positive, negative = masks(rule, start, start + len(scores))
    near, p = scores.masked_fill(~positive, math.inf).min(1)
    far, n = scores.masked_fill(~negative, -math.inf).max(1)
    has = near < math.inf
    counted = far > -math.inf
    if options.lone:
        near = torch.where(has, near, options.of_itself)
        if rule.valid is not None:
            counted &= rule.valid[0][start : start + len(scores)]
    else:
        counted &= has
    x = torch.where(counted, far - near, -math.inf)
    if options.soft:
        values, slope = -logsigmoid(-x), x.sigmoid()
    else:
        values = (x + options.margin).clamp(min=0)
        slope = (values > 0).to(scores.dtype)
    is_hard = x >= 0 if options.ties and (options.margin > 0 or options.soft) else x > 0
    is_easy = counted & (x + options.margin <= 0)
    is_semihard = (x + options.margin > 0) & (x < 0)
    counts = torch.stack(
        (values > 0, is_easy, is_semihard, is_hard & counted, positive.sum(1), negative.sum(1))
    )
    slopes = torch.stack((torch.where(has, -slope, 0), slope))
    return values, counts.long(), torch.stack((p, n)), slopes
