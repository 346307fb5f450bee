"""Losses of sentence-transformers as functions of embeddings: its own code where it is, else what it computes."""

import pytest
import torch
from other_libraries import sentence_transformers
from similarity_rows import K, Q, X, Y, golden, gradients, rows, same
from torch.nn.functional import cross_entropy, normalize

from mmfast.adapters.sentence_transformers import (
    batch_all_triplet,
    batch_hard_soft_margin_triplet,
    batch_hard_triplet,
    batch_semi_hard_triplet,
    multiple_negatives_ranking,
)
from mmfast.errors import UserError


def ranking(embeddings, scale=20.0):
    anchors, *others = (normalize(x) for x in embeddings)
    return cross_entropy(scale * anchors @ torch.cat(others).T, torch.arange(len(anchors)))


@pytest.mark.parametrize("size", [1, 2, 9, 33])
@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_values_and_gradients(size, negatives):
    inputs = [rows(size, 5, seed=i) for i in range(2 + negatives)]
    for scale in (20.0, 3):
        same(
            lambda *x, s=scale: multiple_negatives_ranking(x, s),
            lambda *x, s=scale: ranking(x, s),
            *inputs,
        )


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_sentence_transformers_itself(negatives):
    code = sentence_transformers("MultipleNegativesRankingLoss", "multiple_negatives_ranking")
    inputs = [rows(9, 5, seed=i) for i in range(2 + negatives)]
    loss = code(torch.nn.Identity())
    same(
        lambda *x: multiple_negatives_ranking(list(x)),
        lambda *x: loss.compute_loss_from_embeddings(list(x), None),
        *inputs,
    )


def test_golden_values():
    golden(lambda q, k: multiple_negatives_ranking([q, k]), 0.588444, (0.298023, 4.113569), Q, K)
    inputs = Q, K, -1.3 * K.flip(0)
    golden(lambda *x: multiple_negatives_ranking(x), 0.918994, (0.298485, 5.339609), *inputs)


EXAMPLE = """
class Ranking(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sentence_features, labels):
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings, labels):
        return multiple_negatives_ranking(embeddings)

train_loss = Ranking(model)
train_loss([anchors, positives, negatives], None).backward()
"""


def test_the_body_of_a_loss_of_theirs():
    layer = torch.nn.Linear(4, 3)
    given = {name: torch.randn(5, 4) for name in ("anchors", "positives", "negatives")}
    given |= {"torch": torch, "model": lambda x: {"sentence_embedding": layer(x)}}
    exec("from mmfast.adapters.sentence_transformers import multiple_negatives_ranking" + EXAMPLE, given)
    assert layer.weight.grad.any()


def distances(z):
    return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")


def of_triplets(z, labels):
    """d_ap - d_an of each anchor: (positives, negatives)."""
    d, same_label = distances(z), labels[:, None] == labels
    for i in range(len(z)):
        others = torch.arange(len(z)) != i
        yield d[i, same_label[i] & others], d[i, ~same_label[i]]


def batch_all(labels, z, margin):
    terms = torch.cat([(p[:, None] - n + margin).relu().flatten() for p, n in of_triplets(z, labels)])
    return terms.sum() / max(1, int((terms > 0).sum()))


def batch_hard(labels, z, margin, term=torch.relu):
    terms = [(p.max() if len(p) else 0) - n.min() + margin for p, n in of_triplets(z, labels)]
    return term(torch.stack(terms)).mean()


def soft_margin(labels, z):
    return batch_hard(labels, z, 0, torch.nn.functional.softplus)


def semi_hard(labels, z, margin):
    terms = [
        x - (n[n > x].min() if (n > x).any() else n.max()) + margin
        for p, n in of_triplets(z, labels)
        for x in p
    ]
    return torch.stack(terms).relu().mean()


TRIPLETS = {
    "all": (batch_all_triplet, batch_all, "BatchAllTripletLoss", "batch_all_triplet"),
    "hard": (batch_hard_triplet, batch_hard, "BatchHardTripletLoss", "batch_hard_triplet"),
    "semihard": (batch_semi_hard_triplet, semi_hard, "BatchSemiHardTripletLoss", "batch_semi_hard_triplet"),
}


@pytest.mark.parametrize("name", TRIPLETS)
@pytest.mark.parametrize("margin", [0.2, 1, 5])
@pytest.mark.parametrize("labels", [Y.tolist(), [0, 1] * 4, [0, 1, 2, 3, 0, 5, 6, 7]], ids=str)
def test_triplets(name, margin, labels):
    ours, formula = TRIPLETS[name][:2]
    labels = torch.tensor(labels)
    same(lambda z: ours(labels, z, margin), lambda z: formula(labels, z, margin), rows(8, 5))
    same(lambda z: batch_hard_soft_margin_triplet(labels, z), lambda z: soft_margin(labels, z), rows(8, 5))


@pytest.mark.parametrize("name", TRIPLETS)
@pytest.mark.parametrize("labels", [Y.tolist(), [0, 1] * 4], ids=str)
def test_triplets_of_sentence_transformers_itself(name, labels):
    ours, _, loss, file = TRIPLETS[name]
    labels = torch.tensor(labels)
    theirs = batch_triplets(loss, file)
    same(
        lambda z: ours(labels, z),
        lambda z: theirs.compute_loss_from_embeddings([z], labels),
        rows(8, 5),
        tolerance=1e-6,
    )


def batch_triplets(name, file):
    return sentence_transformers(name, file)(torch.nn.Identity())


def test_soft_margin_of_sentence_transformers_itself():
    theirs = batch_triplets("BatchHardSoftMarginTripletLoss", "batch_hard_soft_margin_triplet")
    same(
        lambda z: batch_hard_soft_margin_triplet(Y, z),
        lambda z: theirs.compute_loss_from_embeddings([z], Y),
        rows(8, 5),
        tolerance=1e-6,
    )


def test_golden_values_of_triplets():
    golden(lambda x: batch_hard_triplet(Y, x), 5.509182, (0.754309,), X)
    golden(lambda x: batch_hard_triplet(Y, x, 0.2), 0.962851, (0.720029,), X)
    golden(lambda x: batch_hard_soft_margin_triplet(Y, x), 1.130138, (0.511564,), X)
    golden(lambda x: batch_semi_hard_triplet(Y, x), 4.861740, (0.740268,), X)
    golden(lambda x: batch_semi_hard_triplet(Y, x, 0.2), 0.125937, (0.644769,), X)
    golden(lambda x: batch_all_triplet(Y, x), 4.650506, (0.603103,), X)


@pytest.mark.parametrize("loss", [*(x[0] for x in TRIPLETS.values()), batch_hard_soft_margin_triplet])
def test_no_triplets_are_zero(loss):
    """One class, equal rows among them: sentence-transformers' batch-hard loss is the margin then."""
    z = rows(4, 3)
    z[1] = z[0]
    for labels in (torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1, dtype=torch.int64)):
        value, grad = gradients(lambda z, y=labels: loss(y, z), z)
        assert value == 0 and not grad.any()
    assert loss(Y[:1], z[:1]) == 0
    value, grad = gradients(lambda z: loss(Y[:4], z), torch.ones(4, 3))
    assert value.isfinite() and not grad.any()


A = torch.ones(3, 4)
OP = "sentence_transformers.multiple_negatives_ranking: "
INVALID = [
    (lambda: multiple_negatives_ranking([A]), OP + "embeddings must be a list of anchors, positives, ..., got 1"),
    (lambda: multiple_negatives_ranking(A), OP + "embeddings must be a list of anchors, positives, ..., got Tensor"),
    (lambda: multiple_negatives_ranking([A, A[:2]]),
     OP + "embeddings[1] must have the 3 rows of embeddings[0], got (2, 4)"),
    (lambda: multiple_negatives_ranking([A, A, A[:, :2]]),
     OP + "embeddings[2] must have the 4 columns of embeddings[0], got (3, 2)"),
    (lambda: multiple_negatives_ranking([A, A], 0), OP + "scale must be finite and above 0, got 0"),
    (lambda: batch_hard_triplet(Y, A), "sentence_transformers.batch_hard_triplet: labels must have shape (3,), "
     "one for each row of embeddings, got (8,)"),
    (lambda: batch_all_triplet(Y[:3], A, -1),
     "sentence_transformers.batch_all_triplet: margin must be finite and at least 0, got -1"),
    (lambda: batch_semi_hard_triplet(A, Y),
     "sentence_transformers.batch_semi_hard_triplet: embeddings must have shape (B, D) with D >= 1, got (8,)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_refusals(call, message):
    with pytest.raises((UserError, TypeError)) as caught:
        call()
    assert str(caught.value) == message
