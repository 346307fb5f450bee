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
#include <omp.h>

#include "barlow_twins_loss.h"
#include "kernels.h"
#include "pairs.h"
#include "parallel.h"

namespace MMFAST_NS {
namespace {

constexpr int kColumns = kWidth<float>;      // of a block
constexpr int kSteps = 1024 / (2 * kPairs);  // vectors of pairs that a panel has of a row
constexpr int kBlockSteps = kColumns / (2 * kPairs);
constexpr int kPanelBlocks = kSteps / kBlockSteps;
constexpr int kAhead = 16;  // rows
constexpr int kSquare = 8;  // rows whose cache lines survive a walk down their columns

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t ratio_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Parts of one allocation.
struct Arena {
  char* start;
  int64_t size = 0;

  template <class T>
  T* take(int64_t count) {
    T* part = (T*)(start + size);
    size += up(count * sizeof(T), 64);
    return part;
  }
};

// lay_out(arena), once for the size and once for the addresses; false if there is no memory, else true after
// run().
template <class LayOut, class Run>
bool with_memory(LayOut lay_out, Run run) {
  Arena arena{0};
  lay_out(arena);
  char* memory = (char*)__builtin_malloc(arena.size + 64);
  if (!memory) return false;
  arena = {(char*)up((int64_t)memory, 64)};
  lay_out(arena);
  run();
  __builtin_free(memory);
  return true;
}

// body(Whole or Part) for the block of columns that begins at j.
template <class Body>
MMFAST_HD void with_extent(int64_t columns, int64_t j, Body body) {
  if (columns - j >= kColumns)
    body(Whole{});
  else
    body(Part{(int)(columns - j)});
}

// Asks for a block's part of a row: rows are far apart, and no hardware foresees them.
MMFAST_HD void prefetch(const bfloat16* row) {
  for (int j = 0; j < kColumns; j += 32) __builtin_prefetch(row + j);
}

MMFAST_HD void copy(const bfloat16* from, Whole, bfloat16* to) {
  __builtin_memcpy(to, from, kColumns * sizeof(bfloat16));
}
MMFAST_HD void copy(const bfloat16* from, Part part, bfloat16* to) {
  for (int k = 0; k < kColumns; ++k) to[k] = k < part.width ? from[k] : bfloat16{0};
}

MMFAST_HD float sum_of(const Row<float>& x) {
  Vector<float> sum = (x.v[0] + x.v[1]) + (x.v[2] + x.v[3]);
  return sum_in_place<kPairs>((float*)&sum);
}

// x in bf16; to the nearest, ties away from zero, as it matters to nobody here. NaN may become anything.
MMFAST_HD Row<float> rounded(const Row<float>& x) {
  Row<float> row;
  for (int i = 0; i < kVectors; ++i) row.v[i] = (Vector<float>)(((Pairs)x.v[i] + 0x8000u) & 0xFFFF0000u);
  return row;
}

// Numbers of bf16 as pairs: those of the first vector with those of the second, and so on.
MMFAST_HD void pack(const Row<float>& x, Pairs (&to)[kBlockSteps]) {
  for (int i = 0; i < kBlockSteps; ++i) to[i] = (Pairs)x.v[2 * i] >> 16 | (Pairs)x.v[2 * i + 1];
}

// Near the mean in columns that are constant or whose mean is large against 1 / r, so that value(i) less this
// is exact in bf16 for all rows i; else 0. All numbers from half the shift to twice it are so (Sterbenz
// 1974), and if a number lies beyond, the deviation is at least the mean's part of 2 sqrt(rows).
template <class Value>
MMFAST_HD Row<float> exact_shift(int64_t rows, const Row<float>& mean, const Row<float>& r,
                                 const Scaling<float>& scaling, Value value) {
  constexpr float kLarge = 2;
  const float r_of_constant = scaling.inverse_deviation(0);
  float m[kColumns], q[kColumns];
  mean.to(m);
  r.to(q);
  bool any = false;
  for (int k = 0; k < kColumns; ++k) {
    const float ratio = m[k] * q[k];
    if (ratio > kLarge || ratio < -kLarge || q[k] == r_of_constant)
      any = true;
    else
      m[k] = 0;
  }
  if (!any) return Row<float>::all(0);
  Row<float> shift = rounded(Row<float>::of(m));
  Pairs rest[kVectors] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const Row<float> d = value(i) - shift;
    for (int k = 0; k < kVectors; ++k) rest[k] |= (Pairs)d.v[k] & 0xFFFFu;
  }
  for (int k = 0; k < kVectors; ++k) shift.v[k] = (Vector<float>)((Pairs)shift.v[k] & (Pairs)(rest[k] == 0));
  return shift;
}

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

// A Gram matrix less its diagonal: the sum of two bf16 matrices, of whose rows there are the sums.
struct Operand {
  uint32_t* parts[2];
  float* sums[2];
};

// What a block that is tried has of sum g^2 and of what the second part of the Gram matrix adds to it.
struct Trial {
  double size, doubt;
};

template <bool native>
struct Gradient {
  struct View {
    const bfloat16* z;
    int64_t stride;
    const float *r, *mean, *gram;  // gram: of the other view
    bfloat16* grad;                // null if not wanted
  };
  View view[2];
  const float* gap;
  int64_t rows, columns;
  Scaling<float> scaling;
  Pull<float> pull;
  int threads;

  Operand operand[2];
  Trial* trials;
  uint32_t* rights;
  float* products;

  // Every kTried-th block is tried; few blocks are all computed with both parts.
  static constexpr int kTried = 32, kFew = 8;
  // Of the second part in the gradient: an eighth of a bit more than the gradient's own rounding, on average.
  static constexpr double kTolerance = 0x1p-9;

  int64_t blocks() const { return ratio_up(columns, kColumns); }
  int64_t depth() const { return ratio_up(rows, 2); }

  void lay_out(Arena& arena) {
    for (Operand& o : operand)
      for (int part = 0; part < 2; ++part) {
        o.parts[part] = arena.take<uint32_t>(rows * depth());
        o.sums[part] = arena.take<float>(rows);
      }
    trials = arena.take<Trial>(2 * ratio_up(blocks(), kTried));
    rights = arena.take<uint32_t>(threads * depth() * kColumns);
    products = arena.take<float>(threads * rows * kColumns);
  }

  // Row i of an operand.
  void split(const float* gram, int64_t i, const Operand& to) const {
    Row<float> sums[2] = {Row<float>::all(0), Row<float>::all(0)};
    for (int64_t k = 0; k < rows; k += kColumns)
      with_extent(rows, k, [&](auto extent) {
        float g[kColumns];
        load<float>(gram + i * rows + k, extent).to(g);
        if (k <= i && i < k + kColumns) g[i - k] = 0;
        Row<float> rest = Row<float>::of(g);
        for (int part = 0; part < 2; ++part) {
          const Row<float> value = rounded(rest);
          store(value, (bfloat16*)(to.parts[part] + i * depth()) + k, extent);
          sums[part] = sums[part] + value;
          rest = rest - value;
        }
      });
    if (rows % 2)
      for (int part = 0; part < 2; ++part) ((bfloat16*)(to.parts[part] + i * depth()))[rows] = {0};
    for (int part = 0; part < 2; ++part) to.sums[part][i] = sum_of(sums[part]);
  }

  // The gradient of columns j, j + 1, ... of view v, with one part of the Gram matrix or both.
  template <class Extent>
  MMFAST_HD void block(int v, int64_t j, Extent extent, bool both, Trial* trial, uint32_t* right,
                       float* m) const {
    const View &own = view[v], &partner = view[1 - v];
    const Operand& g = operand[v];
    const Row<float> r = load<float>(own.r + j, extent), true_mean = load<float>(own.mean + j, extent);
    const auto value = [&](int64_t i) { return load<float>(own.z + i * own.stride + j, extent); };
    // Below, z and its mean are relative to this.
    const Row<float> zero = exact_shift(rows, true_mean, r, scaling, value), mean = true_mean - zero;
    for (int64_t i = 0; i < depth(); ++i) {
      const Row<float> first = value(2 * i) - zero;
      const Row<float> second = 2 * i + 1 < rows ? value(2 * i + 1) - zero : Row<float>::all(0);
      for (int k = 0; k < kVectors; ++k)
        *(Pairs*)(right + i * kColumns + k * kPairs) = (Pairs)first.v[k] >> 16 | (Pairs)second.v[k];
    }
    const auto z_of = [&](int64_t i, int k) {
      const Pairs both = *(const Pairs*)(right + i / 2 * kColumns + k * kPairs);
      return (Vector<float>)(i % 2 ? both & 0xFFFF0000u : both << 16);
    };
    const Row<float> none = Row<float>::all(0);
    if (both) {
      Row<float> squares = none;
      multiply_pairs<native>(g.parts[1], right, rows, depth(), false, m,
                             [&](int64_t i, int k, const Vector<float>& sum) {
                               const Vector<float> x = sum - g.sums[1][i] * mean.v[k];
                               squares.v[k] += x * x;
                               *(Vector<float>*)(m + i * kColumns + k * kPairs) = sum;
                             });
      const Row<float> factor = r * r * Row<float>::all(pull.alpha);
      if (trial) trial->doubt = sum_of(squares * factor * factor);
    }
    Row<float> sums = none;
    multiply_pairs<native>(
        g.parts[0], right, rows, depth(), both, m, [&](int64_t i, int k, const Vector<float>& product) {
          const float sum = g.sums[0][i] + (both ? g.sums[1][i] : 0);
          const Vector<float> hat = (z_of(i, k) - mean.v[k]) * r.v[k];
          const Vector<float> x = (product - sum * mean.v[k]) * r.v[k] + own.gram[i * rows + i] * hat;
          *(Vector<float>*)(m + i * kColumns + k * kPairs) = x;
          sums.v[k] += x * hat;
        });
    float p[kColumns], w[kColumns], q[kColumns];
    sums.to(p);
    load<float>(gap + j, extent).to(w);
    r.to(q);
    for (int k = 0; k < kColumns; ++k) {
      const ColumnGradient<float> c = pull.column(p[k] / (float)rows, w[k], scaling.projection(q[k]));
      p[k] = c.own;
      w[k] = c.weight;
    }
    // r may be so large that its square is not finite.
    const Row<float> x = r * Row<float>::all(pull.alpha), y = r * Row<float>::of(w),
                     s = r * Row<float>::of(p);
    const Row<float> other_r = load<float>(partner.r + j, extent);
    const Row<float> mu = load<float>(partner.mean + j, extent);
    Row<float> squares = none;
    for (int64_t i = 0; i < rows; ++i) {
      Row<float> z;
      for (int k = 0; k < kVectors; ++k) z.v[k] = z_of(i, k);
      const Row<float> gradient =
          x * Row<float>::of(m + i * kColumns) -
          y * ((load<float>(partner.z + i * partner.stride + j, extent) - mu) * other_r) -
          s * ((z - mean) * r);
      store(gradient, own.grad + i * columns + j, extent);
      if (v) {
        prefetch(own.z + i * own.stride + j + kColumns);
        prefetch(partner.z + i * partner.stride + j + kColumns);
      }
      if (trial) squares = squares + gradient * gradient;
    }
    if (trial) trial->size = sum_of(squares);
  }

  void any_block(int v, int64_t b, bool both, Trial* trial) const {
    const int64_t worker = omp_get_thread_num();
    with_extent(columns, b * kColumns, [&](auto extent) {
      block(v, b * kColumns, extent, both, trial, rights + worker * depth() * kColumns,
            products + worker * rows * kColumns);
    });
  }

  void run() const {
    const int64_t tried = ratio_up(blocks(), kTried);
    const bool few = blocks() < kFew;
    bool both[2] = {few, few};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < 2 * rows; ++i)
        if (view[i % 2].grad) split(view[i % 2].gram, i / 2, operand[i % 2]);
      if (!few) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < 2 * tried; ++t)
          if (view[t % 2].grad) any_block(t % 2, t / 2 * kTried, true, trials + t);
#pragma omp single
        for (int v = 0; v < 2; ++v) {
          Trial sum{0, 0};
          for (int64_t t = v; t < 2 * tried && view[v].grad; t += 2) {
            sum.size += trials[t].size;
            sum.doubt += trials[t].doubt;
          }
          both[v] = !(sum.doubt <= kTolerance * kTolerance * sum.size);
        }
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < 2 * blocks(); ++t)
        if (view[t % 2].grad && (few || t / 2 % kTried)) any_block(t % 2, t / 2, both[t % 2], 0);
    }
  }
};

template <bool yes>
struct Native {
  static constexpr bool value = yes;
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

bool barlow_twins_narrow_backward(bool native, const void* z_a, int64_t stride_a, const void* z_b,
                                  int64_t stride_b, const void* matrix_a, const void* matrix_b,
                                  const void* statistics, const void* upstream, int64_t rows, int64_t columns,
                                  const BarlowTwinsDefinition& definition, void* grad_a, void* grad_b,
                                  int threads) {
  const float* s = (const float*)statistics;
  const auto with = [&](auto hardware) {
    using Pass = Gradient<decltype(hardware)::value>;
    Pass pass{
        {{(const bfloat16*)z_a, stride_a, s, s + 3 * columns, (const float*)matrix_a, (bfloat16*)grad_a},
         {(const bfloat16*)z_b, stride_b, s + columns, s + 4 * columns, (const float*)matrix_b,
          (bfloat16*)grad_b}},
        s + 2 * columns,
        rows,
        columns,
        Scaling<float>(definition, rows),
        Pull<float>(definition, rows, true, *(const float*)upstream),
        threads};
    return with_memory([&](Arena& arena) { pass.lay_out(arena); }, [&] { pass.run(); });
  };
#ifdef MMFAST_NATIVE_PAIRS
  if (native) return with(Native<true>());
#endif
  return with(Native<false>());
}

}  // namespace MMFAST_NS
