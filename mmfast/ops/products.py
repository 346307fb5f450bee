"""Matrix products of the losses: torch's own, by the library that is fastest on this processor.

All of them write into ``out`` tensors or call oneDNN directly, neither of which autocast touches.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmfast.backends import _C

# Below this many multiplications oneDNN's call costs more than its faster kernels bring.
_SMALL = 2**21


@functools.cache
def _onednn_linear():
    """oneDNN's ``x @ y.T``, or None where torch's default (MKL) is as good.

    MKL runs its AVX-512 kernels on Intel processors only; oneDNN goes by the instruction set, and is twice as
    fast on others that have AVX-512.
    """
    if _C is None or _C.cpu_is_intel() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _onednn(x: Tensor, work: int):
    if x.dtype != torch.float32 or x.device.type != "cpu" or work < _SMALL:
        return None
    return _onednn_linear()


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T`` of (m, k) and (n, k)."""
    (m, k), n = x.shape, y.shape[0]
    if linear := _onednn(x, m * n * k):
        return linear(x, y, None, "none", [], "")
    return torch.mm(x, y.t(), out=x.new_empty(m, n))


def products(x: Tensor, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """``x[i] @ y[i].T`` of (2, m, k) and (2, n, k): one tensor (2, m, n), or two, whichever is faster."""
    (_, m, k), n = x.shape, y.shape[1]
    if linear := _onednn(x, m * n * k):
        (x_a, x_b), (y_a, y_b) = x, y
        return linear(x_a, y_a, None, "none", [], ""), linear(x_b, y_b, None, "none", [], "")
    return torch.bmm(x, y.mT, out=x.new_empty(2, m, n))
