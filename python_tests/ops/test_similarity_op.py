"""The similarity op is its reference, values and gradients, of every kind and rule; it is a well-made op."""

import itertools

import pytest
import torch

from mmfast.ops.similarity import op, passes, reference

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


@pytest.mark.parametrize("itself", [True, False], ids=["self", "pair"])
def test_opcheck(itself):
    q, k, labels, ids, valid, scale, bias = case(6, 5, 3, "out", itself, True, True, torch.float32)
    pairs = [x for own, other in (labels, ids, valid) for x in (own, None if itself else other)]
    detached = [None if x is None else x.detach() for x in (q, k, *pairs, scale, bias)]
    arguments = (*detached, "out", True, itself, True)
    ops = torch.ops.mmfast
    torch.library.opcheck(ops.similarity_forward, arguments)
    _, _, rows, kept = ops.similarity_forward(*arguments)
    for needs in ([True, not itself, True, False], [False, False, True, False]):
        given = (torch.ones(6), *detached, rows, kept, "out", True, itself, needs)
        torch.library.opcheck(ops.similarity_backward, given)
