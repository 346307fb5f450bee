"""Contrastive losses and losses of pairs: values and gradients that were computed apart from this project."""

import pytest
import torch
from similarity_rows import DOUBLE, IDS, NOT_TWO, PAIR_IDS, PAIRS, WEIGHTS, K, Q, Y

from mmfast import functional as F


def stacked(q, k):
    return torch.stack((q, k), 1)


# In fp64: loss, and norms of the gradients by q, k (where used), temperature.
GOLDEN = {
    "out": (lambda q, k, t: F.sup_con(q, Y, t), 0.1, (3.979686, 1.525640, None, 33.543483)),
    "in": (lambda q, k, t: F.sup_con(q, Y, t, variant="in"), 0.1, (3.861967, 1.419127, None, 31.444565)),
    "solo": (lambda q, k, t: F.sup_con(q, Y, t, variant="solo"), 0.1, (3.564904, 1.419127, None, 31.444565)),
    "out sum": (lambda q, k, t: F.sup_con(q, Y, t, reduction="sum"), 0.05, (51.898258,)),
    "in sum": (lambda q, k, t: F.sup_con(q, Y, t, variant="in", reduction="sum"), 1.0, (11.484313,)),
    "out all": (lambda q, k, t: F.sup_con(q, Y, t, over="all"), 0.5, (1.449223,)),
    "weights": (
        lambda q, k, t: F.sup_con(q, Y, t, weights=WEIGHTS),
        0.1,
        (4.633164, 1.925439, None, 41.819508),
    ),
    "valid": (lambda q, k, t: F.sup_con(q, Y, t, valid=NOT_TWO), 0.1, (3.976535, 1.796594, None, 36.104561)),
    "ser": (
        lambda q, k, t: F.nt_xent(q, None, t, labels=Y, variant="ser"),
        0.1,
        (3.834616, 1.542822, None, 33.604547),
    ),
    "ser weights": (
        lambda q, k, t: F.nt_xent(q, None, t, labels=Y, variant="ser", weights=WEIGHTS),
        0.1,
        (4.567786, 1.928429, None, 41.931167),
    ),
    "ser ids": (
        lambda q, k, t: F.nt_xent(q, None, t, labels=Y, ids=IDS, variant="ser"),
        0.1,
        (2.610135, 1.524185, None, 22.258539),
    ),
    "pml": (lambda q, k, t: F.nt_xent(q, None, t, labels=Y, variant="pml"), 0.05, (5.708397,)),
    "dcl": (
        lambda q, k, t: F.nt_xent(q, None, t, labels=Y, variant="dcl"),
        0.1,
        (3.649201, 1.618329, None, 34.324413),
    ),
    "dcl views": (
        lambda q, k, t: F.nt_xent(q, k, t, variant="dcl"),
        0.1,
        (0.527535, 0.227318, 11.927190, 6.296452),
    ),
    "self": (lambda q, k, t: F.nt_xent(q, None, t, ids=PAIRS), 0.1, (0.439856, 0.458078, None, 1.073888)),
    "two views": (lambda q, k, t: F.nt_xent(q, k, t), 0.5, (1.624015, 0.052028, 1.082413, 0.952564)),
    "two views .07": (lambda q, k, t: F.nt_xent(q, k, t), 0.07, (1.024737, 0.213097, 5.423254, 3.514181)),
    "views": (
        lambda q, k, t: F.sup_con(stacked(q, k), Y, t),
        0.1,
        (4.335114, 0.428099, 11.168017, 29.614474),
    ),
    "views in": (
        lambda q, k, t: F.sup_con(stacked(q, k), Y, t, variant="in"),
        0.1,
        (None, 0.032458, 4.379582, 1.523380),
    ),
    "hobbit": (
        lambda q, k, t: F.sup_con(stacked(q, k), Y, t, variant="hobbit"),
        0.1,
        (6.193021, 0.611570, 15.954310, 19.623814),
    ),
    "no labels": (
        lambda q, k, t: F.sup_con(stacked(q, k), None, t),
        0.1,
        (1.115281, 0.172451, 4.554011, 2.583860),
    ),
    "info_nce": (lambda q, k, t: F.info_nce(q, k, None, t), 0.07, (0.652779, 0.239559, 3.502973, 2.866625)),
    "info_nce back": (
        lambda q, k, t: F.info_nce(k, q, None, t),
        0.5,
        (1.121515, 0.044306, 0.921612, 0.767790),
    ),
    "rectangular": (
        lambda q, k, t: F.info_nce(q[:3], k, None, t, targets=torch.arange(3)),
        0.07,
        (0.974014, 0.624315, 2.996492, 3.214558),
    ),
    "ranking": (lambda q, k, t: F.info_nce(q, k, None, t), 0.05, (0.588444, 0.298023, 4.113569)),
    "hard negatives": (
        lambda q, k, t: F.info_nce(q, k, -1.3 * k.flip(0), t),
        0.05,
        (0.918994, 0.298485),
    ),
    "clip": (lambda q, k, t: F.clip(q, k, t), 0.07, (0.661212, 0.190546, 3.523336, 2.729275)),
    "clip .5": (lambda q, k, t: F.clip(q, k, t), 0.5, (1.123227, 0.048126, 0.901521, 0.766327)),
    "clip ids": (
        lambda q, k, t: F.clip(q, k, t, ids=PAIR_IDS),
        0.07,
        (0.598038, 0.226941, 3.355270, 2.497016),
    ),
    "siglip": (
        lambda q, k, t: F.siglip(q, k, t, bias=-10.0),
        10.0,
        (1.628604, 0.329087, 3.733818, 0.0936922),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values_and_gradients(name):
    function, temperature, expected = GOLDEN[name]
    inputs = [x.clone().requires_grad_() for x in (Q, K, torch.tensor(temperature, **DOUBLE))]
    loss = function(*inputs)
    loss.backward()
    found = loss, *(None if x.grad is None else x.grad.norm() for x in inputs)
    for value, want in zip(found, expected, strict=False):
        if want is not None:
            assert value.item() == pytest.approx(want, abs=1.1e-6)


def test_golden_rows_of_gradients():
    q = Q.clone().requires_grad_()
    F.sup_con(q, Y, 0.1).backward()
    expected = torch.tensor([[0, -0.481131], [-0.120273, 0.043776]], **DOUBLE)
    torch.testing.assert_close(q.grad[[0, 7]], expected, atol=1.1e-6, rtol=0)
