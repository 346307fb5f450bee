// Rows of a block of columns in registers: four vectors of whatever size the instruction set has.
#pragma once
#include "../scalar.h"

#if defined(__AVX512F__)
#define MMFAST_VECTOR_BYTES 64
#elif defined(__AVX__)
#define MMFAST_VECTOR_BYTES 32
#else
#define MMFAST_VECTOR_BYTES 16
#endif

namespace MMFAST_NS {

// C, here and below, is float or double; memory may be unaligned.
template <class C>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(MMFAST_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(MMFAST_VECTOR_BYTES), aligned(8), may_alias));
};
template <class C>
using Vector = typename VectorOf<C>::type;
template <class C>
constexpr int kLanes = MMFAST_VECTOR_BYTES / sizeof(C);

constexpr int kVectors = 4;
template <class C>
constexpr int kWidth = kVectors * kLanes<C>;

template <class C>
struct Row {
  Vector<C> v[kVectors];

  MMFAST_HD static Row of(const C* p) {
    Row row;
    for (int i = 0; i < kVectors; ++i) row.v[i] = *(const Vector<C>*)(p + i * kLanes<C>);
    return row;
  }
  MMFAST_HD static Row all(C x) {
    Row row;
    for (int i = 0; i < kVectors; ++i) row.v[i] = Vector<C>{} + x;
    return row;
  }
  MMFAST_HD void to(C* p) const {
    for (int i = 0; i < kVectors; ++i) *(Vector<C>*)(p + i * kLanes<C>) = v[i];
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

// `kCount` numbers of T from memory as C; columns that do not exist are not read and come out as zero.
template <int kCount, class C, class T, class Extent>
MMFAST_HD void read(const T* p, Extent extent, C* values) {
  for (int j = 0; j < kCount; ++j) values[j] = exists(extent, j) ? Scalar<T>::load(p[j]) : 0;
}

template <class C, class T, class Extent>
MMFAST_HD Row<C> load(const T* p, Extent extent) {
  C values[kWidth<C>];
  read<kWidth<C>>(p, extent, values);
  return Row<C>::of(values);
}

// Through `values` even whole blocks would take a detour over the stack.
template <class C>
MMFAST_HD Row<C> load(const C* p, Whole) {
  return Row<C>::of(p);
}

template <class C>
MMFAST_HD Row<C> load(const bfloat16* p, Whole) {
  typedef uint16_t Halves
      __attribute__((vector_size(MMFAST_VECTOR_BYTES / 2), aligned(sizeof(bfloat16)), may_alias));
  typedef uint32_t Words __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
  Row<C> row;
  for (int i = 0; i < kVectors; ++i)
    row.v[i] = (Vector<C>)(__builtin_convertvector(*(const Halves*)(p + i * kLanes<C>), Words) << 16);
  return row;
}

template <class C>
MMFAST_HD void store(const Row<C>& row, C* p, Whole) {
  row.to(p);
}

template <class C, class T, class Extent>
MMFAST_HD void store(const Row<C>& row, T* p, Extent extent) {
  C values[kWidth<C>];
  row.to(values);
  for (int j = 0; j < kWidth<C>; ++j)
    if (exists(extent, j)) p[j] = Scalar<T>::store(values[j]);
}

// The sum of term(i) over the rows i, in runs that keep the growth of rounding errors down.
template <class C, class Term>
MMFAST_HD Row<C> sum_rows(int64_t rows, Term term) {
  constexpr int64_t kRun = 64;
  Row<C> total = Row<C>::all(0);
  for (int64_t start = 0; start < rows; start += kRun) {
    int64_t stop = start + kRun < rows ? start + kRun : rows;
    Row<C> run = Row<C>::all(0);
    for (int64_t i = start; i < stop; ++i) run = run + term(i);
    total = total + run;
  }
  return total;
}

}  // namespace MMFAST_NS
