"""simclr_loss_func by solo-learn's signature against what it computes, in 1.0.6 and, of two views, in 1.0.2."""

import pytest
import torch
from other_libraries import theirs
from similarity_rows import K, Q, Y, golden, gradients, rows, same
from torch.nn.functional import normalize

from mmfast.adapters.solo import simclr_loss_func
from mmfast.errors import UserError


def simclr(z, indexes, temperature=0.1):
    z = normalize(z, dim=-1)
    sim = (z @ z.T / temperature).exp()
    positives = indexes[:, None] == indexes
    negatives = ~positives
    positives = positives.clone().fill_diagonal_(False)
    pos, neg = (sim * positives).sum(1), (sim * negatives).sum(1)
    return -(pos / (pos + neg)).log().mean()


@pytest.mark.parametrize("indexes", [[0, 1, 2, 3] * 2, [0, 0, 0, 1, 1, 2, 2, 1], [5] * 8], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_values_and_gradients(indexes, temperature):
    indexes = torch.tensor(indexes)
    same(
        lambda z: simclr_loss_func(z, indexes, temperature),
        lambda z: simclr(z, indexes, temperature),
        rows(8, 5),
    )


def test_solo_learn_itself_of_two_views():
    """Its latest wheel takes the two views apart."""
    code = theirs("solo.losses.simclr").simclr_loss_func
    indexes = torch.arange(6).repeat(2)
    a, b = rows(6, 5), rows(6, 5, seed=2)
    same(lambda a, b: simclr_loss_func(torch.cat((a, b)), indexes), code, a, b)


def test_golden_values():
    z = torch.cat((Q, K))
    golden(lambda z: simclr_loss_func(z, Y.repeat(2)), 0.671756, (), z)
    q, k = gradients(lambda q, k: simclr_loss_func(torch.cat((q, k)), Y.repeat(2)), Q, K, upstream=1.0)[1:]
    assert (float(q.norm()), float(k.norm())) == pytest.approx((0.032458, 4.379582), abs=1.1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.001])
def test_finite_at_small_temperatures(temperature):
    """solo-learn's exp overflows."""
    indexes = torch.arange(4).repeat(2)
    z = rows(8, 5)
    exact = gradients(lambda z: simclr_loss_func(z, indexes, temperature), z)
    loss, grad = gradients(lambda z: simclr_loss_func(z, indexes, temperature), z.float())
    assert loss.isfinite() and grad.isfinite().all()
    assert float(loss) == pytest.approx(float(exact[0]), rel=1e-5)
    if temperature == 0.01:
        same(lambda z: simclr_loss_func(z, indexes, 0.01), lambda z: simclr(z, indexes, 0.01), z)
        assert not simclr(z.float() * 0 + 1, indexes, 0.01).isfinite()


def test_rows_without_positives_have_no_loss():
    """solo-learn's is infinite."""
    indexes = torch.tensor([0, 0, 1, 2])
    z = rows(4, 5)
    found = simclr_loss_func(z, indexes)
    scores = (normalize(z) @ normalize(z).T / 0.1).fill_diagonal_(-torch.inf)
    assert float(found) == pytest.approx(
        float((scores.logsumexp(1) - scores[[0, 1, 0, 0], [1, 0, 1, 1]])[:2].mean()), rel=1e-12
    )
    assert simclr_loss_func(z, torch.arange(4)) == 0


EXAMPLE = """
indexes = indexes.repeat(2)
z = torch.cat((z1, z2))
nce_loss = simclr_loss_func(z, indexes=indexes, temperature=0.2)
nce_loss.backward()
"""


def test_one_import_line():
    z1, z2 = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    given = {"torch": torch, "z1": z1, "z2": z2, "indexes": torch.arange(4)}
    exec("from mmfast.adapters.solo import simclr_loss_func" + EXAMPLE, given)
    assert z1.grad.any() and z2.grad.any()


Z = torch.ones(4, 3)
INVALID = [
    (lambda: simclr_loss_func(Z, Y[:4] * 0.5), "solo.simclr_loss_func: indexes must be integers, got torch.float32"),
    (lambda: simclr_loss_func(Z, Y[:3]),
     "solo.simclr_loss_func: indexes must have shape (4,), one for each row of z, got (3,)"),
    (lambda: simclr_loss_func(Z, None), "solo.simclr_loss_func: indexes must be a tensor, got None"),
    (lambda: simclr_loss_func(Z, Y[:4], 0),
     "solo.simclr_loss_func: temperature must be finite and above 0, got 0"),
    (lambda: simclr_loss_func(Z[:1], Y[:1]),
     "solo.simclr_loss_func: z must have at least 2 rows (a contrast needs two), got (1, 3)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_refusals(call, message):
    with pytest.raises((UserError, TypeError)) as caught:
        call()
    assert str(caught.value) == message
