"""Rows, candidates, and who is whose positive, which both passes of the similarity losses share.

A program works on one row, a block of candidates at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmfast.triton import divisor
from mmfast.triton.arithmetic import log_of_one_and

VECTOR_BYTES = 16  # of each thread at a time


@triton.jit
def row_of(labels, ids, valid, row, candidates, HAS_IDS: tl.constexpr, HAS_VALID: tl.constexpr):
    """The row's label and id, and how many candidates it looks at: all, or none if it is not valid."""
    label = tl.load(labels + row)
    id = tl.load(ids + row) if HAS_IDS else label
    seen = candidates
    if HAS_VALID:
        seen = tl.where(tl.load(valid + row), candidates, 0)
    return label, id, seen


@triton.jit
def factors(scale, bias, HAS_BIAS: tl.constexpr):
    """What makes logits of scores."""
    scale = tl.load(scale)
    return scale, tl.load(bias) if HAS_BIAS else tl.zeros_like(scale)


@triton.jit
def block_of(
    scores, labels, ids, valid, scale, bias, label, id, row, j, seen,
    ITSELF: tl.constexpr, HAS_IDS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Of candidates: their logits, whether their labels are the row's, whether they are positives or negatives."""
    inside = j < seen
    logit = tl.load(scores + j, mask=inside, other=0.0) * scale + bias
    same = tl.load(labels + j, mask=inside, other=0) == label
    active = inside
    if HAS_IDS:
        active = active & ((tl.load(ids + j, mask=inside, other=0) != id) | (j == row))
    if HAS_VALID:
        active = active & tl.load(valid + j, mask=inside, other=0)
    if ITSELF:
        active = active & (j != row)
    return logit, same, active


@triton.jit
def softplus(x):
    """log(1 + exp x) and its derivative, neither by a difference."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, x, 0.0) + log_of_one_and(e), tl.where(x > 0, 1.0, e) / (1 + e)


def row_shape(columns: int, *tensors: Tensor) -> tuple[int, int, int]:
    """Warps for a row, how many elements of it they take at a time, and how many neighbours may be one vector."""
    warps = 1 if columns <= 256 else 4 if columns <= 1024 else 8
    size = min(tensor.element_size() for tensor in tensors)
    return warps, 32 * warps * VECTOR_BYTES // size, divisor(VECTOR_BYTES // size, columns)
