"""Shared by tests of the passes of the similarity losses: rules, a run of the passes, and what it must agree with."""

import torch

from mmfast.ops.similarity.kernels import Plain
from mmfast.ops.similarity.passes import Rule

TOLERANCE = {torch.float32: {"rtol": 3e-5, "atol": 2e-6}, torch.float64: {"rtol": 1e-11, "atol": 1e-12}}


def rule_of(rows, candidates, itself, with_ids=False, with_valid=False, classes=4):
    def pair(make):
        own = make(rows)
        return own, own if itself else make(candidates)

    return Rule(
        pair(lambda n: torch.randint(classes, (n,)) - 1),
        pair(lambda n: torch.randint(n // 2 + 1, (n,))) if with_ids else None,
        pair(lambda n: torch.rand(n) > 0.3) if with_valid else None,
        itself,
    )


def run(passes, kind, rule, scores, scale=3.0, bias=None, start=0, weights=None):
    """values, counts, rows (4, B) of the whole, and H and its sums, of the scores of the rows from ``start`` on."""
    rows, dtype = len(rule.labels[0]), scores.dtype
    bound = passes(
        rule,
        kind,
        torch.tensor(scale, dtype=dtype),
        None if bias is None else torch.tensor(bias, dtype=dtype),
    )
    values, counts, numbers = (scores.new_full(shape, 7.5) for shape in ((rows,), (rows,), (4, rows)))
    bound.forward(scores, start, values, counts, numbers)
    if weights is None:
        weights = torch.linspace(-0.5, 1, rows, dtype=dtype)
    # A strip alone does not say what its candidates are as rows.
    filled = numbers if len(scores) == rows or not rule.itself else torch.where(numbers == 7.5, 0.25, numbers)
    columns = (filled, weights) if rule.itself else None
    h, sums = bound.backward(scores.clone(), start, filled, weights, False, columns)
    again, _ = bound.backward(scores.clone(), start, filled, weights, True, columns)
    assert torch.equal(h.nan_to_num(), again.nan_to_num())
    return values, counts, numbers, h, sums


def agree(passes, kind, rule, scores, **options):
    """What :func:`run` found, which is what the passes in PyTorch find."""
    found, wanted = (run(each, kind, rule, scores, **options) for each in (passes, Plain))
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        tolerance = dict(TOLERANCE[scores.dtype])
        if i == 4:
            tolerance["atol"] *= 1 + float(wanted[3].abs().sum(1).amax()) if scores.numel() else 1
        torch.testing.assert_close(x, y, equal_nan=True, **tolerance)
    return found
