"""Scores of strips of rows, cosines, inner products or negative distances; their derivatives taken to the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.ops.products import matmul, product
from mmfast.ops.similarity.op import Rows, _to_rows, _without, rows_of

SCORES = ("cosine", "dot", "euclidean", "sqeuclidean", "unit_euclidean")
# What a row scores with itself; an inner product has no such number.
OF_ITSELF = {"cosine": 1.0, "euclidean": 0.0, "sqeuclidean": 0.0, "unit_euclidean": 0.0}
# Of squared lengths: a smaller squared distance is computed from differences.
NEAR = 2.0**-10
# Pairs whose differences are held at once.
PAIRS = 2**12


class Scored(NamedTuple):
    """Rows as they are multiplied: of unit length, or relative to their mean; and their squared lengths there."""

    rows: Rows
    x: Tensor
    squares: Tensor | None
    score: str

    @classmethod
    def of(cls, z: Tensor, valid: Tensor | None, score: str) -> Scored:
        rows = rows_of(_without(z, valid), score in ("cosine", "unit_euclidean"))
        if score in ("cosine", "dot"):
            return cls(rows, rows.unit, None, score)
        x = _centred(rows.unit, valid)
        return cls(rows, x, x.square().sum(1), score)

    def finite(self) -> bool:
        return bool(self.x.square().sum(1).isfinite().all())

    def scores(self, start: int, stop: int) -> Tensor:
        """(stop - start, B) scores of some rows with all."""
        if self.squares is None:
            return product(self.x[start:stop], self.x)
        squares = self._squared_distances(start, stop)[0]
        return -squares if self.score == "sqeuclidean" else -squares.sqrt()

    def _squared_distances(self, start: int, stop: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """And the pairs that came from differences, none on devices, where all do."""
        own, squares = self.x[start:stop], self.squares
        if own.device.type != "cpu":
            none = torch.empty(0, dtype=torch.long, device=own.device)
            found = torch.cdist(own, self.x, compute_mode="donot_use_mm_for_euclid_dist")
            return found.square_(), (none, none)
        lengths = squares[start:stop, None] + squares
        found = torch.add(lengths, product(own, self.x), alpha=-2).clamp_(min=0)
        near = found <= lengths.mul_(NEAR)
        near.diagonal(start).fill_(False)
        found.diagonal(start).zero_()
        i, j = near.nonzero(as_tuple=True)
        for part in range(0, len(i), PAIRS):
            a, b = i[part : part + PAIRS], j[part : part + PAIRS]
            found[a, b] = (own[a] - self.x[b]).square().sum(1)
        return found, (i, j)

    def pull(self, grad: Tensor, g: Tensor, start: int) -> None:
        """Adds to ``grad``, of x, what ``g``, the derivative by the scores of the rows from ``start`` on, gives."""
        stop = start + len(g)
        own = self.x[start:stop]
        if self.squares is None:
            grad[start:stop] += matmul(g, self.x)
            grad += matmul(g.t(), own)
            return
        squares, (i, j) = self._squared_distances(start, stop)
        w = g * -2 if self.score == "sqeuclidean" else (-g / squares.sqrt()).masked_fill_(squares == 0, 0)
        near = w[i, j]
        w[i, j] = 0
        grad[start:stop] += w.sum(1, keepdim=True) * own - matmul(w, self.x)
        grad += w.sum(0)[:, None] * self.x - matmul(w.t(), own)
        for part in range(0, len(i), PAIRS):
            a, b = i[part : part + PAIRS], j[part : part + PAIRS]
            moved = near[part : part + PAIRS, None] * (own[a] - self.x[b])
            add_rows(grad, a + start, moved)
            add_rows(grad, b, -moved)

    def pull_pairs(self, grad: Tensor, other: Tensor, g: Tensor) -> None:
        """The same for one pair a row: (row, other[row]), whose derivative by its score is g (B,)."""
        candidate = self.x[other]
        if self.squares is None:
            grad += g[:, None] * candidate
            add_rows(grad, other, g[:, None] * self.x)
            return
        moved = self.x - candidate
        if self.score == "sqeuclidean":
            w = -2 * g
        else:
            distance = moved.square().sum(1).sqrt()
            w = torch.where(distance > 0, -g / distance, 0)
        moved *= w[:, None]
        grad += moved
        add_rows(grad, other, -moved)

    def to_rows(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        return _to_rows(grad, self.rows, 1, dtype)


def add_rows(grad: Tensor, index: Tensor, rows: Tensor) -> None:
    """grad[index] += rows in one order, whatever the device."""
    if grad.device.type == "cpu":
        grad.index_add_(0, index, rows)
    else:
        grad.index_put_((index,), rows, accumulate=True)


def _centred(x: Tensor, valid: Tensor | None) -> Tensor:
    """Relative to the first row, then to the mean, so that an offset costs no precision."""
    if not len(x):
        return x
    if valid is None:
        x = x - x[:1]
        return x - x.mean(0)
    valid = valid[:, None]
    first = x.index_select(0, valid.to(torch.uint8).argmax(0))
    x = torch.where(valid, x - first, 0)
    return torch.where(valid, x - x.sum(0) / valid.sum().clamp(min=1), 0)
