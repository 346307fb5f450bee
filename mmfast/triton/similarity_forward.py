"""The forward pass of the similarity losses: of each row its loss, its number of positives and L, a, M, b.

mmfast/ops/similarity/passes.py has the definition, csrc/similarity.h the same mathematics for the other backends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmfast.triton.arithmetic import divide, log_of_one_and
from mmfast.triton.similarity_rule import block_of, factors, row_of, softplus


@triton.jit
def log_sum(top, sum):
    """log of the sum of sum exp(top) over all lanes; of none, minus infinity."""
    most = tl.max(top, axis=0)
    sum = tl.sum(sum * tl.exp(top - most), axis=0)
    none = sum == 0
    return tl.where(none, float("-inf"), most + tl.log(tl.where(none, 1.0, sum)))


@triton.jit
def log_sum_of_both(x, y):
    """log(e^x + e^y); either may be infinite."""
    most = tl.where(x > y, x, y)
    gap = tl.abs(x - y)
    finite = gap < float("inf")
    both = most + log_of_one_and(tl.exp(-tl.where(finite, gap, 0.0)))
    return tl.where(finite, both, tl.where(x == x, tl.where(y == y, most, y), x))


@triton.jit
def softmax_row(negatives, positives, sum, count, KIND: tl.constexpr):
    """Of the kinds out, in and sum, and decoupled, by the logarithms of sums over negatives and positives, and the
    sum of the logits of positives, of which there are ``count``."""
    infinity = tl.full((), float("inf"), negatives.dtype)
    one = tl.full((), 1, negatives.dtype)
    n = tl.where(count > 0, count, 1.0)
    if KIND == "decoupled":
        # Without negatives there is nothing to stand against.
        count = tl.where(negatives == -infinity, 0.0, count)
        value = negatives - divide(sum, n)
        numbers = negatives, one, one * 0, divide(one, n)
    else:
        single = count == 1
        both = log_sum_of_both(negatives, positives)
        alone, sigmoid = softplus(tl.where(single, negatives - positives, 0.0))
        if KIND == "out":
            value, second, b = both - divide(sum, n), one * 0, divide(one, n)
        else:
            value, second, b = both - positives, positives, one
        if KIND == "in":
            value += tl.log(n)
        # Of one positive, nothing nearly equal is subtracted.
        value = tl.where(single, alone, value)
        numbers = (
            tl.where(single, negatives, both), tl.where(single, sigmoid, one), tl.where(single, infinity, second), b,
        )  # fmt: skip
    return value, count, numbers


@triton.jit
def softmax_forward(
    scores, labels, ids, valid, scale, bias, label, id, row, seen,
    ITSELF: tl.constexpr, HAS_IDS: tl.constexpr, HAS_VALID: tl.constexpr,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each lane has the largest of its logits, and the sum of their exponentials relative to it."""
    C: tl.constexpr = scores.dtype.element_ty
    wide: tl.constexpr = scores.dtype.element_ty == tl.float64
    LOWEST: tl.constexpr = -1.7976931348623157e308 if wide else -3.4028234663852886e38
    top_n = tl.full((BLOCK,), LOWEST, C)
    top_p = tl.full((BLOCK,), LOWEST, C)
    sum_n = tl.zeros((BLOCK,), C)
    sum_p = tl.zeros((BLOCK,), C)
    sum = tl.zeros((BLOCK,), C)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, seen, BLOCK):
        logit, same, active = block_of(
            scores, labels, ids, valid, scale, bias, label, id, row, first + tl.arange(0, BLOCK), seen,
            ITSELF, HAS_IDS, HAS_VALID,
        )  # fmt: skip
        positive = active & same
        top = tl.where(same, top_p, top_n)
        gap = logit - top
        grows = gap > 0
        e = tl.exp(-tl.abs(gap))
        of = tl.where(same, sum_p, sum_n)
        of = tl.where(grows, of * e + 1, of + e)
        top = tl.where(grows, logit, top)
        negative = active ^ positive
        top_n, sum_n = tl.where(negative, top, top_n), tl.where(negative, of, sum_n)
        top_p, sum_p = tl.where(positive, top, top_p), tl.where(positive, of, sum_p)
        sum += tl.where(positive, logit, 0.0)
        count += positive.to(tl.int32)
    count = tl.sum(count, axis=0).to(C)
    negatives = log_sum(top_n, sum_n)
    if KIND == "negatives":
        value = tl.zeros((BLOCK,), C)
        slope = tl.zeros((BLOCK,), C)
        for first in range(0, seen, BLOCK):
            logit, same, active = block_of(
                scores, labels, ids, valid, scale, bias, label, id, row, first + tl.arange(0, BLOCK), seen,
                ITSELF, HAS_IDS, HAS_VALID,
            )  # fmt: skip
            above, sigmoid = softplus(negatives - logit)
            value += tl.where(active & same, above, 0.0)
            slope += tl.where(active & same, sigmoid, 0.0)
        n = tl.where(count > 0, count, 1.0)
        numbers = negatives, divide(tl.sum(slope, axis=0), n), n * 0, divide(tl.full((), 1, C), n)
        value = divide(tl.sum(value, axis=0), n)
    else:
        value, count, numbers = softmax_row(
            negatives, log_sum(top_p, sum_p), tl.sum(sum, axis=0), count, KIND
        )
    counts = count > 0
    infinity = tl.full((), float("inf"), C)
    return (
        tl.where(counts, value, 0.0), count, tl.where(counts, numbers[0], infinity),
        tl.where(counts, numbers[1], 0.0), tl.where(counts, numbers[2], infinity), tl.where(counts, numbers[3], 0.0),
    )  # fmt: skip


@triton.jit
def other_forward(
    scores, labels, ids, valid, scale, bias, label, id, row, seen,
    ITSELF: tl.constexpr, HAS_IDS: tl.constexpr, HAS_VALID: tl.constexpr,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each lane has a sum, or the largest of its negatives' logits and the first who has it. NaN shows."""
    C: tl.constexpr = scores.dtype.element_ty
    value = tl.zeros((BLOCK,), C)
    holder = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, seen, BLOCK):
        j = first + tl.arange(0, BLOCK)
        logit, same, active = block_of(
            scores, labels, ids, valid, scale, bias, label, id, row, j, seen, ITSELF, HAS_IDS, HAS_VALID
        )
        positive = active & same
        count += positive.to(tl.int32)
        if KIND == "sigmoid":
            above, _ = softplus(tl.where(same, -logit, logit))
            value += tl.where(active, above, 0.0)
        else:
            negative = active ^ positive
            if KIND == "relu":
                value += tl.where(negative & ((logit > 0) | (logit != logit)), logit, 0.0)
            else:
                larger = negative & ((logit > value) | (logit != logit))
                value = tl.where(larger, logit, value)
                holder = tl.where(larger, j, holder)
    count = tl.sum(count, axis=0).to(C)
    one = tl.full((), 1, C)
    if KIND == "sigmoid":
        return tl.sum(value, axis=0), count, one * 0, one, one * 0, one
    elif KIND == "relu":
        total = tl.sum(value, axis=0)
        return total, count, count, tl.where(total > 0, one, 0.0), one * 0, one * 0
    else:
        # Of NaN nobody knows whether it is the largest.
        known = value == value
        most = tl.max(tl.where(known, value, 0.0), axis=0)
        holder = tl.min(tl.where(value == most, holder, 2147483647), axis=0)
        most += tl.sum(tl.where(known, 0.0, value), axis=0)
        any = most > 0
        return most, count, tl.where(any, holder.to(C), 0.0), tl.where(any, one, 0.0), one * 0, one * 0


@triton.jit(do_not_specialize=["start", "candidates", "stride"])
def similarity_forward_kernel(
    scores, labels_q, labels_k, ids_q, ids_k, valid_q, valid_k, scale, bias, values, counts, numbers,
    start, candidates, stride,
    ITSELF: tl.constexpr, HAS_IDS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a strip of scores: row ``start`` + program of all."""
    program = tl.program_id(0).to(tl.int64)
    row = start + program
    candidates = candidates // VECTOR * VECTOR
    scores += program * candidates
    label, id, seen = row_of(labels_q, ids_q, valid_q, row, candidates, HAS_IDS, HAS_VALID)
    scale, bias = factors(scale, bias, HAS_BIAS)
    if (KIND == "sigmoid") | (KIND == "relu") | (KIND == "top"):
        value, count, first, a, second, b = other_forward(
            scores, labels_k, ids_k, valid_k, scale, bias, label, id, row, seen,
            ITSELF, HAS_IDS, HAS_VALID, KIND, BLOCK,
        )  # fmt: skip
    else:
        value, count, first, a, second, b = softmax_forward(
            scores, labels_k, ids_k, valid_k, scale, bias, label, id, row, seen,
            ITSELF, HAS_IDS, HAS_VALID, KIND, BLOCK,
        )  # fmt: skip
    tl.store(values + row, value)
    tl.store(counts + row, count)
    numbers += row
    plane = stride.to(tl.int64)
    tl.store(numbers, first)
    tl.store(numbers + plane, a)
    tl.store(numbers + 2 * plane, second)
    tl.store(numbers + 3 * plane, b)
