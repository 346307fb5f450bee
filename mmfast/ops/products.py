"""Matrix products of the losses: torch's own, by the library that is fastest on this processor."""

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


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T`` of (m, k) and (n, k), in their precision whatever autocast says."""
    (m, k), n = x.shape, y.shape[0]
    if (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and m * n * k >= _SMALL
        and (linear := _onednn_linear())
    ):
        return linear(x, y, None, "none", [], "")
    # Autocast leaves calls with ``out`` alone.
    return torch.mm(x, y.t(), out=x.new_empty(m, n))
