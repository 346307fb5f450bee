// Apply and its adjoint. A chain is walked backwards for every element: a resample step moves its time step,
// a mask ends it, noise adds to it. x is read once, every view written once, and no intermediate exists.
#include <vector>

#include "../scalar.h"
#include "launch.h"

namespace mmfast {
namespace {

constexpr int kThreads = 256;
constexpr int kRounds = 16;  // vectors of a thread at most
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

// 16 bytes that are loaded and stored at once.
template <class E>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(E);
  E lane[kSize];
};

// Bits read by neighbouring lanes, mostly out of one word.
struct BitReader {
  const int32_t* bits;
  int32_t word = 0, at = -1;
  __device__ bool operator()(int32_t i) {
    if (i >> 5 != at) {
      at = i >> 5;
      word = bits[at];
    }
    return (uint32_t)word >> (i & 31) & 1u;
  }
};

// The standard normal of one coordinate; neighbouring lanes share the four of a block.
struct NormalReader {
  uint64_t seed, id;
  uint32_t tag;
  uint32_t block = ~0u;
  float z[4] = {};
  __device__ float operator()(uint32_t coordinate) {
    if (coordinate / 4 != block) {
      block = coordinate / 4;
      const Words w = philox(seed, id, tag, block);
      normal_pair(w.w[0], w.w[1], z[0], z[1]);
      normal_pair(w.w[2], w.w[3], z[2], z[3]);
    }
    const float even = coordinate & 2 ? z[2] : z[0], odd = coordinate & 2 ? z[3] : z[1];
    return coordinate & 1 ? odd : even;
  }
};

// Where `kLanes` neighbouring elements of one sample come from, and what is added to them.
template <class C, int kLanes, bool kNoisy>
struct Walk {
  int32_t source[kLanes], feature[kLanes];  // source: real time step, 0 where a lane is not real
  C added[kNoisy ? kLanes : 1];
  uint32_t live, moved = 0;  // lanes that no mask has met; lanes whose source is not their own time step

  // Lanes `lanes` of the vector that begins with element `first` of a sample whose n real steps begin at
  // `start`; only real ones are live.
  __device__ Walk(int32_t first, uint32_t lanes, const Divider& features, int32_t start, int32_t n)
      : live(0) {
    int32_t t = 0, f = 0;
    bool begun = false;
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      if (lanes >> k & 1u) {
        if (!begun) {
          t = (int32_t)features((uint32_t)(first + k));
          f = first + k - t * (int32_t)features.divisor;
          begun = true;
        }
        const bool real = t >= start && t - start < n;
        live |= (uint32_t)real << k;
        source[k] = real ? t - start : 0;
        feature[k] = f;
        if (++f == (int32_t)features.divisor) {
          f = 0;
          ++t;
        }
      } else {
        source[k] = feature[k] = 0;
      }
      // x + -0 is x, also for x = -0.
      if (kNoisy) added[k] = (C)-0.0f;
    }
  }

  __device__ bool lives(int k) const { return live >> k & 1u; }

  __device__ void mask_steps(const int32_t* words) {
    BitReader masked{words};
#pragma unroll
    for (int k = 0; k < kLanes; ++k) live &= ~((uint32_t)masked(source[k]) << k);
  }

  __device__ void mask_features(const int32_t* words) {
    BitReader masked{words};
#pragma unroll
    for (int k = 0; k < kLanes; ++k) live &= ~((uint32_t)masked(feature[k]) << k);
  }

  __device__ void resample(const int32_t* words, const ModalitySpec& shape) {
    const int32_t* order = words + bit_words(shape.features);
    BitReader chosen{words}, gate{order + shape.steps};
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      if (chosen(feature[k]) && lives(k) && gate(source[k])) {
        source[k] = order[source[k]];
        moved |= 1u << k;
      }
    }
  }

  __device__ void noise(NormalReader normal, C mean, C deviation, uint32_t features) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      if (lives(k))
        added[kNoisy ? k : 0] += mean + deviation * (C)normal((uint32_t)source[k] * features + feature[k]);
  }
};

// E is stored, C computed in; without noise elements move as bit patterns of their size.
template <class E, class C, bool kNoisy>
__global__ void __launch_bounds__(kThreads) apply_kernel(const __grid_constant__ Tables<C> call) {
  constexpr int kLanes = Vector<E>::kSize;
  constexpr uint32_t kAll = (1u << kLanes) - 1;
  __shared__ int32_t fired[kSteps];
  int m = 0;
  while (m + 1 < call.modalities && blockIdx.x >= call.modality[m + 1].first_block) ++m;
  const Modality& modality = call.modality[m];
  const ModalitySpec& shape = modality.shape;
  const uint32_t block = (uint32_t)(blockIdx.x - modality.first_block);
  const int64_t b = block / (uint32_t)modality.chunks;
  const uint32_t chunk = block % (uint32_t)modality.chunks;
  const int32_t* plan = call.plan + b * call.plan_stride;
  if ((int)threadIdx.x < call.steps) fired[threadIdx.x] = plan[call.step[threadIdx.x].words - 1];
  __syncthreads();

  const int32_t n = (int32_t)clamped_steps(shape, b);
  const int32_t start = shape.front ? (int32_t)shape.steps - n : 0;
  const int32_t cells = (int32_t)(shape.steps * shape.features);
  const E* const x = (const E*)modality.x + b * modality.stride_b;
  const auto element = [&](int32_t t, int32_t f) { return x[t * modality.stride_t + f]; };
  // Vectors are those of the whole dense output, so a sample may begin and end within one.
  const int32_t phase = (int32_t)(b * cells % kLanes);
  const int32_t vectors = (int32_t)(((int64_t)cells + phase + kLanes - 1) / kLanes);
  const int32_t begin = (int32_t)(chunk * kRounds * kThreads);
  const int32_t end = vectors - begin < kRounds * kThreads ? vectors : begin + kRounds * kThreads;

#pragma unroll 1
  for (int32_t i = begin + (int32_t)threadIdx.x; i < end; i += kThreads) {
    const int32_t first = i * kLanes - phase;
    uint32_t lanes = kAll;
    if (first < 0) lanes &= kAll << -first;
    if (cells - first < kLanes) lanes &= (1u << (cells - first)) - 1;
    Vector<E> own;
    if (modality.aligned && lanes == kAll) {
      own = *(const Vector<E>*)(x + first);
    } else {
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        own.lane[k] = E();
        if (lanes >> k & 1u) {
          const int32_t t = (int32_t)modality.features((uint32_t)(first + k));
          own.lane[k] = element(t, first + k - t * (int32_t)shape.features);
        }
      }
    }
#pragma unroll 1
    for (int v = modality.first; v < modality.first + modality.count; ++v) {
      const View& view = call.view[v];
      Walk<C, kLanes, kNoisy> walk(first, lanes, modality.features, start, n);
      const uint32_t real = walk.live;
#pragma unroll 1
      for (int s = view.first + view.count - 1; s >= view.first; --s) {
        if (!fired[s]) continue;
        const Step<C>& step = call.step[s];
        const int32_t* words = plan + step.words;
        if (step.kind == kMaskSteps)
          walk.mask_steps(words);
        else if (step.kind == kMaskFeatures)
          walk.mask_features(words);
        else if (step.kind == kResample)
          walk.resample(words, shape);
        else if (kNoisy)
          walk.noise(
              {*call.seed, call.ids ? (uint64_t)call.ids[b] : (uint64_t)b,
               stream_tag((uint32_t)view.view, (uint32_t)modality.modality, (uint32_t)step.position, kNoise)},
              step.amount, step.spread, modality.features.divisor);
      }
      Vector<E> result;
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        E value = own.lane[k];
        if (walk.moved & walk.live & 1u << k) value = element(start + walk.source[k], walk.feature[k]);
        if ((real & ~walk.live) >> k & 1u) value = E();
        if constexpr (kNoisy) value = Scalar<E>::store(Scalar<E>::load(value) + walk.added[k]);
        result.lane[k] = value;
      }
      E* out = (E*)view.out + b * cells + first;
      if (lanes == kAll) {
        *(Vector<E>*)out = result;
      } else {
#pragma unroll
        for (int k = 0; k < kLanes; ++k)
          if (lanes >> k & 1u) out[k] = result.lane[k];
      }
    }
  }
}

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

template <class E, class C, bool kNoisy>
int apply_typed(const AugmentCall& call, const int32_t* plan, const void* const* x, const int64_t* strides,
                void* const* out, const Target& target) {
  constexpr int64_t kChunk = (int64_t)kRounds * kThreads * Vector<E>::kSize;
  return each_launch<C>(call, plan, kNoisy, kModalities, x, strides, out, [&](Tables<C>& tables) {
    int64_t blocks = 0;
    for (int m = 0; m < tables.modalities; ++m) {
      Modality& modality = tables.modality[m];
      // One vector more than the elements need, for samples that begin within one.
      const int64_t cells = modality.shape.steps * modality.shape.features + Vector<E>::kSize - 1;
      modality.first_block = blocks;
      modality.chunks = (int32_t)((cells + kChunk - 1) / kChunk);
      blocks += call.batch * modality.chunks;
    }
    return launch(target, {blocks}, kThreads, apply_kernel<E, C, kNoisy>, tables);
  });
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

bool has_noise(const AugmentCall& call) {
  int64_t count = 0;
  for (int64_t v = 0; v < call.views; ++v) count += call.steps_per_view[v] * call.modalities;
  for (int64_t i = 0; i < count; ++i)
    if (call.steps[i].kind == kGaussianNoise) return true;
  return false;
}

}  // namespace

int cuda_augment_apply(const AugmentCall& call, const int32_t* plan, int dtype, const void* const* x,
                       const int64_t* strides, void* const* out, bool with_noise, const Target& target) {
  const bool noisy = with_noise && has_noise(call);
  switch (dtype) {
    case kFloat64:
      return noisy ? apply_typed<double, double, true>(call, plan, x, strides, out, target)
                   : apply_typed<uint64_t, float, false>(call, plan, x, strides, out, target);
    case kFloat32:
      return noisy ? apply_typed<float, float, true>(call, plan, x, strides, out, target)
                   : apply_typed<uint32_t, float, false>(call, plan, x, strides, out, target);
    default:
      if (!noisy) return apply_typed<uint16_t, float, false>(call, plan, x, strides, out, target);
      return dtype == kBFloat16 ? apply_typed<bfloat16, float, true>(call, plan, x, strides, out, target)
                                : apply_typed<float16, float, true>(call, plan, x, strides, out, target);
  }
}

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
