"""Triplet losses: gradients against the definition, edge cases, precision, memory, refusals."""

import itertools

import pytest
import torch
from triplet_help import DOUBLE, X, Y, Z

from mmfast import backends
from mmfast.backends import backend
from mmfast.errors import UserError
from mmfast.losses.triplet import (
    MININGS,
    SmoothTripletLoss,
    TripletMarginLoss,
    smooth_triplet,
    triplet_margin,
)
from mmfast.ops.similarity import triplet as op
from mmfast.ops.similarity import triplet_reference as reference
from mmfast.ops.similarity.op import STRIP
from mmfast.ops.similarity.triplet_passes import KINDS, Options
from mmfast.ops.similarity.triplet_scores import SCORES

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def drawn(rows, columns, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, columns, generator=generator, **DOUBLE)
    return z, torch.randint(classes, (rows,), generator=generator)


def gradient(function, z, weights):
    z = z.detach().clone().requires_grad_()
    values = function(z)
    return values.detach(), torch.autograd.grad(values, z, weights.to(values.dtype))[0]


def compared(z, labels, score, options, ids=None, valid=None, rtol=1e-10):
    weights = torch.rand(len(z), generator=torch.Generator().manual_seed(7), **DOUBLE) - 0.3
    found = gradient(lambda z: op.triplets(z, labels, ids, valid, score, options)[0], z, weights)
    expected = gradient(lambda z: reference.triplets(z, labels, ids, valid, score, options), z, weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


SOFT = [Options("batch_hard", 0.3, soft=True), Options("batch_hard", 0.3, lone=True)]
ALL = [Options(kind, 0.3, ties) for kind in KINDS for ties in (False, True)] + SOFT


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("options", ALL, ids=lambda o: f"{o.kind}-{o.ties}-{o.soft}-{o.lone}")
def test_definition(options, score, monkeypatch):
    if options.lone and score == "dot":
        return
    monkeypatch.setattr("mmfast.ops.similarity.op.STRIP", 60)
    for rows, columns, classes in ((2, 3, 2), (11, 2, 4), (13, 7, 3), (14, 5, 20)):
        z, labels = drawn(rows, columns, classes)
        compared(z, labels, score, options)
        with backend("reference"):
            compared(z, labels, score, options)
    ids, valid = torch.arange(17) // 2, torch.arange(17) % 5 != 2
    z, labels = drawn(17, 5, 4)
    compared(z, labels, score, options, ids=ids, valid=valid)


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
@pytest.mark.parametrize("columns", [1, 4])
def test_few_rows_and_one_column(rows, columns):
    """The op itself, which knows no least number of rows."""
    # Of one column cosines are ties, which division by these lengths leaves exact.
    z = torch.tensor([2.0, -4.0, 1.0, 0.5])[:rows, None].double()
    z = z if columns == 1 else drawn(rows, columns, 2)[0]
    for score, options, labels in itertools.product(
        SCORES, ALL, (torch.zeros(3).long(), torch.arange(3), torch.arange(3) // 2)
    ):
        if options.lone and score == "dot":
            continue
        for name in ("cpu", "reference"):
            if not backends.why_not(name, "cpu"):
                with backend(name):
                    if rows:
                        compared(z, labels[:rows], score, options)
                    else:
                        values, counts = op.triplets(z, labels[:0], None, None, score, options)
                        assert values.shape == (0,) and counts.shape == (6, 0)


@pytest.mark.parametrize("score", SCORES)
def test_gradcheck(score):
    z, labels = drawn(9, 4, 3)
    z.requires_grad_()
    for kind in KINDS:
        options = Options(kind, 0.4)
        assert torch.autograd.gradcheck(
            lambda z, o=options: op.triplets(z, labels, None, None, score, o)[0], z
        )


@pytest.mark.parametrize("ties", ["none", "hard"])
def test_ties(ties):
    # Integer rows: inner products of many triplets are equal, and exact.
    generator = torch.Generator().manual_seed(1)
    z = torch.randint(-2, 3, (20, 3), generator=generator).double()
    labels = torch.randint(3, (20,), generator=generator)
    for margin in (0.0, 1.0):
        for mining in ("all", "semihard", "hard"):
            options = Options(mining, margin, ties == "hard")
            compared(z, labels, "dot", options)
        s = z @ z.T
        positive = (labels[:, None] == labels) & ~torch.eye(20, dtype=torch.bool)
        triple = positive[:, :, None] & (labels[:, None] != labels)[:, None]
        x = (s[:, None] - s[:, :, None])[triple]
        hard = x >= 0 if ties == "hard" and margin else x > 0
        loss = TripletMarginLoss(margin, score="dot", ties=ties)
        loss(z, labels)
        expected = [(x + margin <= 0).sum(), ((x + margin > 0) & (x < 0)).sum(), hard.sum()]
        assert [int(n) for n in loss.last[2:]] == [int(n) for n in expected]
        number = {"all": x + margin > 0, "semihard": (x + margin > 0) & (x < 0), "hard": hard}
        for mining, chosen in number.items():
            value = triplet_margin(z, labels, margin, score="dot", mining=mining, ties=ties)
            terms = x[chosen] + margin
            torch.testing.assert_close(value, terms.sum() / max(1, len(terms)))


def test_the_first_of_equals_is_hardest():
    z = torch.tensor([[0.0], [2.0], [-2.0], [1.0], [-1.0]], **DOUBLE).requires_grad_()
    loss = triplet_margin(
        z, torch.tensor([0, 0, 0, 1, 2]), score="sqeuclidean", mining="batch_hard", reduction="none"
    )
    loss[0].backward()
    # Rows 1 and 2, and 3 and 4, are as far from row 0.
    assert z.grad[:, 0].tolist() == [-2.0, 4.0, 0.0, -2.0, 0.0]


LOSSES = {
    **{mining: (lambda z, y, m=mining, **o: triplet_margin(z, y, 0.3, mining=m, **o)) for mining in MININGS},
    "smooth": lambda z, y, **o: smooth_triplet(z, y, **o),
}


@pytest.mark.parametrize("name", LOSSES)
def test_invariances_weights_and_valid_rows(name):
    call = LOSSES[name]
    z, labels = drawn(15, 4, 3)
    ones = torch.ones((), **DOUBLE)
    value, grad = gradient(lambda z: call(z, labels), z, ones)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    value_p, grad_p = gradient(lambda z: call(z, labels[order]), z[order], ones)
    torch.testing.assert_close(value_p, value)
    torch.testing.assert_close(grad_p, grad[order])
    renamed = torch.tensor([77, -5, 2**40])[labels]
    torch.testing.assert_close(gradient(lambda z: call(z, renamed), z, ones), (value, grad))
    # Rows that are not valid are not there, nor read.
    valid = torch.arange(15) % 4 != 1
    spoilt = torch.where(valid[:, None], z, float("nan"))
    weights = torch.rand(15, **DOUBLE)
    for score in ("cosine", "euclidean"):
        v, g = gradient(
            lambda z, s=score: call(z, labels, valid=valid, weights=weights, score=s), spoilt, ones
        )
        v0, g0 = gradient(
            lambda z, s=score: call(z, labels[valid], weights=weights[valid], score=s), z[valid], ones
        )
        torch.testing.assert_close(v, v0)
        torch.testing.assert_close(g[valid], g0)
        assert not g[~valid].any()
    # An anchor of weight w is w anchors: terms and their number.
    doubled = call(z, labels, weights=torch.full((15,), 2.0, **DOUBLE))
    torch.testing.assert_close(doubled, value)
    none = call(z, labels, reduction="none", weights=weights)
    torch.testing.assert_close(none.sum(), call(z, labels, reduction="sum", weights=weights))
    torch.testing.assert_close(none, weights * call(z, labels, reduction="none"))
    zero = gradient(lambda z: call(z, labels, weights=torch.zeros(15, **DOUBLE)), z, ones)
    assert not zero[0] and not zero[1].any()


def test_identities():
    z, labels = drawn(20, 5, 4)
    losses = {m: TripletMarginLoss(0.4, mining=m) for m in ("all", "semihard", "hard")}
    values = {m: loss(z, labels) for m, loss in losses.items()}
    *_, semihard, hard = losses["all"].last
    weighted = (semihard * values["semihard"] + hard * values["hard"]) / (semihard + hard)
    torch.testing.assert_close(values["all"], weighted)
    wide = TripletMarginLoss(2.0)
    wide(z, labels)
    assert int(wide.last.easy) == 0
    options = {"score": "unit_euclidean", "mining": "batch_hard"}
    scaled = z * torch.rand(20, 1, **DOUBLE)
    torch.testing.assert_close(
        triplet_margin(scaled, labels, **options), triplet_margin(z, labels, **options)
    )


def test_scheduled_mining():
    loss = TripletMarginLoss(0.5, mining="semihard_then_hard")
    expected = {m: float(triplet_margin(Z, Y, 0.5, mining=m)) for m in ("semihard", "hard")}
    assert float(loss(Z, Y)) == expected["semihard"]
    for epoch in (1, 40, 41, 50, 3):
        loss.set_progress(epoch, 50)
        assert float(loss(Z, Y)) == expected["hard" if epoch > 40 else "semihard"]
    with pytest.raises(UserError, match="epoch must be in"):
        loss.set_progress(51, 50)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("labels", [torch.zeros(8).long(), torch.arange(8)], ids=["one", "singletons"])
def test_nothing_counts(name, labels):
    for score in SCORES:
        z = X.clone().requires_grad_()
        loss = LOSSES[name](z, labels, score=score)
        loss.backward()
        assert loss.item() == 0 and not z.grad.any()
    module = TripletMarginLoss()
    module(X, labels)
    assert int(module.last.anchors) == 0


@pytest.mark.parametrize("score", SCORES)
def test_zero_rows_and_equal_rows_have_gradients(score):
    for dtype in (torch.float32, torch.float16):
        z = torch.cat((X, X[:2] * 0, X[:3])).to(dtype).requires_grad_()
        labels = torch.cat((Y, torch.tensor([0, 1, 0, 2, 0])))
        for call in LOSSES.values():
            (grad,) = torch.autograd.grad(call(z, labels, score=score), z)
            assert grad.isfinite().all() and grad.abs().max() < 100
            if score in ("cosine", "unit_euclidean"):
                assert not grad[8:10].any()


@pytest.mark.parametrize("name", LOSSES)
def test_an_offset_and_near_pairs_cost_no_precision(name):
    z, labels = drawn(30, 6, 4)
    # Exact in float32, at an offset, too; some pairs are 1e-3 apart.
    z = (z * 2**8).round() / 2**8
    z[15:20] = z[:5] + 2.0**-10
    labels[15:20] = (labels[:5] + 1) % 4
    ones = torch.ones((), **DOUBLE)
    call = LOSSES[name]
    value, grad = gradient(lambda z: call(z, labels, score="euclidean"), z, ones)
    for offset in (0.0, 1000.0):
        found = gradient(lambda z: call(z, labels, score="euclidean"), (z + offset).float(), ones)
        torch.testing.assert_close(found[0].double(), value, rtol=2e-6, atol=0)
        torch.testing.assert_close(found[1].double(), grad, rtol=2e-5, atol=2e-6 * float(grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["cosine", "euclidean"])
def test_types(dtype, score):
    z, labels = drawn(40, 16, 5)
    z = z.to(dtype)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    ones = torch.ones((), **DOUBLE)
    for call in LOSSES.values():
        with torch.autocast("cpu", torch.bfloat16):
            value, grad = gradient(lambda z, c=call: c(z, labels, score=score), z, ones)
        wide = gradient(lambda z, c=call: c(z, labels, score=score), z.double(), ones)
        assert value.dtype == torch.float32 and grad.dtype == dtype
        torch.testing.assert_close(value.double(), wide[0], rtol=1e-5, atol=1e-6)
        assert (grad.double() - wide[1]).norm() <= tolerance * wide[1].norm()


def test_strided_rows_and_classes_of_two():
    z, _ = drawn(12, 6, 2)
    labels = torch.arange(12) % 6
    expected = triplet_margin(z, labels, mining="semihard")
    spaced = torch.stack((z, z * 0), 2)[..., 0]
    assert triplet_margin(spaced, labels.int(), mining="semihard") == expected
    assert triplet_margin(z.T.contiguous().T, labels, mining="semihard") == expected


def test_saved_and_peak_memory():
    rows, columns = 2048, 32
    z = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.arange(rows) % 100
    for mining in ("semihard", "batch_hard"):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x) or x, lambda x: x):
            loss = triplet_margin(z, labels, mining=mining)
        loss.backward()
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
        own = sum(storages.values()) - z.untyped_storage().nbytes() - labels.untyped_storage().nbytes()
        # Indices and slopes of two pairs a row, and vectors of the reduction.
        assert own <= 64 * rows
    profile = torch.profiler.profile(profile_memory=True)
    with profile:
        triplet_margin(z, labels, mining="semihard").backward()
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert largest <= 9 * STRIP < rows * rows * 4 / 3


def test_more_triplets_than_integers_of_32_bits_count():
    rows = 1500
    z = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
    loss = TripletMarginLoss(2.5)
    value = loss(z, torch.arange(rows) % 2)
    assert int(loss.last.semihard + loss.last.hard) == pytest.approx(rows * 749 * 750, rel=1e-6)
    assert 2.4 < float(value) < 2.6


def test_operator_and_compilation():
    z, labels = drawn(8, 3, 3)
    ids, valid = torch.arange(8), torch.arange(8) != 3
    z.requires_grad_()
    every = [(kind, SCORES[i % len(SCORES)]) for i, kind in enumerate(KINDS)] + [("batch_hard", "cosine")]
    for kind, score in every:
        settings = kind, 0.3, False, False, False, score
        torch.library.opcheck(op._forward_op, (z.detach(), labels, ids, valid, *settings))
        _, _, places, slopes = op._forward_op(z.detach(), labels, ids, valid, *settings)
        weights = torch.rand(8, **DOUBLE)
        torch.library.opcheck(
            op._backward_op, (weights, z.detach(), labels, ids, valid, places, slopes, *settings)
        )
    for loss in (TripletMarginLoss(mining="semihard"), SmoothTripletLoss()):
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        (expected,) = torch.autograd.grad(loss(z, labels, valid=valid), z)
        (found,) = torch.autograd.grad(compiled(z, labels, valid=valid), z)
        torch.testing.assert_close(found, expected)


def test_second_derivatives_are_refused():
    z, labels = drawn(6, 3, 2)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(triplet_margin(z, labels, 1.0), z, create_graph=True)
    with pytest.raises(RuntimeError, match="triplets: the gradient must not be differentiated again"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="triplets: the gradient"):
        torch.func.grad(lambda z: triplet_margin(z, labels))(z.detach())


NAN = torch.where(torch.arange(8)[:, None] == 5, float("nan"), X)
REFUSALS = [
    (lambda: triplet_margin(X, Y, mining="semi-hard"),
     "triplet_margin: mining must be one of all, semihard, hard, batch_hard, semihard_nearest, got 'semi-hard'"),
    (lambda: TripletMarginLoss(mining="semi-hard"), "semihard_nearest, semihard_then_hard, got 'semi-hard'"),
    (lambda: triplet_margin(X, Y, score="l2"), "triplet_margin: score must be one of cosine, dot, euclidean"),
    (lambda: triplet_margin(X, Y, over="pairs"), "over must be one of nonzero, triplets, positives, anchors, all"),
    (lambda: triplet_margin(X, Y, ties="easy"), "ties must be one of none, hard, got 'easy'"),
    (lambda: triplet_margin(X, Y, reduction="avg"), "reduction must be one of mean, sum, none, got 'avg'"),
    (lambda: triplet_margin(X, Y, -0.1), "margin must be finite and at least 0, got -0.1"),
    (lambda: triplet_margin(X, Y, soft=True), "soft must be False unless mining is 'batch_hard', got mining 'all'"),
    (lambda: triplet_margin(X, Y, mining="batch_hard", anchors="st", score="dot"), "score must be a cosine or"),
    (lambda: triplet_margin(X, None), "labels must be given, got None"),
    (lambda: triplet_margin(X, Y[:3]), "labels must have shape (8,)"),
    (lambda: triplet_margin(X[:1], Y[:1]), "z must have at least 2 rows (a contrast needs two), got (1, 3)"),
    (lambda: triplet_margin(NAN, Y), "triplet_margin: z must be finite, got 3 NaN or infinite"),
    (lambda: triplet_margin(NAN, Y, mining="batch_hard", score="euclidean"), "triplet_margin: z must be finite"),
    (lambda: triplet_margin(X.float() * 1e30, Y, score="euclidean"), "z must have lengths within the range of"),
    (lambda: smooth_triplet(X, Y, 0.0), "smooth_triplet: temperature must be finite and above 0, got 0.0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "sentence"), REFUSALS, ids=[s[:40] for _, s in REFUSALS])
def test_refusals(call, sentence):
    with pytest.raises(UserError) as caught:
        call()
    assert sentence in str(caught.value)


def test_wrong_types():
    for call in (
        lambda: triplet_margin(X, Y.double()),
        lambda: triplet_margin(X.long(), Y),
        lambda: triplet_margin(X, Y, mining="batch_hard", soft=1),
        lambda: triplet_margin(X, Y, "0.2"),
        lambda: smooth_triplet(X, Y, torch.ones(())),
    ):
        with pytest.raises(TypeError):
            call()


def test_two_losses_before_one_backward_and_reruns_are_equal():
    z, labels = drawn(64, 8, 5)
    z.requires_grad_()
    found = []
    for _ in range(2):
        losses = [call(z, labels) for call in LOSSES.values()]
        found.append(torch.autograd.grad(sum(losses), z)[0])
    assert torch.equal(*found)
    together = sum(torch.autograd.grad(call(z, labels), z)[0] for call in LOSSES.values())
    torch.testing.assert_close(found[0], together)
    for loss in (TripletMarginLoss(), SmoothTripletLoss()):
        assert "group" not in repr(loss) and "cosine" in repr(loss)
