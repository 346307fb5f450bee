// The losses of rows by their similarities, as mmfast/ops/similarity/passes.py defines them.
#pragma once
#include <stdint.h>

namespace mmfast {

// The order of passes.KINDS.
enum SimilarityKind : int { kOut = 0, kIn = 1, kSum = 2, kNegatives = 3, kSigmoid = 4 };

// Who is whose positive, and what a logit is: scale * score + bias. Integers and numbers are int64 and fp64
// if `wide`, else int32 and fp32. Those of the rows start with row 0 of all rows, wherever a strip starts.
struct SimilarityRule {
  bool wide;
  int kind;
  bool itself;  // rows are their own candidates, but none of its own
  int64_t candidates;
  const void *labels_q, *labels_k;
  const void *ids_q, *ids_k;      // null: none
  const void *valid_q, *valid_k;  // -1 for valid, 0 for not; null: all are
  const void *scale, *bias;       // bias: null: 0
};

}  // namespace mmfast
