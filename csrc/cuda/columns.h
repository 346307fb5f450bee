// What the Barlow Twins kernels over columns share.
//
// Columns: lane l of every warp of a block works on column 32 blockIdx.x + l, so a warp's access is one run
// of memory; warp w of W takes rows w, w + W, ... Up to kMaxWarps * kHeld rows, one block holds all of a
// column tile in registers and one launch does a whole pass. Beyond, the rows are cut into chunks, one block
// each, whose sums meet in the next launch. Every sum has a fixed order: results are bit-equal from run to
// run.
#pragma once
#include "../barlow_twins.h"
#include "launch.h"
#include "types.h"

namespace mmfast {
namespace {

constexpr int kMaxWarps = 32, kChunkWarps = 8, kMaxChunks = 64;
// Rows of one column that a thread keeps in registers.
template <class C>
constexpr int kHeld = 64 / sizeof(C);
// Rows of which a thread of a chunked kernel has loads in flight.
template <class C>
constexpr int kAhead = kHeld<C> / 2;

struct Place {
  int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int64_t column;  // lanes beyond the last column repeat it and store nothing
  bool inside;

  __device__ __forceinline__ explicit Place(int64_t columns) {
    column = (int64_t)blockIdx.x * 32 + threadIdx.x % 32;
    inside = column < columns;
    column = inside ? column : columns - 1;
  }
  // How many of `rows` rows are this warp's.
  __device__ __forceinline__ int share(int rows) const { return (rows - warp + warps - 1) / warps; }
  // How many of this warp's next N rows there are, if `left` > 0 rows are left, its own first.
  template <int N>
  __device__ __forceinline__ int ahead(int64_t left) const {
    return left < N * warps ? ((int)left + warps - 1) / warps : N;
  }
};

// Each of N values summed over the warps of a block, by lane; every thread gets its lane's sums.
template <int N, class C>
__device__ __forceinline__ void sum_warps(C (&value)[N]) {
  __shared__ C all[N][kMaxWarps][33], sums[N][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int n = 0; n < N; ++n) all[n][warp][lane] = value[n];
  __syncthreads();
  const int from = lane & (warps - 1), column = lane - from + warp;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    C sum = all[n][from][column];
    for (int d = warps / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
    if (from == 0) sums[n][column] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) value[n] = sums[n][lane];
}

template <class T>
struct Views {
  const T *a, *b;
  int64_t stride_a, stride_b;
};

// x[k] = the k-th row from p less `shift`, `step` apart; 0 from the count-th on.
template <class T, class C, int N>
__device__ __forceinline__ void load_rows(const T* p, int64_t step, int count, C shift, C (&x)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k, p += step) x[k] = k < count ? Scalar<T>::load(*p) - shift : 0;
}

// Rows beyond what one block holds, in pieces of one block each.
struct Chunks {
  int64_t rows, size;  // size: of all chunks but the last; a multiple of what a block holds
  int count;

  template <class C>
  static Chunks of(int64_t rows) {
    constexpr int64_t kTile = kChunkWarps * kHeld<C>;
    const int64_t least = (rows + kMaxChunks - 1) / kMaxChunks, size = (least + kTile - 1) / kTile * kTile;
    return {rows, size, (int)((rows + size - 1) / size)};
  }
  MMFAST_HD int64_t begin(int chunk) const { return chunk * size; }
  MMFAST_HD int64_t length(int chunk) const { return chunk < count - 1 ? size : rows - chunk * size; }
};

// Threads of the kernels that hold all rows; 0 if there are too many rows.
template <class C>
int whole_threads(int64_t rows) {
  int warps = kChunkWarps;
  while (warps * kHeld<C> < rows) {
    if (warps == kMaxWarps) return 0;
    warps *= 2;
  }
  return 32 * warps;
}

template <class C>
int64_t chunk_count(int64_t rows) {
  return whole_threads<C>(rows) ? 0 : Chunks::of<C>(rows).count;
}

int64_t tiles(int64_t columns) { return (columns + 31) / 32; }

}  // namespace
}  // namespace mmfast
