// The Gram form of Barlow Twins on the CPU for bf16 embeddings, with bf16 operands of all matrix products.
//
// Embeddings are exact operands, hats are not. With column means mu, â = (z - mu) r and y = r â:
//   ÂÂ' = ZY' - 1 (Y mu)'             y is split into the sum of two bf16 numbers, 16 bits together
//   (B̂B̂')Â = (B̂B̂'Z - B̂B̂'1 mu') r   B̂B̂' is rounded to bf16, less its diagonal, and B̂B̂'1 is that of it
// Rounding B̂B̂' costs the gradient about as much as its own rounding to bf16 does, unless most of the product
// cancels in the projection on â (few directions in the features, B << D). So blocks of columns are tried
// first, and where the error is seen to be larger, B̂B̂' is split, too.
//
// As in barlow_twins.cpp, results depend neither on the number of threads nor on chance.
#include <omp.h>

#include "blocks.h"
#include "kernels.h"
#include "pairs.h"

namespace MMFAST_NS {
namespace {

constexpr int kColumns = kWidth<float>;   // of a block
constexpr int kSteps = 1024 / (2 * kPairs);  // vectors of pairs that a panel has of a row
constexpr int kBlockSteps = kColumns / (2 * kPairs);
constexpr int kPanelBlocks = kSteps / kBlockSteps;

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

MMFAST_HD float sum_of(const Row<float>& x) {
  Vector<float> sum = (x.v[0] + x.v[1]) + (x.v[2] + x.v[3]);
  return sum_in_place<kPairs>((float*)&sum);
}

MMFAST_HD Row<float> rounded(const Row<float>& x, bfloat16* to) {
  float values[kColumns];
  x.to(values);
  for (int j = 0; j < kColumns; ++j) {
    to[j] = Scalar<bfloat16>::store(values[j]);
    values[j] = Scalar<bfloat16>::load(to[j]);
  }
  return Row<float>::of(values);
}

template <bool native>
struct Forward {
  const bfloat16* z[2];
  int64_t stride[2], rows, columns;
  bool center;
  Scaling<float> scaling;
  float *r[2], *mean[2], *deficit, *gram[2];  // gram: (B, B), null if not wanted
  int threads;

  float *centred_rows, *offsets[2], *offset[2];
  uint32_t *x[2], *y[2];
  double* energies;

  int64_t x_tiles() const { return ratio_up(rows, kDotRows); }
  int64_t y_tiles() const { return ratio_up(rows, kDotColumns); }

  void lay_out(Arena& arena, const bool (&wanted)[2]) {
    centred_rows = arena.take<float>(threads * 2 * rows * kColumns);
    energies = arena.take<double>(rows);
    for (int v = 0; v < 2; ++v) {
      offsets[v] = arena.take<float>(kPanelBlocks * rows);
      offset[v] = arena.take<float>(rows);
      x[v] = arena.take<uint32_t>(x_tiles() * kSteps * kDotRows * kPairs);
      y[v] = arena.take<uint32_t>(y_tiles() * kSteps * kDotColumns * 2 * kPairs);
      if (!wanted[v]) gram[v] = arena.take<float>(rows * rows);
    }
  }

  // Statistics of columns j, j + 1, ..., which are block b of a panel of `steps`, and their part of it.
  template <class Extent>
  MMFAST_HD void standardise(int64_t j, int64_t b, int64_t steps, Extent extent, float* block) const {
    float* d[2] = {block, block + rows * kColumns};
    Row<float> scale[2];
    for (int v = 0; v < 2; ++v) {
      scale[v] =
          centred<float>(z[v] + j, stride[v], rows, extent, center, scaling, d[v], mean[v] + j);
      store(scale[v], r[v] + j, extent);
    }
    const Row<float> known = Row<float>::all(scaling.known);
    const Row<float> terms = sum_rows<float>(rows, [&](int64_t i) {
      return scaling.term(Row<float>::of(d[0] + i * kColumns) * scale[0],
                          Row<float>::of(d[1] + i * kColumns) * scale[1], known);
    });
    float w[kColumns], p[kColumns], q[kColumns];
    terms.to(w);
    scale[0].to(p);
    scale[1].to(q);
    for (int k = 0; k < kColumns; ++k) w[k] = scaling.one_minus_c(w[k] / (float)rows, p[k], q[k]);
    store(Row<float>::of(w), deficit + j, extent);
    for (int v = 0; v < 2; ++v) {
      const Row<float> mu = load<float>(mean[v] + j, extent);
      for (int64_t i = 0; i < rows; ++i) {
        const Row<float> value = Row<float>::of(d[v] + i * kColumns) * scale[v] * scale[v];
        bfloat16 parts[3][kColumns];
        rounded(load<float>(z[v] + j + i * stride[v], extent), parts[0]);
        const Row<float> high = rounded(value, parts[1]);
        const Row<float> low = rounded(value - high, parts[2]);
        offsets[v][b * rows + i] = sum_of(mu * (high + low));
        for (int s = 0; s < kBlockSteps; ++s) {
          const int64_t step = b * kBlockSteps + s;
          uint32_t* to_x = x[v] + ((i / kDotRows * steps + step) * kDotRows + i % kDotRows) * kPairs;
          uint32_t* to_y =
              y[v] + ((i / kDotColumns * steps + step) * kDotColumns + i % kDotColumns) * 2 * kPairs;
          *(Pairs*)to_x = ((const Pairs*)parts[0])[s];
          *(Pairs*)to_y = ((const Pairs*)parts[1])[s];
          *(Pairs*)(to_y + kPairs) = ((const Pairs*)parts[2])[s];
        }
      }
    }
  }

  // Adds the panel's products of all rows with those of y's tile u that do not come after them.
  void add_panel(int v, int64_t u, int64_t steps, bool first) const {
    const int64_t k = u * kDotColumns;
    for (int64_t t = k / kDotRows; t < x_tiles(); ++t) {
      float products[kDotRows][kDotColumns];
      split_dots<native>(x[v] + t * steps * kDotRows * kPairs, y[v] + u * steps * kDotColumns * 2 * kPairs,
                         steps, products[0]);
      for (int64_t i = t * kDotRows, a = 0; a < kDotRows && i < rows; ++a, ++i) {
        float* to = gram[v] + i * rows + k;
        for (int c = 0; c < kDotColumns && k + c < rows; ++c)
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

  // What lies above the diagonal, for rows i, i + 1, ... of a square of them.
  void mirror(float* g, int64_t i) const {
    const int64_t stop = i + kColumns < rows ? i + kColumns : rows;
    for (int64_t k = i; k < rows; ++k)
      for (int64_t t = i; t < stop && t < k; ++t) g[t * rows + k] = g[k * rows + t];
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
        for (int64_t b = 0; b < blocks; ++b)
          with_extent(columns, start + b * kColumns, [&](auto extent) {
            standardise(start + b * kColumns, b, steps, extent,
                        centred_rows + omp_get_thread_num() * 2 * rows * kColumns);
          });
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < 2 * y_tiles(); ++t) add_panel(t % 2, t / 2, steps, start == 0);
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
      for (int64_t i = 0; i < rows; i += kColumns)
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
  const float* deficit;
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
    double sums[2] = {0, 0};
    uint16_t *high = (uint16_t*)(to.parts[0] + i * depth()), *low = (uint16_t*)(to.parts[1] + i * depth());
    for (int64_t k = 0; k < 2 * depth(); ++k) {
      const float g = k < rows && k != i ? gram[i * rows + k] : 0;
      const bfloat16 h = Scalar<bfloat16>::store(g);
      const float rest = g - Scalar<bfloat16>::load(h);
      const bfloat16 l = Scalar<bfloat16>::store(rest);
      high[k] = h.bits;
      low[k] = l.bits;
      sums[0] += Scalar<bfloat16>::load(h);
      sums[1] += Scalar<bfloat16>::load(l);
    }
    to.sums[0][i] = (float)sums[0];
    to.sums[1][i] = (float)sums[1];
  }

  // The gradient of columns j, j + 1, ... of view v, with one part of the Gram matrix or both.
  template <class Extent>
  MMFAST_HD void block(int v, int64_t j, Extent extent, bool both, Trial* trial, uint32_t* right,
                       float* m) const {
    const View &own = view[v], &partner = view[1 - v];
    const Operand& g = operand[v];
    for (int64_t i = 0; i < depth(); ++i) {
      const bfloat16* row = own.z + 2 * i * own.stride + j;
      for (int c = 0; c < kColumns; ++c)
        right[i * kColumns + c] = exists(extent, c) ? row[c].bits : 0;
      if (2 * i + 1 < rows)
        for (int c = 0; c < kColumns; ++c)
          right[i * kColumns + c] |= exists(extent, c) ? (uint32_t)row[own.stride + c].bits << 16 : 0;
    }
    const Row<float> r = load<float>(own.r + j, extent), mean = load<float>(own.mean + j, extent);
    if (both) {
      multiply_pairs<native>(g.parts[1], right, rows, depth(), false, m);
      if (trial) {
        const Row<float> squares = sum_rows<float>(rows, [&](int64_t i) {
          const Row<float> x = Row<float>::of(m + i * kColumns) - Row<float>::all(g.sums[1][i]) * mean;
          return x * x;
        });
        const Row<float> factor = r * r * Row<float>::all(pull.alpha);
        trial->doubt = sum_of(squares * factor * factor);
      }
    }
    multiply_pairs<native>(g.parts[0], right, rows, depth(), both, m);

    const auto hat = [&](const View& view, int64_t i, const Row<float>& mu, const Row<float>& scale) {
      return (load<float>(view.z + i * view.stride + j, extent) - mu) * scale;
    };
    const Row<float> sums = sum_rows<float>(rows, [&](int64_t i) {
      const float sum = g.sums[0][i] + (both ? g.sums[1][i] : 0);
      const Row<float> a = hat(own, i, mean, r);
      const Row<float> x = (Row<float>::of(m + i * kColumns) - Row<float>::all(sum) * mean) * r +
                           Row<float>::all(own.gram[i * rows + i]) * a;
      x.to(m + i * kColumns);
      return x * a;
    });
    float p[kColumns], w[kColumns], q[kColumns];
    sums.to(p);
    load<float>(deficit + j, extent).to(w);
    r.to(q);
    for (int k = 0; k < kColumns; ++k) {
      const ColumnGradient<float> c = pull.column(p[k] / (float)rows, w[k], scaling.projection(q[k]));
      p[k] = c.own;
      w[k] = c.weight;
    }
    const Row<float> x = r * Row<float>::all(pull.alpha), y = r * Row<float>::of(w), s = r * Row<float>::of(p);
    const Row<float> other = load<float>(partner.r + j, extent), mu = load<float>(partner.mean + j, extent);
    const Row<float> squares = sum_rows<float>(rows, [&](int64_t i) {
      const Row<float> gradient = x * Row<float>::of(m + i * kColumns) - y * hat(partner, i, mu, other) -
                                  s * hat(own, i, mean, r);
      store(gradient, own.grad + i * columns + j, extent);
      return gradient * gradient;
    });
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
    float *s = (float*)statistics, *deficit = s + 2 * columns, *matrix = (float*)kept;
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
    pass.deficit = deficit;
    pass.gram[0] = matrix;
    pass.gram[1] = matrix + grad_b * rows * rows;
    pass.threads = threads;
    const bool wanted[2] = {grad_b, grad_a};
    double energy;
    if (!with_memory([&](Arena& arena) { pass.lay_out(arena, wanted); }, [&] { energy = pass.run(wanted); }))
      return 2;
    float total = 0;
    for (int64_t j = 0; j < columns; ++j) total += deficit[j];
    finish(deficit, rows, columns, energy, true, definition, (float*)loss, (float*)components);
    return total - total == 0 ? 0 : 1;
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
    Pass pass{{{(const bfloat16*)z_a, stride_a, s, s + 3 * columns, (const float*)matrix_a, (bfloat16*)grad_a},
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
