"""Losses of triplets by their definition, one triplet after another, differentiable to any order: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmfast.ops.similarity.reference import masks, unit_rows
from mmfast.ops.similarity.triplet_passes import Options
from mmfast.ops.similarity.triplet_scores import OF_ITSELF


def scores(z: Tensor, score: str) -> Tensor:
    """(B, B); the derivative of a distance of 0 is 0."""
    z = unit_rows(z) if score in ("cosine", "unit_euclidean") else z
    if score in ("cosine", "dot"):
        return z @ z.T
    squares = (z[:, None] - z).square().sum(2)
    if score == "sqeuclidean":
        return -squares
    zero = squares == 0
    return -torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())


def triplets(z, labels, ids, valid, score: str, options: Options) -> Tensor:
    """The (B,) sums that :func:`mmfast.ops.similarity.triplet.triplets` gives for the same arguments."""
    pairs = (None if x is None else (x, x) for x in (labels, ids, valid))
    if valid is not None:
        z = z.where(valid[:, None], 0)
    s = scores(z, score)
    sums = []
    for row, positive, negative in zip(s, *masks(len(z), *pairs, True), strict=True):
        p, n = row[positive], row[negative]
        lone = options.lone and not len(p) and (valid is None or bool(valid[len(sums)]))
        sums.append(row.sum() * 0 + _terms(row.new_tensor([OF_ITSELF[score]]) if lone else p, n, options))
    return torch.stack(sums)


def _terms(p: Tensor, n: Tensor, options: Options) -> Tensor:
    kind, margin = options.kind, options.margin
    if not len(p) or not len(n):
        return p.new_zeros(())
    if kind == "smooth":
        return sum(-logsigmoid((a - b) / margin) for a in p for b in n)
    if kind == "batch_hard":
        x = n.max() - p.min()
        return -logsigmoid(-x) if options.soft else (x + margin).clamp(min=0)
    if kind == "semihard_nearest":
        found = (n[n < a].max() if (n < a).any() else n.min() for a in p)
        return sum((b - a + margin).clamp(min=0) for a, b in zip(p, found, strict=True))
    x = (n - p[:, None]).flatten()
    hard = x >= 0 if options.ties else x > 0
    wanted = {"all": x > -margin, "semihard": (x > -margin) & (x < 0), "hard": hard & (x > -margin)}[kind]
    return (x[wanted] + margin).sum()
