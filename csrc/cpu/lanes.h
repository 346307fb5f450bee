// Vectors of numbers and of integers of the same size, and what the losses need of them: exp and log1p.
#pragma once
#include "rows.h"

// Of a lambda: what it captures stays in registers.
#define MMFAST_INLINED __attribute__((always_inline))

namespace MMFAST_NS {

template <class C>
struct LaneOf;
template <>
struct LaneOf<float> {
  typedef int32_t code;
  typedef float numbers __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
  typedef int32_t codes __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
  typedef int32_t unaligned_codes __attribute__((vector_size(MMFAST_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct LaneOf<double> {
  typedef int64_t code;
  typedef double numbers __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
  typedef int64_t codes __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
  typedef int64_t unaligned_codes __attribute__((vector_size(MMFAST_VECTOR_BYTES), aligned(8), may_alias));
};
template <class C>
using Code = typename LaneOf<C>::code;
template <class C>
using Numbers = typename LaneOf<C>::numbers;
// Integers, or a mask: -1 where it holds, 0 where not.
template <class C>
using Codes = typename LaneOf<C>::codes;

template <class C>
MMFAST_HD Numbers<C> numbers_at(const C* p) {
  return (Numbers<C>)*(const Vector<C>*)p;
}
template <class C>
MMFAST_HD Codes<C> codes_at(const Code<C>* p) {
  return (Codes<C>)*(const typename LaneOf<C>::unaligned_codes*)p;
}
template <class C>
MMFAST_HD void put(const Numbers<C>& x, C* p) {
  *(Vector<C>*)p = (Vector<C>)x;
}
template <class C>
MMFAST_HD Numbers<C> every(C x) {
  return x - Numbers<C>{};  // -0 stays
}
template <class C>
MMFAST_HD Codes<C> every_code(Code<C> x) {
  return Codes<C>{} + x;
}

template <class C>
MMFAST_HD Numbers<C> select(const Codes<C>& mask, const Numbers<C>& x, const Numbers<C>& y) {
  return mask ? x : y;
}
// x where the mask holds, else 0, also for NaN.
template <class C>
MMFAST_HD Numbers<C> where(const Codes<C>& mask, const Numbers<C>& x) {
  return (Numbers<C>)(mask & (Codes<C>)x);
}
// y where either is NaN, as the instructions have it, of which compilers make no use for vectors.
template <class C>
MMFAST_HD Numbers<C> larger(const Numbers<C>& x, const Numbers<C>& y) {
#if MMFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(C) == 4)
    return __builtin_ia32_maxps256(x, y);
  else
    return __builtin_ia32_maxpd256(x, y);
#else
  return x > y ? x : y;
#endif
}
template <class C>
MMFAST_HD Numbers<C> smaller(const Numbers<C>& x, const Numbers<C>& y) {
#if MMFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(C) == 4)
    return __builtin_ia32_minps256(x, y);
  else
    return __builtin_ia32_minpd256(x, y);
#else
  return x < y ? x : y;
#endif
}
template <class C>
MMFAST_HD Numbers<C> magnitude(const Numbers<C>& x) {
  return (Numbers<C>)((Codes<C>)x & ~(Codes<C>)every<C>((C)-0.0));
}

template <class C>
MMFAST_HD bool any(const Codes<C>& mask) {
#if defined(__AVX__)
  typedef long long Quarter __attribute__((vector_size(32)));
  union {
    Codes<C> whole;
    Quarter parts[MMFAST_VECTOR_BYTES / 32];
  } u = {mask};
  Quarter all = u.parts[0];
  for (int i = 1; i < MMFAST_VECTOR_BYTES / 32; ++i) all |= u.parts[i];
  return !__builtin_ia32_ptestz256(all, all);
#else
  Code<C> all = 0;
  for (int i = 0; i < kLanes<C>; ++i) all |= mask[i];
  return all != 0;
#endif
}

template <class C>
MMFAST_HD C sum_of(const Numbers<C>& x) {
  C sum = 0;
  for (int i = 0; i < kLanes<C>; ++i) sum += x[i];
  return sum;
}
template <class C>
MMFAST_HD C largest_of(const Numbers<C>& x) {
  C largest = x[0];
  for (int i = 1; i < kLanes<C>; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

template <class C>
struct Exponential;
// magic: 1.5 times the number whose unit in the last place is 1; ln2 in two parts, the first of few bits.
template <>
struct Exponential<float> {
  static constexpr float lowest = -88, highest = 88.8f, magic = 0x1.8p23f;
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
  static constexpr int bits = 23, offset = 127, terms = 7;
};
template <>
struct Exponential<double> {
  static constexpr double lowest = -709, highest = 709.8, magic = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int bits = 52, offset = 1023, terms = 13;
};

// Within 2 ulp; what is no normal number is 0 below, infinity above, and NaN stays.
template <class C>
MMFAST_HD Numbers<C> exponential(Numbers<C> x) {
  using E = Exponential<C>;
  constexpr double inverse[] = {
      1,          1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,       1. / 5040,
      1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  x = smaller<C>(every<C>(E::highest), larger<C>(every<C>(E::lowest), x));
  const Numbers<C> moved = x * (C)1.4426950408889634 + E::magic;
  const Numbers<C> n = moved - E::magic;
  const Codes<C> power = (Codes<C>)moved - (Codes<C>)every<C>(E::magic) + (Code<C>)E::offset;
  const Numbers<C> r = (x - n * E::ln2_high) - n * E::ln2_low;
  Numbers<C> p = every<C>((C)inverse[E::terms - 1]);
#pragma GCC unroll 16
  for (int i = E::terms - 2; i >= 0; --i) p = p * r + (C)inverse[i];
  return (p * r + (C)1) * (Numbers<C>)(power << E::bits);
}

// log(1 + e) of e in [0, 1]: 2 artanh(e / (2 + e)).
template <class C>
MMFAST_HD Numbers<C> log_of_one_and(const Numbers<C>& e) {
  constexpr int kTerms = sizeof(C) == 4 ? 8 : 17;
  const Numbers<C> t = e / (e + (C)2), square = t * t;
  Numbers<C> p = every<C>((C)(1. / (2 * kTerms - 1)));
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) p = p * square + (C)(1. / (2 * i + 1));
  return 2 * t * p;
}

// softplus(x) = log(1 + exp x) and its derivative, neither by a difference.
template <class C>
MMFAST_HD Numbers<C> softplus(const Numbers<C>& x, Numbers<C>& sigmoid) {
  const Numbers<C> e = exponential<C>(-magnitude<C>(x));
  sigmoid = select<C>(x > 0, every<C>(1), e) / (e + (C)1);
  return select<C>(x > 0, x, Numbers<C>{}) + log_of_one_and<C>(e);
}

// A number as a type.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// run(a number of the type).
template <class Run>
MMFAST_HD auto with_type(int dtype, const Run& run) {
  switch (dtype) {
    case kFloat64:
      return run(double{});
    case kBFloat16:
      return run(bfloat16{});
    case kFloat16:
      return run(float16{});
    default:
      return run(float{});
  }
}

}  // namespace MMFAST_NS
