// Embeddings to directions and lengths, and the gradient by directions back to embeddings.
#include "kernels.h"
#include "lanes.h"
#include "parallel.h"

namespace MMFAST_NS {
namespace {

template <class C>
struct Bits;
template <>
struct Bits<float> {
  typedef int32_t type __attribute__((may_alias));
  static constexpr int32_t magnitude = 0x7FFFFFFF, infinity = 0x7F800000;
};
template <>
struct Bits<double> {
  typedef int64_t type __attribute__((may_alias));
  static constexpr int64_t magnitude = 0x7FFFFFFFFFFFFFFF, infinity = 0x7FF0000000000000;
};

template <class C>
MMFAST_HD C power_of_two(int exponent) {
  return (C)__builtin_ldexp(1.0, exponent);
}

// The sum of x[i] y[i], in runs.
template <class C>
C dot(const C* x, const C* y, int64_t n) {
  constexpr int kSize = kLanes<C>;
  constexpr int64_t kRun = 64 * kSize;
  const int64_t whole = n - n % kSize;
  double sum = 0;
  for (int64_t start = 0; start < whole; start += kRun) {
    const int64_t stop = start + kRun < whole ? start + kRun : whole;
    Numbers<C> run = {};
    for (int64_t j = start; j < stop; j += kSize) run += numbers_at(x + j) * numbers_at(y + j);
    sum += sum_of<C>(run);
  }
  for (int64_t j = whole; j < n; ++j) sum += (double)x[j] * (double)y[j];
  return (C)sum;
}

// A shorter row has no direction: its scores and its gradient are zero.
constexpr double kShortest = 1e-12;

// unit (n): x as it is, or divided by its length; returns 1 / length, 0 for none.
template <class C, class T>
C unit_row(const T* x, int64_t n, bool cosine, C* unit, bool* finite) {
  for (int64_t j = 0; j < n; ++j) unit[j] = Scalar<T>::load(x[j]);
  typename Bits<C>::type largest = 0;
  const auto* bits = (const typename Bits<C>::type*)unit;
  for (int64_t j = 0; j < n; ++j) {
    const auto size = bits[j] & Bits<C>::magnitude;
    largest = size > largest ? size : largest;
  }
  *finite = largest < Bits<C>::infinity;
  if (!cosine) return 1;
  if (!*finite) {
    for (int64_t j = 0; j < n; ++j) unit[j] = (C)__builtin_nan("");
    return (C)__builtin_nan("");
  }
  union {
    typename Bits<C>::type bits;
    C number;
  } top = {largest};
  // By a power of two, which rounds nothing: squares neither overflow nor vanish. In two steps, as it may be
  // no number itself.
  int exponent = 0;
  (void)__builtin_frexp((double)top.number, &exponent);
  const C first = power_of_two<C>(-(exponent / 2)), second = power_of_two<C>(exponent / 2 - exponent);
  for (int64_t j = 0; j < n; ++j) unit[j] = unit[j] * first * second;
  const C length = square_root(dot(unit, unit, n));
  const bool none = largest == 0 || (exponent <= 0 && __builtin_ldexp((double)length, exponent) < kShortest);
  const C inverse = none ? 0 : 1 / length;
  for (int64_t j = 0; j < n; ++j) unit[j] *= inverse;
  return inverse * first * second;
}

template <class T>
bool unit_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, const bool* valid, bool cosine,
               void* unit_out, void* inverse_out, int threads) {
  using C = typename Scalar<T>::compute;
  int wrong = 0;
  parallel_for(rows, threads, 0.6 * columns, [&](int64_t i, int) {
    C* unit = (C*)unit_out + i * columns;
    C inverse = 0;
    bool finite = true;
    if (valid && !valid[i])
      for (int64_t j = 0; j < columns; ++j) unit[j] = 0;
    else
      inverse = unit_row<C>(x + i * stride, columns, cosine, unit, &finite);
    ((C*)inverse_out)[i] = inverse;
    if (!finite) __atomic_store_n(&wrong, 1, __ATOMIC_RELAXED);
  });
  return !wrong;
}

template <class T>
void row_gradients(const void* grad_in, const void* unit_in, const void* inverse, const void* scale_in,
                   int64_t rows, int64_t columns, bool cosine, T* out, void* dots, int threads) {
  using C = typename Scalar<T>::compute;
  const C scale = *(const C*)scale_in;
  parallel_for(rows, threads, 0.4 * columns, [&](int64_t i, int) {
    const C *grad = (const C*)grad_in + i * columns, *unit = (const C*)unit_in + i * columns;
    T* to = out + i * columns;
    const C along = dot(grad, unit, columns);
    ((C*)dots)[i] = along;
    if (cosine) {
      const C factor = ((const C*)inverse)[i];
      for (int64_t j = 0; j < columns; ++j)
        to[j] = Scalar<T>::store((grad[j] * scale - unit[j] * (along * scale)) * factor);
    } else {
      for (int64_t j = 0; j < columns; ++j) to[j] = Scalar<T>::store(grad[j] * scale);
    }
  });
}

}  // namespace

bool similarity_units(int dtype, const void* x, int64_t stride, int64_t rows, int64_t columns,
                      const bool* valid, bool cosine, void* unit, void* inverse, int threads) {
  return with_type(dtype, [&](auto number) {
    return unit_rows((const decltype(number)*)x, stride, rows, columns, valid, cosine, unit, inverse,
                     threads);
  });
}

void similarity_row_gradients(int dtype, const void* grad, const void* unit, const void* inverse,
                              const void* scale, int64_t rows, int64_t columns, bool cosine, void* out,
                              void* dots, int threads) {
  with_type(dtype, [&](auto number) {
    row_gradients(grad, unit, inverse, scale, rows, columns, cosine, (decltype(number)*)out, dots, threads);
  });
}

bool similarity_codes(const int64_t* x, int64_t n, int32_t* codes) {
  // Branch-free, so that it is vectorised: what does not fit comes back different.
  uint64_t lost = 0;
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = (int32_t)x[i];
    lost |= (uint64_t)(x[i] ^ (int64_t)codes[i]);
  }
  return !lost;
}

}  // namespace MMFAST_NS
