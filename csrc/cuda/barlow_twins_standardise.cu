// Barlow Twins on CUDA: standardised columns, their statistics, and how far the views are apart.
#include "columns.h"

namespace mmfast {
namespace {

// One block sees all rows of its columns.
template <class T, class H>
__global__ void __launch_bounds__(32 * kMaxWarps)
    standardise_whole(Views<T> z, int rows, int64_t columns, bool center, Scaling<Compute<T>> scaling, H* hat,
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
  C r[2], terms[1] = {0};
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    r[v] = scaling.inverse_deviation(sum[v] * weight);
    if (tells) to_statistics[v * columns] = r[v];
  }
#pragma unroll
  for (int k = 0; k < kHeld<C>; ++k) {
    x[0][k] *= r[0];
    x[1][k] *= r[1];
    terms[0] += scaling.term(x[0][k], x[1][k], scaling.near);
  }
  sum_warps(terms);
  if (tells) to_statistics[2 * columns] = scaling.gap(terms[0] * weight, r[0], r[1]);
  if (!at.inside) return;
  H* to = hat + at.warp * columns + at.column;
#pragma unroll
  for (int k = 0; k < kHeld<C>; ++k, to += at.warps * columns) {
    if (k >= count) break;
    to[0] = Scalar<H>::store(x[0][k]);
    to[rows * columns] = Scalar<H>::store(x[1][k]);
  }
}

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

// terms (chunks, D): their sums.
template <class T, class H>
__global__ void __launch_bounds__(32 * kChunkWarps)
    standardise_chunk(Views<T> z, Chunks chunks, int64_t columns, bool center, Scaling<Compute<T>> scaling,
                      const Compute<T>* partial, Compute<T>* terms, H* hat, Compute<T>* statistics) {
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
  for (int v = 0; v < 2; ++v) r[v] = scaling.inverse_deviation(square[v] * weight);

  C sum[1] = {0};
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
      sum[0] += k < count ? scaling.term(x[k], y[k], scaling.near) : 0;
      if (k < stored) {
        to[0] = Scalar<H>::store(x[k]);
        to[chunks.rows * columns] = Scalar<H>::store(y[k]);
      }
    }
    a += kAhead<C> * kChunkWarps * z.stride_a;
    b += kAhead<C> * kChunkWarps * z.stride_b;
  }
  sum_warps(sum);
  if (at.warp == 0 && at.inside) {
    terms[chunk * columns + at.column] = sum[0];
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
    finish_statistics(const C* terms, Chunks chunks, int64_t columns, Scaling<C> scaling, C* statistics) {
  const int64_t column = (int64_t)blockIdx.x * 128 + threadIdx.x;
  if (column >= columns) return;
  C sum = 0;
#pragma unroll 8
  for (int c = 0; c < chunks.count; ++c) sum += terms[c * columns + column];
  statistics[2 * columns + column] =
      scaling.gap(sum / chunks.rows, statistics[column], statistics[columns + column]);
}

template <class T, class H>
int standardise(const Views<T>& z, int64_t rows, int64_t columns, const BarlowTwinsDefinition& definition,
                H* hat, Compute<T>* statistics, Compute<T>* scratch, const Target& target) {
  using C = Compute<T>;
  const bool center = definition.center;
  const Scaling<C> scaling(definition, rows);
  if (const int threads = whole_threads<C>(rows))
    return launch(target, {tiles(columns)}, threads, standardise_whole<T, H>, z, (int)rows, columns, center,
                  scaling, hat, statistics);
  const Chunks chunks = Chunks::of<C>(rows);
  C* terms = scratch + chunks.count * 4 * columns;
  const int threads = 32 * kChunkWarps;
  if (int code = launch(target, {tiles(columns), 2 * chunks.count}, threads, chunk_moments<T>, z, chunks,
                        columns, center, scratch))
    return code;
  if (int code = launch(target, {tiles(columns), chunks.count}, threads, standardise_chunk<T, H>, z, chunks,
                        columns, center, scaling, (const C*)scratch, terms, hat, statistics))
    return code;
  return launch(target, {(columns + 127) / 128}, 128, finish_statistics<C>, (const C*)terms, chunks, columns,
                scaling, statistics);
}

}  // namespace

int64_t cuda_barlow_twins_standardise_scratch(bool wide, int64_t rows, int64_t columns) {
  return (wide ? chunk_count<double>(rows) : chunk_count<float>(rows)) * 5 * columns;
}

int cuda_barlow_twins_standardise(int dtype, bool narrow, const void* z_a, int64_t stride_a, const void* z_b,
                                  int64_t stride_b, int64_t rows, int64_t columns,
                                  const BarlowTwinsDefinition& definition, void* hat, void* statistics,
                                  void* scratch, const Target& target) {
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    const Views<T> z{(const T*)z_a, (const T*)z_b, stride_a, stride_b};
    return narrow ? standardise(z, rows, columns, definition, (T*)hat, (C*)statistics, (C*)scratch, target)
                  : standardise(z, rows, columns, definition, (C*)hat, (C*)statistics, (C*)scratch, target);
  });
}

}  // namespace mmfast
