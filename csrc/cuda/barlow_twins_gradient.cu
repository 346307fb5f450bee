// Barlow Twins on CUDA: the gradient through the standardisation.
#include "columns.h"

namespace mmfast {
namespace {

// V: of views, hats of C or embeddings of a half type; T: of gradients.
template <class V, class T>
struct GradientCall {
  using C = Compute<V>;
  const C *m_a, *m_b, *gram_b, *gram_a, *statistics, *upstream;
  Views<V> view;
  T *grad_a, *grad_b;
  int64_t rows, columns;
  C scale;  // of products
  Scaling<C> scaling;
  Pull<C> pull;  // without `upstream`
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
    if constexpr (kStandardise) {
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
  }
  template <int N>
  __device__ __forceinline__ void load_partner(int count, C (&partner)[N]) const {
    load_rows(partner_at, partner_step, count, (C)0, partner);
    if constexpr (kStandardise) {
#pragma unroll
      for (int k = 0; k < N; ++k) partner[k] = (partner[k] - partner_mean) * partner_r;
    }
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
    const C u = *call.upstream, gap = call.statistics[2 * call.columns + column];
    const ColumnGradient<C> g = call.pull.column(products / call.rows, gap, call.scaling.projection(r));
    of_m = r * call.pull.alpha * u;
    of_partner = r * g.weight * u;
    of_own = r * g.own * u;
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

int64_t cuda_barlow_twins_gradient_scratch(bool wide, int64_t rows, int64_t columns) {
  return (wide ? chunk_count<double>(rows) : chunk_count<float>(rows)) * 2 * columns;
}

int cuda_barlow_twins_gradient(int view_dtype, int grad_dtype, const void* m_a, const void* m_b,
                               const void* view_a, int64_t stride_a, const void* view_b, int64_t stride_b,
                               const void* statistics, const void* upstream, int64_t rows, int64_t columns,
                               const BarlowTwinsDefinition& definition, bool gram, int exponent,
                               const void* gram_b, const void* gram_a, void* grad_a, void* grad_b,
                               void* scratch, const Target& target) {
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
                                  Scaling<C>(definition, rows),
                                  Pull<C>(definition, rows, gram, 1)};
    return gradient(call, (C*)scratch, target);
  };
  return with_type(grad_dtype, [&](auto of_grad) {
    using T = decltype(of_grad);
    return view_dtype == grad_dtype ? run(T(), T()) : run(Compute<T>(), T());
  });
}

}  // namespace mmfast
