// The forward pass of Barlow Twins on the CPU.
//
// Blocks of columns, or of a Gram matrix, are each the work of one thread and always done in the same order,
// so results depend neither on the number of threads nor on chance.
#include "barlow_twins_blocks.h"
#include "barlow_twins_loss.h"
#include "kernels.h"

namespace MMFAST_NS {
namespace {

// Copies one block of a view to `block`, less its column means if `center`, and returns r. Sums are relative
// to the first row: a constant column comes out exactly zero, and an offset costs no precision.
template <class C, class T, class Extent>
MMFAST_HD Row<C> centred(const T* z, int64_t stride, int64_t rows, Extent extent, bool center,
                         const Scaling<C>& scaling, C* block, C* mean_out) {
  const Row<C> shift = center ? load<C>(z, extent) : Row<C>::all(0);
  const Row<C> sum = sum_rows<C>(rows, [&](int64_t i) {
    Row<C> x = load<C>(z + i * stride, extent) - shift;
    x.to(block + i * kWidth<C>);
    return x;
  });
  const Row<C> mean = center ? sum * Row<C>::all(1 / (C)rows) : Row<C>::all(0);
  store(shift + mean, mean_out, extent);
  const Row<C> square = sum_rows<C>(rows, [&](int64_t i) {
    Row<C> d = Row<C>::of(block + i * kWidth<C>) - mean;
    d.to(block + i * kWidth<C>);
    return d * d;
  });
  C r[kWidth<C>];
  square.to(r);
  for (int j = 0; j < kWidth<C>; ++j) r[j] = scaling.inverse_deviation(r[j] / (C)rows);
  return Row<C>::of(r);
}

// gap: what c is drawn to less c.
template <class C, class T>
struct Standardise {
  const T *z_a, *z_b;
  int64_t stride_a, stride_b, rows, columns;
  bool center;
  Scaling<C> scaling;
  C *hat_a, *hat_b, *r_a, *r_b, *gap, *mean_a, *mean_b;

  Standardise(const void* z_a, int64_t stride_a, const void* z_b, int64_t stride_b, int64_t rows,
              int64_t columns, const BarlowTwinsDefinition& definition, void* hat, void* statistics)
      : z_a((const T*)z_a),
        z_b((const T*)z_b),
        stride_a(stride_a),
        stride_b(stride_b),
        rows(rows),
        columns(columns),
        center(definition.center),
        scaling(definition, rows),
        hat_a((C*)hat),
        hat_b(hat_a + rows * columns),
        r_a((C*)statistics),
        r_b(r_a + columns),
        gap(r_b + columns),
        mean_a(gap + columns),
        mean_b(mean_a + columns) {}

  template <class Extent>
  MMFAST_HD Row<C> centre(int view, int64_t j, Extent extent, C* block) const {
    return view ? centred<C>(z_b + j, stride_b, rows, extent, center, scaling, block, mean_b + j)
                : centred<C>(z_a + j, stride_a, rows, extent, center, scaling, block, mean_a + j);
  }

  // Writes rows [first, last) of both views and returns the sum of their terms.
  template <class Extent>
  MMFAST_HD Row<C> scale(int64_t j, Extent extent, const C* a, const C* b, const Row<C> (&r)[2],
                         int64_t first, int64_t last) const {
    const Row<C> near = Row<C>::all(scaling.near);
    return sum_rows<C>(last - first, [&](int64_t row) {
      const int64_t i = first + row;
      Row<C> x = Row<C>::of(a + i * kWidth<C>) * r[0];
      Row<C> y = Row<C>::of(b + i * kWidth<C>) * r[1];
      store(x, hat_a + i * columns + j, extent);
      store(y, hat_b + i * columns + j, extent);
      return scaling.term(x, y, near);
    });
  }

  template <class Extent>
  MMFAST_HD void write(int64_t j, Extent extent, const Row<C> (&r)[2], const Row<C>& terms) const {
    C d[kWidth<C>], p[kWidth<C>], q[kWidth<C>];
    terms.to(d);
    r[0].to(p);
    r[1].to(q);
    for (int k = 0; k < kWidth<C>; ++k) d[k] = scaling.gap(d[k] / (C)rows, p[k], q[k]);
    store(r[0], r_a + j, extent);
    store(r[1], r_b + j, extent);
    store(Row<C>::of(d), gap + j, extent);
  }

  // Where all columns are one block, threads share views and rows; the parts are the same for any number of
  // threads.
  template <class Extent>
  MMFAST_HD void only_block(Extent extent, C* scratch, int threads) const {
    constexpr int kParts = 16;
    C* blocks[2] = {scratch, scratch + rows * kWidth<C>};
    Row<C> r[2], terms[kParts];
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int v = 0; v < 2; ++v) r[v] = centre(v, 0, extent, blocks[v]);
#pragma omp for schedule(static)
      for (int p = 0; p < kParts; ++p)
        terms[p] = scale(0, extent, blocks[0], blocks[1], r, rows * p / kParts, rows * (p + 1) / kParts);
    }
    Row<C> total = terms[0];
    for (int p = 1; p < kParts; ++p) total = total + terms[p];
    write(0, extent, r, total);
  }

  // Nanoseconds, roughly, as everywhere below.
  double cost() const { return 0.3 * rows * columns; }

  // False if there is no memory.
  bool run(int threads) const {
    if (columns <= kWidth<C>) {
      C* scratch = (C*)__builtin_malloc(2 * rows * kWidth<C> * sizeof(C));
      if (!scratch) return false;
      if (columns == kWidth<C>)
        only_block(Whole{}, scratch, threads);
      else
        only_block(Part{(int)columns}, scratch, threads);
      __builtin_free(scratch);
      return true;
    }
    return for_blocks<C>(1, columns, 2 * rows, threads, [&](int, int64_t j, auto extent, C* scratch) {
      C *a = scratch, *b = scratch + rows * kWidth<C>;
      const Row<C> r[2] = {centre(0, j, extent, a), centre(1, j, extent, b)};
      write(j, extent, r, scale(j, extent, a, b, r, 0, rows));
    });
  }
};

// <ÂÂ', B̂B̂'>, the matrices computed block by block of their lower triangle and kept where there is a place.
template <class C>
struct GramEnergy {
  static constexpr int kMax = 24;  // rows of a block; it and its half are multiples of the tile's sides
  static constexpr int kDown = kMax / kDotRows, kAcross = kMax / kDotColumns;
  using Tiles = DotTile<C>[kDown][kAcross];
  const C *hat_a, *hat_b;
  int64_t rows, columns;
  C *keep_a, *keep_b;

  struct Block {
    int64_t i, k;  // first row and column
    int side;

    // body(t, u) for the tiles that reach the lower triangle.
    template <class Body>
    MMFAST_HD void for_tiles(int64_t rows, Body body) const {
      for (int t = 0; t * kDotRows < side && i + t * kDotRows < rows; ++t)
        for (int u = 0; u * kDotColumns < side && k + u * kDotColumns < i + (t + 1) * kDotRows; ++u)
          body(t, u);
    }
  };

  // The block's inner products of one view.
  void gram(const C* hat, const Block& block, C (&g)[kMax][kMax]) const {
    constexpr int64_t kDepth = 4096 / sizeof(C);  // columns that stay in cache for all tiles of the block
    const C *x[kMax], *y[kMax];
    for (int t = 0; t < block.side; ++t) {
      x[t] = hat + (block.i + t < rows ? block.i + t : rows - 1) * columns;
      y[t] = hat + (block.k + t < rows ? block.k + t : rows - 1) * columns;
    }
    Tiles tiles;
    block.for_tiles(rows, [&](int t, int u) { tiles[t][u] = {}; });
    const auto add = [&](int64_t start, int64_t stop) {
      block.for_tiles(rows, [&](int t, int u) {
        add_dots(tiles[t][u], x + t * kDotRows, y + u * kDotColumns, start, stop);
      });
    };
    const int64_t whole = columns - columns % kLanes<C>;
    for (int64_t start = 0; start < whole; start += kDepth)
      add(start, start + kDepth < whole ? start + kDepth : whole);
    if (whole < columns) {
      C last[2][kMax][kLanes<C>] = {};
      for (int t = 0; t < block.side; ++t) {
        for (int64_t j = whole; j < columns; ++j) {
          last[0][t][j - whole] = x[t][j];
          last[1][t][j - whole] = y[t][j];
        }
        x[t] = last[0][t];
        y[t] = last[1][t];
      }
      add(0, kLanes<C>);
    }
    block.for_tiles(rows, [&](int t, int u) { dots(tiles[t][u], &g[t * kDotRows][u * kDotColumns], kMax); });
  }

  double energy(const Block& block) const {
    C a[kMax][kMax], b[kMax][kMax];
    gram(hat_a, block, a);
    gram(hat_b, block, b);
    double sum = 0;
    for (int t = 0; t < block.side && block.i + t < rows; ++t)
      for (int u = 0; u < block.side && block.k + u <= block.i + t; ++u)
        sum += (block.k + u < block.i + t ? 2 : 1) * (double)(a[t][u] * b[t][u]);
    keep(a, block, keep_a);
    keep(b, block, keep_b);
    return sum;
  }

  // The block and its mirror image, each row by row.
  void keep(const C (&g)[kMax][kMax], const Block& block, C* to) const {
    if (!to) return;
    const int64_t down = rows - block.i < block.side ? rows - block.i : block.side;
    for (int64_t t = 0; t < down; ++t)
      for (int64_t u = 0; u < block.side && block.k + u <= block.i + t; ++u)
        to[(block.i + t) * rows + block.k + u] = g[t][u];
    for (int64_t u = 0; u < block.side && block.k + u < rows; ++u)
      for (int64_t t = block.k + u > block.i ? block.k + u - block.i : 0; t < down; ++t)
        to[(block.k + u) * rows + block.i + t] = g[t][u];
  }

  double cost() const { return 0.02 * rows * rows * columns; }

  // False if there is no memory.
  bool run(int threads, double& total) const {
    const int side = rows <= 64 ? kMax / 2 : kMax;  // smaller blocks balance better, larger ones read less
    const int64_t n = (rows + side - 1) / side, blocks = n * (n + 1) / 2;
    double* energies = (double*)__builtin_malloc(blocks * sizeof(double));
    if (!energies) return false;
#pragma omp parallel for num_threads(blocks < threads ? (int)blocks : threads) schedule(dynamic)
    for (int64_t t = 0; t < blocks; ++t) {
      int64_t i = 0, k = t;
      while (k > i) k -= ++i;
      energies[t] = energy({i * side, k * side, side});
    }
    total = 0;
    for (int64_t t = 0; t < blocks; ++t) total += energies[t];
    __builtin_free(energies);
    return true;
  }
};

// The sum of the squares of a row.
template <class C>
MMFAST_HD double squares(const C* x, int64_t n) {
  Row<C> sum = Row<C>::all(0);
  int64_t j = 0;
  for (; j + kWidth<C> <= n; j += kWidth<C>) sum = sum + load<C>(x + j, Whole{}) * load<C>(x + j, Whole{});
  const Row<C> rest = load<C>(x + j, Part{(int)(n - j)});
  C lanes[kWidth<C>];
  (sum + rest * rest).to(lanes);
  double total = 0;
  for (int k = 0; k < kWidth<C>; ++k) total += lanes[k];
  return total;
}

// Takes the diagonal out of p = Â'B̂ and returns the sum of the squares of the rest.
template <class C>
double correlation_energy(C* p, int64_t columns, int most_threads) {
  const int threads = threads_for(0.05 * columns * columns, most_threads);
  constexpr int kShares = 128;  // more than there are threads
  double shares[kShares];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int s = 0; s < kShares; ++s) {
    shares[s] = 0;
    for (int64_t i = columns * s / kShares; i < columns * (s + 1) / kShares; ++i) {
      p[i * columns + i] = 0;
      shares[s] += squares(p + i * columns, columns);
    }
  }
  double total = 0;
  for (int s = 0; s < kShares; ++s) total += shares[s];
  return total;
}

}  // namespace

int barlow_twins_standardise(int dtype, const void* z_a, int64_t stride_a, const void* z_b, int64_t stride_b,
                             int64_t rows, int64_t columns, const BarlowTwinsDefinition& definition,
                             void* hat, void* statistics, int threads) {
  return with_types(dtype, [&](auto element, auto compute) {
    const Standardise<decltype(compute), decltype(element)> pass(z_a, stride_a, z_b, stride_b, rows, columns,
                                                                 definition, hat, statistics);
    if (!pass.run(threads_for(pass.cost(), threads))) return kNoMemory;
    return finite(pass.gap, columns) ? 0 : kNotFinite;
  });
}

int barlow_twins_gram_forward(int dtype, const void* z_a, int64_t stride_a, const void* z_b, int64_t stride_b,
                              int64_t rows, int64_t columns, const BarlowTwinsDefinition& definition,
                              bool grad_a, bool grad_b, void* hat, void* kept, void* statistics, void* loss,
                              void* components, int threads) {
  return with_types(dtype, [&](auto element, auto compute) {
    using C = decltype(compute);
    const Standardise<C, decltype(element)> pass(z_a, stride_a, z_b, stride_b, rows, columns, definition, hat,
                                                 statistics);
    C *keep_a = grad_b ? (C*)kept : 0, *keep_b = grad_a ? (C*)kept + grad_b * rows * rows : 0;
    const GramEnergy<C> grams{pass.hat_a, pass.hat_b, rows, columns, keep_a, keep_b};
    threads = threads_for(pass.cost() + grams.cost(), threads);
    double energy;
    if (!pass.run(threads)) return kNoMemory;
    if (!finite(pass.gap, columns)) return kNotFinite;
    if (!grams.run(threads, energy)) return kNoMemory;
    finish(pass.gap, rows, columns, energy, true, definition, (C*)loss, (C*)components);
    return 0;
  });
}

void barlow_twins_correlation_energy(bool wide, void* p, const void* statistics, int64_t rows,
                                     int64_t columns, const BarlowTwinsDefinition& definition, void* loss,
                                     void* components, int threads) {
  with_types(wide ? kFloat64 : kFloat32, [&](auto, auto compute) {
    using C = decltype(compute);
    const double energy = correlation_energy((C*)p, columns, threads);
    finish((const C*)statistics + 2 * columns, rows, columns, energy, false, definition, (C*)loss,
           (C*)components);
    return true;
  });
}

}  // namespace MMFAST_NS
