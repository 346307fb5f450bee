"""The loss of many views, and of samples that lack views, in one process."""

import itertools
import math

import pytest
import torch
from barlow_twins_formulas import relative_error
from barlow_twins_help import FORMS, modalities, settings_of
from hypothesis import given, settings
from hypothesis import strategies as st

import mmfast
from mmfast import backends
from mmfast.functional import (
    BARLOW_TWINS_VARIANTS,
    barlow_twins,
    barlow_twins_components,
    multi_view_barlow_twins,
)
from mmfast.losses import MultiViewBarlowTwinsLoss
from mmfast.losses import multi_view_barlow_twins as multi_view
from mmfast.ops.barlow_twins import op as ops
from mmfast.ops.barlow_twins.definition import Definition, Request, Setting
from mmfast.ops.barlow_twins.multi_view import _loss, barlow_twins_of_pairs
from mmfast.ops.collectives import Ranks

HALF = (torch.bfloat16, torch.float16)
VARIANTS = pytest.mark.parametrize("variant", [name for name in BARLOW_TWINS_VARIANTS if name != "vissl"])
ROADS = pytest.mark.parametrize("road", ["pair by pair", "together"], indirect=True)


@pytest.fixture
def road(request, monkeypatch):
    monkeypatch.setattr(multi_view, "_pair_by_pair", lambda *_: request.param == "pair by pair")


def definition(views, present=None, weights=None, lambd=5e-3, eps=1e-5):
    """Loss by autograd, pair by pair: statistics of the samples that have a view, C over those that have both."""
    present = torch.ones(len(views[0]), len(views), dtype=torch.bool) if present is None else present
    hats = []
    for m, z in enumerate(views):
        own = z[present[:, m]]
        hat = (own - own.mean(0)) / (own.var(0, correction=0) + eps).sqrt()
        hats.append(torch.zeros_like(z).index_put((present[:, m].nonzero()[:, 0],), hat))
    total = sum(z.sum() for z in views) * 0
    for pair in itertools.combinations(range(len(views)), 2):
        a, b = (hats[m] for m in pair)
        rows = int((present[:, pair[0]] & present[:, pair[1]]).sum())
        weight = 1.0 if weights is None else weights.get(pair, 0.0)
        if rows < 2 or not weight:
            continue
        c = a.T @ b / rows
        if c.shape[0] != c.shape[1]:
            total = total + weight * lambd * c.square().sum()
        else:
            d = c.diagonal()
            total = total + weight * ((1 - d).square().sum() + lambd * (c - d.diag()).square().sum())
    return total


def gradients(loss, views, upstream=-1.5):
    leaves = [z.detach().clone().requires_grad_() for z in views]
    value = loss(leaves)
    value.backward(torch.tensor(upstream, dtype=value.dtype))
    return value.detach(), [z.grad for z in leaves]


def agree(ours, truth, tolerance):
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=tolerance)
    for x, y in zip(ours[1], truth[1], strict=True):
        assert x.shape == y.shape and relative_error(x, y) < tolerance


@pytest.mark.rotation
@ROADS
@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(12, 40), (40, 12)], ids=["gram", "direct"])
def test_the_sum_over_pairs(variant, dtype, shape, road):
    views = modalities(shape[0], [shape[1]] * 3, dtype)
    weights = {(0, 1): 1.0, (2, 0): 0.25, (1, 2): 3.0}
    options = settings_of(variant)

    def truth(z):
        return sum(w * ops.reference(z[a], z[b], **options) for (a, b), w in weights.items())

    expected = gradients(truth, [z.double() for z in views])
    ours = gradients(lambda z: multi_view_barlow_twins(z, weights=weights, variant=variant), views)
    agree(ours, expected, 1e-11 if dtype == torch.float64 else 5e-6)


@FORMS
@pytest.mark.parametrize("widths", [(20, 20, 20), (20, 31, 9), (1, 1, 4)])
@pytest.mark.parametrize("missing", [0.0, 0.3, 0.6])
def test_missing_views_and_different_widths(widths, missing, gram):
    views = modalities(14, widths)
    present = torch.rand(14, 3, generator=torch.Generator().manual_seed(3)) >= missing
    expected = gradients(lambda z: definition(z, present), views)
    holes = [torch.where(present[:, m, None], z, math.nan) for m, z in enumerate(views)]

    def ours(z):
        pairs = [(*pair, 1.0) for pair in itertools.combinations(range(3), 2)]
        return barlow_twins_of_pairs(dict(enumerate(z)), pairs, present, gram=gram)[0]

    found = gradients(ours, holes)
    agree(found, expected, 1e-10)
    for m, grad in enumerate(found[1]):
        assert not grad[~present[:, m]].any()


def test_a_pair_that_hardly_anybody_has_counts_nothing():
    views = modalities(6, [5, 5])
    for both in (0, 1):
        present = torch.zeros(6, 2, dtype=torch.bool)
        present[:3, 0] = present[3 - both :, 1] = True
        loss, grads = gradients(lambda z, p=present: multi_view_barlow_twins(z, p), views)
        assert loss == 0 and not any(grad.any() for grad in grads)


def test_a_view_that_nobody_has():
    views = [*modalities(8, [5, 5]), torch.full((8, 5), math.nan, dtype=torch.float64)]
    present = torch.tensor([[True, True, False]]).expand(8, 3)
    loss, grads = gradients(lambda z: multi_view_barlow_twins(z, present), views)
    two = gradients(lambda z: barlow_twins(*z), views[:2])
    agree((loss, grads[:2]), two, 1e-12)
    assert not grads[2].any()


def test_names_weights_and_components():
    views = dict(zip(("text", "audio", "visual"), modalities(9, [30, 30, 11], torch.float32), strict=True))
    loss = MultiViewBarlowTwinsLoss({("text", "audio"): 2.0, ("visual", "text"): 0.5}, lambd=0.02)
    assert loss.last is None
    present = {name: torch.arange(9) != m for m, name in enumerate(views)}
    value = loss(views, present)
    assert list(loss.last) == [("text", "audio"), ("visual", "text")]
    one, other = loss.last.values()
    assert float(value) == pytest.approx(float(2 * one.loss + 0.5 * other.loss), rel=1e-6)
    assert float(other.loss) == pytest.approx(0.02 * float(other.off_diagonal), rel=1e-6)
    assert other.on_diagonal == 0 and other.mean_diagonal.isnan()
    assert float(other.off_diagonal_rms) == pytest.approx(
        math.sqrt(float(other.off_diagonal) / 330), rel=1e-6
    )
    assert repr(loss).startswith("MultiViewBarlowTwinsLoss(weights={('text', 'audio'): 2.0")


def test_components_are_those_of_two_views():
    z_a, z_b = modalities(9, [30, 30])
    loss = MultiViewBarlowTwinsLoss()
    loss([z_a, z_b])
    for x, y in zip(loss.last[0, 1], barlow_twins_components(z_a, z_b), strict=True):
        torch.testing.assert_close(x, y)


@ROADS
def test_only_wanted_gradients_are_computed(road):
    views = modalities(9, [30] * 3)
    views[1].requires_grad_()
    (grad,) = torch.autograd.grad(multi_view_barlow_twins(views), views[1])
    full = gradients(multi_view_barlow_twins, views, 1.0)
    assert torch.equal(grad, full[1][1])


@FORMS
def test_gradcheck(gram):
    views = [z.requires_grad_() for z in modalities(6, [4, 4, 3])]
    present = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) < 0.8
    pairs = [(0, 1, 1.0), (1, 2, 0.5)]
    for mask, debias in ((None, False), (present, False), (None, True)):
        assert torch.autograd.gradcheck(
            lambda *z, m=mask, d=debias: barlow_twins_of_pairs(
                dict(enumerate(z)), pairs, m, Request(debias=d), gram=gram
            )[0],
            views,
        )


@ROADS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_computed_in_fp32(dtype, road):
    views = modalities(12, [40] * 3, dtype)
    expected = gradients(lambda z: definition(z), [z.double() for z in views])
    loss, grads = gradients(multi_view_barlow_twins, views)
    assert loss.dtype == torch.float32 and all(grad.dtype == dtype for grad in grads)
    assert float(loss) == pytest.approx(float(expected[0]), rel=1e-5)
    assert all(relative_error(x, y) < torch.finfo(dtype).eps for x, y in zip(grads, expected[1], strict=True))


@ROADS
def test_offsets_cost_no_precision(road):
    views = [(z + 1e4).float() for z in modalities(12, [40] * 3)]
    agree(gradients(multi_view_barlow_twins, views), gradients(definition, [z.double() for z in views]), 5e-6)


@ROADS
def test_views_that_nearly_agree(road):
    """1 - c is a difference of 1e-8 here."""
    z = torch.randn(12, 40)
    views = [z, z + 1e-4 * torch.randn(12, 40)]
    on = MultiViewBarlowTwinsLoss(lambd=0.0)
    truth = gradients(lambda z: definition(z, lambd=0.0), [z.double() for z in views])
    found = gradients(on, views)
    assert float(found[0]) == pytest.approx(float(truth[0]), rel=1e-4)


@ROADS
def test_compiled_whole(road):
    views = [z.requires_grad_() for z in modalities(9, [20] * 3, torch.float32)]
    loss = MultiViewBarlowTwinsLoss({(0, 1): 1.0, (1, 2): 2.0})
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(views), views)
    for x, y in zip(found, torch.autograd.grad(loss(views), views), strict=True):
        torch.testing.assert_close(x, y)


@ROADS
def test_autocast_changes_nothing(road):
    views = modalities(9, [20] * 3, torch.float32)
    plain = gradients(multi_view_barlow_twins, views)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(multi_view_barlow_twins, views)
    assert torch.equal(plain[0], cast[0]) and all(map(torch.equal, plain[1], cast[1]))


@ROADS
def test_a_second_derivative_is_refused(road):
    views = [z.requires_grad_() for z in modalities(9, [20] * 3)]
    grads = torch.autograd.grad(multi_view_barlow_twins(views), views, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|must not be differentiated again"):
        grads[0].sum().backward()


@ROADS
def test_the_same_graph_twice(road):
    views = [z.requires_grad_() for z in modalities(9, [20] * 3)]
    loss = multi_view_barlow_twins(views)
    first = torch.autograd.grad(loss, views, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, views)))


A = torch.ones(4, 3)
BAD = [
    (ValueError, {"views": [A]}, "there must be at least 2 views, got 1"),
    (ValueError, {"views": [A, A[:3]]}, r"views\[1\] must have the 4 rows of views\[0\], got \(3, 3\)"),
    (ValueError, {"views": [A, A[0]]}, r"views\[1\] must have shape \(B, D\), got \(3,\)"),
    (ValueError, {"views": [A, A[:, :0]]}, r"views\[1\] must have at least 1 column, got \(4, 0\)"),
    (ValueError, {"views": [A[:1], A[:1]]}, r"views\[0\] must have at least 2 rows .* got \(1, 3\)"),
    (
        TypeError,
        {"views": [A, A.double()]},
        r"views\[1\] must have the dtype of views\[0\] \(torch.float32\), got .*64",
    ),
    (TypeError, {"views": [A, A.long()]}, r"views\[1\] must have the dtype"),
    (TypeError, {"views": {"text": A, "audio": [1]}}, r"views\['audio'\] must be a tensor, got list"),
    (
        ValueError,
        {"views": [A, A.to("meta")]},
        r"views\[1\] must be on the device of views\[0\] \(cpu\), got meta",
    ),
    (
        ValueError,
        {"views": [A, A * math.nan]},
        r"views\[1\] must be finite, got 12 NaN or infinite values of 12",
    ),
    (
        ValueError,
        {"weights": {(0, 2): 1}},
        r"weights must name each pair of different views once \(0, 1\), got \(0, 2\)",
    ),
    (
        ValueError,
        {"weights": {(0, 0): 1}},
        r"weights must name each pair of different views once .* got \(0, 0\)",
    ),
    (ValueError, {"weights": {(0, 1): 1, (1, 0): 1}}, r"weights must name each pair .* once .* got \(1, 0\)"),
    (ValueError, {"weights": {(0, 1): -1}}, r"weights\[\(0, 1\)\] must be finite and at least 0, got -1"),
    (TypeError, {"weights": {(0, 1): "1"}}, r"weights\[\(0, 1\)\] must be a number, got '1'"),
    (TypeError, {"weights": 5e-3}, "weights must be a mapping pair -> number, got 0.005"),
    (TypeError, {"views": 2}, "views must be a mapping or a sequence of tensors, got 2"),
    (TypeError, {"views": [A, A.to_sparse()]}, r"views\[1\] must be a dense tensor"),
    (TypeError, {"debias": "no"}, "debias must be True or False, got 'no'"),
    (
        TypeError,
        {"present": {0: A[:, 0] > 0, 1: [True] * 4}},
        r"present\[1\] must be a bool tensor, got list",
    ),
    (
        ValueError,
        {"present": {0: A[:, 0] > 0, 1: A[:3, 0] > 0}},
        r"present\[1\] must have shape \(4,\), got \(3,\)",
    ),
    (
        ValueError,
        {"present": {0: A[:, 0] > 0, 1: (A[:, 0] > 0).to("meta")}},
        r"present\[1\] must be on the device of the views \(cpu\), got meta",
    ),
    (
        ValueError,
        {"present": (A[:, :2] > 0).to("meta")},
        r"present must be on the device of the views \(cpu\), got meta",
    ),
    (
        ValueError,
        {"views": [A, A.to("meta")]},
        r"views\[1\] must be on the device of views\[0\] \(cpu\), got meta",
    ),
    (ValueError, {"weights": {}}, "weights must name at least one pair, got none"),
    (TypeError, {"present": A[:, :2]}, "present must be a bool tensor, got torch.float32"),
    (ValueError, {"present": A > 0}, r"present must have shape \(4, 2\), rows by views, got \(4, 3\)"),
    (ValueError, {"present": {0: A[:, 0] > 0}}, r"present must name the views \(0, 1\), got 0"),
    (
        ValueError,
        {"present": A[:, :2] > 0, "debias": True},
        "debias must be False where present is given, got True",
    ),
    (ValueError, {"variant": "vissl"}, 'variant must not be "vissl"'),
    (ValueError, {"variant": "best"}, "variant must be one of official, .* got 'best'"),
    (ValueError, {"lambd": -1.0}, "lambd must be finite and at least 0, got -1.0"),
    (ValueError, {"stats": "all"}, "stats must be one of 'global', 'local', None, got 'all'"),
    (ValueError, {"views": [A[:3], A[:3]], "debias": True}, "debias must have at least 4 rows, got 3"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), BAD)
def test_bad_input(kind, arguments, message):
    with pytest.raises(kind, match=f"^(multi_view_)?barlow_twins: {message}"):
        multi_view_barlow_twins(**{"views": [A, A], **arguments})


@ROADS
@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (math.nan, "be finite, got 1 .* in row 2, column 1"),
        (1e38, r"have variances within the range of torch.float32, got values up to 1e\+38"),
    ],
)
def test_values_without_a_variance(value, rule, road):
    views = dict(zip("tav", modalities(6, [5] * 3, torch.float32), strict=True))
    views["v"][2, 1] = value
    with pytest.raises(mmfast.UserError, match=rf"^barlow_twins: views\['v'\] must {rule}"):
        multi_view_barlow_twins(views)


def test_a_backend_that_cannot_serve_says_so(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda *_: "it is not here")
    with mmfast.backend("cuda"), pytest.raises(mmfast.UserError, match=r"cuda backend .* it is not here"):
        multi_view_barlow_twins(modalities(6, [5] * 3))


@pytest.mark.parametrize(
    ("shape", "views", "weights", "fused"),
    [
        ((64, 512), 3, None, True),
        ((64, 512), 10, None, False),
        ((512, 1000), 3, None, False),
        ((512, 1000), 2, None, True),
        ((512, 1000), 4, {(0, 1): 1.0, (2, 3): 1.0}, True),
        ((1024, 256), 3, None, True),
        ((64, 32), 3, None, True),
    ],
)
def test_views_that_share_little_go_pair_by_pair(shape, views, weights, fused, monkeypatch):
    calls, two = [], multi_view._two_views
    monkeypatch.setattr(multi_view, "_two_views", lambda *z, **options: calls.append(z) or two(*z, **options))
    z = [torch.randn(shape) for _ in range(views)]
    multi_view_barlow_twins(z, weights=weights)
    assert bool(calls) == fused
    calls.clear()
    multi_view_barlow_twins(z, torch.ones(shape[0], views, dtype=torch.bool), weights=weights)
    multi_view_barlow_twins([*z, torch.randn(shape[0], 7)])
    assert not calls


def test_a_view_too_many_of_present_may_be_infinite_but_no_more():
    views = modalities(6, [5, 5])
    views[0][2, 1] = math.inf
    present = torch.ones(6, 2, dtype=torch.bool)
    present[2, 0] = False
    assert multi_view_barlow_twins(views, present).isfinite()
    with pytest.raises(mmfast.UserError, match=r"views\[0\] must be finite, got 1 .* in row 2, column 1"):
        multi_view_barlow_twins(views, ~present | present)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 9),
    st.lists(st.integers(1, 12), min_size=2, max_size=4),
    st.integers(0, 2**31 - 1),
    st.booleans(),
)
def test_any_shape(rows, widths, seed, masked):
    torch.manual_seed(seed)
    views = modalities(rows, widths)
    present = torch.rand(rows, len(widths)) < 0.7 if masked else None
    if present is not None and not any(
        (present[:, a] & present[:, b]).sum() > 1 for a, b in itertools.combinations(range(len(widths)), 2)
    ):
        return
    truth = definition(views, present)
    assert float(multi_view_barlow_twins(views, present)) == pytest.approx(float(truth), rel=1e-7, abs=1e-9)


def test_fewer_products_than_pairs():
    """Four views have six pairs; in Gram form each view is multiplied with itself once, and with weights once."""
    views = [z.requires_grad_() for z in modalities(300, [500] * 4, torch.float32)]
    with torch.profiler.profile() as profile:
        multi_view_barlow_twins(views).backward()
    products = sum(
        event.count
        for event in profile.key_averages()
        if event.key in ("aten::mm", "mkldnn::_linear_pointwise")
    )
    assert products == 8


def narrow_loss(z, gram):
    """As on a GPU: operands of products in the embeddings' half type."""
    setting = Setting(((0, 1, 1.0), (1, 2, 0.5)), Definition(), gram=gram, narrow=z[0].dtype in HALF)
    return _loss(z, None, setting, Ranks((len(z[0]),)))[0]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(24, 300), (300, 24)], ids=["gram", "direct"])
def test_half_operands(shape, dtype):
    views = modalities(shape[0], [shape[1]] * 3, dtype)
    gram = shape[0] < shape[1]
    truth = gradients(lambda z: narrow_loss(z, gram), [z.double() for z in views])
    loss, grads = gradients(lambda z: narrow_loss(z, gram), views)
    eps = torch.finfo(dtype).eps
    assert float(loss) == pytest.approx(float(truth[0]), rel=eps / 8)
    assert all(relative_error(x, y) < eps for x, y in zip(grads, truth[1], strict=True))


def test_half_operands_of_many_rows_do_not_overflow():
    """Sums of 70000 products are beyond fp16."""
    views = modalities(70_000, [6] * 3, torch.float16)
    truth = gradients(lambda z: narrow_loss(z, False), [z.double() for z in views], 1000.0)
    loss, grads = gradients(lambda z: narrow_loss(z, False), views, 1000.0)
    assert float(loss) == pytest.approx(float(truth[0]), rel=1e-3)
    assert all(relative_error(x, y) < 1e-2 for x, y in zip(grads, truth[1], strict=True))
