// What the threads of a block find out together.
#pragma once
#include "launch.h"
#include "types.h"

namespace mmfast {
namespace {

// What the lane `mask` away has for `value`, which is plain data of 32-bit words.
template <class T>
__device__ __forceinline__ T from_lane(const T& value, int mask) {
  constexpr int kWords = sizeof(T) / 4;
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kAllLanes, words[i], mask);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

// merge(x, y) over the values of all threads, always in the same order; every thread gets the same result, if
// merge(x, y) is merge(y, x) to the bit. The number of warps is a power of two.
template <class T, class Merge>
__device__ __forceinline__ T merge_block(T value, const Merge& merge) {
  __shared__ T all[32];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) value = merge(value, from_lane(value, d));
  __syncthreads();  // an earlier result has been read
  if (lane == 0) all[threadIdx.x / 32] = value;
  __syncthreads();
  value = all[lane & (warps - 1)];
  for (int d = warps / 2; d > 0; d /= 2) value = merge(value, from_lane(value, d));
  return value;
}

template <int N, class C>
struct Sums {
  C v[N];
};
// Each of N values summed over the block.
template <int N, class C>
__device__ __forceinline__ Sums<N, C> sum_block(const Sums<N, C>& value) {
  return merge_block(value, [](const Sums<N, C>& x, const Sums<N, C>& y) {
    Sums<N, C> sum;
#pragma unroll
    for (int n = 0; n < N; ++n) sum.v[n] = x.v[n] + y.v[n];
    return sum;
  });
}
template <class C>
__device__ __forceinline__ C sum_block(C value) {
  return sum_block(Sums<1, C>{value}).v[0];
}

// Threads of a block that reads a row of n elements, several each.
inline int threads_of_row(int64_t n) { return n <= 256 ? 32 : n <= 512 ? 64 : n <= 1024 ? 128 : 256; }

}  // namespace
}  // namespace mmfast
