"""The off-diagonal sum estimated without bias: the U-statistic, and zero on average for independent views."""

import itertools

import pytest
import torch
from barlow_twins_help import FORMS, modalities

from mmfast.losses import BarlowTwinsLoss
from mmfast.ops.barlow_twins.definition import Definition, Request
from mmfast.ops.barlow_twins.multi_view import barlow_twins_of_pairs


def u_statistic(a, b, same=True):
    """Average of the kernel of the U-statistic over all ordered choices of four different rows.

    With k_ij = <a_i, a_j> and l of b, for independent rows it is E k l + E k E l - 2 E k_ij l_iq, the sum of
    squared covariances; less the same of corresponding columns if ``same``.
    """

    def energy(k, other):
        n, total, count = len(k), 0.0, 0
        for i, j, q, r in itertools.permutations(range(n), 4):
            total += k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
            count += 1
        return total / count

    columns = sum(
        energy(a[:, i : i + 1] @ a[:, i : i + 1].T, b[:, i : i + 1] @ b[:, i : i + 1].T)
        for i in range(a.shape[1])
        if same
    )
    return energy(a @ a.T, b @ b.T) - columns


@pytest.mark.parametrize("widths", [(3, 3), (3, 5)], ids=["diagonal", "none"])
@FORMS
def test_debiased_is_the_u_statistic(widths, gram):
    views = modalities(6, widths)
    hats = [(z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in views]
    expected = float(u_statistic(*hats, same=widths[0] == widths[1]))
    _, components = barlow_twins_of_pairs(dict(enumerate(views)), request=Request(debias=True), gram=gram)
    assert float(components[0, 2]) == pytest.approx(expected, rel=1e-9)


@FORMS
def test_debiased_without_centring_counts_pairs_of_different_rows(gram):
    views = [z - z.mean(0) + 0.3 for z in modalities(7, (4, 4))]
    hats = [z / (z.square().mean(0) + 1e-5).sqrt() for z in views]
    products = torch.einsum("bi,bj->bij", *hats)
    products.diagonal(dim1=1, dim2=2).zero_()
    total = products.sum(0).square().sum() - products.square().sum()
    request = Request(Definition(center=False), debias=True)
    _, components = barlow_twins_of_pairs(dict(enumerate(views)), request=request, gram=gram)
    assert float(components[0, 2]) == pytest.approx(float(total / 42), rel=1e-9)


@pytest.mark.parametrize("shape", [(8, 64), (6, 3), (24, 10)])
@pytest.mark.parametrize("center", [True, False])
def test_debiased_is_zero_on_average_for_independent_views(shape, center):
    """Means of 500 draws: within five standard errors of zero, a false alarm in 2 million; the plain sum is
    not."""
    torch.manual_seed(0)
    loss, plain = (BarlowTwinsLoss(debias=debias, center=center) for debias in (True, False))
    found, biased = [], []
    for _ in range(500):
        # Features of a view depend on each other; means are known to be zero.
        mix = torch.randn(shape[1], shape[1], dtype=torch.float64)
        z_a, z_b = torch.randn(shape, dtype=torch.float64) @ mix, torch.randn(shape, dtype=torch.float64)
        found.append(loss.components(z_a, z_b).off_diagonal)
        biased.append(plain.components(z_a, z_b).off_diagonal)
    for values, zero in ((torch.stack(found), True), (torch.stack(biased), False)):
        error = values.std() / len(values) ** 0.5
        assert (abs(float(values.mean() / error)) < 5) == zero


def test_debiased_sees_what_is_there():
    """With many rows the two agree on views that do depend on each other."""
    torch.manual_seed(0)
    z_a = torch.randn(4000, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    z_b = z_a + torch.randn_like(z_a)
    unbiased, plain = (BarlowTwinsLoss(debias=d).components(z_a, z_b).off_diagonal for d in (True, False))
    assert float(unbiased) == pytest.approx(float(plain), rel=5e-3)
