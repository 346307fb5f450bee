// What the CUDA runtime says of this machine.
#include "launch.h"

namespace mmfast {

namespace {

// `value`, or minus the error code, which must not be taken for that of a later launch.
int value_or_error(cudaError_t error, int value) {
  if (error == cudaSuccess) return value;
  (void)cudaGetLastError();
  return -(int)error;
}

}  // namespace

int cuda_device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return value_or_error(error, count);
}

int cuda_capability(int device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return value_or_error(error, 10 * major + minor);
}

int cuda_runtime_version() { return CUDART_VERSION; }

int cuda_driver_version() {
  int version = 0;
  const cudaError_t error = cudaDriverGetVersion(&version);
  return value_or_error(error, version);
}

const char* cuda_error_string(int code) { return cudaGetErrorString((cudaError_t)code); }

}  // namespace mmfast
