"""Matrix products by whichever library: right at any size, layout and precision."""

import pytest
import torch

from mmfast.ops import products as ops

# Below and above the size from which oneDNN may take over.
SIZES = pytest.mark.parametrize("size", [(5, 7, 33), (1, 1, 1), (96, 200, 301)], ids=str)


def error(x, truth):
    return float((x.double() - truth).abs().max() / truth.abs().max())


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_product(size, dtype, autocast):
    m, n, k = size
    for x in (torch.randn(m, k, dtype=dtype), torch.randn(k, m, dtype=dtype).t()):
        for y in (torch.randn(n, k, dtype=dtype), torch.randn(k, n, dtype=dtype).t()):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                z = ops.product(x, y)
            assert z.dtype == dtype and z.is_contiguous()
            assert error(z, x.double() @ y.double().t()) < 16 * torch.finfo(dtype).eps
