// Blocks of columns, which the passes of both directions share, and the types they come in.
#pragma once
#include "../barlow_twins.h"
#include "parallel.h"
#include "tiles.h"

namespace MMFAST_NS {

// body(view, j, extent, scratch) for every block of columns j, j + 1, ... of so many views; `scratch` has
// `rows` rows of a block and belongs to the thread. False if there is no memory.
template <class C, class Body>
bool for_blocks(int views, int64_t columns, int64_t rows, int threads, Body body) {
  bool memory = true;
  const int64_t blocks_of_view = (columns + kWidth<C> - 1) / kWidth<C>, blocks = views * blocks_of_view;
#pragma omp parallel num_threads(blocks < threads ? (int)blocks : threads)
  {
    C* scratch = rows ? (C*)__builtin_malloc(rows * kWidth<C> * sizeof(C)) : 0;
    const bool mine = scratch || !rows;
    if (!mine) {
#pragma omp atomic write
      memory = false;
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int view = b >= blocks_of_view;
      const int64_t j = (b - view * blocks_of_view) * kWidth<C>;
      if (!mine) continue;
      if (columns - j >= kWidth<C>)
        body(view, j, Whole{}, scratch);
      else
        body(view, j, Part{(int)(columns - j)}, scratch);
    }
    __builtin_free(scratch);
  }
  return memory;
}

// run(T(), C()) for the element type `dtype` and its compute type.
template <class Run>
auto with_types(int dtype, Run run) {
  switch (dtype) {
    case kFloat64:
      return run(double(), double());
    case kBFloat16:
      return run(bfloat16(), float());
    case kFloat16:
      return run(float16(), float());
    default:
      return run(float(), float());
  }
}

}  // namespace MMFAST_NS
