// Embeddings to directions and lengths, and the gradient by directions back, on CUDA: one block a row.
#include "../similarity.h"
#include "block.h"

namespace mmfast {
namespace {

template <class C>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
  // The exponent of a number m 2^e with m in [0.5, 1), of one that is not normal a little less than e.
  static constexpr int mantissa = 23, offset = 126;
};
template <>
struct Bits<double> {
  using type = int64_t;
  static constexpr int mantissa = 52, offset = 1022;
};

template <class C>
__device__ __forceinline__ typename Bits<C>::type bits_of(C x) {
  typename Bits<C>::type bits;
  memcpy(&bits, &x, sizeof(C));
  return bits;
}

// 2^n of a normal number.
template <class C>
__device__ __forceinline__ C power_of_two(int n) {
  const auto bits = (typename Bits<C>::type)(n + Bits<C>::offset + 1) << Bits<C>::mantissa;
  C power;
  memcpy(&power, &bits, sizeof(C));
  return power;
}

// A shorter row has no direction: its scores and its gradient are zero.
constexpr double kShortest = 1e-12;

// unit: x as it is, or divided by its length; 0 where it has no direction or is not valid. inverse: 1 /
// length, 0 for none. NaN shows.
template <class T>
__global__ void __launch_bounds__(256)
    units_kernel(const T* x, int64_t stride, int columns, const uint8_t* valid, bool cosine, Compute<T>* unit,
                 Compute<T>* inverse) {
  using C = Compute<T>;
  const int64_t i = blockIdx.x;
  x += i * stride;
  unit += i * columns;
  if (valid && !valid[i]) {
    for (int j = threadIdx.x; j < columns; j += blockDim.x) unit[j] = 0;
    if (threadIdx.x == 0) inverse[i] = 0;
    return;
  }
  if (!cosine) {
    for (int j = threadIdx.x; j < columns; j += blockDim.x) unit[j] = Scalar<T>::load(x[j]);
    if (threadIdx.x == 0) inverse[i] = 1;
    return;
  }
  using Integer = typename Bits<C>::type;
  constexpr Integer kMagnitude = (Integer)(((uint64_t)1 << (8 * sizeof(C) - 1)) - 1);
  Integer largest = 0;
  for (int j = threadIdx.x; j < columns; j += blockDim.x) {
    const Integer size = bits_of<C>(Scalar<T>::load(x[j])) & kMagnitude;
    largest = size > largest ? size : largest;
  }
  largest = merge_block(largest, [](Integer a, Integer b) { return a > b ? a : b; });
  // By a power of two, which rounds nothing: squares neither overflow nor vanish. In two steps, as it may be
  // no number itself. Of what is not finite it makes NaN.
  const int exponent = (int)(largest >> Bits<C>::mantissa) - Bits<C>::offset;
  const C first = power_of_two<C>(-(exponent / 2)), second = power_of_two<C>(exponent / 2 - exponent);
  C sum = 0;
  for (int j = threadIdx.x; j < columns; j += blockDim.x) {
    const C scaled = Scalar<T>::load(x[j]) * first * second;
    sum += scaled * scaled;
  }
  sum = sum_block(sum);
  const C length = square_root(sum);
  // length 2^exponent, where it cannot overflow.
  const bool none = largest == 0 || (exponent <= 0 && length / first / second < (C)kShortest);
  const C factor = none ? 0 : 1 / length;
  const bool finite = sum - sum == 0;
  for (int j = threadIdx.x; j < columns; j += blockDim.x)
    unit[j] = finite ? Scalar<T>::load(x[j]) * first * second * factor : sum - sum;
  if (threadIdx.x == 0) inverse[i] = finite ? factor * first * second : sum - sum;
}

// out may be grad.
template <class T>
__global__ void __launch_bounds__(256)
    row_gradients_kernel(const Compute<T>* grad, const Compute<T>* unit, const Compute<T>* inverse,
                         const Compute<T>* scale_in, int columns, bool cosine, T* out, Compute<T>* dots) {
  using C = Compute<T>;
  const int64_t i = blockIdx.x;
  grad += i * columns;
  unit += i * columns;
  out += i * columns;
  C along = 0;
  for (int j = threadIdx.x; j < columns; j += blockDim.x) along += grad[j] * unit[j];
  along = sum_block(along);
  if (threadIdx.x == 0) dots[i] = along;
  const C scale = *scale_in, factor = cosine ? inverse[i] : 1, part = cosine ? along * scale : 0;
  for (int j = threadIdx.x; j < columns; j += blockDim.x) {
    const C own = cosine ? unit[j] * part : 0;
    out[j] = Scalar<T>::store((grad[j] * scale - own) * factor);
  }
}

}  // namespace

int cuda_similarity_units(int dtype, const void* x, int64_t stride, int64_t rows, int64_t columns,
                          const void* valid, bool cosine, void* unit, void* inverse, const Target& target) {
  return with_type(dtype, [&](auto number) {
    using T = decltype(number);
    using C = Compute<T>;
    return launch(target, {rows}, threads_of_row(columns), units_kernel<T>, (const T*)x, stride, (int)columns,
                  (const uint8_t*)valid, cosine, (C*)unit, (C*)inverse);
  });
}

int cuda_similarity_row_gradients(int dtype, const void* grad, const void* unit, const void* inverse,
                                  const void* scale, int64_t rows, int64_t columns, bool cosine, void* out,
                                  void* dots, const Target& target) {
  return with_type(dtype, [&](auto number) {
    using T = decltype(number);
    using C = Compute<T>;
    return launch(target, {rows}, threads_of_row(columns), row_gradients_kernel<T>, (const C*)grad,
                  (const C*)unit, (const C*)inverse, (const C*)scale, (int)columns, cosine, (T*)out,
                  (C*)dots);
  });
}

}  // namespace mmfast
