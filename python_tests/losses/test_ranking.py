"""Losses that rank: pairwise hinge and N-pair, by numbers computed apart and by their definitions."""

import math

import pytest
import torch
from similarity_rows import DOUBLE, K, Q, X

import mmfast
from mmfast import functional as F
from mmfast.errors import UserError
from mmfast.ops.similarity.rows import unit_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    "hardest, expected", [(False, (4.373037, 1.840495, 21.395249)), (True, (2.331793, 0.324284, 19.217082))]
)
def test_golden_hinge(hardest, expected):
    q, k = Q.clone().requires_grad_(), K.clone().requires_grad_()
    loss = F.pairwise_hinge(q, k, 0.2, hardest=hardest)
    loss.backward()
    for value, want in zip((loss, q.grad.norm(), k.grad.norm()), expected, strict=True):
        assert value.item() == pytest.approx(want, abs=1.1e-6)


@pytest.mark.parametrize(
    "options, value, norm",
    [({}, 1.859310, 1.845066), ({"l2": 0.02}, 2.140043, 1.866190), ({"normalise": True}, 1.113115, 0.179033)],
)
def test_golden_n_pair(options, value, norm):
    x = X.clone().requires_grad_()
    loss = F.n_pair(x[[0, 3, 5]], x[[1, 4, 6]], **options)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1.1e-6)
    assert x.grad.norm().item() == pytest.approx(norm, abs=1.1e-6)


def hinge(query, key, margin, hardest, ids):
    scores = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).T
    own = scores.diagonal()
    neither = ids[:, None] == ids
    found = []
    for s in (scores, scores.T):
        cost = (margin - own[:, None] + s).clamp(min=0).masked_fill(neither, 0)
        found.append(cost.amax(1) if hardest else cost.sum(1))
    return found[0] + found[1]


@pytest.mark.parametrize("hardest", [False, True])
@pytest.mark.parametrize("rows, columns", [(2, 1), (3, 4), (17, 5), (64, 100)])
def test_hinge_is_its_definition(hardest, rows, columns):
    q, k = (torch.randn(rows, columns, **DOUBLE).requires_grad_() for _ in range(2))
    ids = torch.arange(rows) // 2 if rows > 2 else torch.arange(rows)
    upstream = torch.randn(rows, **DOUBLE)
    values = F.pairwise_hinge(q, k, 0.3, hardest=hardest, ids=ids, reduction="none")
    expected = hinge(q, k, 0.3, hardest, ids)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
    for grad, want in zip(
        torch.autograd.grad(values, (q, k), upstream),
        torch.autograd.grad(expected, (q, k), upstream),
        strict=True,
    ):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["hinge", "hardest", "n_pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_precision_compiled_and_parts(name, dtype):
    loss = {
        "hinge": mmfast.PairwiseHingeLoss(),
        "hardest": mmfast.PairwiseHingeLoss(hardest=True),
        "n_pair": mmfast.NPairLoss(l2=0.1),
    }[name]
    q, k = (0.3 * torch.randn(24, 40).to(dtype) for _ in range(2))
    results = []
    for call, inputs in (
        (loss, (q, k)),
        (torch.compile(loss, fullgraph=True, backend="aot_eager"), (q, k)),
        (loss, (q.double(), k.double())),
    ):
        a, b = (x.clone().requires_grad_() for x in inputs)
        value = call(a, b)
        (0.5 * value).backward()
        results.append((value.detach().double(), a.grad.double(), b.grad.double()))
    for eager, compiled, exact in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)
        assert (eager - exact).norm() <= (6e-3 if dtype == torch.bfloat16 else 1e-5) * exact.norm()
    assert loss.last.loss == results[2][0] and loss.last.anchors == 24


def test_unit_rows_are_differentiable():
    x = torch.randn(5, 3, **DOUBLE).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: unit_rows(z, True), x)
    zero = torch.zeros(2, 3, requires_grad=True)
    unit_rows(zero, True).sum().backward()
    assert not zero.grad.any()


def test_a_margin_that_nothing_reaches():
    q = torch.eye(4, requires_grad=True)
    loss = F.pairwise_hinge(q, torch.eye(4), 0.5)
    loss.backward()
    assert loss == 0 and not q.grad.any()


Z = torch.randn(4, 3)
REFUSED = [
    (lambda: F.pairwise_hinge(Z, Z, -0.1), r"pairwise_hinge: margin must be .*, got -0.1"),
    (lambda: mmfast.PairwiseHingeLoss(math.nan), r"pairwise_hinge: margin must be .*, got nan"),
    (lambda: F.pairwise_hinge(Z, Z[:3]), r"pairwise_hinge: key must have the 4 rows of query"),
    (lambda: F.pairwise_hinge(Z, Z, hardest=1), "pairwise_hinge: hardest must be True or False, got 1"),
    (lambda: F.pairwise_hinge(Z[:1], Z[:1]), "pairwise_hinge: key must have at least 2 rows"),
    (lambda: F.n_pair(Z, Z, l2=-1), "n_pair: l2 must be .*, got -1"),
    (
        lambda: F.pairwise_hinge(Z, Z + torch.tensor([0, 0, math.nan])),
        r"pairwise_hinge: key must be finite, got 4 NaN .* row 0, column 2",
    ),
]


@pytest.mark.parametrize("call, sentence", REFUSED, ids=[sentence[:40] for _, sentence in REFUSED])
def test_refusals(call, sentence):
    with pytest.raises(UserError if "True or" not in sentence else TypeError, match=sentence):
        call()
