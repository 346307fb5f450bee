"""The C++ and CUDA passes of the similarity losses are those in PyTorch, whatever the rows, the rule and the threads.

Those of CUDA where they were built to be emulated on the CPU.
"""

import itertools
import math

import pytest
import torch
from similarity_help import TOLERANCE, agree, rule_of, run

from mmfast import backends
from mmfast.ops.similarity import op
from mmfast.ops.similarity.kernels import CPU_KINDS, Plain, _codes, passes_for
from mmfast.ops.similarity.passes import KINDS, Rule
from mmfast.ops.similarity.rows import rows_of, to_rows
from mmfast.ops.similarity.total import similarity_total

pytestmark = pytest.mark.usefixtures("poisoned_memory", "native")

DTYPES = [torch.float32, torch.float64]
# Emulated threads are slow.
COUNTS = {
    "cpu": [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 300, 600],
    "cuda": [0, 1, 2, 31, 33, 67, 257, 1100],
}
BACKENDS = {"cpu": CPU_KINDS} | ({"cuda": KINDS} if backends.emulated() else {})
EVERY = pytest.mark.parametrize("backend", BACKENDS)
CASES = pytest.mark.parametrize(
    ("backend", "kind"), [(name, kind) for name, kinds in BACKENDS.items() for kind in kinds]
)
SELF = pytest.mark.parametrize("itself", [True, False], ids=["self", "pair"])


@pytest.fixture
def turns(backend, every_isa):
    """A function that yields each instruction set after switching to it; of CUDA there is one."""
    return every_isa if backend == "cpu" else lambda: [backend]


@SELF
@CASES
def test_every_rule_and_count_of_candidates(backend, kind, itself, turns):
    for _ in turns():
        for candidates, ids, valid, dtype in itertools.product(COUNTS[backend], (0, 1), (0, 1), DTYPES):
            rows = candidates if itself else 5
            if rows > (300 if backend == "cpu" else 70):
                continue
            rule = rule_of(rows, candidates, itself, ids, valid)
            scores = torch.randn(rows, candidates, dtype=dtype)
            agree(passes_for(kind, backend), kind, rule, scores, bias=-1.0 if kind == "sigmoid" else None)


@SELF
@CASES
def test_one_positive(backend, kind, itself):
    for dtype, scale, rows in itertools.product(DTYPES, (1.0, 40.0), (18, 66)):
        rule = rule_of(rows, rows, itself)
        labels = torch.arange(rows) // 2 if itself else torch.arange(rows)
        rule = rule._replace(labels=(labels, labels))
        scores = torch.rand(rows, rows, dtype=dtype) * 2 - 1
        found = agree(passes_for(kind, backend), kind, rule, scores, scale=scale)
        assert (found[1] == 1).all()


@CASES
def test_a_loss_near_zero_is_as_exact_as_a_large_one(backend, kind):
    scores = torch.full((20, 20), -1.0).fill_diagonal_(1)
    rule = Rule((torch.arange(20),) * 2, None, None, False)
    found, exact = (
        run(passes_for(kind, backend), kind, rule, scores, 8.0),
        run(Plain, kind, rule, scores.double(), 8.0),
    )
    for i in (0, 2, 3):
        torch.testing.assert_close(found[i].double(), exact[i], rtol=5e-6, atol=0)


@CASES
def test_strips_of_more_rows(backend, kind):
    """A strip fills its own rows only, and finds their positions among the candidates."""
    for itself, dtype in itertools.product((True, False), DTYPES):
        rule = rule_of(37, 37, itself, True, True)
        scores = torch.randn(37, 37, dtype=dtype)
        for start, stop in ((0, 0), (5, 5), (0, 9), (9, 36), (36, 37), (37, 37)):
            values, counts, numbers, *_ = agree(
                passes_for(kind, backend), kind, rule, scores[start:stop], start=start
            )
            beside = torch.ones(37, dtype=torch.bool).index_fill_(0, torch.arange(start, stop), False)
            for x in (values, counts, *numbers):
                assert (x[beside] == 7.5).all()


@SELF
@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(backend, kind, itself, dtype, turns):
    for isa in turns():
        for scale in (1000.0, 1e-30, 0.0, -1000.0):
            some = torch.rand(33, 33, dtype=dtype)
            for scores in (some + some.T - 1, torch.ones(33, 33, dtype=dtype)):
                rule = rule_of(33, 33, itself)
                found, exact = (
                    run(passes_for(kind, backend), kind, rule, scores, scale),
                    run(Plain, kind, rule, scores.double(), scale),
                )
                assert all(x.isfinite().all() for x in (found[0], found[3], found[4])), isa
                if abs(scale) < 1:
                    torch.testing.assert_close(found[3].double(), exact[3], **TOLERANCE[dtype])
                eps = torch.finfo(dtype).eps * max(1.0, abs(scale))
                torch.testing.assert_close(found[0].double(), exact[0], rtol=30 * eps, atol=30 * eps)


@SELF
@CASES
def test_nan_shows(backend, kind, itself, turns):
    """In the loss and the gradient of each row that counts and has such a score, and in no other."""
    for _ in turns():
        for dtype, column, bad in itertools.product(DTYPES, (0, 7, 18), (math.nan, -math.nan)):
            labels = torch.arange(19) % 3
            if kind not in CPU_KINDS and labels[column] == labels[4]:
                continue  # what positives give depends less on it, or not at all
            rule = Rule((labels, labels), None, None, itself)
            scores = torch.randn(19, 19, dtype=dtype)
            scores[4, column] = bad
            values, _, _, h, sums = run(passes_for(kind, backend), kind, rule, scores)
            others = torch.arange(19) != 4
            assert values[others].isfinite().all()
            assert values[4].isnan()
            if kind not in ("relu", "top"):
                assert sums[4].isnan() and h[4, column].isnan()
            if not itself:
                assert h[others].isfinite().all()


@SELF
@CASES
def test_what_does_not_count_is_not_read(backend, kind, itself):
    for dtype in DTYPES:
        rule = rule_of(19, 19, itself, with_valid=True)
        valid_q, valid_k = rule.valid
        scores = torch.randn(19, 19, dtype=dtype)
        spoiled = scores.masked_fill(~(valid_q[:, None] & valid_k), math.nan)
        if itself:
            spoiled.fill_diagonal_(math.nan)
        for x, y in zip(
            run(passes_for(kind, backend), kind, rule, spoiled),
            run(passes_for(kind, backend), kind, rule, scores),
            strict=True,
        ):
            assert torch.equal(x, y)


@SELF
@CASES
def test_threads_and_repeats_give_the_same_bits(backend, kind, itself, turns):
    before, rows = torch.get_num_threads(), 301 if backend == "cpu" else 45
    try:
        for _ in turns():
            for dtype, general in itertools.product(DTYPES, (0, 1)):
                rule = rule_of(rows, rows, itself, general, general)
                scores = torch.randn(rows, rows, dtype=dtype)
                results = []
                for threads in (1, 2, 3, 2):
                    torch.set_num_threads(threads)
                    results.append(run(passes_for(kind, backend), kind, rule, scores))
                for result in results[1:]:
                    assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    finally:
        torch.set_num_threads(before)


@SELF
@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_write_only_their_outputs(backend, kind, itself, dtype, turns, monkeypatch):
    """Every output lies between red zones of a sentinel value."""
    zone, buffers = 64, []

    def guarded(*shape, like=None):
        buffers.append(torch.full((math.prod(shape) + 2 * zone,), 7.5, dtype=dtype))
        return buffers[-1][zone : zone + math.prod(shape)].view(shape)

    for _, candidates in itertools.product(turns(), (3, 19, 64)):
        buffers.clear()
        rule = rule_of(candidates, candidates, itself, True, True)
        bound = passes_for(kind, backend)(rule, kind, torch.tensor(2.0, dtype=dtype), None)
        values, counts, rows = guarded(candidates), guarded(candidates), guarded(4, candidates)
        scores = guarded(candidates, candidates)
        scores.copy_(torch.randn(scores.shape))
        kept = scores.clone()
        bound.forward(scores, 0, values, counts, rows)
        assert torch.equal(scores, kept)
        weights = torch.ones(candidates, dtype=dtype)
        h, _ = bound.backward(scores, 0, rows, weights, True, (rows, weights) if itself else None)
        assert h is scores and not torch.equal(h, kept)
        assert (counts != 7.5).all()
        for buffer in buffers:
            assert (buffer[:zone] == 7.5).all() and (buffer[-zone:] == 7.5).all()


def test_labels_of_64_bits_are_told_apart():
    low = torch.tensor([1, 1, 5, 5, 0, -1])
    high = torch.tensor([0, 1, 0, 0, -(2**31), 2**31 - 1]) * 2**32
    for labels in (low, low + high, low * 2**31, low.int().long()):
        for wide in (True, False):
            own, other = _codes((labels, labels.flip(0)), wide)
            same = labels[:, None] == labels.flip(0)
            assert torch.equal(own[:, None] == other, same)
            alone = _codes((labels, labels), wide)
            assert alone[0] is alone[1]
            assert torch.equal(alone[0][:, None] == alone[1], labels[:, None] == labels)
            assert own.dtype == (torch.int64 if wide else torch.int32)
        scores = torch.randn(6, 6)
        for backend, kinds in BACKENDS.items():
            for kind in kinds:
                rule = Rule((labels, labels.flip(0)), (labels + 1, labels), None, False)
                agree(passes_for(kind, backend), kind, rule, scores)


@SELF
@CASES
def test_the_op_by_both(backend, kind, itself):
    """Whole calls, of embeddings and labels that are slices, with gradients of everything and any upstream."""
    rows, columns = 35, 6
    for kept in (False, True):
        columns = 80 if kept else 6
        q = torch.randn(2 * rows, columns + 3)[::2, 1:-2]
        k = None if itself else torch.randn(40, columns)
        labels = torch.randint(4, (2 * rows,))[::2]
        other = labels if itself else torch.randint(4, (40,))
        results = []
        for name in (backend, "reference"):
            given = [None if x is None else x.clone().requires_grad_() for x in (q, k)]
            scale, bias = (torch.tensor(x, requires_grad=True) for x in (4.0, -1.0))
            with backends.backend(name):
                values, counts = op.similarity(*given, (labels, other), None, None, scale, bias, kind, True)
                wanted = [x for x in (*given, scale, bias) if x is not None]
                for upstream in (torch.ones(()).expand(rows), torch.linspace(-1, 2, 2 * rows)[::2]):
                    grads = torch.autograd.grad(values, wanted, upstream, retain_graph=True)
                    results.append((values, counts, *grads))
                    # With weights that are known beforehand, in one sweep.
                    total, _ = similarity_total(
                        *given, upstream, (labels, other), None, None, scale, bias, kind, True
                    )
                    grads = torch.autograd.grad(3 * total, wanted)
                    results[-1] += (total, *grads)
        for found, want in zip(results[:2], results[2:], strict=True):
            for x, y in zip(found, want, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=3e-5)


@EVERY
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16], ids=str)
def test_directions_and_the_gradient_back(backend, dtype, cosine, turns):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for _ in turns():
        for rows, columns in ((0, 3), (1, 1), (5, 2), (4, 15), (3, 16), (3, 17), (7, 65), (6, 600)):
            x = torch.randn(2 * rows, columns + 2)[::2, 1:-1]
            sizes = (
                [1e-30, 1e30, 0, 1e-11, 1e-13, 1e-38, 1] if compute == dtype else [1, 1e-4, 0, 1e3, 1, 1, 1]
            )
            x = (x * torch.tensor(sizes)[:rows, None]).to(dtype)
            valid = torch.rand(rows) > 0.3
            grad, scale = torch.randn(rows, columns, dtype=compute), torch.tensor(3.0, dtype=compute)
            for given, some in ((x, None), (x.masked_fill(~valid[:, None], math.nan), valid)):
                results = []
                for name in (backend, "reference"):
                    found = rows_of(given, cosine, some, name)
                    assert found.finite and found.unit.dtype == compute
                    back, along = to_rows(grad.clone(), found, scale, dtype, name)
                    results.append((found.unit, back, along, found.scale))
                tolerance = (
                    {"rtol": 1e-12, "atol": 1e-14}
                    if compute == torch.float64
                    else {"rtol": 1e-5, "atol": 1e-6}
                )
                for found, wanted in zip(*results, strict=True):
                    if found is not None:
                        loose = dtype != compute and found.dtype == dtype
                        torch.testing.assert_close(
                            found, wanted, **({"rtol": 1e-2, "atol": 1e-4} if loose else tolerance)
                        )


@EVERY
def test_rows_that_are_not_finite_are_found_and_stay(backend):
    for dtype, bad in itertools.product(DTYPES, (math.nan, -math.nan, math.inf, -math.inf)):
        for row, column in ((0, 0), (3, 18), (4, 7)):
            x = torch.randn(5, 19, dtype=dtype)
            x[row, column] = bad
            for cosine in (True, False):
                found = rows_of(x, cosine, None, backend)
                # On a device nobody waits for what was found.
                assert found.finite == (backend == "cuda") and not found.unit[row, column].isfinite()
                assert found.unit[torch.arange(5) != row].isfinite().all()
                if cosine:
                    assert found.unit[row].isnan().all() and found.scale[row].isnan()
            assert rows_of(x, True, torch.arange(5) != row, backend).finite
