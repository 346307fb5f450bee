// Draw: a group of threads, a warp for usual sizes, works out one step of one modality of one sample.
#include <vector>

#include "launch.h"

namespace mmfast {
namespace {

// One step of one modality of one view; a launch takes as many as fit into its parameters.
struct Field {
  StepSpec step;
  ModalitySpec shape;
  int64_t offset;  // of its words in a sample's plan
  int32_t view, modality, position;
};

constexpr int kFields = 32;

struct DrawCall {
  int64_t batch;
  const uint64_t* seed;
  const int64_t* ids;
  int32_t* plan;
  int64_t plan_stride;
  Field fields[kFields];
};
static_assert(sizeof(DrawCall) <= 4096, "kernel parameters");

// Apart, for the registers that its fp64 functions need.
__device__ __noinline__ double alpha_of(double amount, double spread, uint64_t seed, uint64_t id,
                                        uint32_t tag) {
  return draw_alpha(amount, spread, seed, id, tag);
}

struct Stream {
  uint64_t seed, id;
  uint32_t tag;
  __device__ Words block(int32_t i) const { return philox(seed, id, tag, (uint32_t)i); }
};

// kThreads threads that draw together; `tile` holds four keys for each of them.
template <int kThreads>
struct Group {
  static constexpr int kTile = 4 * kThreads;
  uint32_t* tile;
  int rank;

  __device__ void sync() const {
    if (kThreads == 32)
      __syncwarp();
    else
      __syncthreads();
  }

  __device__ void fill(int32_t* words, int32_t count) const {
    for (int32_t i = rank; i < count; i += kThreads) words[i] = 0;
  }

  // order[t] = t for begin <= t < end.
  __device__ void identity(int32_t* order, int32_t begin, int32_t end) const {
    for (int32_t t = begin + rank; t < end; t += kThreads) order[t] = t;
  }

  // bits[i] = word i < threshold for i < n, and zero in the rest of the `total` words.
  __device__ void threshold_bits(const Stream& stream, int32_t n, uint64_t threshold, int32_t* bits,
                                 int32_t total) const {
    const bool always = decide(~0u, threshold);
    for (int32_t at = rank / 8; at - rank / 8 < total; at += kTile / 32) {
      // Eight threads draw the 32 bits of one word.
      const int32_t first = 32 * at + 4 * (rank % 8);
      const Words w = always ? Words{} : stream.block(first / 4);
      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        word |= (uint32_t)(first + i < n && (always || decide(w.w[i], threshold))) << i;
      word <<= 4 * (rank % 8);
#pragma unroll
      for (int lane = 1; lane < 8; lane *= 2) word |= __shfl_xor_sync(~0u, word, lane);
      if (rank % 8 == 0 && at < total) bits[at] = (int32_t)word;
    }
  }

  // emit(i, place) for every i < limit, by all threads of a warp at once: the place that key i takes among
  // the keys below n, equal keys by index. Counts how many keys are smaller, a tile of them at a time.
  template <class Emit>
  __device__ void places(const Stream& stream, int32_t n, int32_t limit, Emit emit) const {
    const int32_t tiles = (n + kTile - 1) / kTile;
    for (int32_t own = 0; own * kTile < limit; ++own) {
      const int32_t base = own * kTile;
      uint32_t mine[4] = {}, place[4] = {};
#pragma unroll 1
      for (int32_t k = 0; k < tiles && base < n; ++k) {
        // The first tile is the one with this round's own keys.
        const int32_t start = (own + k < tiles ? own + k : own + k - tiles) * kTile;
        const Words w = stream.block(start / 4 + rank);
        sync();
#pragma unroll
        for (int i = 0; i < 4; ++i) tile[4 * rank + i] = w.w[i];
        sync();
        const int32_t count = n - start < kTile ? n - start : kTile;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (k == 0) mine[i] = tile[i * kThreads + rank];
          const int32_t before = base - start + i * kThreads + rank;  // indices that win against equal keys
          if (base + i * kThreads < n)
#pragma unroll 4
            for (int32_t j = 0; j < count; ++j)
              place[i] += (tile[j] < mine[i]) | ((tile[j] == mine[i]) & (j < before));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (base + i * kThreads < limit) emit(base + i * kThreads + rank, place[i]);
    }
  }

  // A share of the indices below n become ones: an exact count, those with the smallest keys, or each by
  // chance.
  __device__ void subset(const Stream& stream, int32_t n, const StepSpec& step, double share, int32_t* bits,
                         int32_t total) const {
    if (!(step.flags & kExactCount))
      return threshold_bits(stream, n, probability_threshold(share), bits, total);
    const uint32_t count = (uint32_t)exact_count(step, share, n);
    places(stream, n, 32 * total, [&](int32_t i, uint32_t place) {
      const uint32_t word = __ballot_sync(~0u, i < n && place < count);
      if (rank % 32 == 0 && i / 32 < total) bits[i / 32] = (int32_t)word;
    });
  }
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads == 32 ? 128 : kThreads)
    draw_kernel(const __grid_constant__ DrawCall call) {
  constexpr int kGroups = kThreads == 32 ? 4 : 1;
  alignas(16) __shared__ uint32_t tiles[kGroups][4 * kThreads];
  const int64_t b = (int64_t)blockIdx.x * kGroups + threadIdx.x / kThreads;
  if (b >= call.batch) return;
  const Group<kThreads> group{tiles[threadIdx.x / kThreads], (int)(threadIdx.x % kThreads)};
  const Field& field = call.fields[blockIdx.y];
  const StepSpec& step = field.step;
  const int32_t steps = (int32_t)field.shape.steps, features = (int32_t)field.shape.features;
  const int32_t n = (int32_t)clamped_steps(field.shape, b);
  const uint64_t seed = *call.seed, id = call.ids ? (uint64_t)call.ids[b] : (uint64_t)b;
  const auto stream = [&](uint32_t who, Purpose purpose) {
    return Stream{seed, id, stream_tag(field.view, who, field.position, purpose)};
  };
  const bool fired = step_fires(step, seed, id, field.view, field.modality, field.position);
  int32_t* plan = call.plan + b * call.plan_stride + field.offset;
  if (group.rank == 0) plan[0] = fired;
  if (step.kind == kGaussianNoise) return;

  const bool resample = step.kind == kResample, in_time = step.kind == kMaskSteps;
  const int32_t time_words = (int32_t)bit_words(steps);
  const int32_t subset_words = in_time ? time_words : (int32_t)bit_words(features);
  int32_t *bits = plan + 1, *order = bits + subset_words, *gate = order + steps;
  if (!fired) {
    group.fill(bits, subset_words);
    if (resample) {
      group.identity(order, 0, steps);
      group.fill(gate, time_words);
    }
    return;
  }
  const double share = resample
                           ? alpha_of(step.amount, step.spread, seed, id, stream(field.modality, kShare).tag)
                           : step.amount;
  group.subset(stream(field.modality, in_time ? kTime : kFeature), in_time ? n : features, step, share, bits,
               subset_words);
  if (resample) {
    group.places(stream(step.flags & kSharedOrder ? kAllModalities : field.modality, kTime), n, n,
                 [&](int32_t i, uint32_t place) {
                   if (i < n) order[place] = i;
                 });
    group.identity(order, n, steps);
    group.threshold_bits(stream(field.modality, kGate), n, (uint64_t)step.gate, gate, time_words);
  }
}

}  // namespace

int cuda_augment_draw(const AugmentCall& call, int32_t* plan, const Target& target) {
  std::vector<Field> fields;
  int64_t offset = 0, longest = 0;
  const StepSpec* step = call.steps;
  for (int64_t v = 0; v < call.views; ++v)
    for (int64_t s = 0; s < call.steps_per_view[v]; ++s)
      for (int64_t m = 0; m < call.modalities; ++m, ++step) {
        const ModalitySpec& shape = call.shapes[m];
        fields.push_back({*step, shape, offset, (int32_t)v, (int32_t)m, (int32_t)s});
        offset += plan_words(*step, shape);
        longest = shape.steps > longest ? shape.steps : longest;
        if (step->flags & kExactCount) longest = shape.features > longest ? shape.features : longest;
      }
  for (size_t first = 0; first < fields.size(); first += kFields) {
    DrawCall part = {call.batch, call.seed, call.ids, plan, call.plan_stride, {}};
    const size_t count = fields.size() - first < kFields ? fields.size() - first : kFields;
    for (size_t i = 0; i < count; ++i) part.fields[i] = fields[first + i];
    // Counting is quadratic in the length: long sequences get more threads each.
    const int error = longest <= 512
                          ? launch(target, {(call.batch + 3) / 4, (int64_t)count}, 128, draw_kernel<32>, part)
                          : launch(target, {call.batch, (int64_t)count}, 512, draw_kernel<512>, part);
    if (error) return error;
  }
  return 0;
}

}  // namespace mmfast
