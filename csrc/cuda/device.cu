// What the CUDA runtime says of this machine.
#include "launch.h"

namespace mmfast {

// Number of usable devices, or minus the CUDA error code (35: no or too old a driver).
int cuda_device_count() {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? count : -(int)error;
}

const char* cuda_error_string(int code) { return cudaGetErrorString((cudaError_t)code); }

}  // namespace mmfast
