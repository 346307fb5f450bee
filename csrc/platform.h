// Names that let one source serve the host compiler, nvcc and several CPU instruction sets.
#pragma once

// Each instruction set is compiled into a namespace of its own, so that the linker can never pick, say,
// the AVX-512 copy of a shared inline function for a machine without AVX-512. For the same reason nothing
// here includes a standard header that defines inline functions.
#ifndef MMFAST_NS
#define MMFAST_NS mmfast
#endif

#ifdef __CUDACC__
#define MMFAST_HD __host__ __device__ __forceinline__
#else
#define MMFAST_HD inline __attribute__((always_inline))
#endif

#include <stdint.h>

namespace MMFAST_NS {

// Square roots are correctly rounded; the others agree within an ulp or two on all targets.
#ifdef __CUDA_ARCH__
MMFAST_HD float square_root(float x) { return __fsqrt_rn(x); }
MMFAST_HD double square_root(double x) { return __dsqrt_rn(x); }
MMFAST_HD float fast_square_root(float x) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
MMFAST_HD float natural_log(float x) { return ::logf(x); }
MMFAST_HD double natural_log(double x) { return ::log(x); }
MMFAST_HD float exponential(float x) { return ::expf(x); }
MMFAST_HD double exponential(double x) { return ::exp(x); }
// log(1 + x).
MMFAST_HD float log_of_one_and(float x) { return ::log1pf(x); }
MMFAST_HD double log_of_one_and(double x) { return ::log1p(x); }
MMFAST_HD double cosine_of_turn(double u) { return ::cospi(2 * u); }
#else
MMFAST_HD float square_root(float x) { return __builtin_sqrtf(x); }
MMFAST_HD double square_root(double x) { return __builtin_sqrt(x); }
MMFAST_HD float fast_square_root(float x) { return __builtin_sqrtf(x); }
MMFAST_HD float natural_log(float x) { return __builtin_logf(x); }
MMFAST_HD double natural_log(double x) { return __builtin_log(x); }
MMFAST_HD float exponential(float x) { return __builtin_expf(x); }
MMFAST_HD double exponential(double x) { return __builtin_exp(x); }
MMFAST_HD float log_of_one_and(float x) { return __builtin_log1pf(x); }
MMFAST_HD double log_of_one_and(double x) { return __builtin_log1p(x); }
MMFAST_HD double cosine_of_turn(double u) { return __builtin_cos(6.283185307179586 * u); }
#endif

}  // namespace MMFAST_NS
