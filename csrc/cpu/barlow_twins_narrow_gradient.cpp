// The gradient of the Gram form for bf16 embeddings: barlow_twins_narrow.cpp has the notation.
#include "barlow_twins_narrow.h"
#include "kernels.h"

namespace MMFAST_NS {
namespace {

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
