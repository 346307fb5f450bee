"""The Triton passes of the similarity losses are those in PyTorch, whatever the rows and the rule."""

import itertools
import math

import pytest
import torch
from similarity_help import TOLERANCE, agree, rule_of, run
from triton_help import DEVICE, INTERPRETED, inside, red_zones

from mmfast import backends
from mmfast.ops.similarity import op
from mmfast.ops.similarity.kernels import Plain, passes_for
from mmfast.ops.similarity.passes import KINDS, Rule
from mmfast.ops.similarity.rows import rows_of, to_rows
from mmfast.ops.similarity.total import similarity_total
from mmfast.triton.similarity import Passes

# Products on a GPU refuse what poisons memory. NumPy, by which the interpreter computes, warns of infinities that are
# meant to be there.
pytestmark = [
    pytest.mark.usefixtures("on_device", *["poisoned_memory"] * INTERPRETED),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.float64]
EVERY = pytest.mark.parametrize("kind", KINDS)
SELF = pytest.mark.parametrize("itself", [True, False], ids=["self", "pair"])


@pytest.fixture
def on_device():
    with DEVICE:
        yield


def test_backend():
    assert all(passes_for(kind, "triton") is Passes for kind in KINDS)


@pytest.mark.rotation
@SELF
@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rule_and_count_of_candidates(kind, itself, dtype):
    """Alone, in less than a block, in several; a row in one warp and in several."""
    counts = (0, 1, 2, 9) if itself else (0, 1, 2, 33, 134, 1100)
    for candidates, general in itertools.product(counts, range(4)):
        rows = candidates if itself else 2
        rule = rule_of(rows, candidates, itself, general & 1, general & 2)
        scores = torch.randn(rows, candidates, dtype=dtype)
        agree(Passes, kind, rule, scores, bias=-1.0 if kind == "sigmoid" else None)


def test_rows_among_themselves_in_several_blocks():
    for kind, dtype in (("out", torch.float32), ("top", torch.float64)):
        rule = rule_of(150, 150, True, True, True)
        agree(Passes, kind, rule, torch.randn(150, 150, dtype=dtype)[140:], start=140)


@pytest.mark.rotation
@SELF
@EVERY
def test_one_positive(kind, itself):
    for dtype, scale in zip(DTYPES, (1.0, 40.0), strict=True):
        labels = torch.arange(6) // 2 if itself else torch.arange(6)
        rule = Rule((labels, labels), None, None, itself)
        scores = torch.rand(6, 6, dtype=dtype) * 2 - 1
        found = agree(Passes, kind, rule, scores, scale=scale)
        assert (found[1] == 1).all()


@EVERY
def test_a_loss_near_zero_is_as_exact_as_a_large_one(kind):
    scores = torch.full((6, 6), -1.0).fill_diagonal_(1)
    rule = Rule((torch.arange(6),) * 2, None, None, False)
    found, exact = run(Passes, kind, rule, scores, 8.0), run(Plain, kind, rule, scores.double(), 8.0)
    for i in (0, 2, 3):
        torch.testing.assert_close(found[i].double(), exact[i], rtol=5e-6, atol=0)


@EVERY
def test_strips_of_more_rows(kind):
    """A strip fills its own rows only, and finds their positions among the candidates."""
    for itself, (start, stop) in itertools.product((True, False), ((0, 0), (3, 5), (10, 11), (11, 11))):
        rule = rule_of(11, 11, itself, True, start > 3)
        # The candidate at a row's own place has its id, and counts if rows are not their own candidates.
        rule.ids[1].copy_(rule.ids[0])
        scores = torch.randn(11, 11)
        values, counts, numbers, *_ = agree(Passes, kind, rule, scores[start:stop], start=start)
        beside = torch.ones(11, dtype=torch.bool).index_fill_(0, torch.arange(start, stop), False)
        for x in (values, counts, *numbers):
            assert (x[beside] == 7.5).all()


@pytest.mark.rotation
@SELF
@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(kind, itself, dtype):
    for scale in (1000.0, 1e-30, 0.0, -1000.0):
        some = torch.rand(6, 6, dtype=dtype)
        for scores in (some + some.T - 1, torch.ones(6, 6, dtype=dtype)):
            rule = rule_of(6, 6, itself)
            found, exact = (
                run(Passes, kind, rule, scores, scale),
                run(Plain, kind, rule, scores.double(), scale),
            )
            assert all(x.isfinite().all() for x in (found[0], found[3], found[4]))
            if abs(scale) < 1:
                torch.testing.assert_close(found[3].double(), exact[3], **TOLERANCE[dtype])
            eps = torch.finfo(dtype).eps * max(1.0, abs(scale))
            torch.testing.assert_close(found[0].double(), exact[0], rtol=30 * eps, atol=30 * eps)


@pytest.mark.rotation
@SELF
@EVERY
def test_nan_shows(kind, itself):
    """In the loss and the gradient of each row that counts and has such a score, and in no other."""
    labels = torch.arange(6) % 3
    rule = Rule((labels, labels), None, None, itself)
    others = torch.arange(6) != 4
    # A positive and two negatives; of the former decoupled, relu and top depend less, or not at all.
    for column, bad in ((1, math.nan), (0, -math.nan), (5, math.nan)):
        if column == 1 and kind in KINDS[5:]:
            continue
        scores = torch.randn(6, 6)
        scores[4, column] = bad
        values, _, _, h, sums = run(Passes, kind, rule, scores)
        assert values[others].isfinite().all() and values[4].isnan()
        if kind not in ("relu", "top"):
            assert sums[4].isnan() and h[4, column].isnan()
        if not itself:
            assert h[others].isfinite().all()


@pytest.mark.rotation
@SELF
@EVERY
def test_what_does_not_count_is_not_read(kind, itself):
    rule = rule_of(6, 6, itself, with_valid=True)
    valid_q, valid_k = rule.valid
    scores = torch.randn(6, 6)
    spoiled = scores.masked_fill(~(valid_q[:, None] & valid_k), math.nan)
    if itself:
        spoiled.fill_diagonal_(math.nan)
    for x, y in zip(run(Passes, kind, rule, spoiled), run(Passes, kind, rule, scores), strict=True):
        assert torch.equal(x, y)


@EVERY
def test_repeats_give_the_same_bits(kind):
    rule, scores = rule_of(3, 300, False, True, True), torch.randn(3, 300)
    first, second = (run(Passes, kind, rule, scores) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.rotation
@SELF
@EVERY
def test_kernels_write_only_their_outputs(kind, itself):
    """All that is allocated is poisoned, and lies between zones that stay as they are."""
    for candidates, dtype in ((3, torch.float32), (8, torch.float64)):
        rule = rule_of(candidates, candidates, itself, True, True)
        passes = Passes(rule, kind, torch.tensor(2.0, dtype=dtype), None)
        given = torch.randn(candidates, candidates, dtype=dtype)
        weights = torch.ones(candidates, dtype=dtype)
        with red_zones():
            values, counts, rows = (
                torch.empty(*shape, dtype=dtype) for shape in ((candidates,), (candidates,), (4, candidates))
            )
            scores = torch.empty(candidates, candidates, dtype=dtype).copy_(given)
            passes.forward(scores, 0, values, counts, rows)
            assert torch.equal(scores, given) and not counts.isnan().any() and not rows.isnan().any()
            columns = (rows, weights) if itself else None
            other, of_other = passes.backward(scores, 0, rows, weights, False, columns)
            assert torch.equal(scores, given)
            h, sums = passes.backward(scores, 0, rows, weights, True, columns)
            assert h is scores and torch.equal(h, other) and torch.equal(sums, of_other)
            assert h.isfinite().all() and sums.isfinite().all()


def test_labels_of_64_bits_are_told_apart():
    low = torch.tensor([1, 1, 5, 5, 0, -1])
    high = torch.tensor([0, 1, 0, 0, -(2**31), 2**31 - 1]) * 2**32
    scores = torch.randn(6, 6)
    for labels, kind in ((low, "out"), (low + high, "sigmoid"), (low * 2**31, "sum")):
        agree(Passes, kind, Rule((labels, labels.flip(0)), (labels + 1, labels), None, False), scores)


@pytest.mark.rotation
@SELF
@EVERY
def test_the_op_by_both(kind, itself):
    """Whole calls, of embeddings and labels that are slices, with gradients of everything and any upstream."""
    rows = 7
    for kept in (False, True):
        columns = 24 if kept else 5
        q = torch.randn(2 * rows, columns + 3)[::2, 1:-2]
        k = None if itself else torch.randn(9, columns)
        labels = torch.randint(4, (2 * rows,))[::2]
        pair = labels, labels if itself else torch.randint(4, (9,))
        weights = torch.linspace(-1, 2, 2 * rows)[::2]
        results = []
        for name in ("triton", "reference"):
            given = [None if x is None else x.clone().requires_grad_() for x in (q, k)]
            scale, bias = (torch.tensor(x, requires_grad=True) for x in (4.0, -1.0))
            wanted = [x for x in (*given, scale, bias) if x is not None]
            with backends.backend(name):
                values, counts = op.similarity(*given, pair, None, None, scale, bias, kind, True)
                grads = torch.autograd.grad(values, wanted, weights)
                total, _ = similarity_total(*given, weights, pair, None, None, scale, bias, kind, True)
                of_total = torch.autograd.grad(total, wanted, torch.tensor(-2.5))
            results.append((values, counts, *grads, total, *of_total))
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.rotation
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16], ids=str)
def test_directions_and_the_gradient_back(dtype, cosine):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    exact = {"rtol": 1e-12, "atol": 1e-14} if compute == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    sizes = [1e-30, 1e30, 0, 1e-11, 1e-13, 1e-38, 1] if compute == dtype else [1, 1e-4, 0, 1e3, 1, 1, 1]
    for rows, columns in ((0, 3), (1, 1), (7, 16), (4, 17), (5, 600), (2, 2100)):
        x = (torch.randn(rows, columns) * torch.tensor(sizes)[:rows, None]).to(dtype)
        valid = torch.rand(rows) > 0.3
        grad, scale = torch.randn(rows, columns, dtype=compute), torch.tensor(3.0, dtype=compute)
        invalid = x.masked_fill(~valid[:, None], math.nan)
        for given, some in ((x, None), (inside(x), None), (x.t().clone().t(), valid), (invalid, valid)):
            results = []
            for name in ("triton", "reference"):
                found = rows_of(given, cosine, some, name)
                assert found.finite and found.unit.dtype == compute
                own = grad.clone()
                back, along = to_rows(own, found, scale, dtype, name)
                assert name == "reference" or (back is own) == (dtype == compute)
                results.append((found.unit, back, along, found.scale))
            for found, wanted in zip(*results, strict=True):
                if found is not None:
                    loose = found.dtype != compute
                    tolerance = {"rtol": 1e-2, "atol": 1e-4} if loose else exact
                    torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_directions_and_gradients_write_only_their_outputs(dtype):
    for columns, some in itertools.product((3, 160), (None, torch.tensor([True, False, True]))):
        x, grad = torch.randn(3, columns).to(dtype), torch.randn(3, columns)
        with red_zones():
            for cosine in (True, False):
                found = rows_of(x, cosine, some, "triton")
                back, along = to_rows(grad.clone(), found, torch.tensor(2.0), dtype, "triton")
                assert all(y.isfinite().all() for y in (found.unit, back, along))


def test_rows_that_are_not_finite_stay():
    for dtype, bad in itertools.product(DTYPES, (math.nan, -math.nan, math.inf, -math.inf)):
        for row, column in ((0, 0), (2, 18)):
            x = torch.randn(3, 19, dtype=dtype)
            x[row, column] = bad
            others = torch.arange(3) != row
            for cosine in (True, False):
                found = rows_of(x, cosine, None, "triton")
                # On a device nobody waits for what was found.
                assert found.finite and not found.unit[row, column].isfinite()
                assert found.unit[others].isfinite().all()
                if cosine:
                    assert found.unit[row].isnan().all() and found.scale[row].isnan()
            assert rows_of(x, True, others, "triton").unit.isfinite().all()
