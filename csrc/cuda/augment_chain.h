// Chains as kernels take them: tables in the parameters of a launch, of which a call is cut into as many as
// its chains need.
#pragma once
#include "../scalar.h"
#include "launch.h"

namespace mmfast {

constexpr int kThreads = 256;
constexpr int kSteps = kLongestChain, kViews = 16, kModalities = 8;

// i / divisor for i < 2^31 without a division (Granlund and Montgomery, PLDI 1994).
struct Divider {
  uint32_t divisor, magic, shift;

  Divider(uint32_t d = 1) : divisor(d), magic(0), shift(0) {
    while (((uint64_t)1 << shift) < d) ++shift;
    magic = (uint32_t)((((uint64_t)1 << 32) * (((uint64_t)1 << shift) - d)) / d + 1);
  }
  MMFAST_HD uint32_t operator()(uint32_t i) const {
    return ((uint32_t)((uint64_t)i * magic >> 32) + i) >> shift;
  }
};

// A step of a view's chain for one modality; its words in a sample's plan begin behind `fired`, at `words`.
template <class C>
struct Step {
  int64_t words;
  int32_t kind, position;
  C amount, spread;
};

struct View {
  void* out;
  int32_t first, count;  // its steps
  int32_t view;
};

struct Modality {
  ModalitySpec shape;
  const void* x;
  int64_t stride_b, stride_t;
  int64_t first_block;
  Divider features;
  int32_t chunks;        // blocks of a sample
  int32_t first, count;  // its views
  int32_t modality;
  bool aligned;  // vectors of out are vectors of x
};

template <class C>
struct Tables {
  const int32_t* plan;
  int64_t plan_stride;
  const uint64_t* seed;
  const int64_t* ids;
  int32_t modalities, views, steps;
  Modality modality[kModalities];
  View view[kViews];
  Step<C> step[kSteps];
};
static_assert(sizeof(Tables<double>) <= 4000, "kernel parameters");

// Cuts a call into launches whose tables fit into kernel parameters: send(tables) for each. x[m] has
// `strides`, out is dense.
template <class C, class Send>
int each_launch(const AugmentCall& call, const int32_t* plan, bool with_noise, int most_modalities,
                const void* const* x, const int64_t* strides, const void* const* out, const Send& send) {
  Tables<C> tables = {};
  int error = 0;
  const auto flush = [&] {
    if (tables.views && !error) error = send(tables);
    tables = {};
    tables.plan = plan;
    tables.plan_stride = call.plan_stride;
    tables.seed = call.seed;
    tables.ids = call.ids;
  };
  flush();
  for (int64_t m = 0; m < call.modalities; ++m) {
    const ModalitySpec& shape = call.shapes[m];
    if (shape.steps * shape.features == 0) continue;
    bool open = false;
    const StepSpec* specs = call.steps;
    int64_t words = 0;  // in front of the current step
    for (int64_t v = 0; v < call.views; ++v) {
      const int64_t length = call.steps_per_view[v];
      if (tables.views == kViews || tables.steps + length > kSteps ||
          (!open && tables.modalities == most_modalities)) {
        flush();
        open = false;
      }
      if (!open) {
        Modality& modality = tables.modality[tables.modalities++];
        modality.shape = shape;
        modality.x = x[m];
        modality.stride_b = strides[2 * m];
        modality.stride_t = strides[2 * m + 1];
        modality.features = Divider((uint32_t)shape.features);
        modality.first = tables.views;
        modality.modality = (int32_t)m;
        modality.aligned = modality.stride_t == shape.features &&
                           modality.stride_b == shape.steps * shape.features && (uintptr_t)x[m] % 16 == 0;
        open = true;
      }
      View& view = tables.view[tables.views++];
      view.out = const_cast<void*>(out[v * call.modalities + m]);
      view.first = tables.steps;
      view.view = (int32_t)v;
      for (int64_t s = 0; s < length; ++s)
        for (int64_t i = 0; i < call.modalities; ++i, ++specs) {
          if (i == m && (specs->kind != kGaussianNoise || with_noise))
            tables.step[tables.steps++] = {words + 1, (int32_t)specs->kind, (int32_t)s, (C)specs->amount,
                                           (C)specs->spread};
          words += plan_words(*specs, call.shapes[i]);
        }
      view.count = tables.steps - view.first;
      ++tables.modality[tables.modalities - 1].count;
    }
  }
  flush();
  return error;
}

}  // namespace mmfast
