"""Soft nearest neighbour loss: numbers computed apart, its definition, and what it must not mind."""

import math

import pytest
import torch
from similarity_rows import DOUBLE, X, Y

import mmfast
from mmfast import functional as F
from mmfast.errors import UserError

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    "temperature, value, norm, slope",
    [(0.5, 5.955464, 5.563949, 11.241987), (2.0, 2.110650, 1.259915, 0.489375)],
)
def test_golden(temperature, value, norm, slope):
    x, t = X.clone().requires_grad_(), torch.tensor(temperature, requires_grad=True, **DOUBLE)
    loss = F.soft_nearest_neighbour(x, Y, t)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1.1e-6)
    assert x.grad.norm().item() == pytest.approx(norm, abs=1.1e-6)
    assert abs(t.grad.item()) == pytest.approx(slope, abs=1.1e-6)


def definition(x, labels, temperature):
    logits = -torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square() / temperature
    logits = logits.masked_fill(torch.eye(len(x), dtype=torch.bool), -math.inf)
    same = labels[:, None] == labels
    has = same.sum(1) > 1
    positives = logits.masked_fill(~same, -math.inf)[has]
    return (logits[has].logsumexp(1) - positives.logsumexp(1)).mean()


@pytest.mark.parametrize("rows, columns", [(5, 1), (17, 4), (40, 60)])
def test_is_its_definition(rows, columns):
    labels = torch.arange(rows) % 4
    found = []
    x = 0.5 * torch.randn(rows, columns, **DOUBLE)
    for function, z in (
        (F.soft_nearest_neighbour, x),
        (definition, x),
        (F.soft_nearest_neighbour, x.float()),
        (F.soft_nearest_neighbour, x + 1000),
        (F.soft_nearest_neighbour, (x + 1000).float()),
    ):
        z = z.clone().requires_grad_()
        loss = function(z, labels, 0.7)
        (2 * loss).backward()
        found.append((loss.detach().double(), z.grad.double()))
    for (loss, grad), tolerance in zip(found[2:] + found[:1], (1e-5, 1e-9, 1e-2, 1e-10), strict=True):
        assert (loss - found[1][0]).abs() <= tolerance * found[1][0].abs()
        assert (grad - found[1][1]).norm() <= tolerance * found[1][1].norm()


def test_gradcheck_with_rows_that_are_not_valid():
    x, valid = torch.randn(7, 3, **DOUBLE).requires_grad_(), torch.arange(7) != 2
    labels, t = torch.arange(7) % 2, torch.tensor(0.8, requires_grad=True, **DOUBLE)
    assert torch.autograd.gradcheck(
        lambda z, t: F.soft_nearest_neighbour(z, labels, t, valid=valid, normalise=True), (x, t)
    )
    holed = torch.where(valid[:, None], x, math.nan).detach().requires_grad_()
    loss = F.soft_nearest_neighbour(holed, labels, 0.8, valid=valid)
    loss.backward()
    kept = x.detach()[valid].requires_grad_()
    expected = F.soft_nearest_neighbour(kept, labels[valid], 0.8)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(holed.grad[valid], kept.grad)
    assert not holed.grad[~valid].any()


def test_is_sup_con_of_unit_rows():
    x, labels = torch.randn(12, 5, **DOUBLE), torch.arange(12) % 3
    distances = F.soft_nearest_neighbour(x, labels, 0.6, normalise=True)
    torch.testing.assert_close(distances, F.sup_con(x, labels, 0.3, variant="solo"))
    loss = mmfast.SoftNearestNeighbourLoss(0.6, normalise=True)
    assert loss(x, labels) == distances and loss.last.anchors == 12


def test_refusals():
    z, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    for call, words in (
        (lambda: F.soft_nearest_neighbour(z, None), "labels must be given"),
        (lambda: F.soft_nearest_neighbour(z, labels, 0.0), "temperature must be finite and above 0"),
        (lambda: F.soft_nearest_neighbour(z[:1], labels[:1]), "z must have at least 2 rows"),
        (lambda: F.soft_nearest_neighbour(z + math.nan, labels), "z must be finite, got 12 NaN"),
    ):
        with pytest.raises(UserError, match=f"^soft_nearest_neighbour: {words}"):
            call()
