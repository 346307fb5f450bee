"""Triplet losses against numbers that were computed apart from this project, in fp64."""

import math

import pytest
import torch
from triplet_help import DOUBLE, X, Y, Z

from mmfast.losses.triplet import SmoothTripletLoss, TripletMarginLoss, smooth_triplet, triplet_margin

# margin: easy, semi-hard and hard triplets; losses of all, semi-hard and hard ones.
COSINE = {
    0.01: (42, 0, 12, 0.380281, 0, 0.380281),
    0.02: (42, 0, 12, 0.390281, 0, 0.390281),
    0.05: (41, 1, 12, 0.388840, 0.011545, 0.420281),
    0.1: (41, 1, 12, 0.438840, 0.061545, 0.470281),
    0.2: (39, 3, 12, 0.473403, 0.085890, 0.570281),
    0.5: (36, 6, 12, 0.677406, 0.291657, 0.870281),
    1.0: (23, 19, 12, 0.785566, 0.416273, 1.370281),
    2.0: (0, 42, 12, 1.248219, 0.927630, 2.370281),
}


@pytest.mark.parametrize("margin", COSINE)
def test_cosines(margin):
    *regions, all_, semihard, hard = COSINE[margin]
    # Normalisation has to undo it.
    scaled = Z * torch.arange(1, 9, **DOUBLE)[:, None]
    for mining, expected in (("all", all_), ("semihard", semihard), ("hard", hard)):
        loss = TripletMarginLoss(margin, mining=mining)
        assert float(loss(scaled, Y)) == pytest.approx(expected, abs=1e-6)
        assert [int(x) for x in loss.last[2:]] == regions
        assert int(loss.last.anchors) == 7


@pytest.mark.parametrize(
    ("temperature", "expected"), [(0.05, 1.673143), (0.1, 0.874657), (0.5, 0.387324), (1.0, 0.449654)]
)
def test_smooth(temperature, expected):
    loss = SmoothTripletLoss(temperature)
    assert float(loss(Z, Y)) == pytest.approx(expected, abs=1e-6)
    assert [int(x) for x in loss.last[1:]] == [7, 42, 0, 12]


def test_other_means_and_a_collapsed_batch():
    assert float(triplet_margin(Z, Y, 0.2, over="triplets")) == pytest.approx(0.131501, abs=1e-6)
    same = torch.ones(8, 3, **DOUBLE)
    assert float(smooth_triplet(same, Y, 0.1)) == pytest.approx(math.log(2), abs=1e-12)
    assert float(triplet_margin(same, Y, mining="hard")) == 0
    for margin, expected in ((0.05, 0.433956), (0.2, 0.583956)):
        assert float(triplet_margin(Z, Y, margin, mining="batch_hard")) == pytest.approx(expected, abs=1e-6)
    assert float(triplet_margin(Z, Y, mining="batch_hard", soft=True)) == pytest.approx(0.909021, abs=1e-6)


ST = {"mining": "batch_hard", "anchors": "st", "over": "all"}
NEAREST = {"mining": "semihard_nearest", "over": "positives"}
UNIT = {"score": "unit_euclidean", "ties": "hard"}
HARDEST = {"mining": "batch_hard"}
DISTANCES = [
    (0.2, {}, 0.713937, 0.640995),
    (0.2, {"mining": "semihard"}, 0.089556, 0.937904),
    (0.2, {"mining": "hard"}, 0.922064, 0.670378),
    (1, {}, 1.234722, 0.618241),
    (1, {"mining": "semihard"}, 0.632710, 0.760898),
    (1, {"mining": "hard"}, 1.722064, 0.670378),
    (1, {"over": "triplets"}, 0.868878, 0.435058),
    (0.05, UNIT, 0.329236, 0.216657),
    (0.05, UNIT | {"over": "triplets"}, 0.189006, 0.124377),
    (0.2, HARDEST, 1.100401, 0.822890),
    (5, HARDEST, 5.900401, 0.822890),
    (5, HARDEST | {"soft": True}, 1.276987, 0.583050),
    (0.2, ST, 0.962851, 0.720029),
    (5, ST, 5.509182, 0.754309),
    (5, ST | {"soft": True}, 1.130138, 0.511564),
    (0.2, NEAREST, 0.125937, 0.644769),
    (5, NEAREST, 4.861740, 0.740268),
    (5, {}, 4.650506, 0.603103),
]


@pytest.mark.parametrize(("margin", "options", "value", "norm"), DISTANCES)
def test_distances(margin, options, value, norm):
    x = X.clone().requires_grad_()
    loss = triplet_margin(x, Y, margin, **{"score": "euclidean"} | options)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value, abs=1e-6)
    assert float(x.grad.norm()) == pytest.approx(norm, abs=1e-6)


def test_smooth_distances_and_regions():
    x = X.clone().requires_grad_()
    loss = smooth_triplet(x, Y, 1.0, score="euclidean")
    loss.backward()
    assert (float(loss.detach()), float(x.grad.norm())) == pytest.approx((0.667282, 0.261989), abs=1e-6)
    for margin, regions in ((0.2, [26, 7, 21]), (1.0, [16, 17, 21])):
        loss = TripletMarginLoss(margin, score="euclidean")
        loss(X, Y)
        assert [int(number) for number in loss.last[2:]] == regions
