// Barlow Twins on CUDA: what lies between the matrix products, which are torch's.
//
// Columns: lane l of every warp of a block works on column 32 blockIdx.x + l, so a warp's access is one run
// of memory; warp w of W takes rows w, w + W, ... Up to kMaxWarps * kHeld rows, one block holds all of a
// column tile in registers and one launch does a whole pass. Beyond, the rows are cut into chunks, one block
// each, whose sums meet in the next launch. Every sum has a fixed order: results are bit-equal from run to
// run.
#include "../barlow_twins.h"
#include "../scalar.h"
#include "launch.h"

namespace mmfast {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kMaxWarps = 32, kChunkWarps = 8, kMaxChunks = 64;
// Rows of one column that a thread keeps in registers.
template <class C>
constexpr int kHeld = 64 / sizeof(C);
// Rows of which a thread of a chunked kernel has loads in flight.
template <class C>
constexpr int kAhead = kHeld<C> / 2;

template <class T>
using Compute = typename Scalar<T>::compute;

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

// Each of N values summed over a block; every thread gets the sums.
template <int N, class C>
__device__ __forceinline__ void sum_block(C (&value)[N]) {
  __shared__ C all[N][32];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    C sum = value[n];
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
    if (lane == 0) all[n][threadIdx.x / 32] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    C sum = lane < warps ? all[n][lane] : 0;
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
    value[n] = sum;
  }
}

// standardise

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

// One block sees all rows of its columns.
template <class T, class H>
__global__ void __launch_bounds__(32 * kMaxWarps)
    standardise_whole(Views<T> z, int rows, int64_t columns, bool center, Compute<T> eps, H* hat,
                      Compute<T>* statistics) {
  using C = Compute<T>;
  const Place at(columns);
  const int count = at.share(rows);
  const C weight = (C)1 / rows;
  C* to_statistics = statistics + at.column;
  const bool tells = at.warp == 0 && at.inside;
  C x[2][kHeld<C>], first[2], sum[2];
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const T* p = (v ? z.b : z.a) + at.column;
    const int64_t stride = v ? z.stride_b : z.stride_a;
    first[v] = center ? Scalar<T>::load(*p) : 0;
    load_rows(p + at.warp * stride, at.warps * stride, count, first[v], x[v]);
    sum[v] = 0;
#pragma unroll
    for (int k = 0; k < kHeld<C>; ++k) sum[v] += x[v][k];
  }
  sum_warps(sum);
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const C mean = center ? sum[v] * weight : 0;
    if (tells) to_statistics[(3 + v) * columns] = first[v] + mean;
    sum[v] = 0;
#pragma unroll
    for (int k = 0; k < kHeld<C>; ++k) {
      x[v][k] = k < count ? x[v][k] - mean : 0;
      sum[v] += x[v][k] * x[v][k];
    }
  }
  sum_warps(sum);
  C r[2], apart[1] = {0};
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    r[v] = inverse_deviation(sum[v] * weight, eps);
    if (tells) to_statistics[v * columns] = r[v];
  }
#pragma unroll
  for (int k = 0; k < kHeld<C>; ++k) {
    x[0][k] *= r[0];
    x[1][k] *= r[1];
    apart[0] += (x[0][k] - x[1][k]) * (x[0][k] - x[1][k]);
  }
  sum_warps(apart);
  if (tells) to_statistics[2 * columns] = one_minus_c(apart[0] * weight, r[0], r[1], eps);
  if (!at.inside) return;
  H* to = hat + at.warp * columns + at.column;
#pragma unroll
  for (int k = 0; k < kHeld<C>; ++k, to += at.warps * columns) {
    if (k >= count) break;
    to[0] = Scalar<H>::store(x[0][k]);
    to[rows * columns] = Scalar<H>::store(x[1][k]);
  }
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

// partial (chunks, 2, 2, D): by view, mean less the first row and sum of squared deviations.
template <class T>
__global__ void __launch_bounds__(32 * kChunkWarps)
    chunk_moments(Views<T> z, Chunks chunks, int64_t columns, bool center, Compute<T>* partial) {
  using C = Compute<T>;
  constexpr int kTile = kChunkWarps * kHeld<C>;
  const Place at(columns);
  const int chunk = blockIdx.y / 2;
  const bool b = blockIdx.y % 2;
  const T* p = (b ? z.b : z.a) + at.column;
  const int64_t stride = b ? z.stride_b : z.stride_a;
  const C first = center ? Scalar<T>::load(*p) : 0;
  p += (chunks.begin(chunk) + at.warp) * stride;
  Moments<C> all = {0, 0, 0};
  for (int64_t left = chunks.length(chunk); left > 0; left -= kTile, p += kTile * stride) {
    const int tile = left < kTile ? (int)left : kTile, count = at.share(tile);
    C x[kHeld<C>], mean[1] = {0}, square[1] = {0};
    load_rows(p, kChunkWarps * stride, count, first, x);
#pragma unroll
    for (int k = 0; k < kHeld<C>; ++k) mean[0] += x[k];
    sum_warps(mean);
    mean[0] = center ? mean[0] / tile : 0;
#pragma unroll
    for (int k = 0; k < kHeld<C>; ++k) {
      const C d = k < count ? x[k] - mean[0] : 0;
      square[0] += d * d;
    }
    sum_warps(square);
    all = merged(all, Moments<C>{(C)tile, mean[0], square[0]});
  }
  if (at.warp == 0 && at.inside) {
    C* to = partial + blockIdx.y * 2 * columns + at.column;
    to[0] = all.mean;
    to[columns] = all.square;
  }
}

// differences (chunks, D): sums of (â - b̂)^2.
template <class T, class H>
__global__ void __launch_bounds__(32 * kChunkWarps)
    standardise_chunk(Views<T> z, Chunks chunks, int64_t columns, bool center, Compute<T> eps,
                      const Compute<T>* partial, Compute<T>* differences, H* hat, Compute<T>* statistics) {
  using C = Compute<T>;
  const Place at(columns);
  const int chunk = blockIdx.y;
  const C weight = (C)1 / chunks.rows;
  C first[2], mean[2], square[2], r[2];
  const int64_t chunk_step = kChunkWarps * 4 * columns;
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    first[v] = center ? Scalar<T>::load((v ? z.b : z.a)[at.column]) : 0;
    mean[v] = square[v] = 0;
    const C* of = partial + (4 * at.warp + 2 * v) * columns + at.column;
#pragma unroll 2
    for (int c = at.warp; c < chunks.count; c += kChunkWarps, of += chunk_step)
      mean[v] += chunks.length(c) * weight * of[0];
  }
  sum_warps(mean);
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const C* of = partial + (4 * at.warp + 2 * v) * columns + at.column;
#pragma unroll 2
    for (int c = at.warp; c < chunks.count; c += kChunkWarps, of += chunk_step) {
      const C apart = of[0] - mean[v];
      square[v] += of[columns] + chunks.length(c) * apart * apart;
    }
  }
  sum_warps(square);
#pragma unroll
  for (int v = 0; v < 2; ++v) r[v] = inverse_deviation(square[v] * weight, eps);

  C apart[1] = {0};
  const int64_t row = chunks.begin(chunk) + at.warp;
  const T *a = z.a + row * z.stride_a + at.column, *b = z.b + row * z.stride_b + at.column;
  H* to = hat + row * columns + at.column;
  for (int64_t left = chunks.length(chunk) - at.warp; left > 0; left -= kAhead<C> * kChunkWarps) {
    const int count = at.ahead<kAhead<C>>(left);
    const int stored = at.inside ? count : 0;
    C x[kAhead<C>], y[kAhead<C>];
    load_rows(a, kChunkWarps * z.stride_a, count, first[0], x);
    load_rows(b, kChunkWarps * z.stride_b, count, first[1], y);
#pragma unroll
    for (int k = 0; k < kAhead<C>; ++k, to += kChunkWarps * columns) {
      x[k] = (x[k] - mean[0]) * r[0];
      y[k] = (y[k] - mean[1]) * r[1];
      apart[0] += k < count ? (x[k] - y[k]) * (x[k] - y[k]) : 0;
      if (k < stored) {
        to[0] = Scalar<H>::store(x[k]);
        to[chunks.rows * columns] = Scalar<H>::store(y[k]);
      }
    }
    a += kAhead<C> * kChunkWarps * z.stride_a;
    b += kAhead<C> * kChunkWarps * z.stride_b;
  }
  sum_warps(apart);
  if (at.warp == 0 && at.inside) {
    differences[chunk * columns + at.column] = apart[0];
    if (chunk > 0) return;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      statistics[v * columns + at.column] = r[v];
      statistics[(3 + v) * columns + at.column] = first[v] + mean[v];
    }
  }
}

template <class C>
__global__ void __launch_bounds__(128)
    finish_statistics(const C* differences, Chunks chunks, int64_t columns, C eps, C* statistics) {
  const int64_t column = (int64_t)blockIdx.x * 128 + threadIdx.x;
  if (column >= columns) return;
  C sum = 0;
#pragma unroll 8
  for (int c = 0; c < chunks.count; ++c) sum += differences[c * columns + column];
  statistics[2 * columns + column] =
      one_minus_c(sum / chunks.rows, statistics[column], statistics[columns + column], eps);
}

// gram_loss, correlation_loss, narrowed

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
__device__ __forceinline__ void finish(C energy, const C* statistics, int64_t rows, int64_t columns, C lambd,
                                       C* loss, C* components) {
  C sums[4] = {energy, 0, 0, 0};
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) {
    const C deficit = statistics[2 * columns + j], c = 1 - deficit;
    sums[1] += deficit * deficit;
    sums[2] += c;
    sums[3] += c * c;
  }
  sum_block(sums);
  if (threadIdx.x == 0)
    write_loss(sums[1], sums[2], sums[3], sums[0], kGram, rows, columns, lambd, loss, components);
}

// <ÂÂ', B̂B̂'> of `matrices` (2, B, B), or the sum of the squares of p (D, D) while its diagonal becomes zero.
// One block finishes the loss, several leave their parts in `partial`.
template <bool kGram, int N, class C>
__global__ void __launch_bounds__(1024)
    loss_kernel(C* matrices, const C* statistics, int64_t rows, int64_t columns, C lambd, C* loss,
                C* components, C* partial) {
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
  C energy[1] = {0};
#pragma unroll
  for (int k = 0; k < N; ++k) energy[0] += sums[k];
  if (gridDim.x == 1) {
    finish<kGram>(energy[0], statistics, rows, columns, lambd, loss, components);
  } else {
    sum_block(energy);
    if (threadIdx.x == 0) partial[blockIdx.x] = energy[0];
  }
}

template <bool kGram, class C>
__global__ void __launch_bounds__(1024)
    finish_loss(const C* partial, int64_t blocks, const C* statistics, int64_t rows, int64_t columns, C lambd,
                C* loss, C* components) {
  C energy = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) energy += partial[i];
  finish<kGram>(energy, statistics, rows, columns, lambd, loss, components);
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
    for (int u = 0; u < kUnroll; ++u)
      if (i + u * step < count) a[u] = x[i + u * step];
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

// gradient

// V: of views, hats of C or embeddings of a half type; T: of gradients.
template <class V, class T>
struct GradientCall {
  using C = Compute<V>;
  const C *m_a, *m_b, *gram_b, *gram_a, *statistics, *upstream;
  Views<V> view;
  T *grad_a, *grad_b;
  int64_t rows, columns;
  C scale, alpha, beta, diagonal;  // of products; alpha and beta still lack `upstream`
};

// One column of one view, from row `row` on, rows `step` apart.
template <class V, class T>
struct ColumnView {
  using C = Compute<V>;
  static constexpr bool kStandardise = sizeof(V) < sizeof(C);
  static constexpr int kRows = kStandardise ? kAhead<C> / 2 : kAhead<C>;  // at once
  const V *own_at, *partner_at;
  const C *m_at, *gram_at;
  T* grad_at;
  int64_t own_step, partner_step, step, gram_step;
  C own_mean = 0, own_r, partner_mean = 0, partner_r = 1, scale;

  __device__ __forceinline__ ColumnView(const GradientCall<V, T>& call, bool b, int64_t column, int64_t row,
                                        int by) {
    const int64_t own_stride = b ? call.view.stride_b : call.view.stride_a;
    const int64_t partner_stride = b ? call.view.stride_a : call.view.stride_b;
    own_at = (b ? call.view.b : call.view.a) + row * own_stride + column;
    partner_at = (b ? call.view.a : call.view.b) + row * partner_stride + column;
    m_at = (b ? call.m_b : call.m_a) + row * call.columns + column;
    grad_at = (b ? call.grad_b : call.grad_a) + row * call.columns + column;
    own_step = by * own_stride;
    partner_step = by * partner_stride;
    step = by * call.columns;
    const C* s = call.statistics + column;
    own_r = s[b * call.columns];
    if (kStandardise) {
      gram_at = b ? call.gram_a : call.gram_b;
      if (gram_at) gram_at += row * (call.rows + 1);
      gram_step = by * (call.rows + 1);
      scale = call.scale;
      own_mean = s[(3 + b) * call.columns];
      partner_mean = s[(4 - b) * call.columns];
      partner_r = s[(1 - b) * call.columns];
    }
  }
  // The next N rows of own and m, 0 from the count-th on.
  template <int N>
  __device__ __forceinline__ void load(int count, C (&own)[N], C (&m)[N]) const {
    load_rows(own_at, own_step, count, (C)0, own);
    load_rows(m_at, step, count, (C)0, m);
    if (!kStandardise) return;
#pragma unroll
    for (int k = 0; k < N; ++k) own[k] = k < count ? (own[k] - own_mean) * own_r : 0;
#pragma unroll
    for (int k = 0; k < N; ++k) m[k] *= scale;
    if (!gram_at) return;
    C diagonal[N];
    load_rows(gram_at, gram_step, count, (C)0, diagonal);
#pragma unroll
    for (int k = 0; k < N; ++k) m[k] += diagonal[k] * own[k];
  }
  template <int N>
  __device__ __forceinline__ void load_partner(int count, C (&partner)[N]) const {
    load_rows(partner_at, partner_step, count, (C)0, partner);
    if (!kStandardise) return;
#pragma unroll
    for (int k = 0; k < N; ++k) partner[k] = (partner[k] - partner_mean) * partner_r;
  }
  __device__ __forceinline__ ColumnView moved(int rows) const {
    ColumnView view = *this;
    view.own_at += rows * own_step;
    view.partner_at += rows * partner_step;
    view.m_at += rows * step;
    view.grad_at += rows * step;
    if (kStandardise && gram_at) view.gram_at += rows * gram_step;
    return view;
  }
};

// dL/dz = of_m m - of_partner partner - of_own own.
template <class C>
struct Weights {
  C of_m, of_partner, of_own;

  template <class Call>
  __device__ __forceinline__ Weights(const Call& call, int64_t column, C r, C products) {
    const C u = *call.upstream, deficit = call.statistics[2 * call.columns + column];
    const ColumnGradient<C> g =
        column_gradient(products / call.rows, deficit, call.alpha * u, call.beta * u, call.diagonal);
    of_m = r * call.alpha * u;
    of_partner = r * g.weight;
    of_own = r * g.projection;
  }
  template <class T, int N>
  __device__ __forceinline__ void store(const C (&m)[N], const C (&partner)[N], const C (&own)[N], int count,
                                        int64_t step, T* grad) const {
#pragma unroll
    for (int k = 0; k < N; ++k, grad += step)
      if (k < count) *grad = Scalar<T>::store(of_m * m[k] - of_partner * partner[k] - of_own * own[k]);
  }
};

// Sums over a warp's rows of m * own. What it reads is still in the cache when the gradient is written.
template <class V, class T>
__device__ __forceinline__ Compute<V> sum_products(ColumnView<V, T> view, int64_t rows, const Place& at) {
  using C = Compute<V>;
  constexpr int kRows = ColumnView<V, T>::kRows;
  C sum = 0;
  for (int64_t left = rows - at.warp; left > 0; left -= kRows * at.warps) {
    const int count = at.ahead<kRows>(left);
    C own[kRows], m[kRows];
    view.load(count, own, m);
#pragma unroll
    for (int k = 0; k < kRows; ++k) sum += m[k] * own[k];
    view = view.moved(kRows);
  }
  return sum;
}

// blockIdx.y: chunks of the first view, then of the second. partial (views, chunks, D): sums of m * own.
template <class V, class T>
__global__ void __launch_bounds__(32 * kChunkWarps)
    chunk_products(GradientCall<V, T> call, int first, Chunks chunks, Compute<V>* partial) {
  using C = Compute<V>;
  const Place at(call.columns);
  const int view_index = blockIdx.y >= chunks.count, chunk = blockIdx.y - view_index * chunks.count;
  const ColumnView<V, T> view(call, first + view_index, at.column, chunks.begin(chunk) + at.warp, at.warps);
  C products[1] = {sum_products(view, chunks.length(chunk), at)};
  sum_warps(products);
  if (at.warp == 0 && at.inside) partial[blockIdx.y * call.columns + at.column] = products[0];
}

// The same blocks; if there is but one chunk, it needs no partial sums.
template <class V, class T>
__global__ void __launch_bounds__(32 * kMaxWarps)
    gradient_kernel(GradientCall<V, T> call, int first, Chunks chunks, const Compute<V>* partial) {
  using C = Compute<V>;
  const Place at(call.columns);
  const int view_index = blockIdx.y >= chunks.count, chunk = blockIdx.y - view_index * chunks.count;
  ColumnView<V, T> view(call, first + view_index, at.column, chunks.begin(chunk) + at.warp, at.warps);
  C products[1] = {0};
  if (chunks.count == 1) {
    products[0] = sum_products(view, call.rows, at);
  } else {
    for (int c = at.warp; c < chunks.count; c += at.warps)
      products[0] += partial[(view_index * chunks.count + c) * call.columns + at.column];
  }
  sum_warps(products);
  const Weights<C> weights(call, at.column, view.own_r, products[0]);
  if (!at.inside) return;
  constexpr int kRows = ColumnView<V, T>::kRows;
  for (int64_t left = chunks.length(chunk) - at.warp; left > 0; left -= kRows * at.warps) {
    const int count = at.ahead<kRows>(left);
    // A gradient may lie where its product was, so loads come first.
    C own[kRows], partner[kRows], m[kRows];
    view.load(count, own, m);
    view.load_partner(count, partner);
    weights.store(m, partner, own, count, view.step, view.grad_at);
    view = view.moved(kRows);
  }
}

// Launching

// run(T()) for the element type `dtype`.
template <class Run>
auto with_type(int dtype, Run run) {
  switch (dtype) {
    case kFloat64:
      return run(double());
    case kBFloat16:
      return run(bfloat16());
    case kFloat16:
      return run(float16());
    default:
      return run(float());
  }
}

template <class Run>
auto with_width(bool wide, Run run) {
  return wide ? run(double()) : run(float());
}

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

template <class T, class H>
int standardise(const Views<T>& z, int64_t rows, int64_t columns, bool center, double eps, H* hat,
                Compute<T>* statistics, Compute<T>* scratch, const Target& target) {
  using C = Compute<T>;
  if (const int threads = whole_threads<C>(rows))
    return launch(target, {tiles(columns)}, threads, standardise_whole<T, H>, z, (int)rows, columns, center,
                  (C)eps, hat, statistics);
  const Chunks chunks = Chunks::of<C>(rows);
  C* differences = scratch + chunks.count * 4 * columns;
  const int threads = 32 * kChunkWarps;
  if (int code = launch(target, {tiles(columns), 2 * chunks.count}, threads, chunk_moments<T>, z, chunks,
                        columns, center, scratch))
    return code;
  if (int code = launch(target, {tiles(columns), chunks.count}, threads, standardise_chunk<T, H>, z, chunks,
                        columns, center, (C)eps, (const C*)scratch, differences, hat, statistics))
    return code;
  return launch(target, {(columns + 127) / 128}, 128, finish_statistics<C>, (const C*)differences, chunks,
                columns, (C)eps, statistics);
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
int loss(C* matrices, const C* statistics, int64_t rows, int64_t columns, double lambd, C* loss,
         C* components, C* partial, const Target& target) {
  const int64_t n = kGram ? rows : columns, blocks = loss_blocks<C>(kGram, n);
  const bool vectors = n * n % kWidth<C> == 0 && aligned(16, matrices);
  const auto kernel = vectors ? loss_kernel<kGram, kWidth<C>, C> : loss_kernel<kGram, 1, C>;
  if (int code = launch(target, {blocks}, blocks == 1 ? 1024 : 256, kernel, matrices, statistics, rows,
                        columns, (C)lambd, loss, components, partial))
    return code;
  if (blocks == 1) return 0;
  return launch(target, {1}, 1024, finish_loss<kGram, C>, (const C*)partial, blocks, statistics, rows,
                columns, (C)lambd, loss, components);
}

template <class T>
int narrowed(const float* matrices, int64_t count, int64_t n, int exponent, T* out, const Target& target) {
  constexpr int kWide = 4;
  const bool vectors = n * n % kWide == 0 && aligned(16, matrices) && aligned(8, out);
  const auto kernel = vectors ? narrow_kernel<kWide, T> : narrow_kernel<1, T>;
  const Grid grid{stream_blocks(n * n / (vectors ? kWide : 1), 256), count};
  return launch(target, grid, 256, kernel, matrices, n, (float)(1 / (double)(1ull << exponent)), out);
}

template <class V, class T>
int gradient(const GradientCall<V, T>& call, Compute<V>* scratch, const Target& target) {
  using C = Compute<V>;
  const int first = call.grad_a ? 0 : 1;
  int threads = whole_threads<C>(call.rows);
  const Chunks chunks = threads ? Chunks{call.rows, call.rows, 1} : Chunks::of<C>(call.rows);
  const Grid grid{tiles(call.columns), ((call.grad_a ? 1 : 0) + (call.grad_b ? 1 : 0)) * chunks.count};
  if (!threads) {
    threads = 32 * kChunkWarps;
    if (int code = launch(target, grid, threads, chunk_products<V, T>, call, first, chunks, scratch))
      return code;
  }
  return launch(target, grid, threads, gradient_kernel<V, T>, call, first, chunks, (const C*)scratch);
}

}  // namespace

int64_t cuda_barlow_twins_standardise_scratch(bool wide, int64_t rows, int64_t columns) {
  return (wide ? chunk_count<double>(rows) : chunk_count<float>(rows)) * 5 * columns;
}

int cuda_barlow_twins_standardise(int dtype, bool narrow, const void* z_a, int64_t stride_a, const void* z_b,
                                  int64_t stride_b, int64_t rows, int64_t columns, bool center, double eps,
                                  void* hat, void* statistics, void* scratch, const Target& target) {
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    const Views<T> z{(const T*)z_a, (const T*)z_b, stride_a, stride_b};
    return narrow ? standardise(z, rows, columns, center, eps, (T*)hat, (C*)statistics, (C*)scratch, target)
                  : standardise(z, rows, columns, center, eps, (C*)hat, (C*)statistics, (C*)scratch, target);
  });
}

int64_t cuda_barlow_twins_loss_scratch(bool wide, bool gram, int64_t rows, int64_t columns) {
  const int64_t n = gram ? rows : columns;
  const int64_t blocks = wide ? loss_blocks<double>(gram, n) : loss_blocks<float>(gram, n);
  return blocks == 1 ? 0 : blocks;
}

int cuda_barlow_twins_loss(bool wide, bool gram, void* matrices, const void* statistics, int64_t rows,
                           int64_t columns, double lambd, void* loss_out, void* components, void* scratch,
                           const Target& target) {
  return with_width(wide, [&](auto compute) {
    using C = decltype(compute);
    const auto run = gram ? loss<true, C> : loss<false, C>;
    return run((C*)matrices, (const C*)statistics, rows, columns, lambd, (C*)loss_out, (C*)components,
               (C*)scratch, target);
  });
}

int cuda_barlow_twins_narrowed(int dtype, const void* matrices, int64_t count, int64_t n, int exponent,
                               void* out, const Target& target) {
  const auto* from = (const float*)matrices;
  return dtype == kBFloat16 ? narrowed(from, count, n, exponent, (bfloat16*)out, target)
                            : narrowed(from, count, n, exponent, (float16*)out, target);
}

int64_t cuda_barlow_twins_gradient_scratch(bool wide, int64_t rows, int64_t columns) {
  return (wide ? chunk_count<double>(rows) : chunk_count<float>(rows)) * 2 * columns;
}

int cuda_barlow_twins_gradient(int view_dtype, int grad_dtype, const void* m_a, const void* m_b,
                               const void* view_a, int64_t stride_a, const void* view_b, int64_t stride_b,
                               const void* statistics, const void* upstream, int64_t rows, int64_t columns,
                               double lambd, bool gram, int exponent, const void* gram_b, const void* gram_a,
                               void* grad_a, void* grad_b, void* scratch, const Target& target) {
  const auto run = [&](auto of_view, auto of_grad) {
    using V = decltype(of_view);
    using T = decltype(of_grad);
    using C = Compute<V>;
    const GradientCall<V, T> call{(const C*)m_a,
                                  (const C*)m_b,
                                  (const C*)gram_b,
                                  (const C*)gram_a,
                                  (const C*)statistics,
                                  (const C*)upstream,
                                  {(const V*)view_a, (const V*)view_b, stride_a, stride_b},
                                  (T*)grad_a,
                                  (T*)grad_b,
                                  rows,
                                  columns,
                                  (C)(1ull << exponent),
                                  (C)(2 * lambd / rows / rows),
                                  (C)(2.0 / rows),
                                  gram ? (C)lambd : 0};
    return gradient(call, (C*)scratch, target);
  };
  return with_type(grad_dtype, [&](auto of_grad) {
    using T = decltype(of_grad);
    return view_dtype == grad_dtype ? run(T(), T()) : run(Compute<T>(), T());
  });
}

}  // namespace mmfast
