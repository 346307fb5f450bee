"""The backward pass of the similarity losses: the derivative H by the logits, and its sums by row."""

from __future__ import annotations

import triton
import triton.language as tl

from mmfast.triton.similarity_rule import block_of, factors, row_of, softplus


@triton.jit
def derivative(numbers, plane, weights, at, mask, logit, same, place, KIND: tl.constexpr):
    """Of the losses of the rows ``at``, or of candidates as rows; place: where among its candidates each logit is."""
    weight = tl.load(weights + at, mask=mask)
    numbers += at
    if KIND == "relu":
        h = tl.where(same, 0.0, tl.where(logit > 0, 1.0, 0.0))
    elif KIND == "top":
        of = tl.load(numbers, mask=mask) == place.to(logit.dtype)
        h = tl.where(same | (of == 0), 0.0, tl.load(numbers + plane, mask=mask))
    elif KIND == "sigmoid":
        _, sigmoid = softplus(tl.where(same, -logit, logit))
        h = tl.where(same, -sigmoid, sigmoid)
    else:
        e = tl.exp(logit - tl.load(numbers, mask=mask))
        negative = tl.load(numbers + plane, mask=mask) * e
        b = tl.load(numbers + 3 * plane, mask=mask)
        if KIND == "decoupled":
            positive = -b
        elif KIND == "negatives":
            positive = -b / (1 + e)
        else:
            second = tl.load(numbers + 2 * plane, mask=mask)
            own = b
            if KIND != "out":
                own = b * tl.exp(logit - second)
            positive = tl.where(second == float("inf"), -b / (1 + e), negative - own)
        h = tl.where(same, positive, negative)
    return weight * h


@triton.jit(do_not_specialize=["start", "candidates", "stride"])
def similarity_backward_kernel(
    scores, labels_q, labels_k, ids_q, ids_k, valid_q, valid_k, scale, bias, numbers, weights,
    column_numbers, column_weights, out, sums,
    start, candidates, stride,
    ITSELF: tl.constexpr, HAS_IDS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_BIAS: tl.constexpr,
    BOTH: tl.constexpr, KIND: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a strip of scores, over which ``out`` may be written."""
    C: tl.constexpr = scores.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = start + program
    candidates = candidates // VECTOR * VECTOR
    scores += program * candidates
    out += program * candidates
    label, id, seen = row_of(labels_q, ids_q, valid_q, row, candidates, HAS_IDS, HAS_VALID)
    scale, bias = factors(scale, bias, HAS_BIAS)
    plane = stride.to(tl.int64)
    sum = tl.zeros((BLOCK,), C)
    for first in range(0, candidates, BLOCK):
        j = first + tl.arange(0, BLOCK)
        logit, same, active = block_of(
            scores, labels_k, ids_k, valid_k, scale, bias, label, id, row, j, seen, ITSELF, HAS_IDS, HAS_VALID
        )
        h = derivative(numbers, plane, weights, row, None, logit, same, j, KIND)
        if BOTH:
            columns = candidates.to(tl.int64)
            h += derivative(column_numbers, columns, column_weights, j, j < seen, logit, same, row, KIND)
        h = tl.where(active, h, 0.0)
        tl.store(out + j, h, mask=j < candidates)
        sum += h
    tl.store(sums + program, tl.sum(sum, axis=0))
