"""Losses by pytorch-metric-learning's signatures: its own code where it is, golden values, edge cases, refusals."""

import pytest
import torch
from metric_learning import Formula, both, ours_of, theirs_of
from other_libraries import metric_learning
from similarity_rows import K, Q, X, Y, golden, gradients, rows, same

from mmfast import functional as F
from mmfast.adapters import pytorch_metric_learning as pml
from mmfast.adapters.pytorch_metric_learning import distances, losses, reducers
from mmfast.errors import UserError

LOSSES = ["NTXentLoss", "SupConLoss"]
REDUCERS = ["AvgNonZeroReducer", "MeanReducer", "SumReducer"]
every_loss = pytest.mark.parametrize("name", LOSSES)
LABELS = {
    "classes": [0, 0, 0, 1, 1, 2, 2, 3],
    "one class": [1] * 8,
    "singletons": list(range(8)),
    "one pair": [0, 1, 2, 3, 4, 5, 5, 6],
}


@pytest.mark.parametrize("name", [*LOSSES, "NPairsLoss"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("reducer", [None, *REDUCERS])
def test_the_formulas_are_theirs(name, labels, reducer):
    labels = torch.tensor(LABELS[labels])
    formula, theirs = Formula(name, reducer), theirs_of(name, reducer)
    same(lambda z: formula(z, labels), lambda z: theirs(z, labels), rows(8, 5))


def test_golden_values():
    golden(lambda q: losses.NTXentLoss(0.05)(q, Y), 5.708397, (), Q)
    golden(lambda q: losses.NTXentLoss(0.1)(q, Y), 3.070327, (), Q)
    golden(lambda q: losses.SupConLoss()(q, Y), 3.979686, (1.525640,), Q)
    golden(lambda q, k: losses.SupConLoss()(q, Y, None, k, Y.clone()), 3.154275, (0.320355, 8.125054), Q, K)
    golden(lambda q, k: losses.NTXentLoss(0.1)(q, Y, None, k, Y.clone()), 2.469370, (), Q, K)
    golden(lambda q, k: losses.SupConLoss()(q, Y, None, k, Y), 5.466518, (), Q, K)


@every_loss
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("reducer", [None, *REDUCERS])
def test_labels_and_reducers(name, labels, reducer):
    labels = torch.tensor(LABELS[labels])
    ours, theirs = both(name, reducer)
    same(lambda z: ours(z, labels), lambda z: theirs(z, labels), rows(8, 5))
    assert ours.last.loss == ours(rows(8, 5), labels)


@every_loss
@pytest.mark.parametrize("identity", ["other", "same", "none"])
def test_references(name, identity):
    ours, theirs = both(name)
    ref_labels = {"other": Y.flip(0), "same": Y, "none": None}[identity]
    same(
        lambda z, r: ours(z, Y, ref_emb=r, ref_labels=ref_labels),
        lambda z, r: theirs(z, Y, ref_emb=r, ref_labels=ref_labels),
        rows(8, 5),
        rows(8, 5, seed=2),
    )


@every_loss
def test_rectangular_references(name):
    ours, theirs = both(name, temperature=0.5)
    labels = torch.tensor([0, 1, 2, 5, 5])
    given = {"ref_labels": torch.tensor([0, 0, 1, 3, 4, 5, 5, 5])}
    same(
        lambda z, r: ours(z, labels, ref_emb=r, **given),
        lambda z, r: theirs(z, labels, ref_emb=r, **given),
        rows(5, 4),
        rows(8, 4, seed=2),
    )


TUPLES = {
    "pairs": ([0, 0, 2, 5], [1, 2, 0, 6], [0, 0, 1, 2, 5, 5], [3, 4, 7, 5, 0, 0]),
    "triplets": ([0, 0, 3, 0], [1, 2, 4, 1], [5, 6, 7, 6]),
    "no negatives": ([0, 1], [1, 0], [], []),
    "no positives": ([], [], [0, 1], [3, 4]),
    "anchors without negatives": ([0, 3, 3], [1, 4, 3], [0, 0], [5, 6]),
}


@every_loss
@pytest.mark.parametrize("indices", TUPLES)
@pytest.mark.parametrize("reducer", [None, *REDUCERS])
def test_tuples_of_indices(name, indices, reducer):
    ours, theirs = both(name, reducer)
    indices = tuple(torch.tensor(x, dtype=torch.int64) for x in TUPLES[indices])
    same(lambda z: ours(z, Y, indices), lambda z: theirs(z, Y, indices), rows(8, 5))
    same(
        lambda z, r: ours(z, None, indices, r),
        lambda z, r: theirs(z, None, indices, r),
        rows(8, 5),
        rows(8, 5, seed=2),
    )


@every_loss
@pytest.mark.parametrize(
    "distance",
    [
        ("CosineSimilarity", {}),
        ("DotProductSimilarity", {}),
        ("DotProductSimilarity", {"normalize_embeddings": False}),
    ],
    ids=str,
)
def test_distances(name, distance):
    ours, theirs = both(name, distance=distance)
    same(lambda z: ours(z, Y), lambda z: theirs(z, Y), rows(8, 3))
    indices = tuple(torch.tensor(x) for x in TUPLES["pairs"])
    same(lambda z: ours(z, Y, indices), lambda z: theirs(z, Y, indices), rows(8, 3))


@every_loss
@pytest.mark.parametrize("labels", LABELS)
def test_nothing_is_reduced(name, labels):
    labels = torch.tensor(LABELS[labels])
    ours, theirs = (make(name, "DoNothingReducer") for make in (ours_of, theirs_of))
    z = rows(8, 5)
    found, truth = (x(z, labels)["loss"] for x in (ours, theirs))
    if torch.is_tensor(truth["losses"]):
        torch.testing.assert_close(found["losses"], truth["losses"])
        assert found["reduction_type"] == truth["reduction_type"]
        for x, y in zip(found["indices"], truth["indices"], strict=True):
            assert torch.equal(x, y)
    else:
        assert not torch.as_tensor(found["losses"]).any()


def test_reducers_and_distances_of_theirs_do():
    kinds = {"reducer": metric_learning("reducers.SumReducer")(), "distance": None}
    ours = losses.NTXentLoss(**kinds)
    assert ours(Q, Y) == losses.NTXentLoss(reducer=reducers.SumReducer())(Q, Y)
    raw = metric_learning("distances.DotProductSimilarity")(normalize_embeddings=False)
    assert losses.SupConLoss(distance=raw)(Q, Y) != losses.SupConLoss()(Q, Y)


@every_loss
@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised(name, symmetric):
    ours, theirs = both(name)
    ours = losses.SelfSupervisedLoss(ours, symmetric=symmetric)
    labels = torch.arange(6)

    def truth(a, b):
        if symmetric:
            return theirs(torch.cat((a, b)), labels.repeat(2))
        return theirs(a, labels, None, b, labels.clone())

    same(ours, truth, rows(6, 5), rows(6, 5, seed=2))


@every_loss
@pytest.mark.parametrize("symmetric", [True, False])
def test_their_self_supervision(name, symmetric):
    wrapper = metric_learning("losses.SelfSupervisedLoss")(theirs_of(name), symmetric=symmetric)
    ours = losses.SelfSupervisedLoss(ours_of(name), symmetric=symmetric)
    same(ours, wrapper, rows(6, 5), rows(6, 5, seed=2))


def test_two_views_are_simclr():
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss(0.5))
    same(loss, lambda a, b: F.nt_xent(a, b, 0.5), rows(6, 5), rows(6, 5, seed=2))


@every_loss
def test_one_row_is_zero_and_zero_rows_have_no_gradient(name):
    loss = getattr(losses, name)()
    value, grad = gradients(lambda z: loss(z, Y[:1]), rows(1, 5))
    assert value == 0 and not grad.any()
    z = rows(8, 5)
    z[1] = 0
    indices = tuple(torch.tensor(x) for x in TUPLES["pairs"])
    for given in ((Y,), (Y, indices)):
        value, grad = gradients(lambda z, g=given: loss(z, *g), z)
        assert value.isfinite() and not grad[1].any() and float(grad.abs().max()) < 100


def test_a_single_pair_is_a_pair():
    """pytorch-metric-learning makes 0 of one positive and one negative pair."""
    a, refs = rows(1, 5), rows(2, 5, seed=2)
    given = {"labels": Y[2:3], "ref_emb": refs, "ref_labels": Y[2:4]}
    assert losses.NTXentLoss()(a, **given) > 0
    indices = tuple(torch.tensor([x]) for x in (0, 0, 0, 1))
    assert losses.NTXentLoss()(a, None, indices, refs) == pytest.approx(
        float(losses.NTXentLoss()(a, **given)), rel=1e-10
    )


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_temperatures_and_half_types(name, dtype):
    # Of rows above 0 the mean would jump where a loss is rounded to 0.
    loss = getattr(losses, name)(0.01, reducer=reducers.MeanReducer())
    z = rows(8, 5).to(dtype)
    indices = tuple(torch.tensor(x) for x in TUPLES["pairs"])
    for given in ((Y,), (Y, indices)):
        exact = gradients(lambda z, g=given: loss(z, *g), z.double())
        found = gradients(lambda z, g=given: loss(z, *g), z)
        assert found[0].dtype == torch.float32 and found[1].dtype == dtype
        assert float(found[0]) == pytest.approx(float(exact[0]), rel=1e-4)
        assert (found[1] - exact[1]).norm() < (1e-4 if dtype == torch.float32 else 1e-2) * exact[1].norm()


def test_golden_values_of_n_pairs():
    raw = distances.DotProductSimilarity(normalize_embeddings=False)
    golden(lambda x: losses.NPairsLoss(distance=raw)(x, Y), 1.859310, (1.845066,), X)
    golden(lambda x: losses.NPairsLoss()(x, Y), 1.113115, (0.179033,), X)


@pytest.mark.parametrize("labels", [*LABELS.values(), [2, 0, 2, 1, 0, 0, 1, 3]], ids=str)
@pytest.mark.parametrize("reducer", [None, *REDUCERS])
def test_n_pairs(labels, reducer):
    labels = torch.tensor(labels)
    ours, theirs = both("NPairsLoss", reducer)
    same(lambda z: ours(z, labels), lambda z: theirs(z, labels), rows(8, 5))
    indices = tuple(torch.tensor(x) for x in ([1, 3, 0, 1], [0, 5, 2, 3], [0], [7]))
    same(lambda z: ours(z, labels, indices), lambda z: theirs(z, labels, indices), rows(8, 5))


def test_n_pairs_that_are_not_reduced():
    ours, theirs = (make("NPairsLoss", "DoNothingReducer") for make in (ours_of, theirs_of))
    labels = torch.tensor([2, 0, 2, 1, 0, 0, 1, 3])
    found, truth = (x(rows(8, 5), labels)["loss"] for x in (ours, theirs))
    torch.testing.assert_close(found["losses"], truth["losses"])
    assert torch.equal(found["indices"], truth["indices"]) and ours.last.anchors == 3


EXAMPLES = {
    "self supervised": """
loss_func = losses.SelfSupervisedLoss(losses.NTXentLoss())

# your training for-loop
for i, data in enumerate(dataloader):
    optimizer.zero_grad()
    embeddings = your_model(data)
    augmented = your_model(your_augmentation(data))
    loss = loss_func(embeddings, augmented)
    loss.backward()
    optimizer.step()
""",
    "labels": """
loss_func = losses.SupConLoss(
    distance=distances.CosineSimilarity(), reducer=reducers.AvgNonZeroReducer()
)

for i, data in enumerate(dataloader):
    optimizer.zero_grad()
    embeddings = your_model(data)
    loss = loss_func(embeddings, labels)
    loss.backward()
    optimizer.step()
""",
    "memory": """
loss_fn = losses.CrossBatchMemory(losses.NTXentLoss(), 4, memory_size=16)
for i, data in enumerate(dataloader):
    query, key = your_model(data), your_model(your_augmentation(data))
    all_enc = torch.cat([query, key], dim=0)
    pair_labels = torch.arange(len(data) * i, len(data) * (i + 1)).repeat(2)
    enqueue_mask = torch.zeros(len(all_enc)).bool()
    enqueue_mask[len(query):] = True
    loss = loss_fn(all_enc, pair_labels, enqueue_mask=enqueue_mask)
    loss.backward()
""",
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_one_import_line(example):
    model = torch.nn.Linear(5, 4)
    given = {"torch": torch, "your_model": model, "your_augmentation": lambda x: x + 0.1, "labels": Y}
    given |= {
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "dataloader": [torch.randn(8, 5) for _ in "ab"],
    }
    line = "from mmfast.adapters.pytorch_metric_learning import distances, losses, reducers"
    exec(line + EXAMPLES[example], given)
    assert model.weight.grad.any()


class SNRDistance:
    pass


class ThresholdReducer:
    pass


A, P = torch.ones(3, 4), "pytorch_metric_learning."
LOSS = losses.NTXentLoss()
INVALID = [
    (lambda: LOSS(A), P + "NTXentLoss: labels must be given without indices_tuple, got None"),
    (lambda: LOSS(A, Y), P + "NTXentLoss: labels must have shape (3,), one for each row of embeddings, got (8,)"),
    (lambda: LOSS(A, Y[:3], ref_emb=A[:2]),
     P + "NTXentLoss: ref_labels must have shape (2,), one for each row of ref_emb, got (3,)"),
    (lambda: LOSS(A, Y[:3], 5),
     P + "NTXentLoss: indices_tuple must be 3 or 4 tensors (triplets, or pairs and pairs), got 5"),
    (lambda: LOSS(A, Y[:3], [[0], [1], [2]]), P + "NTXentLoss: indices_tuple must hold tensors (n,)"),
    (lambda: LOSS(A, Y[:3], (Y[:2], Y[:3], Y[:2])),
     P + "NTXentLoss: indices_tuple must have as many others as anchors, got [2, 3, 2, 2]"),
    (lambda: losses.NTXentLoss(-1), P + "NTXentLoss: temperature must be finite and above 0, got -1"),
    (lambda: losses.SupConLoss(distance=SNRDistance()),
     P + "SupConLoss: distance must be CosineSimilarity or DotProductSimilarity, got SNRDistance"),
    (lambda: losses.SupConLoss(distance=distances.CosineSimilarity(power=2)),
     P + "SupConLoss: distance must have p = 2 and power = 1, got 2 and 2"),
    (lambda: losses.SupConLoss(reducer=ThresholdReducer()), P + "SupConLoss: reducer must be one of "
     "AvgNonZeroReducer, MeanReducer, SumReducer, DoNothingReducer, got ThresholdReducer"),
    (lambda: losses.SupConLoss(embedding_regularizer=SNRDistance()),
     P + "SupConLoss: embedding_regularizer must be None, got a regularizer"),
    (lambda: losses.NPairsLoss()(A, Y[:3], None, A),
     P + "NPairsLoss: ref_emb and ref_labels must be None, got references"),
    (lambda: losses.NPairsLoss()(A, None), P + "NPairsLoss: labels must be a tensor, got None"),
    (lambda: losses.SelfSupervisedLoss(torch.nn.MSELoss()),
     P + "SelfSupervisedLoss: loss must be NTXentLoss, SupConLoss or TripletMarginLoss of here, got MSELoss"),
    (lambda: losses.SelfSupervisedLoss(LOSS)(A, A[:2]),
     P + "SelfSupervisedLoss: ref_emb must have the 3 rows of embeddings, got (2, 4)"),
    (lambda: losses.CrossBatchMemory(LOSS, 4, miner=SNRDistance()),
     P + "CrossBatchMemory: miner must be None, got SNRDistance"),
    (lambda: losses.CrossBatchMemory(LOSS, 4, 2)(A, Y[:3]),
     P + "CrossBatchMemory: embeddings must have memory_size rows at most (2), got (3, 4)"),
    (lambda: losses.CrossBatchMemory(LOSS, 3)(A, Y[:3]),
     P + "CrossBatchMemory: embeddings must have the 3 columns of the queue, got (3, 4)"),
    (lambda: losses.CrossBatchMemory(LOSS, 4)(A, Y[:3], (Y, Y, Y)),
     P + "CrossBatchMemory: indices_tuple must be None, got tuple"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_refusals(call, message):
    with pytest.raises((UserError, TypeError)) as caught:
        call()
    assert str(caught.value) == message


def test_names():
    assert all(hasattr(pml, name) for name in pml.__all__)
