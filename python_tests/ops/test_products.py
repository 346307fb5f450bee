"""Matrix products by whichever library: right at any size, layout and precision."""

import pytest
import torch

from mmfast.ops import products as ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Below and above the size from which oneDNN may take over.
SIZES = pytest.mark.parametrize("size", [(5, 7, 33), (1, 1, 1), (96, 200, 301)], ids=str)


def error(x, truth):
    return float((x.double() - truth).abs().max() / truth.abs().max())


@SIZES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_product(size, dtype, autocast):
    m, n, k = size
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for x in (torch.randn(m, k, dtype=dtype), torch.randn(k, m, dtype=dtype).t()):
        for y in (torch.randn(n, k, dtype=dtype), torch.randn(k, n, dtype=dtype).t()):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results = ops.product(x, y), ops.matmul(x, y.t())
            for z in results:
                assert z.dtype == compute and z.is_contiguous()
                assert error(z, x.double() @ y.double().t()) < 16 * torch.finfo(compute).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_gram_matrices(dtype, autocast):
    x = torch.randn(2, 7, 33, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z = ops.gram_matrices(x)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(z, x.double() @ x.double().mT) < 16 * torch.finfo(z.dtype).eps
