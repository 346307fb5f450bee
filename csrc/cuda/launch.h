// The one place where kernels are launched: on the caller's device and stream, with nothing waited for.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#else
#include "emulation.h"
#endif
#include <stdint.h>

#include "kernels.h"

namespace mmfast {

// Blocks are one-dimensional and a multiple of 32 threads.
struct Grid {
  int64_t x, y = 1;
};

#ifdef __CUDACC__
// The caller has made `device` current in its own CUDA runtime; this is about the one linked in here.
inline cudaError_t use_device(int device) {
  int current = -1;
  const cudaError_t error = cudaGetDevice(&current);
  return error == cudaSuccess && current != device ? cudaSetDevice(device) : error;
}
#endif

// 0 or CUDA's error code. An empty grid is no launch.
template <class... Parameters, class... Arguments>
int launch(const Target& target, Grid grid, int threads, void (*kernel)(Parameters...),
           const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return 0;
  constexpr int kInvalidConfiguration = 9;
  if (grid.x > INT32_MAX || grid.y > UINT16_MAX) return kInvalidConfiguration;
#ifdef __CUDACC__
  if (const cudaError_t error = use_device(target.device)) return (int)error;
  (void)cudaGetLastError();  // what an earlier call has left is not this launch's
  kernel<<<dim3((unsigned)grid.x, (unsigned)grid.y), threads, 0, (cudaStream_t)target.stream>>>(arguments...);
  return (int)cudaGetLastError();
#else
  (void)target;
  emulation::run((unsigned)grid.x, (unsigned)grid.y, (unsigned)threads, [&] { kernel(arguments...); });
  return 0;
#endif
}

}  // namespace mmfast
