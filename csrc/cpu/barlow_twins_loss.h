// The end of every form's forward pass.
#pragma once
#include "../barlow_twins.h"

namespace MMFAST_NS {

template <class C>
inline bool finite(const C* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (x[i] - x[i] != 0) return false;
  return true;
}

// The loss and its components; `energy` is the sum of the squares of B C, with_diagonal or not.
template <class C>
inline void finish(const C* gap, int64_t rows, int64_t columns, double energy, bool with_diagonal,
                   const BarlowTwinsDefinition& definition, C* loss, C* components) {
  const Objective<double> objective(definition, rows);
  double on = 0, trace = 0, diagonal = 0;
  for (int64_t j = 0; j < columns; ++j) {
    const double d = gap[j], c = objective.target - d;
    on += d * d;
    trace += c;
    diagonal += c * c;
  }
  write_loss(on, trace, diagonal, energy, with_diagonal, rows, columns, objective, loss, components);
}

}  // namespace MMFAST_NS
