// The Gram form of Barlow Twins on the CPU for bf16 embeddings, with bf16 operands of all matrix products.
//
// Embeddings are exact operands, hats are not. With column means mu, â = (z - mu) r and y = r â:
//   ÂÂ' = ZY' - 1 (Y mu)'             y is split into the sum of two bf16 numbers, 16 bits together
//   (B̂B̂')Â = (B̂B̂'Z - B̂B̂'1 mu') r   B̂B̂' is rounded to bf16, less its diagonal, and B̂B̂'1 is that of it
// Where mu is large against 1 / r, these are differences of large numbers, and r magnifies their rounding
// without end as a column becomes constant: there z and mu are both taken relative to a number near mu, from
// which the embeddings differ by numbers of bf16, too (exact_shift). Rounding B̂B̂' costs the gradient about as
// much as its own rounding to bf16 does, unless most of the product cancels in the projection on â (few
// directions in the features, B << D). So blocks of columns are tried first, and where the error is seen to
// be larger, B̂B̂' is split, too.
//
// As in barlow_twins.cpp, results depend neither on the number of threads nor on chance.
#include "barlow_twins_narrow.h"

#include "barlow_twins_loss.h"
#include "kernels.h"

namespace MMFAST_NS {
namespace {

template <bool native>
struct Forward {
  const bfloat16* z[2];
  int64_t stride[2], rows, columns;
  bool center;
  Scaling<float> scaling;
  float *r[2], *mean[2], *gap, *gram[2];  // gram: (B, B), null if not wanted
  int threads;

  float *offsets[2], *offset[2];
  uint32_t *x[2], *y_panel[2];
  bfloat16* copies;
  double* energies;

  int64_t x_tiles() const { return ratio_up(rows, kDotColumns); }
  int64_t y_tiles() const { return ratio_up(rows, kDotRows); }

  void lay_out(Arena& arena, const bool (&wanted)[2]) {
    energies = arena.take<double>(rows);
    copies = arena.take<bfloat16>(threads * 2 * rows * kColumns);
    for (int v = 0; v < 2; ++v) {
      offsets[v] = arena.take<float>(kPanelBlocks * rows);
      offset[v] = arena.take<float>(rows);
      x[v] = arena.take<uint32_t>(x_tiles() * kSteps * kDotColumns * kPairs);
      y_panel[v] = arena.take<uint32_t>(y_tiles() * kSteps * kDotRows * 2 * kPairs);
      if (!wanted[v]) gram[v] = arena.take<float>(rows * rows);
    }
  }

  // Statistics of columns j, j + 1, ..., which are block b of a panel of `steps`, and their part of it. block
  // (2, rows, kColumns): for copies, as rows may be so far apart that they push each other out of the cache.
  template <class Extent>
  MMFAST_HD void standardise(int64_t j, int64_t b, int64_t steps, Extent extent, bfloat16* block) const {
    const auto row = [&](int v, int64_t i) { return block + (v * rows + i) * kColumns; };
    // Sums are relative to the first row: an offset costs no precision.
    Row<float> shift[2], rest[2], scale[2], zero[2];
    for (int v = 0; v < 2; ++v) {
      shift[v] = center ? load<float>(z[v] + j, extent) : Row<float>::all(0);
      rest[v] = sum_rows<float>(rows, [&](int64_t i) {
        const Row<float> value = load<float>(z[v] + j + i * stride[v], extent);
        prefetch(z[v] + j + (i + kAhead < rows ? i + kAhead : i) * stride[v]);
        copy(z[v] + j + i * stride[v], extent, row(v, i));
        return value - shift[v];
      });
      rest[v] = center ? rest[v] * Row<float>::all(1 / (float)rows) : Row<float>::all(0);
      const Row<float> square = sum_rows<float>(rows, [&](int64_t i) {
        const Row<float> d = load<float>(row(v, i), Whole{}) - shift[v] - rest[v];
        return d * d;
      });
      float s[kColumns];
      square.to(s);
      for (int k = 0; k < kColumns; ++k) s[k] = scaling.inverse_deviation(s[k] / (float)rows);
      scale[v] = Row<float>::of(s);
      store(scale[v], r[v] + j, extent);
      store(shift[v] + rest[v], mean[v] + j, extent);
      zero[v] = exact_shift(rows, shift[v] + rest[v], scale[v], scaling,
                            [&](int64_t i) { return load<float>(row(v, i), Whole{}); });
    }
    const Row<float> near = Row<float>::all(scaling.near);
    const Row<float> terms = sum_rows<float>(rows, [&](int64_t i) {
      Row<float> hat[2];
      for (int v = 0; v < 2; ++v) {
        const Row<float> value = load<float>(row(v, i), Whole{});
        hat[v] = (value - shift[v] - rest[v]) * scale[v];
        const Row<float> y = hat[v] * scale[v], high = rounded(y), low = rounded(y - high);
        offsets[v][b * rows + i] = sum_of((shift[v] - zero[v] + rest[v]) * (high + low));
        Pairs whole[kBlockSteps], parts[2][kBlockSteps];
        pack(value - zero[v], whole);
        pack(high, parts[0]);
        pack(low, parts[1]);
        for (int s = 0; s < kBlockSteps; ++s) {
          const int64_t step = b * kBlockSteps + s;
          uint32_t* to_x = x[v] + ((i / kDotColumns * steps + step) * kDotColumns + i % kDotColumns) * kPairs;
          uint32_t* to_y =
              y_panel[v] + ((i / kDotRows * steps + step) * kDotRows + i % kDotRows) * 2 * kPairs;
          *(Pairs*)to_x = whole[s];
          *(Pairs*)to_y = parts[0][s];
          *(Pairs*)(to_y + kPairs) = parts[1][s];
        }
      }
      return scaling.term(hat[0], hat[1], near);
    });
    float w[kColumns], p[kColumns], q[kColumns];
    terms.to(w);
    scale[0].to(p);
    scale[1].to(q);
    for (int k = 0; k < kColumns; ++k) w[k] = scaling.gap(w[k] / (float)rows, p[k], q[k]);
    store(Row<float>::of(w), gap + j, extent);
  }

  // Adds the panel's products of all rows with those of y's tile u that do not come after them.
  void add_panel(int v, int64_t u, int64_t steps, bool first) const {
    const int64_t k = u * kDotRows;
    for (int64_t t = k / kDotColumns; t < x_tiles(); ++t) {
      float products[kDotColumns][kDotRows];
      split_dots<native>(x[v] + t * steps * kDotColumns * kPairs,
                         y_panel[v] + u * steps * kDotRows * 2 * kPairs, steps, products[0]);
      for (int64_t i = t * kDotColumns, a = 0; a < kDotColumns && i < rows; ++a, ++i) {
        float* to = gram[v] + i * rows + k;
        for (int c = 0; c < kDotRows && k + c < rows; ++c)
          to[c] = first ? products[a][c] : to[c] + products[a][c];
      }
    }
  }

  double energy(int64_t i) const {
    double sum = 0;
    float *a = gram[0] + i * rows, *b = gram[1] + i * rows;
    for (int64_t k = 0; k <= i; ++k) {
      a[k] -= offset[0][k];
      b[k] -= offset[1][k];
      sum += (k < i ? 2 : 1) * ((double)a[k] * b[k]);
    }
    return sum;
  }

  // What lies above the diagonal, for the kSquare rows from i.
  void mirror(float* g, int64_t i) const {
    for (int64_t k = i; k < rows; ++k)
      for (int64_t t = i; t < i + kSquare && t < k; ++t) g[t * rows + k] = g[k * rows + t];
  }

  // The energy.
  double run(const bool (&wanted)[2]) const {
    const int64_t panel = kPanelBlocks * kColumns;
#pragma omp parallel num_threads(threads)
    {
      for (int64_t start = 0; start < columns; start += panel) {
        const int64_t stop = start + panel < columns ? start + panel : columns;
        const int64_t blocks = ratio_up(stop - start, kColumns), steps = blocks * kBlockSteps;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t j = start + b * kColumns;
          bfloat16* block = copies + omp_get_thread_num() * 2 * rows * kColumns;
          with_extent(columns, j, [&](auto extent) { standardise(j, b, steps, extent, block); });
        }
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < 2 * y_tiles(); ++t)
          add_panel((int)(t / y_tiles()), t % y_tiles(), steps, start == 0);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; ++i)
          for (int v = 0; v < 2; ++v) {
            float sum = start ? offset[v][i] : 0;
            for (int64_t b = 0; b < blocks; ++b) sum += offsets[v][b * rows + i];
            offset[v][i] = sum;
          }
      }
#pragma omp for schedule(dynamic, 16)
      for (int64_t i = 0; i < rows; ++i) energies[i] = energy(i);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < rows; i += kSquare)
        for (int v = 0; v < 2; ++v)
          if (wanted[v]) mirror(gram[v], i);
    }
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) total += energies[i];
    return total;
  }
};

}  // namespace

int barlow_twins_narrow_forward(bool native, const void* z_a, int64_t stride_a, const void* z_b,
                                int64_t stride_b, int64_t rows, int64_t columns,
                                const BarlowTwinsDefinition& definition, bool grad_a, bool grad_b, void* kept,
                                void* statistics, void* loss, void* components, int threads) {
  const auto with = [&](auto pass) {
    float *s = (float*)statistics, *gap = s + 2 * columns, *matrix = (float*)kept;
    pass.z[0] = (const bfloat16*)z_a;
    pass.z[1] = (const bfloat16*)z_b;
    pass.stride[0] = stride_a;
    pass.stride[1] = stride_b;
    pass.rows = rows;
    pass.columns = columns;
    pass.center = definition.center;
    for (int v = 0; v < 2; ++v) {
      pass.r[v] = s + v * columns;
      pass.mean[v] = s + (3 + v) * columns;
    }
    pass.gap = gap;
    pass.gram[0] = matrix;
    pass.gram[1] = matrix + grad_b * rows * rows;
    pass.threads = threads_for((1.0 + 0.015 * rows) * rows * columns, threads);
    const bool wanted[2] = {grad_b, grad_a};
    double energy;
    if (!with_memory([&](Arena& arena) { pass.lay_out(arena, wanted); }, [&] { energy = pass.run(wanted); }))
      return kNoMemory;
    if (!finite(gap, columns)) return kNotFinite;
    finish(gap, rows, columns, energy, true, definition, (float*)loss, (float*)components);
    return 0;
  };
  const Scaling<float> scaling(definition, rows);
#ifdef MMFAST_NATIVE_PAIRS
  if (native) return with(Forward<true>{{}, {}, 0, 0, false, scaling});
#endif
  return with(Forward<false>{{}, {}, 0, 0, false, scaling});
}

}  // namespace MMFAST_NS
