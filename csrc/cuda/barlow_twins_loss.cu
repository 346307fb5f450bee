// Barlow Twins on CUDA: the loss from Gram matrices or from the correlation matrix, and their narrow copies.
#include "../barlow_twins.h"
#include "block.h"

namespace mmfast {
namespace {

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
template <class C>
constexpr int kWidth = 16 / sizeof(C);

// Follows a thread's steps through a matrix (n, n) read as one run: the diagonal is where the position is a
// multiple of n + 1.
struct Diagonal {
  uint32_t period, at, step;

  __device__ __forceinline__ Diagonal(int64_t n, uint32_t start, uint32_t by)
      : period((uint32_t)n + 1), at(start % period), step(by % period) {}
  __device__ __forceinline__ bool hit(uint32_t ahead) const {
    return at + ahead == 0 || at + ahead == period;
  }
  __device__ __forceinline__ void go() {
    at += step;
    at = at >= period ? at - period : at;
  }
};

// Ends a launch of one block: `energy` is this thread's part.
template <bool kGram, class C>
__device__ __forceinline__ void finish(C energy, const C* statistics, int64_t rows, int64_t columns,
                                       const Objective<C>& objective, C* loss, C* components) {
  Sums<4, C> sums = {{energy, 0, 0, 0}};
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
    const C gap = statistics[2 * columns + j], c = objective.target - gap;
    sums.v[1] += gap * gap;
    sums.v[2] += c;
    sums.v[3] += c * c;
  }
  sums = sum_block(sums);
  if (threadIdx.x == 0)
    write_loss(sums.v[1], sums.v[2], sums.v[3], sums.v[0], kGram, rows, columns, objective, loss, components);
}

// <ÂÂ', B̂B̂'> of `matrices` (2, B, B), or the sum of the squares of p (D, D) while its diagonal becomes zero.
// One block finishes the loss, several leave their parts in `partial`.
template <bool kGram, int N, class C>
__global__ void __launch_bounds__(1024)
    loss_kernel(C* matrices, const C* statistics, int64_t rows, int64_t columns, Objective<C> objective,
                C* loss, C* components, C* partial) {
  using Vector = Pack<C, N>;
  constexpr int kUnroll = kGram ? 2 : 4;  // of two matrices or one
  const int64_t n = kGram ? rows : columns, count = n * n / N;
  const Vector *x = (const Vector*)matrices, *y = kGram ? x + count : x;
  const unsigned step = gridDim.x * blockDim.x, start = blockIdx.x * blockDim.x + threadIdx.x;
  Diagonal diagonal(n, start * N, step * N);
  C sums[N] = {};
  for (int64_t i = start; i < count; i += kUnroll * step) {
    Vector a[kUnroll], b[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * step < count) {
        a[u] = x[i + u * step];
        if (kGram) b[u] = y[i + u * step];
      } else {
        a[u] = b[u] = {};
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (kGram) {
          sums[k] += a[u].v[k] * b[u].v[k];
        } else {
          const bool hit = diagonal.hit(k);
          sums[k] += hit ? 0 : a[u].v[k] * a[u].v[k];
          if (hit && i + u * step < count) matrices[(i + u * step) * N + k] = 0;
        }
      }
      if (!kGram) diagonal.go();
    }
  }
  C energy = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) energy += sums[k];
  if (gridDim.x == 1) {
    finish<kGram>(energy, statistics, rows, columns, objective, loss, components);
  } else {
    energy = sum_block(energy);
    if (threadIdx.x == 0) partial[blockIdx.x] = energy;
  }
}

template <bool kGram, class C>
__global__ void __launch_bounds__(1024)
    finish_loss(const C* partial, int64_t blocks, const C* statistics, int64_t rows, int64_t columns,
                Objective<C> objective, C* loss, C* components) {
  C energy = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) energy += partial[i];
  finish<kGram>(energy, statistics, rows, columns, objective, loss, components);
}

template <int N, class T>
__global__ void __launch_bounds__(256) narrow_kernel(const float* matrices, int64_t n, float scale, T* out) {
  constexpr int kUnroll = 4;
  const int64_t count = n * n / N;
  const unsigned step = gridDim.x * 256, start = blockIdx.x * 256 + threadIdx.x;
  const auto* x = (const Pack<float, N>*)matrices + blockIdx.y * count;
  auto* to = (Pack<T, N>*)out + blockIdx.y * count;
  Diagonal diagonal(n, start * N, step * N);
  for (int64_t i = start; i < count; i += kUnroll * step) {
    Pack<float, N> a[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * step < count)
        a[u] = x[i + u * step];
      else
        a[u] = {};
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      Pack<T, N> narrow;
#pragma unroll
      for (int k = 0; k < N; ++k) narrow.v[k] = Scalar<T>::store(diagonal.hit(k) ? 0.0f : a[u].v[k] * scale);
      if (i + u * step < count) to[i + u * step] = narrow;
      diagonal.go();
    }
  }
}

// Blocks of `threads` that read `count` vectors four at a time, at most 1024.
int64_t stream_blocks(int64_t count, int threads) {
  const int64_t blocks = (count + 4 * threads - 1) / (4 * threads);
  return blocks < 1 ? 1 : blocks < 1024 ? blocks : 1024;
}

template <class... T>
bool aligned(int64_t bytes, const T*... pointers) {
  return ((uintptr_t(pointers) % bytes == 0) && ...);
}

// Up to this many bytes of matrices, one block and so one launch is quickest.
constexpr int64_t kOneBlock = 1 << 18;

template <class C>
int64_t loss_blocks(bool gram, int64_t n) {
  const int64_t bytes = (gram ? 2 : 1) * n * n * (int64_t)sizeof(C);
  return bytes <= kOneBlock ? 1 : stream_blocks(n * n / kWidth<C>, 256);
}

template <bool kGram, class C>
int loss(C* matrices, const C* statistics, int64_t rows, int64_t columns,
         const BarlowTwinsDefinition& definition, C* loss, C* components, C* partial, const Target& target) {
  const int64_t n = kGram ? rows : columns, blocks = loss_blocks<C>(kGram, n);
  const bool vectors = n * n % kWidth<C> == 0 && aligned(16, matrices);
  const auto kernel = vectors ? loss_kernel<kGram, kWidth<C>, C> : loss_kernel<kGram, 1, C>;
  const Objective<C> objective(definition, rows);
  if (int code = launch(target, {blocks}, blocks == 1 ? 1024 : 256, kernel, matrices, statistics, rows,
                        columns, objective, loss, components, partial))
    return code;
  if (blocks == 1) return 0;
  return launch(target, {1}, 1024, finish_loss<kGram, C>, (const C*)partial, blocks, statistics, rows,
                columns, objective, loss, components);
}

template <class T>
int narrowed(const float* matrices, int64_t count, int64_t n, int exponent, T* out, const Target& target) {
  constexpr int kWide = 4;
  const bool vectors = n * n % kWide == 0 && aligned(16, matrices) && aligned(8, out);
  const auto kernel = vectors ? narrow_kernel<kWide, T> : narrow_kernel<1, T>;
  const Grid grid{stream_blocks(n * n / (vectors ? kWide : 1), 256), count};
  return launch(target, grid, 256, kernel, matrices, n, (float)(1 / (double)(1ull << exponent)), out);
}

}  // namespace

int64_t cuda_barlow_twins_loss_scratch(bool wide, bool gram, int64_t rows, int64_t columns) {
  const int64_t n = gram ? rows : columns;
  const int64_t blocks = wide ? loss_blocks<double>(gram, n) : loss_blocks<float>(gram, n);
  return blocks == 1 ? 0 : blocks;
}

int cuda_barlow_twins_loss(bool wide, bool gram, void* matrices, const void* statistics, int64_t rows,
                           int64_t columns, const BarlowTwinsDefinition& definition, void* loss_out,
                           void* components, void* scratch, const Target& target) {
  return with_width(wide, [&](auto compute) {
    using C = decltype(compute);
    const auto run = gram ? loss<true, C> : loss<false, C>;
    return run((C*)matrices, (const C*)statistics, rows, columns, definition, (C*)loss_out, (C*)components,
               (C*)scratch, target);
  });
}

int cuda_barlow_twins_narrowed(int dtype, const void* matrices, int64_t count, int64_t n, int exponent,
                               void* out, const Target& target) {
  const auto* from = (const float*)matrices;
  return dtype == kBFloat16 ? narrowed(from, count, n, exponent, (bfloat16*)out, target)
                            : narrowed(from, count, n, exponent, (float16*)out, target);
}

}  // namespace mmfast
