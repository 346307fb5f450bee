"""Matrix products of the losses: torch's own, by the library that is fastest on this processor."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmfast import backends

# Up to this many multiplications, or elements of the result, oneDNN's call costs more than its faster kernels bring.
_SMALL, _SMALL_RESULT = 2**21, 2**12


@functools.cache
def _onednn_linear():
    """oneDNN's ``x @ y.T``, or None where torch's default (MKL) is as good.

    MKL runs its AVX-512 kernels on Intel processors only; oneDNN goes by the instruction set, and is twice as
    fast on others that have AVX-512.
    """
    if (
        backends._C is None
        or backends._C.cpu_is_intel()
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
    ):
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_HALF = (torch.bfloat16, torch.float16)


# Below, autocast leaves calls with ``out`` alone.


def gram_matrices(x: Tensor) -> Tensor:
    """``x @ x.mT`` (2, m, m) of (2, m, k), in the precision of :func:`product`."""
    if x.dtype not in _HALF:
        return torch.bmm(x, x.mT, out=x.new_empty((len(x), x.shape[1], x.shape[1])))
    if not x.is_cuda:
        return gram_matrices(x.float())
    out = x.new_empty((len(x), x.shape[1], x.shape[1]), dtype=torch.float32)
    return torch.bmm(x, x.mT, out_dtype=torch.float32, out=out)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` of (m, k) and (k, n), in the precision of :func:`product`."""
    if x.dtype not in _HALF:
        return torch.mm(x, y, out=x.new_empty((x.shape[0], y.shape[1])))
    if not x.is_cuda:
        return matmul(x.float(), y.float())
    out = x.new_empty((x.shape[0], y.shape[1]), dtype=torch.float32)
    return torch.mm(x, y, out_dtype=torch.float32, out=out)


def product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """``x @ y.T`` of (m, k) and (n, k), in their precision whatever autocast says; half types give fp32.

    ``out`` (m, n): where it goes, of operands that are not of a half type.
    """
    if x.dtype in _HALF and not x.is_cuda:
        x, y = x.float(), y.float()
    (m, k), n = x.shape, y.shape[0]
    if (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and m * n > _SMALL_RESULT
        and m * n * k >= _SMALL
        and (linear := _onednn_linear())
    ):
        result = linear(x, y, None, "none", [], "")
        return result if out is None else out.copy_(result)
    return matmul(x, y.t()) if out is None else torch.mm(x, y.t(), out=out)
