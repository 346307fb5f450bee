// The gradient of apply: what the views pull back to each element of x.
#include <vector>

#include "augment_chain.h"

namespace mmfast {
namespace {

// One thread per sample and feature adds up what the views pull back to each time step of x; nobody else
// touches that column. Grad pointers stand where apply has its outputs.
template <class E, class C>
__global__ void __launch_bounds__(kThreads)
    adjoint_kernel(const __grid_constant__ Tables<C> call, int64_t batch) {
  const Modality& modality = call.modality[0];
  const ModalitySpec& shape = modality.shape;
  const int32_t features = (int32_t)shape.features, steps = (int32_t)shape.steps;
  const int64_t column = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (column >= batch * features) return;
  const int64_t b = column / features;
  const int32_t f = (int32_t)(column % features);
  const int32_t* plan = call.plan + b * call.plan_stride;
  const int32_t n = (int32_t)clamped_steps(shape, b);
  const int32_t start = shape.front ? steps - n : 0;
  const int64_t at = b * steps * features + f;
  C* const sum = (C*)modality.x + at;
  if (call.view[0].view == 0)
    for (int32_t t = 0; t < steps; ++t) sum[(int64_t)t * features] = 0;
  for (int v = 0; v < modality.count; ++v) {
    const View& view = call.view[v];
    const E* const grad = (const E*)view.out + at;
    for (int32_t t = 0; t < steps; ++t) {
      const bool real = t >= start && t - start < n;
      int32_t source = real ? t - start : 0;
      bool live = true;
      for (int s = view.first + view.count - 1; real && live && s >= view.first; --s) {
        const Step<C>& step = call.step[s];
        const int32_t* words = plan + step.words;
        if (!words[-1]) continue;
        if (step.kind == kMaskSteps)
          live = !get_bit(words, source);
        else if (step.kind == kMaskFeatures)
          live = !get_bit(words, f);
        else if (step.kind == kResample && get_bit(words, f)) {
          const int32_t* order = words + bit_words(features);
          if (get_bit(order + steps, source)) source = order[source];
        }
      }
      const int32_t to = real ? start + source : t;
      if (live) sum[(int64_t)to * features] += Scalar<E>::load(grad[(int64_t)t * features]);
    }
  }
}

template <class E, class C>
int adjoint_typed(const AugmentCall& call, const int32_t* plan, const void* const* grads,
                  void* const* x_grads, const Target& target) {
  std::vector<int64_t> strides;
  for (int64_t m = 0; m < call.modalities; ++m) {
    strides.push_back(call.shapes[m].steps * call.shapes[m].features);
    strides.push_back(call.shapes[m].features);
  }
  return each_launch<C>(call, plan, false, 1, x_grads, strides.data(), grads, [&](const Tables<C>& tables) {
    const int64_t columns = call.batch * tables.modality[0].shape.features;
    return launch(target, {(columns + kThreads - 1) / kThreads}, kThreads, adjoint_kernel<E, C>, tables,
                  call.batch);
  });
}

}  // namespace

int cuda_augment_adjoint(const AugmentCall& call, const int32_t* plan, int dtype, const void* const* grads,
                         void* const* x_grads, const Target& target) {
  switch (dtype) {
    case kFloat64:
      return adjoint_typed<double, double>(call, plan, grads, x_grads, target);
    case kBFloat16:
      return adjoint_typed<bfloat16, float>(call, plan, grads, x_grads, target);
    case kFloat16:
      return adjoint_typed<float16, float>(call, plan, grads, x_grads, target);
    default:
      return adjoint_typed<float, float>(call, plan, grads, x_grads, target);
  }
}

}  // namespace mmfast
