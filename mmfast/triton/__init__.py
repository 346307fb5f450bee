"""The kernels in Triton. Nothing but this folder imports Triton, and only once a kernel of it is wanted.

The modules work compiled, with Triton 3.6 or later, and in Triton's interpreter on CPU tensors
(``TRITON_INTERPRET=1``, set before Triton is imported).
"""

from __future__ import annotations

import contextlib

import torch


def launch(
    kernel, programs: int, device: torch.device, *arguments, fuse: bool = True, warps: int = 4
) -> None:
    """Run ``programs`` programs of ``kernel`` on ``device``; none for empty tensors.

    ``fuse`` lets multiplications and additions become one instruction with one rounding.
    """
    if programs == 0:
        return
    # Triton launches on the current device, whatever device its arguments are on.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=fuse)


def divisor(limit: int, *sizes: int) -> int:
    """The largest power of 2, at most ``limit``, that divides all sizes: so wide may vectors be."""
    while any(size % limit for size in sizes):
        limit //= 2
    return limit
