// Launchers of the CUDA kernels, one per entry of mmfast._C. Pointers are device addresses unless it is said
// otherwise; every function returns 0 or CUDA's error code, and waits for nothing.
#pragma once
#include "../augment.h"

namespace mmfast {

// Where kernels are launched: a CUDA stream of a device.
struct Target {
  int device;
  void* stream;
};

// device.cu: the number of usable devices, or minus CUDA's error code; its name.
int cuda_device_count();
const char* cuda_error_string(int code);

// As in cpu/kernels.h; in `call`, lengths, seed and ids are on the device, the tables on the host. Lengths
// are clamped to [0, L], for nobody waits to look at them. Outputs begin at multiples of 16 bytes. A sample
// has fewer than 2^31 elements and a chain at most kLongestChain steps.
constexpr int kLongestChain = 64;
int cuda_augment_draw(const AugmentCall& call, int32_t* plan, const Target& target);
int cuda_augment_apply(const AugmentCall& call, const int32_t* plan, int dtype, const void* const* x,
                       const int64_t* strides, void* const* out, bool with_noise, const Target& target);
// x_grads are fp32 for half gradients.
int cuda_augment_adjoint(const AugmentCall& call, const int32_t* plan, int dtype, const void* const* grads,
                         void* const* x_grads, const Target& target);

}  // namespace mmfast
