// The mathematics of the Barlow Twins loss, one column or one element at a time.
//
// z is an embedding, d is z less its column's mean (as it is with center=False), v = mean(d^2),
// r = 1 / sqrt(v + eps), and the standardised embedding is â = d r for view a, b̂ for view b. c = mean(â b̂).
#pragma once
#include "platform.h"

namespace MMFAST_NS {

// r; 0 for a column without any variance where eps is 0, NaN where v is not finite.
template <class C>
MMFAST_HD C inverse_deviation(C v, C eps) {
  C w = v + eps;
  return w - w != 0 ? w - w : w > 0 ? 1 / square_root(w) : 0;
}

// Mean and sum of squared deviations of `count` rows of a column.
template <class C>
struct Moments {
  C count, mean, square;
};

// Of the rows of both (Chan, Golub and LeVeque 1979).
template <class C>
MMFAST_HD Moments<C> merged(const Moments<C>& x, const Moments<C>& y) {
  const C count = x.count + y.count, share = y.count / count, apart = y.mean - x.mean;
  return {count, x.mean + apart * share, x.square + y.square + apart * apart * x.count * share};
}

// 1 - mean(â^2): the length that eps takes from a column.
template <class C>
MMFAST_HD C shrinkage(C r, C eps) {
  return r == 0 ? 1 : eps * r * r;
}

// 1 - c from mean((â - b̂)^2), without the cancellation of 1 - mean(â b̂) where the views nearly agree.
template <class C>
MMFAST_HD C one_minus_c(C mean_square_difference, C r_a, C r_b, C eps) {
  return (mean_square_difference + shrinkage(r_a, eps) + shrinkage(r_b, eps)) / 2;
}

// The gradient with respect to one column of view a (of b alike, with the views exchanged):
//   dL/dâ = alpha m - weight b̂,  dL/dz = r (dL/dâ - â mean(â dL/dâ)).
// m is the column of (B̂B̂')Â, weight corrects its diagonal. dL/dâ of centred columns has mean zero.
template <class C>
struct ColumnGradient {
  C weight, projection;
};

// deficit: 1 - c; diagonal: lambd if m contains the diagonal of the correlation matrix, 0 if that was left
// out.
template <class C>
MMFAST_HD ColumnGradient<C> column_gradient(C mean_own_m, C deficit, C alpha, C beta, C diagonal) {
  C c = 1 - deficit;
  C weight = beta * (deficit + diagonal * c);
  return {weight, alpha * mean_own_m - weight * c};
}

// The loss and what else is told of it, from sums over columns of (1 - c)^2, c and c^2 and from the sum of
// the squares of B C, with its diagonal or without. components: loss, on-diagonal, off-diagonal, mean c,
// off-diagonal RMS.
template <class S, class C>
MMFAST_HD void write_loss(S on_diagonal, S trace, S diagonal, S energy, bool with_diagonal, int64_t rows,
                          int64_t columns, S lambd, C* loss, C* components) {
  S off_diagonal = energy / rows / rows - (with_diagonal ? diagonal : 0);
  off_diagonal = off_diagonal < 0 ? 0 : off_diagonal;
  const S pairs = columns > 1 ? (S)columns * (S)(columns - 1) : 1;
  *loss = (C)(on_diagonal + lambd * off_diagonal);
  components[0] = *loss;
  components[1] = (C)on_diagonal;
  components[2] = (C)off_diagonal;
  components[3] = (C)(trace / columns);
  components[4] = (C)square_root(off_diagonal / pairs);
}

}  // namespace MMFAST_NS
