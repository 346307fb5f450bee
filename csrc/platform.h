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

// One instruction on every target; both forms are correctly rounded.
#ifdef __CUDA_ARCH__
MMFAST_HD float square_root(float x) { return __fsqrt_rn(x); }
MMFAST_HD double square_root(double x) { return __dsqrt_rn(x); }
#else
MMFAST_HD float square_root(float x) { return __builtin_sqrtf(x); }
MMFAST_HD double square_root(double x) { return __builtin_sqrt(x); }
#endif

}  // namespace MMFAST_NS
