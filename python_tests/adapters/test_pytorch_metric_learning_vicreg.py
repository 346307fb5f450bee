"""VICRegLoss by pytorch-metric-learning's signature."""

import pytest
import torch
from other_libraries import metric_learning
from similarity_rows import X, golden, rows, same

from mmfast.adapters.pytorch_metric_learning import losses
from mmfast.errors import UserError


def formula(a, b, invariance=25, variance=25, covariance=1, eps=1e-4):
    total = invariance * (a - b).square().mean()
    for z in (a, b):
        c = z.T.cov()
        total = total + variance * (1 - (z.var(0) + eps).sqrt()).relu().mean() / 2
        total = total + covariance * (c - c.diagonal().diag()).square().sum() / len(c)
    return total


@pytest.mark.parametrize("size", [(8, 5), (4, 9)], ids=str)
@pytest.mark.parametrize("options", [(), (1, 2, 3, 0.1)], ids=str)
def test_values_and_gradients(size, options):
    loss = losses.VICRegLoss(*options)
    inputs = rows(*size) / 3, rows(*size, seed=2) / 3
    same(lambda a, b: loss(a, ref_emb=b), lambda a, b: formula(a, b, *options), *inputs)
    assert loss.last.loss == loss(inputs[0], ref_emb=inputs[1])


def test_theirs():
    theirs = metric_learning("losses.VICRegLoss")()
    inputs = rows(8, 5).float() / 3, rows(8, 5, seed=2).float() / 3
    loss = losses.VICRegLoss()
    same(lambda a, b: loss(a, ref_emb=b), lambda a, b: theirs(a, ref_emb=b), *inputs, tolerance=2e-5)


def test_golden_values():
    loss = losses.VICRegLoss()
    inputs = X / 4, (0.9 * X[:, [1, 2, 0]] + 0.1) / 4
    golden(lambda a, b: loss(a, ref_emb=b), 22.443616, (2.379631, 2.443733), *inputs)


P, A = "pytorch_metric_learning.VICRegLoss: ", torch.ones(3, 4)
INVALID = [
    (lambda: losses.VICRegLoss()(A, torch.arange(3), ref_emb=A), P + "labels must be None, got Tensor"),
    (lambda: losses.VICRegLoss()(A), P + "ref_emb must be a tensor, got None"),
    (lambda: losses.VICRegLoss()(A, ref_emb=A[:2]),
     P + "ref_emb must have the shape of embeddings (3, 4), got (2, 4)"),
    (lambda: losses.VICRegLoss(-1), P + "invariance_lambda must be finite and at least 0, got -1"),
    (lambda: losses.VICRegLoss(reducer=A), P + "reducer must be None, got Tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_refusals(call, message):
    with pytest.raises((UserError, TypeError)) as caught:
        call()
    assert str(caught.value) == message
