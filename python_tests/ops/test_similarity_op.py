"""The similarity op is its reference, values and gradients, of every kind and rule; it is a well-made op."""

import itertools

import pytest
import torch

from mmfast.ops.similarity import op, passes, reference
from mmfast.ops.similarity.total import similarity_total

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DOUBLE = {"dtype": torch.float64}


def case(rows, candidates, columns, kind, itself, with_ids, with_valid, dtype=torch.float64):
    def pair(make):
        first = make(rows)
        return first, first if itself else make(candidates)

    inputs = [torch.randn(rows, columns, dtype=dtype, requires_grad=True), None]
    if not itself:
        inputs[1] = torch.randn(candidates, columns, dtype=dtype, requires_grad=True)
    labels = pair(lambda n: torch.randint(4, (n,)))
    ids = pair(lambda n: torch.randint(6, (n,))) if with_ids else None
    valid = pair(lambda n: torch.rand(n) > 0.3) if with_valid else None
    scale = torch.tensor(3.0, dtype=dtype, requires_grad=True)
    bias = torch.tensor(-1.0, dtype=dtype, requires_grad=True) if kind == "sigmoid" else None
    return *inputs, labels, ids, valid, scale, bias


@pytest.mark.parametrize("kind", passes.KINDS)
@pytest.mark.parametrize("itself", [True, False], ids=["self", "pair"])
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
def test_the_op_is_its_reference(kind, itself, cosine, monkeypatch):
    for with_ids, with_valid, strip, columns in itertools.product((0, 1), (0, 1), (2**19, 20), (1, 5, 40)):
        monkeypatch.setattr(op, "STRIP", strip)
        arguments = case(11, 9, columns, kind, itself, with_ids, with_valid)
        wanted = [x for x in (arguments[0], arguments[1], *arguments[5:]) if x is not None]
        values, _ = op.similarity(*arguments, kind, cosine)
        expected = reference.similarity(*arguments, kind, cosine)
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-11)
        upstream = torch.randn(11, **DOUBLE)
        grads = torch.autograd.grad(values, wanted, upstream)
        exact = torch.autograd.grad(expected, wanted, upstream, materialize_grads=True)
        for grad, want in zip(grads, exact, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", passes.KINDS)
@pytest.mark.parametrize("itself", [True, False], ids=["self", "pair"])
def test_a_weighted_sum_with_its_gradient_is_that_of_the_losses_of_rows(kind, itself, monkeypatch):
    for with_ids, with_valid, strip, cosine in itertools.product((0, 1), (0, 1), (2**19, 20), (True, False)):
        monkeypatch.setattr(op, "STRIP", strip)
        arguments = case(11, 9, 5, kind, itself, with_ids, with_valid)
        wanted = [x for x in (arguments[0], arguments[1], *arguments[5:]) if x is not None]
        weights = torch.rand(11, **DOUBLE)
        total, counts = similarity_total(*arguments[:2], weights, *arguments[2:], kind, cosine)
        values = reference.similarity(*arguments, kind, cosine)
        torch.testing.assert_close(total, (weights * values).sum(), rtol=1e-10, atol=1e-11)
        assert torch.equal(counts, op.similarity(*arguments, kind, cosine)[1])
        grads = torch.autograd.grad(total, wanted, torch.tensor(-2.5, **DOUBLE), retain_graph=True)
        exact = torch.autograd.grad(values, wanted, -2.5 * weights, materialize_grads=True)
        for grad, want in zip(grads, exact, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-10)
        # Of some inputs alone, and a second time.
        (alone,) = torch.autograd.grad(total, wanted[-1:], torch.tensor(-2.5, **DOUBLE))
        assert torch.equal(alone, grads[-1])


@pytest.mark.parametrize("kind", passes.KINDS)
def test_a_sum_of_both_sides(kind, monkeypatch):
    for with_ids, with_valid, strip, cosine in itertools.product((0, 1), (0, 1), (2**19, 20), (True, False)):
        monkeypatch.setattr(op, "STRIP", strip)
        q, k, labels, ids, valid, scale, bias = case(9, 9, 5, kind, False, with_ids, with_valid)
        wanted = [x for x in (q, k, scale, bias) if x is not None]
        weights, pairs = torch.rand(9, **DOUBLE), (labels, ids, valid)
        total, _ = similarity_total(q, k, weights, *pairs, scale, bias, kind, cosine, sides=True)
        turned = (None if x is None else x[::-1] for x in pairs)
        values = reference.similarity(q, k, *pairs, scale, bias, kind, cosine)
        values = values + reference.similarity(k, q, *turned, scale, bias, kind, cosine)
        torch.testing.assert_close(total, (weights * values).sum(), rtol=1e-10, atol=1e-11)
        grads = torch.autograd.grad(total, wanted, torch.tensor(-2.5, **DOUBLE))
        exact = torch.autograd.grad(values, wanted, -2.5 * weights, materialize_grads=True)
        for grad, want in zip(grads, exact, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-10)


def test_a_recorded_gradient_of_a_sum_refuses_a_derivative():
    q, k, labels, ids, valid, scale, bias = case(6, 5, 3, "out", True, False, False)
    total, _ = similarity_total(q, k, torch.ones(6, **DOUBLE), labels, ids, valid, scale, bias, "out", True)
    plain = torch.autograd.grad(total, q, retain_graph=True)[0]
    (grad,) = torch.autograd.grad(total, q, create_graph=True)
    assert torch.equal(grad, plain)
    with pytest.raises(RuntimeError, match="similarity: the gradient must not be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", passes.KINDS)
def test_rows_at_the_head_of_longer_candidates(kind):
    q, _, _, _, _, scale, bias = case(7, 7, 4, kind, True, False, False)
    k = torch.cat((q, torch.randn(5, 4, **DOUBLE)))
    labels, ids, valid = (torch.randint(3, (12,)), torch.randint(8, (12,)), torch.rand(12) > 0.2)
    labels, ids, valid = ((x[:7], x) for x in (labels, ids, valid))
    values, _ = op.similarity(q, k, labels, ids, valid, scale, bias, kind, True, itself=True)
    expected = reference.similarity(q, k, labels, ids, valid, scale, bias, kind, True, itself=True)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-11)
    upstream = torch.randn(7, **DOUBLE)
    grads = [torch.autograd.grad(x, (q, scale), upstream, retain_graph=True) for x in (values, expected)]
    for grad, want in zip(*grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", passes.KINDS)
@pytest.mark.parametrize("itself", [True, False], ids=["self", "pair"])
def test_gradcheck(kind, itself):
    q, k, labels, ids, valid, scale, bias = case(6, 5, 3, kind, itself, True, True)
    inputs = [x for x in (q, k, scale, bias) if x is not None]

    def function(*given):
        given = iter(given)
        args = [next(given) if x is not None else None for x in (q, k, scale, bias)]
        return op.similarity(*args[:2], labels, ids, valid, *args[2:], kind, True)[0]

    assert torch.autograd.gradcheck(function, inputs)


def inputs_of_op(candidates, itself):
    q, k, labels, ids, valid, scale, bias = case(6, candidates, 3, "out", itself, True, True, torch.float32)
    pairs = [x for own, other in (labels, ids, valid) for x in (own, None if itself else other)]
    return [None if x is None else x.detach() for x in (q, k, *pairs, scale, bias)]


@pytest.mark.parametrize("itself", [True, False], ids=["self", "pair"])
def test_opcheck(itself):
    detached, ops = inputs_of_op(5, itself), torch.ops.mmfast
    arguments = (*detached, "out", True, itself, True)
    torch.library.opcheck(ops.similarity_forward, arguments)
    _, _, rows, kept = ops.similarity_forward(*arguments)
    for needs in ([True, not itself, True, False], [False, False, True, False]):
        given = (torch.ones(6), *detached, rows, kept, "out", True, itself, needs)
        torch.library.opcheck(ops.similarity_backward, given)
    for sides in {False, not itself}:
        q, k, *rest = inputs_of_op(6 if sides else 5, itself)
        for needs in ([True, not itself, True, False], [False, False, False, False]):
            given = (q, k, torch.rand(6), *rest, "out", True, itself, sides, needs)
            torch.library.opcheck(ops.similarity_total, given)
