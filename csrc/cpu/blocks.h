// What the fp32, fp64 and bf16 passes of Barlow Twins share: blocks of columns, their statistics, the loss.
#pragma once
#include "../barlow_twins.h"
#include "rows.h"

namespace MMFAST_NS {

// body(j, extent, scratch) for every block of columns j, j + 1, ...; `scratch` has `rows` rows of a block and
// belongs to the thread. False if there is no memory.
template <class C, class Body>
bool for_blocks(int64_t columns, int64_t rows, int threads, Body body) {
  bool memory = true;
  const int64_t blocks = (columns + kWidth<C> - 1) / kWidth<C>;
#pragma omp parallel num_threads(blocks < threads ? (int)blocks : threads)
  {
    C* scratch = rows ? (C*)__builtin_malloc(rows * kWidth<C> * sizeof(C)) : 0;
    const bool mine = scratch || !rows;
    if (!mine) {
#pragma omp atomic write
      memory = false;
    }
#pragma omp for schedule(static)
    for (int64_t j = 0; j < columns; j += kWidth<C>) {
      if (!mine) continue;
      if (columns - j >= kWidth<C>)
        body(j, Whole{}, scratch);
      else
        body(j, Part{(int)(columns - j)}, scratch);
    }
    __builtin_free(scratch);
  }
  return memory;
}

// Copies one block of a view to `block`, less its column means if `center`, and returns r. Sums are relative
// to the first row: a constant column comes out exactly zero, and an offset costs no precision.
template <class C, class T, class Extent>
MMFAST_HD Row<C> centred(const T* z, int64_t stride, int64_t rows, Extent extent, bool center,
                         const Scaling<C>& scaling, C* block, C* mean_out) {
  const Row<C> shift = center ? load<C>(z, extent) : Row<C>::all(0);
  const Row<C> sum = sum_rows<C>(rows, [&](int64_t i) {
    Row<C> x = load<C>(z + i * stride, extent) - shift;
    x.to(block + i * kWidth<C>);
    return x;
  });
  const Row<C> mean = center ? sum * Row<C>::all(1 / (C)rows) : Row<C>::all(0);
  store(shift + mean, mean_out, extent);
  const Row<C> square = sum_rows<C>(rows, [&](int64_t i) {
    Row<C> d = Row<C>::of(block + i * kWidth<C>) - mean;
    d.to(block + i * kWidth<C>);
    return d * d;
  });
  C r[kWidth<C>];
  square.to(r);
  for (int j = 0; j < kWidth<C>; ++j) r[j] = scaling.inverse_deviation(r[j] / (C)rows);
  return Row<C>::of(r);
}

// The loss and its components; `energy` is the sum of the squares of B C, with_diagonal or not.
template <class C>
inline void finish(const C* deficit, int64_t rows, int64_t columns, double energy, bool with_diagonal,
            const BarlowTwinsDefinition& definition, C* loss, C* components) {
  const Objective<double> objective(definition, rows);
  double on = 0, trace = 0, diagonal = 0;
  for (int64_t j = 0; j < columns; ++j) {
    double d = deficit[j], c = 1 - d;
    on += (d - objective.lack) * (d - objective.lack);
    trace += c;
    diagonal += c * c;
  }
  write_loss(on, trace, diagonal, energy, with_diagonal, rows, columns, objective, loss, components);
}

}  // namespace MMFAST_NS
