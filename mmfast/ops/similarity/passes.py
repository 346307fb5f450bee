"""What lies between the matrix products of the similarity losses: the passes over strips of scores, in PyTorch.

A strip holds the scores of some rows with all candidates. Of each row the forward pass leaves four numbers, of which
and of its logits l the derivative H of the row's loss by them follows in one pass::

    e = exp(l - L);   negatives: H = a e;   positives, by kind:
    out        a e - b
    in, sum    a e - b exp(l - M)
    negatives  -b / (1 + e), and so for all kinds where M = inf: of one positive, nothing nearly equal is subtracted
    decoupled  -b
    sigmoid    -sigmoid(-l), and for negatives sigmoid(l)
    relu, top  0, and for negatives 1 where l > 0; top: only for the first of the largest, number L, where a = 1

Rows that do not count have L = M = inf and a = b = 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

KINDS = ("out", "in", "sum", "negatives", "sigmoid", "decoupled", "relu", "top")


class Rule(NamedTuple):
    """Which candidates are positives of a row, and which neither positives nor negatives; integers (B,) and (C,)."""

    labels: tuple[Tensor, Tensor]
    ids: tuple[Tensor, Tensor] | None
    valid: tuple[Tensor, Tensor] | None
    itself: bool
    """Rows are their own candidates: a row is none of its own."""

    def turned(self) -> Rule:
        """The same with candidates for rows."""
        ids, valid = (None if x is None else x[::-1] for x in (self.ids, self.valid))
        return Rule(self.labels[::-1], ids, valid, self.itself)

    def masks(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """For the rows [start, stop): whose labels are equal, and who are neither (None: nobody), bool (n, C)."""
        labels_q, labels_k = self.labels
        same = labels_q[start:stop, None] == labels_k
        neither = None
        if self.ids is not None:
            neither = self.ids[0][start:stop, None] == self.ids[1]
            neither.diagonal(start).fill_(False)
        if self.valid is not None:
            void = ~(self.valid[0][start:stop, None] & self.valid[1])
            neither = void if neither is None else neither.logical_or_(void)
        if self.itself:
            neither = torch.zeros_like(same) if neither is None else neither
            neither.diagonal(start).fill_(True)
        return same, neither


def forward_rows(logits: Tensor, rule: Rule, start: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) losses and numbers of positives, and (4, n) L, a, M, b of the rows from ``start`` on."""
    same, neither = rule.masks(start, start + len(logits))
    positive, negative = (same, ~same) if neither is None else (same & ~neither, ~(same | neither))
    count = positive.sum(1).to(logits.dtype)
    if kind == "sigmoid":
        value = -logsigmoid(torch.where(same, logits, -logits))
        value = (value if neither is None else value.masked_fill(neither, 0)).sum(1)
        zero = torch.zeros_like(value)
        return value, count, torch.stack((zero, zero + 1, zero, zero + 1))
    infinity = math.inf
    if kind in ("relu", "top"):
        above = logits.masked_fill(~negative, 0).clamp(min=0)
        value, first = (above.sum(1), count) if kind == "relu" or not above.shape[1] else above.max(1)
        zero = torch.zeros_like(value)
        return value, count, torch.stack((first.to(value.dtype), (value > 0).to(value.dtype), zero, zero))
    n = count.clamp(min=1)
    of_negatives = logits.masked_fill(~negative, -infinity).logsumexp(1)
    single = count == 1
    if kind == "decoupled":
        # Without negatives there is nothing to stand against.
        count = count.masked_fill(of_negatives == -infinity, 0)
        value = of_negatives - logits.masked_fill(~positive, 0).sum(1) / n
        rows = of_negatives, torch.ones_like(n), torch.zeros_like(n), 1 / n
    elif kind == "negatives":
        excess = (of_negatives[:, None] - logits).masked_fill_(~positive, -infinity)
        value = -logsigmoid(-excess).sum(1) / n
        rows = of_negatives, excess.sigmoid().sum(1) / n, torch.zeros_like(n), 1 / n
    else:
        of_positives = logits.masked_fill(~positive, -infinity).logsumexp(1)
        of_all = torch.logaddexp(of_negatives, of_positives)
        if kind == "out":
            mean = logits.masked_fill(~positive, 0).sum(1) / n
            value, second, b = of_all - mean, torch.zeros_like(n), 1 / n
        else:
            value, second, b = of_all - of_positives, of_positives, torch.ones_like(n)
            value = value + n.log() if kind == "in" else value
        excess = of_negatives - of_positives
        value = torch.where(single, -logsigmoid(-excess), value)
        rows = (
            torch.where(single, of_negatives, of_all),
            torch.where(single, excess.sigmoid(), 1),
            torch.where(single, infinity, second),
            b,
        )
    void = torch.tensor([infinity, 0, infinity, 0], dtype=logits.dtype, device=logits.device)
    return torch.where(count > 0, value, 0), count, torch.where(count > 0, torch.stack(rows), void[:, None])


def backward_rows(logits, rule, start, kind, rows, weights, column_rows, column_weights) -> Tensor:
    """H of the rows from ``start`` on, plus, with ``column_rows``, that of the candidates as rows; (n, C).

    rows (4, n), column_rows (4, C): see :func:`forward_rows`. weights (n,), column_weights (C,): derivatives of the
    loss by the losses of the rows.
    """
    same, neither = rule.masks(start, start + len(logits))
    n, candidates = logits.shape
    place = torch.arange(candidates, device=logits.device)
    total = _derivative(logits, same, kind, rows[:, :, None], weights[:, None], place)
    if column_rows is not None:
        place = torch.arange(start, start + n, device=logits.device)[:, None]
        total += _derivative(logits, same, kind, column_rows[:, None], column_weights, place)
    return total if neither is None else total.masked_fill_(neither, 0)


def _derivative(logits, same, kind, rows, weights, place):
    first, a, second, b = rows
    if kind == "relu":
        return weights * ((logits > 0) & ~same)
    if kind == "top":
        return weights * a * ((place == first) & ~same)
    if kind == "sigmoid":
        return weights * torch.where(same, -(-logits).sigmoid(), logits.sigmoid())
    e = (logits - first).exp_()
    alone = -b / (1 + e)
    if kind == "negatives":
        positives = alone
    elif kind == "decoupled":
        positives = -b
    elif kind == "out":
        positives = torch.where(second == math.inf, alone, a * e - b)
    else:
        positives = torch.where(second == math.inf, alone, a * e - b * (logits - second).exp())
    return weights * torch.where(same, positives, a * e)
