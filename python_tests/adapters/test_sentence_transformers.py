"""Losses of sentence-transformers as functions of embeddings: its own code where it is, else what it computes."""

import pytest
import torch
from peers import sentence_transformers
from similarity_rows import K, Q, golden, rows, same
from torch.nn.functional import cross_entropy, normalize

from mmfast.adapters.sentence_transformers import multiple_negatives_ranking
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
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_refusals(call, message):
    with pytest.raises((UserError, TypeError)) as caught:
        call()
    assert str(caught.value) == message
