// What several kernels need of warps and of the element types of their arguments.
#pragma once
#include "../scalar.h"

namespace mmfast {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

template <class T>
using Compute = typename Scalar<T>::compute;

// run(T()) for the element type `dtype`.
template <class Run>
auto with_type(int dtype, Run run) {
  switch (dtype) {
    case kFloat64:
      return run(double());
    case kBFloat16:
      return run(bfloat16());
    case kFloat16:
      return run(float16());
    default:
      return run(float());
  }
}

template <class Run>
auto with_width(bool wide, Run run) {
  return wide ? run(double()) : run(float());
}

}  // namespace
}  // namespace mmfast
