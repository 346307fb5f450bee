"""TripletMarginLoss and miners by pytorch-metric-learning's signatures."""

import itertools

import pytest
import torch
from other_libraries import metric_learning
from similarity_rows import X, Y, Z, golden, gradients, rows, same
from torch.nn.functional import normalize, softplus

from mmfast.adapters.pytorch_metric_learning import distances, losses, miners, reducers
from mmfast.adapters.pytorch_metric_learning.triplets import TripletMarginLoss
from mmfast.errors import UserError

RAW = ("LpDistance", {"normalize_embeddings": False})
DISTANCES = [
    None,
    RAW,
    ("LpDistance", {"normalize_embeddings": False, "power": 2}),
    ("CosineSimilarity", {}),
    ("DotProductSimilarity", {"normalize_embeddings": False}),
]
LABELS = [Y.tolist(), [0, 1] * 4, [0] * 8, list(range(8))]


def score(distance):
    """Similarities as pytorch-metric-learning orders them, here of rows and references."""
    name, more = distance or ("LpDistance", {})

    def found(q, k):
        if more.get("normalize_embeddings", True):
            q, k = normalize(q), normalize(k)
        if name != "LpDistance":
            return q @ k.T
        return -(torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist") ** more.get("power", 1))

    return found


def picked(s, labels, ref_labels, itself, miner, options):
    """[(a, p, n)] one by one."""
    found = []
    for a, row in enumerate(s):
        positives = [j for j in range(len(row)) if ref_labels[j] == labels[a] and not (itself and j == a)]
        negatives = [j for j in range(len(row)) if ref_labels[j] != labels[a]]
        if miner == "BatchHardMiner" and positives and negatives:
            found.append((a, min(positives, key=row.__getitem__), max(negatives, key=row.__getitem__)))
        elif miner != "BatchHardMiner":
            found += [(a, p, n) for p, n in itertools.product(positives, negatives)]
    if miner == "TripletMarginMiner":
        margin, kind = options.get("margin", 0.2), options.get("type_of_triplets", "all")
        apart = [float(s[a, p] - s[a, n]) for a, p, n in found]
        wanted = {
            "all": lambda x: x <= margin,
            "easy": lambda x: x > margin,
            "hard": lambda x: x <= margin and x <= 0,
            "semihard": lambda x: 0 < x <= margin,
        }[kind]
        found = [triplet for triplet, x in zip(found, apart, strict=True) if wanted(x)]
    return found


def formula(
    z, labels, refs=None, ref_labels=None, margin=0.05, smooth=False, distance=None, reducer=None, mining=None
):
    itself = refs is None or ref_labels is labels
    k = z if refs is None else refs
    ref_labels = labels if ref_labels is None else ref_labels
    s = score(distance)(z, k)
    mined = score(mining[2] if mining else None)(z, k).detach()
    triplets = picked(mined, labels, ref_labels, itself, *(mining[:2] if mining else (None, {})))
    if not triplets:
        return z.sum() * 0
    terms = torch.stack([s[a, n] - s[a, p] + margin for a, p, n in triplets])
    terms = softplus(terms) if smooth else terms.relu()
    if reducer == "SumReducer":
        return terms.sum()
    return terms.mean() if reducer == "MeanReducer" else terms.sum() / max(1, int((terms > 0).sum()))


def ours(distance=None, reducer=None, **options):
    if distance is not None:
        options["distance"] = getattr(distances, distance[0])(**distance[1])
    if reducer is not None:
        options["reducer"] = getattr(reducers, reducer)()
    return TripletMarginLoss(**options)


def theirs(distance=None, reducer=None, **options):
    if distance is not None:
        options["distance"] = metric_learning(f"distances.{distance[0]}")(**distance[1])
    if reducer is not None:
        options["reducer"] = metric_learning(f"reducers.{reducer}")()
    return metric_learning("losses.TripletMarginLoss")(**options)


every_distance = pytest.mark.parametrize("distance", DISTANCES, ids=str)
every_reducer = pytest.mark.parametrize("reducer", [None, "MeanReducer", "SumReducer"])


@every_distance
@every_reducer
@pytest.mark.parametrize("labels", LABELS, ids=str)
def test_labels(distance, reducer, labels):
    labels = torch.tensor(labels)
    for margin in (0.05, 1):
        options = {"margin": margin, "distance": distance, "reducer": reducer}
        same(
            lambda z, o=options: ours(**o)(z, labels),
            lambda z, o=options: formula(z, labels, **o),
            rows(8, 5),
            tolerance=1e-9,
        )


@every_distance
@every_reducer
def test_theirs(distance, reducer):
    pair = ours(distance, reducer, margin=0.3), theirs(distance, reducer, margin=0.3)
    same(*(lambda z, f=f: f(z, Y) for f in pair), rows(8, 5), tolerance=1e-7)
    refs, ref_labels = rows(6, 5, seed=2), Y[2:]
    same(*(lambda z, r, f=f: f(z, Y, None, r, ref_labels) for f in pair), rows(8, 5), refs, tolerance=1e-7)
    smooth = ours(distance, reducer, smooth_loss=True), theirs(distance, reducer, smooth_loss=True)
    same(*(lambda z, f=f: f(z, Y) for f in smooth), rows(8, 5), tolerance=1e-7)


@every_reducer
@pytest.mark.parametrize("smooth", [False, True])
def test_references(reducer, smooth):
    loss = ours(None, reducer, smooth_loss=smooth)
    for ref_labels in (Y.flip(0), Y):
        same(
            lambda z, r, y=ref_labels: loss(z, Y, ref_emb=r, ref_labels=y),
            lambda z, r, y=ref_labels: formula(z, Y, r, y, smooth=smooth, reducer=reducer),
            rows(8, 5),
            rows(8, 5, seed=2),
        )


MINERS = [
    ("TripletMarginMiner", {}, None),
    *(("TripletMarginMiner", {"type_of_triplets": x}, None) for x in ("hard", "semihard", "easy")),
    *(
        ("TripletMarginMiner", {"margin": 0.01, "type_of_triplets": x}, None)
        for x in ("all", "semihard", "hard")
    ),
    ("TripletMarginMiner", {"margin": -0.1}, None),
    ("TripletMarginMiner", {}, RAW),
    ("BatchHardMiner", {}, None),
    ("BatchHardMiner", {}, RAW),
]
ENGINE = [0, 1, 2, 6, 9]


def miner_of(mining, code=None):
    name, options, distance = mining
    if distance is not None:
        kind, more = distance
        where = getattr(distances, kind) if code is None else metric_learning(f"distances.{kind}")
        options = options | {"distance": where(**more)}
    return (getattr(miners, name) if code is None else metric_learning(f"miners.{name}"))(**options)


@every_reducer
@pytest.mark.parametrize("mining", MINERS, ids=str)
def test_miners(reducer, mining):
    loss, miner = ours(None, reducer), miner_of(mining)
    same(
        lambda z: loss(z, Y, miner(z, Y)),
        lambda z: formula(z, Y, reducer=reducer, mining=mining),
        rows(8, 3),
        tolerance=1e-9,
    )


@pytest.mark.parametrize("number", ENGINE)
def test_rules_make_no_triplets(number, monkeypatch):
    monkeypatch.setattr(TripletMarginLoss, "_of_triplets", None)
    z = rows(8, 3)
    assert ours()(z, Y, miner_of(MINERS[number])(z, Y)) > 0
    # Of other rows they are found at once.
    with pytest.raises(TypeError):
        ours()(z.clone(), Y, miner_of(MINERS[number])(z, Y))


@pytest.mark.parametrize("mining", MINERS, ids=str)
def test_their_miners(mining):
    z = rows(8, 3)
    truth = miner_of(mining, "theirs")(z, Y)
    found = miner_of(mining)(z, Y).triplets()
    order = [sorted(zip(*(x.tolist() for x in t), strict=True)) for t in (found, truth)]
    assert order[0] == order[1]
    same(lambda z: ours()(z, Y, truth), lambda z: theirs()(z, Y, truth), z, tolerance=1e-7)
    pairs = tuple(torch.tensor(x) for x in ([0, 0, 3], [1, 2, 4], [0, 3, 3], [5, 6, 7]))
    same(lambda z: ours()(z, None, pairs), lambda z: theirs()(z, None, pairs), z, tolerance=1e-7)
    refs = rows(6, 3, seed=2)
    found = miner_of(mining)(z, Y, refs, Y[2:]).triplets()
    truth = miner_of(mining, "theirs")(z, Y, refs, Y[2:])
    order = [sorted(zip(*(x.tolist() for x in t), strict=True)) for t in (found, truth)]
    assert order[0] == order[1]


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss", "NPairsLoss"])
def test_other_losses_take_what_was_mined(name):
    loss, z, miner = getattr(losses, name)(), rows(8, 3), miners.BatchHardMiner()
    assert loss(z, Y, miner(z, Y)) == loss(z, Y, miner(z, Y).triplets())


def test_golden_values():
    golden(lambda x: ours()(x, Y), 0.329236, (0.216657,), X)
    golden(lambda x: ours(reducer="MeanReducer")(x, Y), 0.189006, (0.124377,), X)
    raw = ours(RAW, margin=0.2)
    golden(lambda x: raw(x, Y), 0.713937, (0.640995,), X)
    for kind, value, norm in (("semihard", 0.089556, 0.937904), ("hard", 0.922064, 0.670378)):
        miner = miner_of(("TripletMarginMiner", {"type_of_triplets": kind}, RAW))
        golden(lambda x, m=miner: raw(x, Y, m(x, Y)), value, (norm,), X)
    miner = miner_of(("BatchHardMiner", {}, RAW))
    golden(lambda x: raw(x, Y, miner(x, Y)), 1.100401, (0.822890,), X)
    cosine = ours(("CosineSimilarity", {}), margin=0.2)
    golden(lambda z: cosine(z, Y), 0.473403, (), Z)


def test_nothing_is_reduced_or_there():
    z = rows(8, 3)
    found = ours(reducer="DoNothingReducer")(z, Y)["loss"]
    truth = theirs(reducer="DoNothingReducer")(z, Y)["loss"]
    torch.testing.assert_close(found["losses"], truth["losses"])
    assert all(torch.equal(x, y) for x, y in zip(found["indices"], truth["indices"], strict=True))
    assert found["reduction_type"] == truth["reduction_type"]


def test_no_triplets_are_zero():
    loss = ours()
    empty = torch.zeros(0, dtype=torch.int64)
    for given in ((Y * 0,), (Y, (empty, empty, empty)), (Y, (empty,) * 4)):
        value, grad = gradients(lambda z, g=given: loss(z, *g), rows(8, 3))
        assert value == 0 and not grad.any()
    assert loss(rows(1, 3), Y[:1]) == 0 and loss.last.anchors == 0
    nothing = ours(reducer="DoNothingReducer")(rows(8, 3), Y * 0)
    assert nothing["loss"]["reduction_type"] == "already_reduced"


def test_components_are_the_same_by_both_ways():
    z, loss = rows(8, 3), ours(margin=0.2)
    loss(z, Y)
    engine = loss.last
    loss(z, Y, miners.TripletMarginMiner(margin=9)(z.clone(), Y))
    assert all(torch.allclose(x, y) for x, y in zip(engine, loss.last, strict=True))


def test_self_supervision():
    a, b = rows(6, 5), rows(6, 5, seed=2)
    labels = torch.arange(6)
    for symmetric in (True, False):
        loss = losses.SelfSupervisedLoss(ours(), symmetric=symmetric)
        truth = (
            formula(torch.cat((a, b)), labels.repeat(2))
            if symmetric
            else formula(a, labels, b, labels.clone())
        )
        assert float(loss(a, b)) == pytest.approx(float(truth), rel=1e-9)


EXAMPLE = """
miner = miners.TripletMarginMiner()
loss_func = losses.TripletMarginLoss()

# your training loop
for i, (data, labels) in enumerate(dataloader):
    optimizer.zero_grad()
    embeddings = model(data)
    hard_pairs = miner(embeddings, labels)
    loss = loss_func(embeddings, labels, hard_pairs)
    loss.backward()
    optimizer.step()
"""


def test_one_import_line():
    model = torch.nn.Linear(5, 4)
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    given["dataloader"] = [(torch.randn(8, 5), Y) for _ in "ab"]
    exec("from mmfast.adapters.pytorch_metric_learning import losses, miners" + EXAMPLE, given)
    assert model.weight.grad.any()


class SNRDistance:
    pass


A, P = torch.ones(3, 4), "pytorch_metric_learning.TripletMarginLoss: "
INVALID = [
    (lambda: TripletMarginLoss(swap=True), P + "swap must be False, got True"),
    (lambda: TripletMarginLoss(triplets_per_anchor=100), P + "triplets_per_anchor must be 'all', got 100"),
    (lambda: TripletMarginLoss(-1), P + "margin must be finite and at least 0, got -1"),
    (lambda: TripletMarginLoss(distance=SNRDistance()),
     P + "distance must be LpDistance, CosineSimilarity or DotProductSimilarity, got SNRDistance"),
    (lambda: TripletMarginLoss(distance=distances.LpDistance(p=1)),
     P + "distance must have p = 2, and power = 1 (or 2 of rows as they are), got 1 and 1"),
    (lambda: TripletMarginLoss()(A), P + "labels must be given without indices_tuple, got None"),
    (lambda: TripletMarginLoss()(A, Y[:3], 3),
     P + "indices_tuple must be 3 or 4 tensors (triplets, or pairs and pairs), got 3"),
    (lambda: miners.TripletMarginMiner(type_of_triplets="semi-hard"),
     "pytorch_metric_learning.TripletMarginMiner: type_of_triplets must be one of all, hard, semihard, easy, "
     "got 'semi-hard'"),
    (lambda: losses.CrossBatchMemory(TripletMarginLoss(), 4),
     "pytorch_metric_learning.CrossBatchMemory: loss must be NTXentLoss or SupConLoss of here, "
     "got TripletMarginLoss"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_refusals(call, message):
    with pytest.raises((UserError, TypeError)) as caught:
        call()
    assert str(caught.value) == message
