"""Losses of pytorch-metric-learning 2.9.0 beside ours, and what they compute, for where it is not installed."""

import pytest
import torch
from other_libraries import metric_learning
from torch.nn.functional import normalize

from mmfast.adapters.pytorch_metric_learning import distances, losses, reducers


class Formula:
    """A loss by its name, called as theirs."""

    def __init__(self, name, reducer=None, distance=None, temperature=None):
        self.name = name
        self.reducer = reducer or ("AvgNonZeroReducer" if name == "SupConLoss" else "MeanReducer")
        self.temperature = temperature or {"NTXentLoss": 0.07, "SupConLoss": 0.1, "NPairsLoss": 1}[name]
        self.unit = distance is None or distance[1].get("normalize_embeddings", True)

    def __call__(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        refs = embeddings if ref_emb is None else ref_emb
        x, y = (normalize(v) if self.unit else v for v in (embeddings, refs))
        scores = x @ y.T / self.temperature
        pairs = self.pairs(labels, ref_labels, ref_emb is None) if indices_tuple is None else indices_tuple
        a1, p, a2, n = pairs if len(pairs) == 4 else (pairs[0], pairs[1], pairs[0], pairs[2])
        losses = getattr(self, self.name)(scores, a1.tolist(), p.tolist(), a2.tolist(), n.tolist(), labels)
        return self.reduced(torch.stack(losses)) if losses else embeddings.sum() * 0

    @staticmethod
    def pairs(labels, ref_labels, itself):
        itself = itself or ref_labels is None or ref_labels is labels
        same = labels[:, None] == (labels if ref_labels is None else ref_labels)
        positive = same & ~torch.eye(*same.shape, dtype=torch.bool) if itself else same
        return *torch.where(positive), *torch.where(~same)

    @staticmethod
    def NTXentLoss(scores, a1, p, a2, n, labels):
        if not a1 or not a2:
            return []
        found = []
        for i, j in zip(a1, p, strict=True):
            negatives = [scores[i, k] for anchor, k in zip(a2, n, strict=True) if anchor == i]
            found.append(torch.stack([scores[i, j], *negatives]).logsumexp(0) - scores[i, j])
        return found

    @staticmethod
    def SupConLoss(scores, a1, p, a2, n, labels):
        if not a1 or not a2:
            return []
        found = []
        for i, row in enumerate(scores):
            positives = sorted({j for anchor, j in zip(a1, p, strict=True) if anchor == i})
            negatives = sorted({j for anchor, j in zip(a2, n, strict=True) if anchor == i})
            of_all = row[positives + negatives].logsumexp(0)
            found.append(of_all - row[positives].mean() if positives else row.sum() * 0)
        return found

    @staticmethod
    def NPairsLoss(scores, a1, p, a2, n, labels):
        first = {}
        for i, j in zip(a1, p, strict=True):
            first.setdefault(int(labels[i]), (i, j))
        first = [first[label] for label in sorted(first)]
        return [scores[i, [k for _, k in first]].logsumexp(0) - scores[i, j] for i, j in first]

    def reduced(self, losses):
        if self.reducer == "AvgNonZeroReducer":
            losses = losses[losses > 1e-14]
            return losses.mean() if len(losses) else losses.sum()
        return losses.sum() if self.reducer == "SumReducer" else losses.mean()


def ours_of(name, reducer=None, distance=None, **options):
    if reducer is not None:
        options["reducer"] = getattr(reducers, reducer)()
    if distance is not None:
        options["distance"] = getattr(distances, distance[0])(**distance[1])
    return getattr(losses, name)(**options)


def theirs_of(name, reducer=None, distance=None, **options):
    if reducer is not None:
        options["reducer"] = metric_learning(f"reducers.{reducer}")()
    if distance is not None:
        options["distance"] = metric_learning(f"distances.{distance[0]}")(**distance[1])
    return metric_learning(f"losses.{name}")(**options)


def both(name, *kinds, **options):
    """Ours, and theirs or what it computes."""
    try:
        theirs = theirs_of(name, *kinds, **options)
    except pytest.skip.Exception:
        theirs = Formula(name, *kinds, **options)
    return ours_of(name, *kinds, **options), theirs
