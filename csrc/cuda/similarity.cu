// The passes over strips of scores of the similarity losses on CUDA: a row is the work of one block.
#include "../similarity.h"
#include "block.h"

namespace mmfast {
namespace {

// One row's view of the rule.
template <class C>
struct Row {
  const int64_t *labels, *ids;
  const uint8_t* valid;
  int64_t label, id;
  int candidates, own;  // its own position, -1 for none
  bool counts, itself;
  C scale, bias;

  __device__ __forceinline__ Row(const SimilarityRule& rule, int64_t row)
      : labels((const int64_t*)rule.labels_k),
        ids((const int64_t*)rule.ids_k),
        valid((const uint8_t*)rule.valid_k),
        label(((const int64_t*)rule.labels_q)[row]),
        id(rule.ids_q ? ((const int64_t*)rule.ids_q)[row] : 0),
        candidates((int)rule.candidates),
        own(row < rule.candidates ? (int)row : -1),
        counts(!rule.valid_q || ((const uint8_t*)rule.valid_q)[row]),
        itself(rule.itself),
        scale(*(const C*)rule.scale),
        bias(rule.bias ? *(const C*)rule.bias : 0) {}

  __device__ __forceinline__ C logit(const C* scores, int j) const { return scores[j] * scale + bias; }
  __device__ __forceinline__ bool same(int j) const { return __ldg(labels + j) == label; }
  // Whether a candidate is a positive or a negative.
  __device__ __forceinline__ bool active(int j) const {
    bool is = counts;
    if (ids) is = is && (j == own || __ldg(ids + j) != id);
    if (valid) is = is && __ldg(valid + j);
    return is && !(itself && j == own);
  }
};

template <class C>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float lowest = -3.4028234663852886e38f;
};
template <>
struct Limits<double> {
  static constexpr double lowest = -1.7976931348623157e308;
};

// Of the numbers of both; the same to the bit in whichever order.
template <class C>
__device__ __forceinline__ LogSum<C> merged(const LogSum<C>& x, const LogSum<C>& y) {
  const C gap = y.top - x.top;
  const bool grows = gap > 0;
  const C least = grows ? x.sum : y.sum, most = grows ? y.sum : x.sum;
  return {grows ? y.top : x.top, most + least * exponential(grows ? -gap : gap)};
}

// What threads know of a row, by kind. Softmax: logits of negatives and positives.
template <class C>
struct Softmax {
  LogSum<C> negatives, positives;
  C sum;
  int count;
};

template <class C, int kKind>
__device__ __forceinline__ RowResult<C> softmax_forward(const Row<C>& row, const C* scores) {
  Softmax<C> own = {{Limits<C>::lowest, 0}, {Limits<C>::lowest, 0}, 0, 0};
  for (int j = threadIdx.x; j < row.candidates; j += blockDim.x) {
    if (!row.active(j)) continue;
    const C l = row.logit(scores, j);
    if (!row.same(j)) {
      own.negatives = merged(own.negatives, {l, 1});
    } else {
      own.positives = merged(own.positives, {l, 1});
      own.sum += l;
      ++own.count;
    }
  }
  const Softmax<C> all = merge_block(own, [](const Softmax<C>& x, const Softmax<C>& y) {
    return Softmax<C>{merged(x.negatives, y.negatives), merged(x.positives, y.positives), x.sum + y.sum,
                      x.count + y.count};
  });
  if (all.count == 0) return row_that_does_not_count<C>();
  const C count = (C)all.count;
  if constexpr (kKind != kNegatives) {
    return softmax_row(kKind, all.negatives, all.positives, all.sum, count);
  } else {
    const C level = log_of(all.negatives);
    Sums<2, C> sums = {};
    for (int j = threadIdx.x; j < row.candidates; j += blockDim.x) {
      if (!row.same(j) || !row.active(j)) continue;
      C sigmoid;
      sums.v[0] += softplus_of(level - row.logit(scores, j), sigmoid);
      sums.v[1] += sigmoid;
    }
    sums = sum_block(sums);
    return {sums.v[0] / count, count, {level, sums.v[1] / count, 0, 1 / count}};
  }
}

// A sum over the candidates and the number of positives, or the largest and the first who has it.
template <class C>
struct Found {
  C value;
  int count, first;
};

template <class C, int kKind>
__device__ __forceinline__ RowResult<C> other_forward(const Row<C>& row, const C* scores) {
  Found<C> own = {0, 0, INT32_MAX};
  // NaN shows.
  const auto larger = [](C x, C y) { return x > y || x != x; };
  for (int j = threadIdx.x; j < row.candidates; j += blockDim.x) {
    if (!row.active(j)) continue;
    const C l = row.logit(scores, j);
    const bool same = row.same(j);
    own.count += same;
    if constexpr (kKind == kSigmoid) {
      C sigmoid;
      own.value += softplus_of(same ? -l : l, sigmoid);
    } else if constexpr (kKind == kRelu) {
      own.value += same || l <= 0 ? 0 : l;
    } else if (!same && larger(l, own.value)) {
      own.value = l;
      own.first = j;
    }
  }
  const Found<C> all = merge_block(own, [&](const Found<C>& x, const Found<C>& y) {
    if constexpr (kKind == kTop) {
      const bool other = larger(y.value, x.value) || (y.value == x.value && y.first < x.first);
      return Found<C>{other ? y.value : x.value, x.count + y.count, other ? y.first : x.first};
    } else {
      return Found<C>{x.value + y.value, x.count + y.count, 0};
    }
  });
  const C count = (C)all.count;
  if constexpr (kKind == kSigmoid) return {all.value, count, {0, 1, 0, 1}};
  const C first = kKind == kRelu ? count : all.value > 0 ? (C)all.first : 0;
  return {all.value, count, {first, (C)(all.value > 0), 0, 0}};
}

template <class C, int kKind>
__global__ void __launch_bounds__(256) forward_kernel(SimilarityRule rule, int64_t start, const C* scores,
                                                      C* values, C* counts, C* numbers, int64_t stride) {
  const int64_t i = blockIdx.x;
  const Row<C> row(rule, start + i);
  scores += i * row.candidates;
  constexpr bool kSoftmax = kKind != kSigmoid && kKind != kRelu && kKind != kTop;
  RowResult<C> result;
  if constexpr (kSoftmax)
    result = softmax_forward<C, kKind>(row, scores);
  else
    result = other_forward<C, kKind>(row, scores);
  if (threadIdx.x != 0) return;
  values[i] = result.value;
  counts[i] = result.count;
#pragma unroll
  for (int k = 0; k < 4; ++k) numbers[k * stride + i] = result.numbers[k];
}

// A row, or a candidate, in its role of a row: what the derivative by its logits needs.
template <class C>
struct Role {
  C first, a, second, b, weight;
};

template <class C>
__device__ __forceinline__ Role<C> role_of(const C* numbers, int64_t stride, const C* weights, int64_t i) {
  return {numbers[i], numbers[stride + i], numbers[2 * stride + i], numbers[3 * stride + i], weights[i]};
}

// place: of the candidate in the role of a row, among which `top` has the first of the largest.
template <class C, int kKind>
__device__ __forceinline__ C derivative(const Role<C>& role, C l, bool same, int place) {
  if constexpr (kKind == kRelu) return same || !(l > 0) ? 0 : role.weight;
  if constexpr (kKind == kTop) return same || (C)place != role.first ? 0 : role.weight * role.a;
  if constexpr (kKind == kSigmoid) {
    C sigmoid;
    softplus_of(same ? -l : l, sigmoid);
    return role.weight * (same ? -sigmoid : sigmoid);
  }
  const C e = exponential(l - role.first), negative = role.a * e;
  if constexpr (kKind == kDecoupled) return role.weight * (same ? -role.b : negative);
  if constexpr (kKind == kNegatives) return role.weight * (same ? -role.b / (1 + e) : negative);
  if (!same) return role.weight * negative;
  if (role.second == (C)__builtin_huge_val()) return role.weight * (-role.b / (1 + e));
  if constexpr (kKind == kOut) return role.weight * (negative - role.b);
  return role.weight * (negative - role.b * exponential(l - role.second));
}

// out may be scores.
template <class C, int kKind>
__global__ void __launch_bounds__(256, sizeof(C) == 8 ? 3 : 6)
    backward_kernel(SimilarityRule rule, int64_t start, const C* scores, const C* numbers, int64_t stride,
                    const C* weights, const C* column_numbers, const C* column_weights, C* out, C* sums) {
  const int64_t i = blockIdx.x;
  const Row<C> row(rule, start + i);
  const Role<C> own = role_of(numbers, stride, weights, i);
  scores += i * row.candidates;
  out += i * row.candidates;
  C sum = 0;
  for (int j = threadIdx.x; j < row.candidates; j += blockDim.x) {
    C h = 0;
    if (row.active(j)) {
      const C l = row.logit(scores, j);
      const bool same = row.same(j);
      h = derivative<C, kKind>(own, l, same, j);
      if (column_weights)
        h += derivative<C, kKind>(role_of(column_numbers, row.candidates, column_weights, j), l, same,
                                  (int)(start + i));
    }
    out[j] = h;
    sum += h;
  }
  sum = sum_block(sum);
  if (threadIdx.x == 0) sums[i] = sum;
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// run(a number of the compute type, the kind as a type).
template <class Run>
int with_types(const SimilarityRule& rule, const Run& run) {
  return with_width(rule.wide, [&](auto compute) {
    switch (rule.kind) {
      case kOut:
        return run(compute, Constant<kOut>());
      case kIn:
        return run(compute, Constant<kIn>());
      case kSum:
        return run(compute, Constant<kSum>());
      case kNegatives:
        return run(compute, Constant<kNegatives>());
      case kSigmoid:
        return run(compute, Constant<kSigmoid>());
      case kDecoupled:
        return run(compute, Constant<kDecoupled>());
      case kRelu:
        return run(compute, Constant<kRelu>());
      default:
        return run(compute, Constant<kTop>());
    }
  });
}

}  // namespace

int cuda_similarity_forward_rows(const SimilarityRule& rule, int64_t start, int64_t rows, const void* scores,
                                 void* values, void* counts, void* numbers, int64_t stride,
                                 const Target& target) {
  return with_types(rule, [&](auto compute, auto kind) {
    using C = decltype(compute);
    return launch(target, {rows}, threads_of_row(rule.candidates), forward_kernel<C, decltype(kind)::value>,
                  rule, start, (const C*)scores, (C*)values, (C*)counts, (C*)numbers, stride);
  });
}

int cuda_similarity_backward_rows(const SimilarityRule& rule, int64_t start, int64_t rows, const void* scores,
                                  const void* numbers, int64_t stride, const void* weights,
                                  const void* column_numbers, const void* column_weights, void* out,
                                  void* sums, const Target& target) {
  return with_types(rule, [&](auto compute, auto kind) {
    using C = decltype(compute);
    // The derivatives of both are the same.
    constexpr int kKind = decltype(kind)::value == kSum ? kIn : decltype(kind)::value;
    return launch(target, {rows}, threads_of_row(rule.candidates), backward_kernel<C, kKind>, rule, start,
                  (const C*)scores, (const C*)numbers, stride, (const C*)weights, (const C*)column_numbers,
                  (const C*)column_weights, (C*)out, (C*)sums);
  });
}

}  // namespace mmfast
