// The losses of rows by their similarities, as mmfast/ops/similarity/passes.py defines them.
#pragma once
#include "platform.h"

namespace mmfast {

// The order of KINDS in mmfast/ops/similarity/passes.py. csrc/cpu has those before kDecoupled.
enum SimilarityKind : int {
  kOut = 0,
  kIn = 1,
  kSum = 2,
  kNegatives = 3,
  kSigmoid = 4,
  kDecoupled = 5,
  kRelu = 6,
  kTop = 7
};

// Who is whose positive, and what a logit is: scale * score + bias. scale and bias are fp64 if `wide`, else
// fp32. csrc/cpu takes integers of the same width, and valid as -1 for valid and 0 for not; csrc/cuda int64,
// and bool. Those of the rows start with row 0 of all rows, wherever a strip starts.
struct SimilarityRule {
  bool wide;
  int kind;
  bool itself;  // rows are their own candidates, but none of its own
  int64_t candidates;
  const void *labels_q, *labels_k;
  const void *ids_q, *ids_k;      // null: none
  const void *valid_q, *valid_k;  // null: all are
  const void *scale, *bias;       // bias: null: 0
};

}  // namespace mmfast

namespace MMFAST_NS {

// sum exp(x - top) over some numbers x; of none, sum is 0 and top any finite number.
template <class C>
struct LogSum {
  C top, sum;
};

template <class C>
MMFAST_HD C log_of(const LogSum<C>& x) {
  return x.top + natural_log(x.sum);
}

// log(e^x + e^y); either may be infinite.
template <class C>
MMFAST_HD C log_sum_of_both(C x, C y) {
  const C most = x > y ? x : y, least = x > y ? y : x, gap = most - least;
  if (!(gap < (C)__builtin_huge_val())) return x != x ? x : y != y ? y : most;
  return most + log_of_one_and(exponential(-gap));
}

// softplus(x) = log(1 + exp x) and its derivative, neither by a difference.
template <class C>
MMFAST_HD C softplus_of(C x, C& sigmoid) {
  const C e = exponential(x > 0 ? -x : x);
  sigmoid = (x > 0 ? 1 : e) / (1 + e);
  return (x > 0 ? x : 0) + log_of_one_and(e);
}

// Loss, number of positives and L, a, M, b of a row.
template <class C>
struct RowResult {
  C value, count, numbers[4];
};

template <class C>
MMFAST_HD RowResult<C> row_that_does_not_count() {
  const C infinity = (C)__builtin_huge_val();
  return {0, 0, {infinity, 0, infinity, 0}};
}

// Of the kinds out, in and sum, and decoupled, by the logits of its negatives and of its positives, count > 0
// of them, whose sum is sum_l.
template <class C>
MMFAST_HD RowResult<C> softmax_row(int kind, const LogSum<C>& negatives, const LogSum<C>& positives, C sum_l,
                                   C count) {
  const C infinity = (C)__builtin_huge_val(), of_negatives = log_of(negatives), mean = sum_l / count;
  if (kind == mmfast::kDecoupled) {
    // Without negatives there is nothing to stand against.
    if (of_negatives == -infinity) return row_that_does_not_count<C>();
    return {of_negatives - mean, count, {of_negatives, 1, 0, 1 / count}};
  }
  const C of_positives = log_of(positives);
  if (count == 1) {
    C sigmoid;
    const C value = softplus_of(of_negatives - of_positives, sigmoid);
    return {value, 1, {of_negatives, sigmoid, infinity, 1}};
  }
  const C of_all = log_sum_of_both(of_negatives, of_positives);
  if (kind == mmfast::kOut) return {of_all - mean, count, {of_all, 1, 0, 1 / count}};
  const C factor = kind == mmfast::kIn ? natural_log(count) : 0;
  return {of_all - of_positives + factor, count, {of_all, 1, of_positives, 1}};
}

}  // namespace MMFAST_NS
