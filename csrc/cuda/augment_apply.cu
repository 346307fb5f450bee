// Apply. A chain is walked backwards for every element: a resample step moves its time step, a mask ends it,
// noise adds to it. x is read once, every view written once, and no intermediate exists.
#include <string.h>

#include "augment_chain.h"

namespace mmfast {
namespace {

constexpr int kRounds = 16;  // vectors of a thread at most

// 16 bytes, loaded and stored at once. Stores stream: the cache is for x, whose rows are read again.
template <class E>
struct Vector {
  static constexpr int kSize = 16 / sizeof(E);
  E lane[kSize];

  __device__ void load(const E* from) {
    const uint4 bits = __ldg((const uint4*)from);
    memcpy(lane, &bits, 16);
  }
  __device__ void store(E* to) const {
    uint4 bits;
    memcpy(&bits, lane, 16);
    __stcs((uint4*)to, bits);
  }
};

// Bits begin .. begin + count - 1, count <= 8, from the lowest up.
__device__ uint32_t bit_window(const int32_t* bits, int32_t begin, int32_t count) {
  const int32_t shift = begin & 31;
  const uint32_t low = (uint32_t)bits[begin >> 5] >> shift;
  const uint32_t high = shift + count > 32 ? (uint32_t)bits[(begin >> 5) + 1] << (32 - shift) : 0u;
  return low | high;
}

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

// Neighbouring lanes of a vector that are real elements of one row. A resample step moves some of them to
// another row, the same for all; a mask ends them. After a second resample step there could be more than two
// rows, so with two such steps runs are single lanes.
struct Run {
  int32_t source, source_moved;  // rows of the lanes that stayed and that moved
  uint32_t stayed, moved;        // lanes
  int32_t feature, lane, width;  // of its first lane; number of lanes

  __device__ uint32_t chosen(const int32_t* features) const {
    return bit_window(features, feature, width) << lane;
  }

  __device__ void mask_steps(const int32_t* masked) {
    if (stayed && get_bit(masked, source)) stayed = 0;
    if (moved && get_bit(masked, source_moved)) moved = 0;
  }

  __device__ void mask_features(const int32_t* masked) {
    const uint32_t dead = chosen(masked);
    stayed &= ~dead;
    moved &= ~dead;
  }

  __device__ void resample(const int32_t* features, const int32_t* order, const int32_t* gate) {
    const uint32_t lanes = chosen(features);
    if (lanes & stayed && get_bit(gate, source)) {
      source_moved = order[source];
      moved = lanes & stayed;
      stayed &= ~lanes;
    } else if (lanes & moved && get_bit(gate, source_moved)) {
      source_moved = order[source_moved];
    }
  }
};

// E is stored, C computed in; without noise elements move as bit patterns of their size.
template <class E, class C, bool kNoisy>
__global__ void __launch_bounds__(kThreads, kNoisy ? 3 : 4)
    apply_kernel(const __grid_constant__ Tables<C> call) {
  constexpr int kLanes = Vector<E>::kSize;
  constexpr uint32_t kAll = (1u << kLanes) - 1;
  __shared__ int32_t fired[kSteps];  // per view, behind its first: the steps that fired, last first
  __shared__ int32_t counts[kViews], resamples[kViews];
  int m = 0;
  while (m + 1 < call.modalities && blockIdx.x >= call.modality[m + 1].first_block) ++m;
  const Modality& modality = call.modality[m];
  const ModalitySpec& shape = modality.shape;
  const uint32_t block = (uint32_t)(blockIdx.x - modality.first_block);
  const int64_t b = block / (uint32_t)modality.chunks;
  const uint32_t chunk = block % (uint32_t)modality.chunks;
  const int32_t* plan = call.plan + b * call.plan_stride;
  if ((int)threadIdx.x < modality.count) {
    const int v = modality.first + (int)threadIdx.x;
    const View& view = call.view[v];
    int count = 0, moves = 0;
    for (int s = view.first + view.count - 1; s >= view.first; --s) {
      if (!plan[call.step[s].words - 1]) continue;
      fired[view.first + count++] = s;
      moves += call.step[s].kind == kResample;
    }
    counts[v] = count;
    resamples[v] = moves;
  }
  __syncthreads();

  const int32_t features = (int32_t)shape.features;
  const int32_t n = (int32_t)clamped_steps(shape, b);
  const int32_t start = shape.front ? (int32_t)shape.steps - n : 0;
  const int32_t cells = (int32_t)shape.steps * features;
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
    const int32_t row = (int32_t)modality.features((uint32_t)(first < 0 ? 0 : first));
    Vector<E> own;
    if (modality.aligned && lanes == kAll) {
      own.load(x + first);
    } else {
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        own.lane[k] = E();
        if (lanes >> k & 1u) {
          const int32_t t = (int32_t)modality.features((uint32_t)(first + k));
          own.lane[k] = element(t, first + k - t * features);
        }
      }
    }
#pragma unroll 1
    for (int v = modality.first; v < modality.first + modality.count; ++v) {
      const View& view = call.view[v];
      const int count = counts[v];
      Vector<E> result = own;
      int32_t lane = first < 0 ? -first : 0, t = row, f = first + lane - row * features;
#pragma unroll 1
      while (count > 0 && lanes >> lane != 0) {
        Run run;
        run.width = features - f < kLanes - lane ? features - f : kLanes - lane;
        if (resamples[v] > 1) run.width = 1;
        const bool real = t >= start && t - start < n;
        const uint32_t within = ((1u << run.width) - 1) << lane & lanes;
        run.source = run.source_moved = t - start;
        run.stayed = real ? within : 0;
        run.moved = 0;
        run.feature = f;
        run.lane = lane;
        C added[kNoisy ? kLanes : 1];
#pragma unroll
        // x + -0 is x, also for x = -0.
        for (C& value : added) value = (C)-0.0f;

#pragma unroll 1
        for (int j = 0; real && j < count; ++j) {
          const Step<C>& step = call.step[fired[view.first + j]];
          const int32_t* words = plan + step.words;
          if (step.kind == kMaskSteps) {
            run.mask_steps(words);
          } else if (step.kind == kMaskFeatures) {
            run.mask_features(words);
          } else if (step.kind == kResample) {
            const int32_t* order = words + bit_words(features);
            run.resample(words, order, order + shape.steps);
          } else if (kNoisy) {
            NormalReader normal{*call.seed, call.ids ? (uint64_t)call.ids[b] : (uint64_t)b,
                                stream_tag((uint32_t)view.view, (uint32_t)modality.modality,
                                           (uint32_t)step.position, kNoise)};
#pragma unroll
            for (int k = 0; k < kLanes; ++k) {
              if ((run.stayed | run.moved) >> k & 1u) {
                const int32_t source = run.moved >> k & 1u ? run.source_moved : run.source;
                const uint32_t coordinate = (uint32_t)(source * features + f + k - lane);
                added[kNoisy ? k : 0] += step.amount + step.spread * (C)normal(coordinate);
              }
            }
          }
        }

        const uint32_t dead = real ? within & ~(run.stayed | run.moved) : 0;
        const E* const moved_row = x + (start + run.source_moved) * modality.stride_t + (f - lane);
#pragma unroll
        for (int k = 0; k < kLanes; ++k) {
          if (run.moved >> k & 1u) result.lane[k] = moved_row[k];
          if (dead >> k & 1u) result.lane[k] = E();
          if constexpr (kNoisy)
            if (within >> k & 1u)
              result.lane[k] = Scalar<E>::store(Scalar<E>::load(result.lane[k]) + added[k]);
        }
        lane += run.width;
        f += run.width;
        if (f == features) {
          f = 0;
          ++t;
        }
      }
      E* out = (E*)view.out + b * cells + first;
      if (lanes == kAll) {
        result.store(out);
      } else {
#pragma unroll
        for (int k = 0; k < kLanes; ++k)
          if (lanes >> k & 1u) out[k] = result.lane[k];
      }
    }
  }
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

}  // namespace mmfast
