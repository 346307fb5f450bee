// The three products of the recurrent engine, a tile of the result in registers at a time, and what cells do
// with it.
#pragma once
#include "recurrent_layout.h"

namespace MMFAST_NS {

#if defined(__AVX512F__)
constexpr int kScanRows = 6;
#else
constexpr int kScanRows = 3;
#endif
constexpr int kPanelVectors = 4;

template <class C, int W>
struct WideOf {
  typedef C type __attribute__((vector_size(W * sizeof(C)), aligned(sizeof(C)), may_alias));
  typedef Code<C> code __attribute__((vector_size(W * sizeof(C)), aligned(sizeof(C)), may_alias));
};
template <class C, int W>
using Wide = typename WideOf<C, W>::type;

template <class C, int W>
MMFAST_HD Wide<C, W> wide_at(const C* p) {
  return *(const Wide<C, W>*)p;
}
template <class C, int W>
MMFAST_HD void put_wide(const Wide<C, W>& x, C* p) {
  *(Wide<C, W>*)p = x;
}

// e^x = p 2^k + 2^k and e^x - 1 = p 2^k + (2^k - 1), where p = e^r - 1, |r| <= ln 2 / 2. x is small enough.
template <class C, int W>
MMFAST_HD void parts_of_exponential(const Wide<C, W>& x, Wide<C, W>& p, Wide<C, W>& power) {
  using E = Exponential<C>;
  typedef typename WideOf<C, W>::code Integers;
  constexpr double inverse[] = {
      1,          1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,       1. / 5040,
      1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  const Wide<C, W> magic = Wide<C, W>{} + E::magic, moved = x * (C)1.4426950408889634 + magic;
  const Wide<C, W> n = moved - magic;
  power = (Wide<C, W>)(((Integers)moved - (Integers)magic + (Code<C>)E::offset) << E::bits);
  const Wide<C, W> r = (x - n * E::ln2_high) - n * E::ln2_low;
  Wide<C, W> q = Wide<C, W>{} + (C)inverse[E::terms - 1];
#pragma GCC unroll 16
  for (int i = E::terms - 2; i >= 0; --i) q = q * r + (C)inverse[i];
  p = q * r;
}

// NaN stays.
template <class C, int W>
MMFAST_HD Wide<C, W> within(Wide<C, W> x, C most) {
  const Wide<C, W> high = Wide<C, W>{} + most, low = -high;
  x = x > high ? high : x;
  return x < low ? low : x;
}
template <class C, int W>
MMFAST_HD Wide<C, W> sigmoid(const Wide<C, W>& x) {
  Wide<C, W> p, power;
  parts_of_exponential<C, W>(within<C, W>(-x, sizeof(C) == 4 ? 87 : 707), p, power);
  return 1 / (1 + (p * power + power));
}
template <class C, int W>
MMFAST_HD Wide<C, W> tanh_of(const Wide<C, W>& x) {
  Wide<C, W> p, power;
  parts_of_exponential<C, W>(within<C, W>(x + x, sizeof(C) == 4 ? 20 : 40), p, power);
  const Wide<C, W> e = p * power + (power - 1);
  return e / (e + 2);
}

// Each cell: what it makes of its four sums and the state before, and the derivative.
// forward: sums become what is kept (4, then the state), returns h. before: the state, 0 at the start.
template <class C, int W>
struct LstmCell {
  using V = Wide<C, W>;
  static MMFAST_HD V forward(V (&s)[4], V& state) {
    s[0] = sigmoid<C, W>(s[0]);
    s[1] = sigmoid<C, W>(s[1]);
    s[2] = tanh_of<C, W>(s[2]);
    s[3] = sigmoid<C, W>(s[3]);
    state = s[0] * s[2] + s[1] * state;
    return s[3] * tanh_of<C, W>(state);
  }
  static MMFAST_HD V output(const V (&s)[4], const V& state) { return s[3] * tanh_of<C, W>(state); }
  // dh: by h; carry: by the state, and then by that before. d: by the sums.
  static MMFAST_HD void backward(const V (&s)[4], const V& state, const V& before, const V& dh, V& carry,
                                 V (&d)[4]) {
    const V q = tanh_of<C, W>(state), by_state = carry + dh * s[3] * (1 - q * q);
    d[0] = by_state * s[2] * s[0] * (1 - s[0]);
    d[1] = by_state * before * s[1] * (1 - s[1]);
    d[2] = by_state * s[0] * (1 - s[2] * s[2]);
    d[3] = dh * q * s[3] * (1 - s[3]);
    carry = by_state * s[1];
  }
};

// r, z, n and the part of n that r scales.
template <class C, int W>
struct GruCell {
  using V = Wide<C, W>;
  static MMFAST_HD V forward(V (&s)[4], V& state) {
    s[0] = sigmoid<C, W>(s[0]);
    s[1] = sigmoid<C, W>(s[1]);
    s[2] = tanh_of<C, W>(s[2] + s[0] * s[3]);
    state = (1 - s[1]) * s[2] + s[1] * state;
    return state;
  }
  static MMFAST_HD V output(const V (&)[4], const V& state) { return state; }
  // carry: what h gives to the h before, beside the sums.
  static MMFAST_HD void backward(const V (&s)[4], const V&, const V& before, const V& by_output, V& carry,
                                 V (&d)[4]) {
    const V dh = by_output + carry;
    d[2] = dh * (1 - s[1]) * (1 - s[2] * s[2]);
    d[0] = d[2] * s[3] * s[0] * (1 - s[0]);
    d[1] = dh * (before - s[2]) * s[1] * (1 - s[1]);
    d[3] = d[2] * s[0];
    carry = dh * s[1];
  }
};

// Rows of z (rows, depth) times the packed weights (depth, 4 W) of a block.
template <class C>
struct GateCall {
  const C* z;
  int64_t z_stride;
  int depth;
  const C *weights, *bias;
  C* gates;
  int64_t gates_stride;
  const C* before;  // null: 0
  int64_t before_stride;
  C* state;
  int64_t state_stride;
  C* h;
  int64_t h_stride;
};

template <class Cell, class C, int W, int R>
void gate_tile(const GateCall<C>& a, int64_t row) {
  using V = Wide<C, W>;
  V sums[R][4];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < 4; ++g) sums[r][g] = wide_at<C, W>(a.bias + g * W);
  const C *z = a.z + row * a.z_stride, *w = a.weights;
  for (int k = 0; k < a.depth; ++k, w += 4 * W) {
    V b[4];
    for (int g = 0; g < 4; ++g) b[g] = wide_at<C, W>(w + g * W);
    for (int r = 0; r < R; ++r) {
      const V v = z[r * a.z_stride + k] - V{};
      for (int g = 0; g < 4; ++g) sums[r][g] += v * b[g];
    }
  }
  for (int r = 0; r < R; ++r) {
    V state = a.before ? wide_at<C, W>(a.before + (row + r) * a.before_stride) : V{};
    const V h = Cell::forward(sums[r], state);
    C* to = a.gates + (row + r) * a.gates_stride;
    for (int g = 0; g < 4; ++g) put_wide<C, W>(sums[r][g], to + g * W);
    put_wide<C, W>(state, a.state + (row + r) * a.state_stride);
    put_wide<C, W>(h, a.h + (row + r) * a.h_stride);
  }
}

template <class Cell, class C, int W, int R = kScanRows>
void gate_rows(const GateCall<C>& a, int64_t row, int64_t rows) {
  for (; row + R <= rows; row += R) gate_tile<Cell, C, W, R>(a, row);
  if constexpr (R > 1)
    if (row < rows) gate_rows<Cell, C, W, R - 1>(a, row, rows);
}

// Columns of a product that a tile has at a time: of `vectors` vectors, packed (depth, vectors x lanes) from
// `at`.
struct Panel {
  int column, vectors, lanes, real;
  int64_t at;
};

template <class C>
struct Panels {
  Room<Panel> of;
  int count;
  int64_t size;

  Panels(int64_t columns, int64_t depth) : of(columns / kLanes<C> + 4), count(0), size(0) {
    for (int64_t c = 0; of.get() && c < columns;) {
      const int64_t rest = columns - c, whole = rest / kLanes<C>;
      const int vectors = whole == 0 ? 1 : whole < kPanelVectors ? (int)whole : kPanelVectors;
      const int lanes = whole == 0 ? lanes_for<C>(rest) : kLanes<C>, width = vectors * lanes;
      of[count++] = {(int)c, vectors, lanes, rest < width ? (int)rest : width, size};
      size += depth * width;
      c += width;
    }
  }
};

// to[row][0, N W) = a[row] b, b packed (depth, N W).
template <class C, int W, int N, int R>
void back_tile(const C* a, int64_t stride, int depth, const C* b, C* const* to, int column, int real) {
  using V = Wide<C, W>;
  V sums[R][N];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) sums[r][v] = V{};
  for (int k = 0; k < depth; ++k, b += N * W) {
    V y[N];
    for (int v = 0; v < N; ++v) y[v] = wide_at<C, W>(b + v * W);
    for (int r = 0; r < R; ++r) {
      const V x = a[r * stride + k] - V{};
      for (int v = 0; v < N; ++v) sums[r][v] += x * y[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) {
      C* p = to[r] + column + v * W;
      if (real >= (v + 1) * W) {
        put_wide<C, W>(sums[r][v], p);
      } else {
        for (int j = 0; j < real - v * W; ++j) p[j] = sums[r][v][j];
      }
    }
}

template <class C, int W, int N, int R>
void back_rows(const C* a, int64_t stride, int depth, const C* b, C* const* to, int column, int real,
               int64_t row, int64_t rows) {
  for (; row + R <= rows; row += R)
    back_tile<C, W, N, R>(a + row * stride, stride, depth, b, to + row, column, real);
  if constexpr (R > 1)
    if (row < rows) {
      constexpr int kNext = R > kScanRows ? kScanRows : R - 1;
      back_rows<C, W, N, kNext>(a, stride, depth, b, to, column, real, row, rows);
    }
}

// to[row] = a[row] b of `rows` rows, b packed in panels.
template <class C>
void back(const Panels<C>& panels, const C* packed, const C* a, int64_t stride, int depth, C* const* to,
          int64_t rows) {
  constexpr int W = kLanes<C>;
  for (int i = 0; i < panels.count; ++i) {
    const Panel& p = panels.of[i];
    const C* b = packed + p.at;
    if (p.vectors == 4)
      back_rows<C, W, 4, kScanRows>(a, stride, depth, b, to, p.column, p.real, 0, rows);
    else if (p.vectors == 3)
      back_rows<C, W, 3, kScanRows * 4 / 3>(a, stride, depth, b, to, p.column, p.real, 0, rows);
    else if (p.vectors == 2)
      back_rows<C, W, 2, kScanRows * 2>(a, stride, depth, b, to, p.column, p.real, 0, rows);
    else
      with_lanes<C>(p.lanes, [&](auto lanes) {
        back_rows<C, decltype(lanes)::value, 1, kScanRows * 2>(a, stride, depth, b, to, p.column, p.real, 0,
                                                               rows);
      });
  }
}

// sums (M, columns): sums[m][n] += sum over rows of d[row][m] z[row][n].
template <class C, int N, int R>
void outer_tile(const C* d, int64_t d_stride, const C* z, int64_t rows, C* sums, int64_t stride) {
  constexpr int W = kLanes<C>;
  using V = Wide<C, W>;
  V s[R][N];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) s[r][v] = wide_at<C, W>(sums + r * stride + v * W);
  for (int64_t p = 0; p < rows; ++p, d += d_stride, z += N * W) {
    V y[N];
    for (int v = 0; v < N; ++v) y[v] = wide_at<C, W>(z + v * W);
    for (int r = 0; r < R; ++r) {
      const V x = d[r] - V{};
      for (int v = 0; v < N; ++v) s[r][v] += x * y[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) put_wide<C, W>(s[r][v], sums + r * stride + v * W);
}

template <class C, int N, int R>
void outer_panel(const C* d, int64_t d_stride, const C* z, int64_t rows, C* sums, int64_t stride, int m,
                 int M) {
  for (; m + R <= M; m += R) outer_tile<C, N, R>(d + m, d_stride, z, rows, sums + m * stride, stride);
  if constexpr (R > 1)
    if (m < M) outer_panel<C, N, R - 1>(d, d_stride, z, rows, sums, stride, m, M);
}

constexpr int64_t kSlabRows = 128;

// `stride`, of z and of the sums, in whole vectors. slab: room for kSlabRows rows of a panel of z, which
// stays in the first-level cache where it lies dense.
template <class C>
void outer(const C* d, int64_t d_stride, const C* z, int64_t stride, int64_t rows, C* sums, int M, C* slab) {
  constexpr int W = kLanes<C>;
  for (int64_t p = 0; p < rows; p += kSlabRows) {
    const int64_t n = rows - p < kSlabRows ? rows - p : kSlabRows;
    for (int64_t c = 0; c < stride; c += kPanelVectors * W) {
      const int64_t left = (stride - c) / W, v = left < kPanelVectors ? left : kPanelVectors;
      for (int64_t i = 0; i < n; ++i)
        memcpy(slab + i * v * W, z + (p + i) * stride + c, (size_t)(v * W) * sizeof(C));
      const C* from = d + p * d_stride;
      C* to = sums + c;
      if (v == 4)
        outer_panel<C, 4, kScanRows>(from, d_stride, slab, n, to, stride, 0, M);
      else if (v == 3)
        outer_panel<C, 3, kScanRows * 4 / 3>(from, d_stride, slab, n, to, stride, 0, M);
      else if (v == 2)
        outer_panel<C, 2, kScanRows * 2>(from, d_stride, slab, n, to, stride, 0, M);
      else
        outer_panel<C, 1, kScanRows * 2>(from, d_stride, slab, n, to, stride, 0, M);
    }
  }
}

}  // namespace MMFAST_NS
