// Draw: which steps fire, feature subsets, permutations and masks, one sample at a time.
#include <stdlib.h>

#include "../augment.h"
#include "kernels.h"
#include "parallel.h"
#include "stream.h"

namespace MMFAST_NS {
namespace {

// words[0 .. count) of one stream; room for whole chunks.
inline void fill_words(uint64_t seed, uint64_t id, uint32_t tag, int64_t count, uint32_t* words) {
  for (int64_t chunk = 0; chunk * kChunk < count; ++chunk)
    words_chunk(seed, id, tag, (uint32_t)chunk, words + chunk * kChunk);
}

// bits[i] = words[i] < threshold; bits beyond count are zero.
inline void threshold_bits(const uint32_t* words, int64_t count, uint64_t threshold, int32_t* bits) {
  for (int64_t base = 0; base < count; base += 32) {
    const int64_t left = count - base < 32 ? count - base : 32;
    uint32_t word = 0;
    for (int64_t j = 0; j < left; ++j) word |= (uint32_t)decide(words[base + j], threshold) << j;
    bits[base / 32] = (int32_t)word;
  }
}

// order = indices of keys sorted upwards, equal keys by index. Counting how many keys are smaller vectorises
// and wins for short sequences; a byte-wise radix sort takes over for long ones. Keys fill whole chunks, so
// counting may run to a whole number of vectors.
inline void sort_indices(const uint32_t* keys, int64_t n, int32_t* order, int32_t* spare) {
  if (n <= 256) {
    int32_t* rank = spare;
    const int32_t padded = (int32_t)((n + 15) / 16 * 16);
    for (int32_t i = 0; i < padded; ++i) rank[i] = 0;
    for (int32_t j = 0; j < (int32_t)n; ++j) {
      const uint32_t key = keys[j];
      for (int32_t i = 0; i < padded; ++i) rank[i] += (key < keys[i]) | ((key == keys[i]) & (j < i));
    }
    for (int32_t i = 0; i < (int32_t)n; ++i) order[rank[i]] = i;
    return;
  }
  for (int64_t i = 0; i < n; ++i) order[i] = (int32_t)i;
  int32_t *from = order, *to = spare;
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t place[256] = {};
    for (int64_t i = 0; i < n; ++i) ++place[keys[i] >> shift & 255u];
    int64_t sum = 0;
    for (int digit = 0; digit < 256; ++digit) {
      const int64_t count = place[digit];
      place[digit] = sum;
      sum += count;
    }
    for (int64_t i = 0; i < n; ++i) to[place[keys[from[i]] >> shift & 255u]++] = from[i];
    int32_t* swap = from;
    from = to;
    to = swap;
  }
  // Four passes: the result is back in `order`.
}

// The `count` indices with the smallest keys become ones.
inline void smallest_bits(const uint32_t* keys, int64_t n, int64_t count, int32_t* bits, int32_t* order,
                          int32_t* spare) {
  sort_indices(keys, n, order, spare);
  for (int64_t i = 0; i < count; ++i) bits[order[i] >> 5] |= (int32_t)(1u << (order[i] & 31));
}

struct Scratch {
  uint32_t* words;  // max(L, F), whole chunks
  int32_t* order;
  int32_t* spare;
};

void draw_step(const StepSpec& step, const ModalitySpec& shape, int64_t n, uint64_t seed, uint64_t id,
               int view, int modality, int position, int32_t* plan, const Scratch& scratch) {
  const auto tag = [&](int who, Purpose purpose) { return stream_tag(view, who, position, purpose); };
  const int64_t size = plan_words(step, shape);
  __builtin_memset(plan, 0, (size_t)size * sizeof(int32_t));
  const bool fired = step_fires(step, seed, id, view, modality, position);
  plan[0] = fired;
  int32_t* bits = plan + 1;
  uint32_t* words = scratch.words;
  if (step.kind == kMaskFeatures && fired) {
    fill_words(seed, id, tag(modality, kFeature), shape.features, words);
    if (step.flags & kExactCount)
      smallest_bits(words, shape.features, exact_count(step, step.amount, shape.features), bits,
                    scratch.order, scratch.spare);
    else
      threshold_bits(words, shape.features, probability_threshold(step.amount), bits);
  } else if (step.kind == kMaskSteps && fired) {
    fill_words(seed, id, tag(modality, kTime), n, words);
    if (step.flags & kExactCount)
      smallest_bits(words, n, exact_count(step, step.amount, n), bits, scratch.order, scratch.spare);
    else
      threshold_bits(words, n, probability_threshold(step.amount), bits);
  } else if (step.kind == kResample) {
    int32_t* order = bits + bit_words(shape.features);
    int32_t* gate = order + shape.steps;
    if (fired) {
      const double alpha = draw_alpha(step.amount, step.spread, seed, id, tag(modality, kShare));
      fill_words(seed, id, tag(modality, kFeature), shape.features, words);
      if (step.flags & kExactCount)
        smallest_bits(words, shape.features, exact_count(step, alpha, shape.features), bits, scratch.order,
                      scratch.spare);
      else
        threshold_bits(words, shape.features, probability_threshold(alpha), bits);
      fill_words(seed, id, tag(step.flags & kSharedOrder ? kAllModalities : modality, kTime), n, words);
      sort_indices(words, n, order, scratch.spare);
      // A gate of probability 1 is open whatever the words are.
      if (!decide(~0u, (uint64_t)step.gate)) fill_words(seed, id, tag(modality, kGate), n, words);
      threshold_bits(words, n, (uint64_t)step.gate, gate);
    }
    for (int64_t t = fired ? n : 0; t < shape.steps; ++t) order[t] = (int32_t)t;
  }
}

}  // namespace

int augment_draw(const AugmentCall& call, int32_t* plan, int threads) {
  int64_t longest = 0;
  for (int64_t m = 0; m < call.modalities; ++m) {
    longest = call.shapes[m].steps > longest ? call.shapes[m].steps : longest;
    longest = call.shapes[m].features > longest ? call.shapes[m].features : longest;
  }
  const int64_t room = (longest + kChunk - 1) / kChunk * kChunk;
  if (threads < 1) threads = 1;
  uint32_t* memory = (uint32_t*)malloc((size_t)(room * 3 * threads + 1) * sizeof(uint32_t));
  if (!memory) return kNoMemory;
  const uint64_t seed = *call.seed;
  parallel_for(call.batch, threads, (double)call.plan_stride * 2, [&](int64_t b, int worker) {
    uint32_t* mine = memory + worker * room * 3;
    const Scratch scratch = {mine, (int32_t*)mine + room, (int32_t*)mine + 2 * room};
    const uint64_t id = sample_id(call, b);
    const StepSpec* step = call.steps;
    int32_t* words = plan + b * call.plan_stride;
    for (int64_t v = 0; v < call.views; ++v)
      for (int64_t s = 0; s < call.steps_per_view[v]; ++s)
        for (int64_t m = 0; m < call.modalities; ++m, ++step) {
          draw_step(*step, call.shapes[m], real_steps(call.shapes[m], b), seed, id, (int)v, (int)m, (int)s,
                    words, scratch);
          words += plan_words(*step, call.shapes[m]);
        }
  });
  free(memory);
  return 0;
}

}  // namespace MMFAST_NS
