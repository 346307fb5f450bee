// Element types and their conversion to and from the type they are computed in.
#pragma once
#include "platform.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace MMFAST_NS {

// The codes of mmfast/ops/native.py.
enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

union FloatBits {
  float f;
  uint32_t u;
};

MMFAST_HD float as_float(uint32_t u) {
  FloatBits b;
  b.u = u;
  return b.f;
}
MMFAST_HD uint32_t as_bits(float f) {
  FloatBits b;
  b.f = f;
  return b.u;
}

// Half types are computed in fp32; everything here is branch-free so that loops over it vectorise. CUDA
// devices have instructions for it, which differ in the bits of NaN only.
template <class T>
struct Scalar;

template <>
struct Scalar<float> {
  using compute = float;
  static MMFAST_HD float load(float x) { return x; }
  static MMFAST_HD float store(float x) { return x; }
};

template <>
struct Scalar<double> {
  using compute = double;
  static MMFAST_HD double load(double x) { return x; }
  static MMFAST_HD double store(double x) { return x; }
};

template <>
struct Scalar<bfloat16> {
  using compute = float;
  static MMFAST_HD float load(bfloat16 x) { return as_float((uint32_t)x.bits << 16); }
  static MMFAST_HD bfloat16 store(float x) {
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    uint32_t u = as_bits(x);
    uint32_t rounded = (u + 0x7FFFu + (u >> 16 & 1u)) >> 16;
    uint32_t quiet_nan = u >> 16 | 0x40u;
    return {(uint16_t)((u & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded)};
#endif
  }
};

template <>
struct Scalar<float16> {
  using compute = float;
  static MMFAST_HD float load(float16 x) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(x.bits));
#else
    uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16;
    uint32_t magnitude = (uint32_t)(x.bits & 0x7FFFu) << 13;
    // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals.
    uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);
    uint32_t special = magnitude | 0x7F800000u;
    return as_float(sign | (magnitude >= 0x0F800000u ? special : scaled));
#endif
  }
  static MMFAST_HD float16 store(float x) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(x))};
#else
    uint32_t u = as_bits(x);
    uint32_t sign = u >> 16 & 0x8000u;
    uint32_t magnitude = u & 0x7FFFFFFFu;
    uint32_t normal = (magnitude + 0x0FFFu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    // Adding 0.5 makes the hardware round a subnormal result to a multiple of 2^-24.
    uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t nan = 0x7E00u | (magnitude >> 13 & 0x3FFu);
    uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x477FF000u ? 0x7C00u : h;
    h = magnitude > 0x7F800000u ? nan : h;
    return {(uint16_t)(sign | h)};
#endif
  }
};

}  // namespace MMFAST_NS
