// Apply and its adjoint: the chain of a view on one sample at a time, which stays in the cache while the
// batch is read once and every view written once.
#include <stdlib.h>

#include "../augment.h"
#include "kernels.h"
#include "parallel.h"
#include "stream.h"

namespace MMFAST_NS {
namespace {

// Masks and blends work on bit patterns, noise on the numbers they stand for (setup.py:
// -fno-strict-aliasing).
template <int kBytes>
struct Bits;
template <>
struct Bits<2> {
  typedef uint16_t type;
};
template <>
struct Bits<4> {
  typedef uint32_t type;
};
template <>
struct Bits<8> {
  typedef uint64_t type;
};

// A step that fired, and its words of the plan behind `fired`.
struct Fired {
  const StepSpec* step;
  const int32_t* words;
  int position;
};

struct Resample {
  const int32_t* features;
  const int32_t* order;
  const int32_t* gate;
  Resample(const int32_t* words, const ModalitySpec& shape)
      : features(words), order(words + bit_words(shape.features)), gate(order + shape.steps) {}
  int64_t source(int64_t t) const { return get_bit(gate, t) ? order[t] : t; }
};

// lanes[f] = all ones where the bit is set.
template <class U>
inline void expand_bits(const int32_t* bits, int64_t n, U* lanes) {
  for (int64_t base = 0; base < n; base += 32) {
    const uint32_t word = (uint32_t)bits[base / 32];
    const int64_t left = n - base < 32 ? n - base : 32;
    for (int64_t j = 0; j < left; ++j) lanes[base + j] = (U)(0 - (U)(word >> j & 1u));
  }
}

// Rows of the real steps of one sample.
template <class U>
struct Rows {
  const U* data;
  int64_t stride;
  const U* operator[](int64_t t) const { return data + t * stride; }
};

template <class U>
inline void copy_rows(U* out, Rows<U> in, int64_t n, int64_t width) {
  if (in.stride == width) {
    __builtin_memcpy(out, in.data, (size_t)(n * width) * sizeof(U));
    return;
  }
  for (int64_t t = 0; t < n; ++t) __builtin_memcpy(out + t * width, in[t], (size_t)width * sizeof(U));
}

// out = in + mean + deviation z over the real elements, both dense; coordinate i of the stream is element i.
// Chunks of rows that nothing later in the chain looks at are left out.
template <class C>
inline void add_noise(C* out, const C* in, int64_t n, int64_t width, const StepSpec& step, uint64_t seed,
                      uint64_t id, uint32_t tag, const uint8_t* wanted) {
  const C mean = (C)step.amount, deviation = (C)step.spread;
  const int64_t count = n * width;
  float z[kChunk];
  for (int64_t base = 0; base < count; base += kChunk) {
    const int64_t end = base + kChunk < count ? base + kChunk : count;
    bool any = false;
    for (int64_t t = base / width; t <= (end - 1) / width; ++t) any |= wanted[t] != 0;
    if (!any) continue;
    normals_chunk(seed, id, tag, (uint32_t)(base / kChunk), z);
    if (end - base == kChunk)
      for (int j = 0; j < kChunk; ++j) out[base + j] = in[base + j] + (mean + deviation * (C)z[j]);
    else
      for (int64_t j = 0; j < end - base; ++j) out[base + j] = in[base + j] + (mean + deviation * (C)z[j]);
  }
}

// wanted[i * n + t]: does what follows fired step i look at time step t?
inline void wanted_steps(const Fired* fired, int count, const ModalitySpec& shape, int64_t n,
                         uint8_t* wanted) {
  for (int64_t t = 0; t < n; ++t) wanted[(count - 1) * n + t] = 1;
  for (int i = count - 1; i > 0; --i) {
    const uint8_t* after = wanted + i * n;
    uint8_t* before = wanted + (i - 1) * n;
    for (int64_t t = 0; t < n; ++t) before[t] = after[t];
    if (fired[i].step->kind == kMaskSteps) {
      for (int64_t t = 0; t < n; ++t) before[t] = before[t] && !get_bit(fired[i].words, t);
    } else if (fired[i].step->kind == kResample) {
      const Resample resample(fired[i].words, shape);
      for (int64_t t = 0; t < n; ++t)
        if (after[t]) before[resample.source(t)] = 1;
    }
  }
}

// The chain on the n real steps of one sample: from `in` to `out` (dense), with room for n * width elements
// in `spare` and width in `lanes`. `in` may be `out`.
template <class C>
void run_chain(Rows<typename Bits<sizeof(C)>::type> in, typename Bits<sizeof(C)>::type* out,
               typename Bits<sizeof(C)>::type* spare, typename Bits<sizeof(C)>::type* lanes, uint8_t* wanted,
               int64_t n, const Fired* fired, int count, const ModalitySpec& shape, uint64_t seed,
               uint64_t id, uint32_t view, uint32_t modality, bool with_noise) {
  using U = typename Bits<sizeof(C)>::type;
  const int64_t width = shape.features;
  const bool noisy = with_noise && sizeof(C) >= sizeof(float);
  if (noisy) wanted_steps(fired, count, shape, n, wanted);
  for (int i = 0; i < count; ++i) {
    const StepSpec& step = *fired[i].step;
    if (step.kind == kGaussianNoise) {
      if (!noisy) continue;
      if (in.stride != width) {
        copy_rows(out, in, n, width);
        in = {out, width};
      }
      if constexpr (sizeof(C) >= sizeof(float)) {
        add_noise((C*)out, (const C*)in.data, n, width, step, seed, id,
                  stream_tag(view, modality, fired[i].position, kNoise), wanted + i * n);
      }
    } else if (step.kind == kMaskSteps) {
      for (int64_t t = 0; t < n; ++t) {
        U* row = out + t * width;
        if (get_bit(fired[i].words, t))
          __builtin_memset(row, 0, (size_t)width * sizeof(U));
        else if (in[t] != row)
          __builtin_memcpy(row, in[t], (size_t)width * sizeof(U));
      }
    } else if (step.kind == kMaskFeatures) {
      expand_bits(fired[i].words, width, lanes);
      for (int64_t t = 0; t < n; ++t) {
        const U* from = in[t];
        U* row = out + t * width;
        for (int64_t f = 0; f < width; ++f) row[f] = from[f] & ~lanes[f];
      }
    } else {
      const Resample resample(fired[i].words, shape);
      if (in.data == out) {
        copy_rows(spare, in, n, width);
        in = {spare, width};
      }
      expand_bits(resample.features, width, lanes);
      for (int64_t t = 0; t < n; ++t) {
        const U* __restrict own = in[t], * __restrict other = in[resample.source(t)];
        U* __restrict row = out + t * width;
        for (int64_t f = 0; f < width; ++f) row[f] = (own[f] & ~lanes[f]) | (other[f] & lanes[f]);
      }
    }
    in = {out, width};
  }
  if (in.data != out) copy_rows(out, in, n, width);
}

// Planes of the work space, each with room for one sample of the widest type.
enum Plane { kMask, kSpare, kResult, kInput, kApplyPlanes };
enum AdjointPlane { kSum, kGrad, kGradSpare, kKeep, kAdjointPlanes };

// Work space of one thread.
struct Scratch {
  char* memory;
  int64_t plane;  // bytes of one sample in the widest type
  uint8_t* wanted;
  Fired* fired;
  template <class T>
  T* at(int i) const {
    return (T*)(memory + plane * i);
  }
};

// Allocates the work space of all threads; planes of max(L F + F) elements of 8 bytes.
struct Workspace {
  char* memory = nullptr;
  int64_t plane = 0, per_worker = 0, planes = 0, wanted = 0;

  bool allocate(const AugmentCall& call, int count, int threads) {
    int64_t cells = 0, steps = 0, chain = 1;
    for (int64_t m = 0; m < call.modalities; ++m) {
      const ModalitySpec& shape = call.shapes[m];
      const int64_t here = (shape.steps + 1) * shape.features;
      cells = here > cells ? here : cells;
      steps = shape.steps > steps ? shape.steps : steps;
    }
    for (int64_t v = 0; v < call.views; ++v)
      chain = call.steps_per_view[v] > chain ? call.steps_per_view[v] : chain;
    plane = (cells * 8 + 63) / 64 * 64;
    planes = count;
    wanted = (steps * chain + 63) / 64 * 64;
    per_worker = plane * planes + wanted + ((int64_t)sizeof(Fired) * chain + 63) / 64 * 64;
    memory = (char*)malloc((size_t)(per_worker * (threads < 1 ? 1 : threads) + 64));
    return memory != nullptr;
  }
  ~Workspace() { free(memory); }

  Scratch of(int worker) const {
    char* mine = memory + (64 - (uint64_t)memory % 64) % 64 + per_worker * worker;
    char* flags = mine + plane * planes;
    return {mine, plane, (uint8_t*)flags, (Fired*)(flags + wanted)};
  }
};

// Where the real steps of one sample of one modality stand, in time steps and in elements.
struct Place {
  int64_t n, start, width;  // real steps, first of them, F
  int64_t block;            // L F
};

inline Place place_of(const ModalitySpec& shape, int64_t b) {
  const int64_t n = real_steps(shape, b);
  return {n, shape.front ? shape.steps - n : 0, shape.features, shape.steps * shape.features};
}

// body(b, scratch) for every sample of the batch; `cost` is the rough number of nanoseconds per element and
// view.
template <class Body>
inline int each_sample(const AugmentCall& call, int planes, int threads, double cost, const Body& body) {
  Workspace workspace;
  if (!workspace.allocate(call, planes, threads)) return kNoMemory;
  double cells = 0;
  for (int64_t m = 0; m < call.modalities; ++m)
    cells += (double)(call.shapes[m].steps * call.shapes[m].features);
  parallel_for(call.batch, threads, cells * cost * (double)call.views,
               [&](int64_t b, int worker) { body(b, workspace.of(worker)); });
  return 0;
}

// body(view, number of steps that fired) for every view of sample b of modality m; the steps are in
// scratch.fired.
template <class Body>
inline void each_view(const AugmentCall& call, const int32_t* plan, int64_t b, int64_t m,
                      const Scratch& scratch, const Body& body) {
  const StepSpec* step = call.steps;
  const int32_t* words = plan + b * call.plan_stride;
  for (int64_t v = 0; v < call.views; ++v) {
    int count = 0;
    for (int64_t s = 0; s < call.steps_per_view[v]; ++s)
      for (int64_t i = 0; i < call.modalities; ++i, ++step) {
        if (i == m && words[0]) scratch.fired[count++] = {step, words + 1, (int)s};
        words += plan_words(*step, call.shapes[i]);
      }
    body(v, count);
  }
}

// One view of one sample of one modality. E is stored, C is computed in; they differ for half types with
// noise. x: its first time step; real: its real steps, dense.
template <class E, class C>
void apply_view(const AugmentCall& call, const Fired* fired, int count, int64_t b, int64_t m, int64_t v,
                const E* x, int64_t stride_t, const E* real, E* out, bool with_noise,
                const Scratch& scratch) {
  typedef typename Bits<sizeof(E)>::type Stored;
  typedef typename Bits<sizeof(C)>::type U;
  const ModalitySpec& shape = call.shapes[m];
  const Place at = place_of(shape, b);
  const Rows<Stored> rows = {(const Stored*)x, stride_t};
  Stored* const block = (Stored*)out;
  const int64_t after = at.start + at.n, cells = at.n * at.width;
  copy_rows(block, rows, at.start, at.width);
  copy_rows(block + after * at.width, {rows[after], stride_t}, shape.steps - after, at.width);
  const auto chain = [&](const U* in, U* to) {
    run_chain<C>({in, at.width}, to, scratch.at<U>(kSpare), scratch.at<U>(kMask), scratch.wanted, at.n, fired,
                 count, shape, *call.seed, sample_id(call, b), (uint32_t)v, (uint32_t)m, with_noise);
  };
  U* const result = scratch.at<U>(kResult);
  if constexpr (sizeof(E) == sizeof(C)) {
    // Worked out in the cache and copied in one go: memcpy writes whole lines without reading them first.
    chain((const U*)real, result);
    __builtin_memcpy(block + at.start * at.width, result, (size_t)cells * sizeof(U));
  } else {
    C* const numbers = (C*)result;
    for (int64_t i = 0; i < cells; ++i) numbers[i] = Scalar<E>::load(real[i]);
    chain(result, result);
    E* to = out + at.start * at.width;
    for (int64_t i = 0; i < cells; ++i) to[i] = Scalar<E>::store(numbers[i]);
  }
}

template <class E>
int apply_typed(const AugmentCall& call, const int32_t* plan, const void* const* x, const int64_t* strides,
                void* const* out, bool with_noise, int threads) {
  using C = typename Scalar<E>::compute;
  typedef typename Bits<sizeof(E)>::type Stored;
  return each_sample(call, kApplyPlanes, threads, 0.2, [&](int64_t b, const Scratch& scratch) {
    for (int64_t m = 0; m < call.modalities; ++m) {
      const Place at = place_of(call.shapes[m], b);
      if (at.block == 0) continue;
      const E* from = (const E*)x[m] + b * strides[2 * m];
      const int64_t stride_t = strides[2 * m + 1];
      Stored* const real = scratch.at<Stored>(kInput);
      bool read = false;
      each_view(call, plan, b, m, scratch, [&](int64_t v, int count) {
        E* to = (E*)out[v * call.modalities + m] + b * at.block;
        if (count == 0) {
          copy_rows((Stored*)to, {(const Stored*)from, stride_t}, call.shapes[m].steps, at.width);
          return;
        }
        // Read once and in order for all views: a permutation would wait for each row it fetched from memory.
        if (!read) copy_rows(real, {(const Stored*)from + at.start * stride_t, stride_t}, at.n, at.width);
        read = true;
        bool noisy = false;
        for (int i = 0; i < count; ++i) noisy |= with_noise && scratch.fired[i].step->kind == kGaussianNoise;
        // Without noise nothing is computed: elements move as bit patterns of their own size.
        if (noisy)
          apply_view<E, C>(call, scratch.fired, count, b, m, v, from, stride_t, (const E*)real, to, true,
                           scratch);
        else
          apply_view<E, E>(call, scratch.fired, count, b, m, v, from, stride_t, (const E*)real, to, false,
                           scratch);
      });
    }
  });
}

// One view's gradient pulled back through its chain; the result is in `grad` or in `spare`. Selecting, not
// multiplying by zero: an infinite gradient of a masked element must vanish, too.
template <class C>
C* pull_back(C* grad, C* spare, C* keep, int64_t n, const Fired* fired, int count,
             const ModalitySpec& shape) {
  const int64_t width = shape.features;
  for (int i = count - 1; i >= 0; --i) {
    const StepSpec& step = *fired[i].step;
    if (step.kind == kMaskSteps) {
      for (int64_t t = 0; t < n; ++t)
        if (get_bit(fired[i].words, t)) __builtin_memset(grad + t * width, 0, (size_t)width * sizeof(C));
    } else if (step.kind == kMaskFeatures) {
      for (int64_t f = 0; f < width; ++f) keep[f] = get_bit(fired[i].words, f) ? (C)0 : (C)1;
      for (int64_t t = 0; t < n; ++t) {
        C* row = grad + t * width;
        for (int64_t f = 0; f < width; ++f) row[f] = keep[f] != 0 ? row[f] : (C)0;
      }
    } else if (step.kind == kResample) {
      const Resample resample(fired[i].words, shape);
      for (int64_t f = 0; f < width; ++f) keep[f] = get_bit(resample.features, f) ? (C)0 : (C)1;
      __builtin_memset(spare, 0, (size_t)(n * width) * sizeof(C));
      for (int64_t t = 0; t < n; ++t) {
        const C* from = grad + t * width;
        C *own = spare + t * width, *other = spare + resample.source(t) * width;
        for (int64_t f = 0; f < width; ++f) own[f] += keep[f] != 0 ? from[f] : (C)0;
        for (int64_t f = 0; f < width; ++f) other[f] += keep[f] != 0 ? (C)0 : from[f];
      }
      C* swap = grad;
      grad = spare;
      spare = swap;
    }
  }
  return grad;
}

template <class E>
int adjoint_typed(const AugmentCall& call, const int32_t* plan, const void* const* grads,
                  void* const* x_grads, int threads) {
  using C = typename Scalar<E>::compute;
  return each_sample(call, kAdjointPlanes, threads, 0.5, [&](int64_t b, const Scratch& scratch) {
    C* const sum = scratch.at<C>(kSum);
    for (int64_t m = 0; m < call.modalities; ++m) {
      const ModalitySpec& shape = call.shapes[m];
      const Place at = place_of(shape, b);
      if (at.block == 0) continue;
      for (int64_t i = 0; i < at.block; ++i) sum[i] = 0;
      each_view(call, plan, b, m, scratch, [&](int64_t v, int count) {
        const E* from = (const E*)grads[v * call.modalities + m] + b * at.block;
        // Padding is a copy of the input, so its gradient comes straight through.
        const int64_t first = at.start * at.width, last = first + at.n * at.width;
        for (int64_t i = 0; i < first; ++i) sum[i] += Scalar<E>::load(from[i]);
        for (int64_t i = last; i < at.block; ++i) sum[i] += Scalar<E>::load(from[i]);
        C* const grad = scratch.at<C>(kGrad);
        for (int64_t i = 0; i < last - first; ++i) grad[i] = Scalar<E>::load(from[first + i]);
        const C* pulled = pull_back(grad, scratch.at<C>(kGradSpare), scratch.at<C>(kKeep), at.n,
                                    scratch.fired, count, shape);
        for (int64_t i = 0; i < last - first; ++i) sum[first + i] += pulled[i];
      });
      E* to = (E*)x_grads[m] + b * at.block;
      for (int64_t i = 0; i < at.block; ++i) to[i] = Scalar<E>::store(sum[i]);
    }
  });
}

}  // namespace

int augment_apply(const AugmentCall& call, const int32_t* plan, int dtype, const void* const* x,
                  const int64_t* strides, void* const* out, bool with_noise, int threads) {
  switch (dtype) {
    case kFloat64:
      return apply_typed<double>(call, plan, x, strides, out, with_noise, threads);
    case kBFloat16:
      return apply_typed<bfloat16>(call, plan, x, strides, out, with_noise, threads);
    case kFloat16:
      return apply_typed<float16>(call, plan, x, strides, out, with_noise, threads);
    default:
      return apply_typed<float>(call, plan, x, strides, out, with_noise, threads);
  }
}

int augment_adjoint(const AugmentCall& call, const int32_t* plan, int dtype, const void* const* grads,
                    void* const* x_grads, int threads) {
  switch (dtype) {
    case kFloat64:
      return adjoint_typed<double>(call, plan, grads, x_grads, threads);
    case kBFloat16:
      return adjoint_typed<bfloat16>(call, plan, grads, x_grads, threads);
    case kFloat16:
      return adjoint_typed<float16>(call, plan, grads, x_grads, threads);
    default:
      return adjoint_typed<float>(call, plan, grads, x_grads, threads);
  }
}

}  // namespace MMFAST_NS
