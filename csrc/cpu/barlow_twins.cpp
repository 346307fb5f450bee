// Barlow Twins on the CPU: the passes between the matrix products.
//
// Columns are processed in blocks of 256 bytes, each by one thread and always in the same order, so results
// depend neither on the number of threads nor on chance.
#include "../barlow_twins.h"

#include "../scalar.h"
#include "kernels.h"

namespace MMFAST_NS {
namespace {

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

constexpr int kVectors = 4;
// Shares into which the rows of a matrix are cut to sum over it; more than any machine has use for.
constexpr int kShares = 128;
// Rows that are summed in a row before the sum moves on: bounds the growth of rounding errors.
constexpr int64_t kRun = 64;

template <class C>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
};

// One row of a block of columns, in registers; C is float or double.
template <class C>
struct Row {
  using Vector = typename VectorOf<C>::type;
  static constexpr int kLanes = VECTOR_BYTES / sizeof(C);
  static constexpr int kWidth = kVectors * kLanes;
  Vector v[kVectors];

  MMFAST_HD static Row of(const C* p) {
    Row row;
    for (int i = 0; i < kVectors; ++i) row.v[i] = *(const Vector*)(p + i * kLanes);
    return row;
  }
  MMFAST_HD static Row all(C x) {
    Row row;
    for (int i = 0; i < kVectors; ++i) row.v[i] = Vector{} + x;
    return row;
  }
  MMFAST_HD void to(C* p) const {
    for (int i = 0; i < kVectors; ++i) *(Vector*)(p + i * kLanes) = v[i];
  }
};

template <class C>
MMFAST_HD Row<C> operator+(const Row<C>& x, const Row<C>& y) {
  Row<C> row;
  for (int i = 0; i < kVectors; ++i) row.v[i] = x.v[i] + y.v[i];
  return row;
}
template <class C>
MMFAST_HD Row<C> operator-(const Row<C>& x, const Row<C>& y) {
  Row<C> row;
  for (int i = 0; i < kVectors; ++i) row.v[i] = x.v[i] - y.v[i];
  return row;
}
template <class C>
MMFAST_HD Row<C> operator*(const Row<C>& x, const Row<C>& y) {
  Row<C> row;
  for (int i = 0; i < kVectors; ++i) row.v[i] = x.v[i] * y.v[i];
  return row;
}

// How many columns of a block exist: all of them (known to the compiler), or fewer in the last block.
struct Whole {};
struct Part {
  int width;
};
MMFAST_HD bool exists(Whole, int) { return true; }
MMFAST_HD bool exists(Part part, int j) { return j < part.width; }

// A row of T from memory; columns that do not exist are not read and come out as zero.
template <class C, class T, class Extent>
MMFAST_HD Row<C> load(const T* p, Extent extent) {
  C values[Row<C>::kWidth];
  for (int j = 0; j < Row<C>::kWidth; ++j) values[j] = exists(extent, j) ? Scalar<T>::load(p[j]) : 0;
  return Row<C>::of(values);
}

template <class C, class T, class Extent>
MMFAST_HD void store(const Row<C>& row, T* p, Extent extent) {
  C values[Row<C>::kWidth];
  row.to(values);
  for (int j = 0; j < Row<C>::kWidth; ++j)
    if (exists(extent, j)) p[j] = Scalar<T>::store(values[j]);
}

// The sum of term(i) over the rows i.
template <class C, class Term>
MMFAST_HD Row<C> sum_rows(int64_t rows, Term term) {
  Row<C> total = Row<C>::all(0);
  for (int64_t start = 0; start < rows; start += kRun) {
    int64_t stop = start + kRun < rows ? start + kRun : rows;
    Row<C> run = Row<C>::all(0);
    for (int64_t i = start; i < stop; ++i) run = run + term(i);
    total = total + run;
  }
  return total;
}

// Copies one block of a view to `block`, less its column means if `center`, and returns r.
// Sums are relative to the first row: a constant column comes out exactly zero, and an offset costs no
// precision.
template <class C, class T, class Extent>
MMFAST_HD Row<C> centred(const T* z, int64_t stride, int64_t rows, Extent extent, bool center, C eps,
                         C* block) {
  constexpr int kWidth = Row<C>::kWidth;
  const Row<C> shift = center ? load<C>(z, extent) : Row<C>::all(0);
  const Row<C> sum = sum_rows<C>(rows, [&](int64_t i) {
    Row<C> x = load<C>(z + i * stride, extent) - shift;
    x.to(block + i * kWidth);
    return x;
  });
  const Row<C> mean = center ? sum * Row<C>::all(1 / (C)rows) : Row<C>::all(0);
  const Row<C> square = sum_rows<C>(rows, [&](int64_t i) {
    Row<C> d = Row<C>::of(block + i * kWidth) - mean;
    d.to(block + i * kWidth);
    return d * d;
  });
  C r[kWidth];
  square.to(r);
  for (int j = 0; j < kWidth; ++j) r[j] = inverse_deviation(r[j] / (C)rows, eps);
  return Row<C>::of(r);
}

template <class C, class T>
struct Standardise {
  const T *z_a, *z_b;
  int64_t stride_a, stride_b, rows, columns;
  bool center;
  C eps;
  C *hat_a, *hat_b, *r_a, *r_b, *deficit;

  template <class Extent>
  MMFAST_HD void block(int64_t j, Extent extent, C* a, C* b) const {
    constexpr int kWidth = Row<C>::kWidth;
    const Row<C> ra = centred<C>(z_a + j, stride_a, rows, extent, center, eps, a);
    const Row<C> rb = centred<C>(z_b + j, stride_b, rows, extent, center, eps, b);
    const Row<C> square = sum_rows<C>(rows, [&](int64_t i) {
      Row<C> x = Row<C>::of(a + i * kWidth) * ra;
      Row<C> y = Row<C>::of(b + i * kWidth) * rb;
      store(x, hat_a + i * columns + j, extent);
      store(y, hat_b + i * columns + j, extent);
      return (x - y) * (x - y);
    });
    C d[kWidth], r[kWidth], q[kWidth];
    square.to(d);
    ra.to(r);
    rb.to(q);
    for (int k = 0; k < kWidth; ++k) d[k] = one_minus_c(d[k] / (C)rows, r[k], q[k], eps);
    store(ra, r_a + j, extent);
    store(rb, r_b + j, extent);
    store(Row<C>::of(d), deficit + j, extent);
  }

  // False if there is no memory.
  bool run(int threads) const {
    constexpr int kWidth = Row<C>::kWidth;
    bool memory = true;
#pragma omp parallel num_threads(threads)
    {
      C* a = (C*)__builtin_malloc(2 * rows * kWidth * sizeof(C));
      C* b = a + rows * kWidth;
      if (!a) {
#pragma omp atomic write
        memory = false;
      }
#pragma omp for schedule(static)
      for (int64_t j = 0; j < columns; j += kWidth) {
        if (!a) continue;
        if (columns - j >= kWidth)
          block(j, Whole{}, a, b);
        else
          block(j, Part{(int)(columns - j)}, a, b);
      }
      __builtin_free(a);
    }
    return memory;
  }
};

// The gradient of one view; m may be `out`.
template <class C, class T>
struct View {
  const C *m, *own, *partner, *r;
  T* out;
};

template <class C, class T>
struct StandardiseBackward {
  View<C, T> views[2];
  const C* deficit;
  int64_t rows, columns;
  C alpha, beta, diagonal;

  template <class Extent>
  MMFAST_HD void block(const View<C, T>& view, int64_t j, Extent extent) const {
    constexpr int kWidth = Row<C>::kWidth;
    const Row<C> products = sum_rows<C>(rows, [&](int64_t i) {
      return load<C>(view.m + i * columns + j, extent) * load<C>(view.own + i * columns + j, extent);
    });
    C p[kWidth], w[kWidth];
    products.to(p);
    load<C>(deficit + j, extent).to(w);
    for (int k = 0; k < kWidth; ++k) {
      ColumnGradient<C> g = column_gradient(p[k] / (C)rows, w[k], alpha, beta, diagonal);
      p[k] = g.projection;
      w[k] = g.weight;
    }
    const Row<C> r = load<C>(view.r + j, extent);
    const Row<C> a = r * Row<C>::all(alpha), b = r * Row<C>::of(w), c = r * Row<C>::of(p);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = i * columns + j;
      Row<C> g = a * load<C>(view.m + at, extent) - b * load<C>(view.partner + at, extent) -
                 c * load<C>(view.own + at, extent);
      store(g, view.out + at, extent);
    }
  }

  void run(int threads) const {
    constexpr int kWidth = Row<C>::kWidth;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < columns; j += kWidth) {
      for (const View<C, T>& view : views) {
        if (!view.m) continue;
        if (columns - j >= kWidth)
          block(view, j, Whole{});
        else
          block(view, j, Part{(int)(columns - j)});
      }
    }
  }
};

// Inner product of two contiguous stretches; y is copied to `keep` unless that is null.
template <class C>
MMFAST_HD double inner(const C* x, const C* y, int64_t n) {
  constexpr int kWidth = Row<C>::kWidth;
  Row<C> sum = Row<C>::all(0);
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) sum = sum + load<C>(x + j, Whole{}) * load<C>(y + j, Whole{});
  const Part rest{(int)(n - j)};
  sum = sum + load<C>(x + j, rest) * load<C>(y + j, rest);
  C lanes[kWidth];
  sum.to(lanes);
  double total = 0;
  for (int k = 0; k < kWidth; ++k) total += lanes[k];
  return total;
}

template <class C>
void copy(const C* from, int64_t n, C* to) {
  constexpr int kWidth = Row<C>::kWidth;
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) store(load<C>(from + j, Whole{}), to + j, Whole{});
  const Part rest{(int)(n - j)};
  store(load<C>(from + j, rest), to + j, rest);
}

// The sum of term(i) over the rows of a matrix, in an order that does not depend on `threads`.
template <class Term>
double sum_over_rows(int64_t rows, int threads, Term term) {
  double shares[kShares];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int s = 0; s < kShares; ++s) {
    shares[s] = 0;
    for (int64_t i = rows * s / kShares; i < rows * (s + 1) / kShares; ++i) shares[s] += term(i);
  }
  double total = 0;
  for (int s = 0; s < kShares; ++s) total += shares[s];
  return total;
}

// The loss, and its components as in kernels.h. `energy` is the sum of the squares of B C; with_diagonal: of
// all.
template <class C>
void finish(const C* deficit, int64_t rows, int64_t columns, double energy, bool with_diagonal, double lambd,
            C* loss, C* components) {
  double on = 0, trace = 0, diagonal = 0;
  for (int64_t j = 0; j < columns; ++j) {
    double d = deficit[j], c = 1 - d;
    on += d * d;
    trace += c;
    diagonal += c * c;
  }
  double off = energy / rows / rows - (with_diagonal ? diagonal : 0);
  off = off < 0 ? 0 : off;
  const double pairs = columns > 1 ? (double)columns * (columns - 1) : 1;
  *loss = (C)(on + lambd * off);
  components[0] = *loss;
  components[1] = (C)on;
  components[2] = (C)off;
  components[3] = (C)(trace / columns);
  components[4] = (C)square_root(off / pairs);
}

}  // namespace

int barlow_twins_standardise(int dtype, const void* z_a, int64_t stride_a, const void* z_b, int64_t stride_b,
                             int64_t rows, int64_t columns, bool center, double eps, void* hat,
                             void* statistics, int threads) {
  auto run = [&](auto element, auto compute) {
    using T = decltype(element);
    using C = decltype(compute);
    C *s = (C*)statistics, *hats = (C*)hat;
    const bool memory = Standardise<C, T>{(const T*)z_a,
                                          (const T*)z_b,
                                          stride_a,
                                          stride_b,
                                          rows,
                                          columns,
                                          center,
                                          (C)eps,
                                          hats,
                                          hats + rows * columns,
                                          s,
                                          s + columns,
                                          s + 2 * columns}
                            .run(threads);
    C total = 0;
    for (int64_t j = 0; j < columns; ++j) total += s[2 * columns + j];
    return !memory ? 2 : total - total == 0 ? 0 : 1;
  };
  switch (dtype) {
    case kFloat64:
      return run(double(), double());
    case kBFloat16:
      return run(bfloat16(), float());
    case kFloat16:
      return run(float16(), float());
    default:
      return run(float(), float());
  }
}

void barlow_twins_gram_energy(bool wide, const void* gram_a, const void* gram_b, const void* statistics,
                              int64_t rows, int64_t columns, double lambd, bool grad_a, bool grad_b,
                              void* kept, void* loss, void* components, int threads) {
  auto run = [&](auto compute) {
    using C = decltype(compute);
    const C *a = (const C*)gram_a, *b = (const C*)gram_b;
    C *keep_b = grad_a ? (C*)kept : 0, *keep_a = grad_b ? (C*)kept + grad_a * rows * rows : 0;
    const double energy = sum_over_rows(rows, threads, [&](int64_t i) {
      const int64_t at = i * rows;
      if (keep_b) copy(b + at, rows, keep_b + at);
      if (keep_a) copy(a + at, rows, keep_a + at);
      return inner(a + at, b + at, rows);
    });
    finish((const C*)statistics + 2 * columns, rows, columns, energy, true, lambd, (C*)loss, (C*)components);
  };
  wide ? run(double()) : run(float());
}

void barlow_twins_correlation_energy(bool wide, void* p, const void* statistics, int64_t rows,
                                     int64_t columns, double lambd, void* loss, void* components,
                                     int threads) {
  auto run = [&](auto compute) {
    using C = decltype(compute);
    const double energy = sum_over_rows(columns, threads, [&](int64_t i) {
      C* row = (C*)p + i * columns;
      row[i] = 0;
      return inner(row, row, columns);
    });
    finish((const C*)statistics + 2 * columns, rows, columns, energy, false, lambd, (C*)loss, (C*)components);
  };
  wide ? run(double()) : run(float());
}

void barlow_twins_standardise_backward(int dtype, const void* m_a, const void* m_b, const void* hat,
                                       const void* statistics, const void* upstream, int64_t rows,
                                       int64_t columns, double lambd, bool with_diagonal, void* grad_a,
                                       void* grad_b, int threads) {
  auto run = [&](auto element, auto compute) {
    using T = decltype(element);
    using C = decltype(compute);
    const C *s = (const C*)statistics, *hat_a = (const C*)hat, *hat_b = hat_a + rows * columns;
    const double u = *(const C*)upstream;
    StandardiseBackward<C, T>{{{(const C*)m_a, hat_a, hat_b, s, (T*)grad_a},
                               {(const C*)m_b, hat_b, hat_a, s + columns, (T*)grad_b}},
                              s + 2 * columns,
                              rows,
                              columns,
                              (C)(2 * lambd * u / rows / rows),
                              (C)(2 * u / rows),
                              with_diagonal ? (C)lambd : 0}
        .run(threads);
  };
  switch (dtype) {
    case kFloat64:
      return run(double(), double());
    case kBFloat16:
      return run(bfloat16(), float());
    case kFloat16:
      return run(float16(), float());
    default:
      return run(float(), float());
  }
}

}  // namespace MMFAST_NS
