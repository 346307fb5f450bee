// What draw and apply mean for one sample, in one place for host and device: the parameters of a step of a
// chain, and the layout of a plan. mmfast/ops/plan.py says the same in Python.
//
// Words of the plan are int32, sample-major: plan[b] holds, for every view, step and modality in this order,
//   fired (1) and then
//   resample       features (bits of F), source time steps (L), gate (bits of L)
//   mask steps     masked time steps (bits of L)
//   mask features  masked features (bits of F)
//   noise          nothing: apply computes it from the seed
// Time steps are counted from the first real one, so a plan does not know on which side the padding is.
#pragma once
#include "random.h"

namespace mmfast {

enum Kind : int64_t { kResample = 0, kMaskSteps = 1, kMaskFeatures = 2, kGaussianNoise = 3 };
enum Apply : int64_t { kPerModality = 0, kPerBatch = 1, kPerSample = 2 };
enum Flag : int64_t { kExactCount = 1, kSharedOrder = 2 };

// One transform of one modality in one view.
struct StepSpec {
  int64_t kind;
  int64_t apply;
  int64_t flags;
  int64_t coin;  // thresholds, see decide()
  int64_t gate;
  double amount;  // alpha, share to mask, or mean of the noise
  double spread;  // of alpha, or standard deviation of the noise
};

struct ModalitySpec {
  int64_t steps;           // L, padding included
  int64_t features;        // F
  int64_t front;           // 1: padding comes before the real steps
  const int64_t* lengths;  // (B) numbers of real steps, or null: all L
};

// The arrays belong to the caller.
struct AugmentCall {
  int64_t batch;
  int64_t modalities;
  int64_t views;
  const int64_t* steps_per_view;  // (views)
  const StepSpec* steps;          // (sum of steps_per_view, modalities)
  const ModalitySpec* shapes;     // (modalities)
  const uint64_t* seed;           // (1)
  const int64_t* ids;             // (batch) sample ids, or null: the position in the batch
  int64_t plan_stride;            // words per sample
};

}  // namespace mmfast

namespace MMFAST_NS {
using namespace mmfast;

MMFAST_HD int64_t bit_words(int64_t n) { return (n + 31) / 32; }

MMFAST_HD int64_t plan_words(const StepSpec& step, const ModalitySpec& modality) {
  const int64_t feature_bits = bit_words(modality.features), time_bits = bit_words(modality.steps);
  switch (step.kind) {
    case kResample:
      return 1 + feature_bits + modality.steps + time_bits;
    case kMaskSteps:
      return 1 + time_bits;
    case kMaskFeatures:
      return 1 + feature_bits;
    default:
      return 1;
  }
}

// round(p 2^32) for p in [0, 1], half up.
MMFAST_HD uint64_t probability_threshold(double p) { return (uint64_t)(p * 4294967296.0 + 0.5); }

// How many of n a step selects: round(share n), half up. A mask leaves one, unless its share is 1.
MMFAST_HD int64_t exact_count(const StepSpec& step, double share, int64_t n) {
  const int64_t count = (int64_t)(share * (double)n + 0.5);
  return count == n && n > 0 && share < 1 && step.kind != kResample ? n - 1 : count;
}

MMFAST_HD int64_t real_steps(const ModalitySpec& modality, int64_t sample) {
  return modality.lengths ? modality.lengths[sample] : modality.steps;
}

// The same for lengths that nobody has checked.
MMFAST_HD int64_t clamped_steps(const ModalitySpec& modality, int64_t sample) {
  const int64_t n = real_steps(modality, sample);
  return n < 0 ? 0 : n > modality.steps ? modality.steps : n;
}

MMFAST_HD uint64_t sample_id(const AugmentCall& call, int64_t sample) {
  return call.ids ? (uint64_t)call.ids[sample] : (uint64_t)sample;
}

// Does the step fire? One coin per batch and modality, per batch, or per sample and modality.
MMFAST_HD bool step_fires(const StepSpec& step, uint64_t seed, uint64_t id, int view, int modality,
                          int position) {
  const uint32_t who = step.apply == kPerBatch ? kAllModalities : (uint32_t)modality;
  const uint64_t whose = step.apply == kPerSample ? id : kAllSamples;
  return decide(philox(seed, whose, stream_tag(view, who, position, kCoin), 0).w[0], (uint64_t)step.coin);
}

// SeqAug's alpha of one sample: amount + |N(0, spread^2)|, clipped to [0, 1]. In fp64, so that backends whose
// logarithm or cosine differ in the last bit still agree on the threshold made of it.
MMFAST_HD double draw_alpha(double amount, double spread, uint64_t seed, uint64_t id, uint32_t tag) {
  if (spread == 0) return amount;
  const Words w = philox(seed, id, tag, 0);
  const double radius = square_root(-2.0 * natural_log(1.0 - (double)uniform(w.w[0])));
  const double normal = radius * cosine_of_turn((double)uniform(w.w[1]));
  const double alpha = amount + spread * (normal < 0 ? -normal : normal);
  return alpha < 1 ? alpha : 1;
}

MMFAST_HD bool get_bit(const int32_t* bits, int64_t i) { return (uint32_t)bits[i >> 5] >> (i & 31) & 1u; }

}  // namespace MMFAST_NS
