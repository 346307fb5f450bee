// The two matrix products of the Gram form, a tile of the result in registers at a time.
#pragma once
#include "rows.h"

namespace MMFAST_NS {

// Tiles as large as the registers hold: 32 of AVX-512, 16 of others.
#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotColumns = 6, kTileVectors = 4;
#else
constexpr int kDotRows = 3, kDotColumns = 4, kTileVectors = 2;
#endif
constexpr int kTileRows = 6;

template <class C>
struct DotTile {
  Vector<C> lanes[kDotRows][kDotColumns];
};

// Adds the inner products of rows x[i] and y[k] over the columns [start, stop), a multiple of the lanes.
template <class C>
MMFAST_HD void add_dots(DotTile<C>& tile, const C* const* x, const C* const* y, int64_t start, int64_t stop) {
  Vector<C> sum[kDotRows][kDotColumns];
  for (int i = 0; i < kDotRows; ++i)
    for (int k = 0; k < kDotColumns; ++k) sum[i][k] = tile.lanes[i][k];
  for (int64_t j = start; j < stop; j += kLanes<C>) {
    Vector<C> a[kDotRows];
    for (int i = 0; i < kDotRows; ++i) a[i] = *(const Vector<C>*)(x[i] + j);
    for (int k = 0; k < kDotColumns; ++k) {
      Vector<C> b = *(const Vector<C>*)(y[k] + j);
      for (int i = 0; i < kDotRows; ++i) sum[i][k] += a[i] * b;
    }
  }
  for (int i = 0; i < kDotRows; ++i)
    for (int k = 0; k < kDotColumns; ++k) tile.lanes[i][k] = sum[i][k];
}

// The sum of n numbers, a power of two; overwrites them.
template <int n, class C>
MMFAST_HD C sum_in_place(C* x) {
  if constexpr (n == 2) {
    return x[0] + x[1];
  } else {
    typedef C Half __attribute__((vector_size(n / 2 * sizeof(C)), aligned(sizeof(C)), may_alias));
    *(Half*)x += *(Half*)(x + n / 2);
    return sum_in_place<n / 2>(x);
  }
}

// The inner products of a tile, to rows of `stride`; overwrites the tile.
template <class C>
MMFAST_HD void dots(DotTile<C>& tile, C* to, int64_t stride) {
  for (int i = 0; i < kDotRows; ++i)
    for (int k = 0; k < kDotColumns; ++k) to[i * stride + k] = sum_in_place<kLanes<C>>((C*)&tile.lanes[i][k]);
}

// out (rows, kWidth) = left (rows, depth) right (depth, kWidth); rows of `left` are `stride` apart.
template <class C>
void multiply(const C* left, int64_t stride, const C* right, int64_t rows, int64_t depth, C* out) {
  // Rows of `right` that stay in the second-level cache while all of `left` passes by.
  constexpr int64_t kDepth = 512;
  for (int64_t first = 0; first < depth; first += kDepth) {
    const int64_t last = first + kDepth < depth ? first + kDepth : depth;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const C* l[kTileRows];
      for (int t = 0; t < kTileRows; ++t) l[t] = left + (i + t < rows ? i + t : rows - 1) * stride;
      for (int v = 0; v < kVectors; v += kTileVectors) {
        Vector<C> sum[kTileRows][kTileVectors];
        for (int t = 0; t < kTileRows; ++t)
          for (int u = 0; u < kTileVectors; ++u) sum[t][u] = Vector<C>{};
        for (int64_t k = first; k < last; ++k) {
          Vector<C> r[kTileVectors];
          for (int u = 0; u < kTileVectors; ++u)
            r[u] = *(const Vector<C>*)(right + k * kWidth<C> + (v + u) * kLanes<C>);
          for (int t = 0; t < kTileRows; ++t)
            for (int u = 0; u < kTileVectors; ++u) sum[t][u] += l[t][k] * r[u];
        }
        for (int t = 0; t < kTileRows && i + t < rows; ++t)
          for (int u = 0; u < kTileVectors; ++u) {
            Vector<C>* to = (Vector<C>*)(out + (i + t) * kWidth<C> + (v + u) * kLanes<C>);
            *to = first ? *to + sum[t][u] : sum[t][u];
          }
      }
    }
  }
}

}  // namespace MMFAST_NS
