// The gradient of Barlow Twins on the CPU; as in barlow_twins.cpp, each block is the work of one thread.
#include "barlow_twins_blocks.h"
#include "kernels.h"

namespace MMFAST_NS {
namespace {

// A view in the backward pass. matrix: in Gram form that of the other view, in direct form the product m,
// which may be `grad`. grad: null if not wanted.
template <class C, class T>
struct View {
  const C *hat, *r, *matrix;
  T* grad;
};

template <class C, class T>
struct Backward {
  View<C, T> a, b;
  const C* gap;
  int64_t rows, columns;
  Scaling<C> scaling;
  Pull<C> pull;

  // The gradient of one block of columns, from m, own and partner with rows of `stride`.
  template <class Stored, class Extent>
  MMFAST_HD void gradient(const C* m, const C* own, const C* partner, int64_t stride, Stored stored,
                          const C* r, int64_t j, Extent extent, T* grad) const {
    const Row<C> products = sum_rows<C>(
        rows, [&](int64_t i) { return load<C>(m + i * stride, stored) * load<C>(own + i * stride, stored); });
    const Row<C> scale = load<C>(r + j, extent);
    C p[kWidth<C>], w[kWidth<C>], q[kWidth<C>];
    products.to(p);
    load<C>(gap + j, extent).to(w);
    scale.to(q);
    const Scaling<C> scaling = this->scaling;
    const Pull<C> pull = this->pull;
    for (int k = 0; k < kWidth<C>; ++k) {
      const ColumnGradient<C> g = pull.column(p[k] / (C)rows, w[k], scaling.projection(q[k]));
      p[k] = g.own;
      w[k] = g.weight;
    }
    const Row<C> x = scale * Row<C>::all(pull.alpha), y = scale * Row<C>::of(w), z = scale * Row<C>::of(p);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = i * stride;
      Row<C> g =
          x * load<C>(m + at, stored) - y * load<C>(partner + at, stored) - z * load<C>(own + at, stored);
      store(g, grad + i * columns + j, extent);
    }
  }

  template <class Extent>
  MMFAST_HD void direct(const View<C, T>& own, const View<C, T>& partner, int64_t j, Extent extent) const {
    if (own.grad)
      gradient(own.matrix + j, own.hat + j, partner.hat + j, columns, extent, own.r, j, extent, own.grad);
  }

  template <class Extent>
  MMFAST_HD void gram(int64_t j, Extent extent, C* scratch) const {
    constexpr int kStride = kWidth<C>;
    C *own = scratch, *partner = own + rows * kStride, *m = partner + rows * kStride;
    for (int64_t i = 0; i < rows; ++i) {
      load<C>(a.hat + i * columns + j, extent).to(own + i * kStride);
      load<C>(b.hat + i * columns + j, extent).to(partner + i * kStride);
    }
    if (a.grad) {
      multiply(a.matrix, rows, own, rows, rows, m);
      gradient(m, own, partner, kStride, Whole{}, a.r, j, extent, a.grad);
    }
    if (b.grad) {
      multiply(b.matrix, rows, partner, rows, rows, m);
      gradient(m, partner, own, kStride, Whole{}, b.r, j, extent, b.grad);
    }
  }

  // False if there is no memory.
  bool run(bool gram_form, int most_threads) const {
    const int threads = threads_for((0.3 + (gram_form ? 0.025 * rows : 0)) * rows * columns, most_threads);
    if (gram_form)
      return for_blocks<C>(1, columns, 3 * rows, threads,
                           [&](int, int64_t j, auto extent, C* scratch) { gram(j, extent, scratch); });
    return for_blocks<C>(2, columns, 0, threads, [&](int view, int64_t j, auto extent, C*) {
      view ? direct(b, a, j, extent) : direct(a, b, j, extent);
    });
  }
};

}  // namespace

bool barlow_twins_backward(int dtype, bool gram, const void* matrix_a, const void* matrix_b, const void* hat,
                           const void* statistics, const void* upstream, int64_t rows, int64_t columns,
                           const BarlowTwinsDefinition& definition, void* grad_a, void* grad_b, int threads) {
  return with_types(dtype, [&](auto element, auto compute) {
    using T = decltype(element);
    using C = decltype(compute);
    const C *hat_a = (const C*)hat, *hat_b = hat_a + rows * columns, *r = (const C*)statistics;
    return Backward<C, T>{{hat_a, r, (const C*)matrix_a, (T*)grad_a},
                          {hat_b, r + columns, (const C*)matrix_b, (T*)grad_b},
                          r + 2 * columns,
                          rows,
                          columns,
                          Scaling<C>(definition, rows),
                          Pull<C>(definition, rows, gram, *(const C*)upstream)}
        .run(gram, threads);
  });
}

}  // namespace MMFAST_NS
