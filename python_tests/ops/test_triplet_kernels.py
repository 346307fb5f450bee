"""The C++ passes of triplet losses: those in PyTorch, on every instruction set."""

import pytest
import torch

from mmfast import backends
from mmfast.ops.similarity.passes import Rule
from mmfast.ops.similarity.triplet_kernels import Cpu
from mmfast.ops.similarity.triplet_passes import KINDS, Options, Plain

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(backends._C is None, reason="the package was not built"),
]


@pytest.fixture(params=[] if backends._C is None else backends._C.isas())
def isa(request):
    previous = backends._C.use_isa(request.param)
    yield request.param
    backends._C.use_isa(previous)


def rules(rows, classes, generator):
    labels = torch.randint(-classes, classes, (rows,), generator=generator)
    ids = torch.randint(rows, (rows,), generator=generator)
    valid = torch.rand(rows, generator=generator) < 0.8
    for i, v in ((None, None), (ids, None), (None, valid), (ids, valid)):
        yield Rule(*(None if x is None else (x, x) for x in (labels, i, v)), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_passes_are_those_of_pytorch(isa, dtype):
    generator = torch.Generator().manual_seed(0)
    for rows, classes in ((1, 1), (2, 1), (17, 2), (40, 1), (70, 3), (95, 50)):
        for rule in rules(rows, classes, generator):
            for ties in (False, True):
                scores = torch.randn(rows, rows, generator=generator, dtype=dtype)
                # Quarters: many equal scores, and sums without rounding.
                scores = (scores * 4).round() / 4 if ties else scores
                start = rows // 3
                part = scores[start : start + max(1, rows // 2)]
                weights = torch.rand(len(part), generator=generator, dtype=dtype)
                native, plain = Cpu(rule), Plain(rule)
                for kind in KINDS[:4]:
                    for margin in (0.0, 0.25, 3.0):
                        options = Options(kind, margin, ties)
                        values, counts = native.strip(part, start, options)
                        expected, expected_counts = plain.strip(part, start, options)
                        assert torch.equal(counts, expected_counts), (kind, margin)
                        torch.testing.assert_close(values, expected)
                        slopes = native.slopes(part, start, options, weights)
                        torch.testing.assert_close(slopes, plain.slopes(part, start, options, weights))
                near, far, places, numbers = native.extremes(part, start)
                expected = plain.extremes(part, start)
                for found, wanted in zip(
                    (near, far, numbers), (*expected[:2], expected.numbers), strict=True
                ):
                    assert torch.equal(found, wanted)
                for found, wanted, has in zip(
                    places.long(), expected.places, (near.isfinite(), far.isfinite()), strict=True
                ):
                    assert torch.equal(found[has], wanted[has])


def test_threads_change_nothing(isa):
    generator = torch.Generator().manual_seed(1)
    rule = next(rules(300, 4, generator))
    scores = torch.randn(300, 300, generator=generator)
    weights = torch.rand(300, generator=generator)
    found = []
    for threads in (1, 2):
        previous = torch.get_num_threads()
        torch.set_num_threads(threads)
        native, options = Cpu(rule), Options("semihard", 0.5)
        found.append((*native.strip(scores, 0, options), native.slopes(scores, 0, options, weights)))
        torch.set_num_threads(previous)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
