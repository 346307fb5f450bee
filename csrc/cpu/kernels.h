// The CPU kernels of every op, declared once per instruction set: bindings.cpp includes this file with each
// MMFAST_NS in turn and picks one at run time. Hence no include guard.
//
// Pointers are addresses of dense host memory; `threads` is the number of threads to use at most.
#include "../augment.h"

namespace MMFAST_NS {

// What an augment kernel returns besides 0.
constexpr int kNoMemory = 1;

// plan: (batch, plan_stride), every word is written.
int augment_draw(const mmfast::AugmentCall& call, int32_t* plan, int threads);

// x[m]: (B, L, F), strides[2 m] and strides[2 m + 1] elements from sample to sample and from step to step.
// out[view * modalities + m]: (B, L, F) dense. Padding is copied, never computed with.
int augment_apply(const mmfast::AugmentCall& call, const int32_t* plan, int dtype, const void* const* x,
                  const int64_t* strides, void* const* out, bool with_noise, int threads);

// The transposed linear map: x_grads[m] = sum over the views of what grads[view * modalities + m] pulls back.
int augment_adjoint(const mmfast::AugmentCall& call, const int32_t* plan, int dtype, const void* const* grads,
                    void* const* x_grads, int threads);

}  // namespace MMFAST_NS
