// The mathematics of the Barlow Twins loss, one column or one element at a time.
//
// z is an embedding, d is z less its column's mean (as it is with center=False), v = mean(d^2), and the
// standardised embedding is â = d r for view a, b̂ for view b. c = mean(â b̂). Published losses disagree on
// r = 1 / sqrt(kappa v + eps), which may also be 1 / (sqrt(kappa v) + eps) or 1, with kappa = 1 or, for the
// unbiased variance, B / (B - 1).
#pragma once
#include "platform.h"

namespace mmfast {

// Definition of mmfast/ops/barlow_twins/definition.py.
struct BarlowTwinsDefinition {
  double lambd;
  bool center;
  double eps;
  bool eps_outside, unbiased, divide;
  double scale;
  bool normalise;
};

}  // namespace mmfast

namespace MMFAST_NS {
using namespace mmfast;

// What c is drawn to.
template <class C>
MMFAST_HD C target_of(const BarlowTwinsDefinition& definition, int64_t rows) {
  return definition.divide ? 1 : (C)(1.0 / rows);
}

// How columns of B rows are scaled: by r = 1 / (sqrt(kappa v + inner) + outer), or by 1.
template <class C>
struct Scaling {
  C inner, outer;   // one of them is eps, the other 0
  C kappa, excess;  // excess: 1 - 1 / kappa
  C known;          // 1 if columns are standardised, so that their lengths are known, or 0
  C target;         // what c is drawn to: 1, or 1 / B where C is not divided by B
  C near;           // 1 if gaps come from the distance of both views, or 0

  MMFAST_HD Scaling(const BarlowTwinsDefinition& definition, int64_t rows)
      : inner(definition.eps_outside ? 0 : (C)definition.eps),
        outer(definition.eps_outside ? (C)definition.eps : 0),
        kappa(definition.unbiased ? (C)((double)rows / (rows - 1)) : 1),
        excess(definition.unbiased ? (C)(1.0 / rows) : 0),
        known(definition.normalise),
        target(target_of<C>(definition, rows)),
        near(definition.normalise && definition.divide) {}

  // r; 0 for a column without any variance where eps is 0, NaN where v is not finite.
  MMFAST_HD C inverse_deviation(C v) const {
    const C deviation = square_root(kappa * v + inner) + outer;
    const C inverse = known == 0 ? 1 : deviation > 0 ? 1 / deviation : 0;
    return deviation - deviation == 0 ? inverse : deviation - deviation;
  }
  // Of elements of both views, for gap: (â - b̂)^2 if `near`, else -â b̂.
  template <class X>
  static MMFAST_HD X term(const X& a, const X& b, const X& near) {
    return (a - near * b) * (near * a - b);
  }
  // target - c from the mean of terms: without cancellation where c is near its target. For a target of 1,
  // where the views agree, that takes lengths that are known; 1 / B is near 0 as it is.
  MMFAST_HD C gap(C mean_term, C r_a, C r_b) const {
    return near ? (mean_term + shrinkage(r_a) + shrinkage(r_b)) / 2 : target + mean_term;
  }
  // 1 - mean(â^2): the length that eps and kappa take from a standardised column.
  MMFAST_HD C shrinkage(C r) const {
    const C lost = r == 0 ? 1 : inner * r * r + outer * r * (2 - outer * r);
    return excess + (1 - excess) * lost;
  }
  // dL/dz = r (dL/dâ - projection â mean(â dL/dâ)).
  MMFAST_HD C projection(C r) const {
    const C kept = 1 - outer * r;
    return kept > 0 ? known * kappa / kept : 0;
  }
};

// What the loss does with C: scale * (sum of (target - c)^2 + lambd * off-diagonal). Without the division of
// C by B it is B^2 times as large, and c is drawn to 1 / B.
template <class C>
struct Objective {
  C lambd, scale, target;

  MMFAST_HD Objective(const BarlowTwinsDefinition& definition, int64_t rows)
      : lambd((C)definition.lambd),
        scale((C)(definition.divide ? definition.scale : definition.scale * rows * rows)),
        target(target_of<C>(definition, rows)) {}
};

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

// The gradient with respect to one column of view a (of b alike, with the views exchanged), where
//   dL/dâ = alpha m - weight b̂.
// m is the column of (B̂B̂')Â, weight corrects its diagonal. dL/dâ of centred columns has mean zero.
template <class C>
struct ColumnGradient {
  C weight, own;  // dL/dz = r (dL/dâ - own â)
};

// The numbers of one backward pass, for the upstream gradient u of the loss.
template <class C>
struct Pull {
  C alpha, beta, diagonal, target;

  // with_diagonal: m contains the diagonal of the correlation matrix.
  Pull(const BarlowTwinsDefinition& definition, int64_t rows, bool with_diagonal, double u) {
    const Objective<double> objective(definition, rows);
    alpha = (C)(2 * objective.lambd * objective.scale * u / rows / rows);
    beta = (C)(2 * objective.scale * u / rows);
    diagonal = with_diagonal ? (C)objective.lambd : 0;
    target = (C)objective.target;
  }

  // gap: target - c.
  MMFAST_HD ColumnGradient<C> column(C mean_own_m, C gap, C projection) const {
    const C c = target - gap, weight = beta * (gap + diagonal * c);
    return {weight, projection * (alpha * mean_own_m - weight * c)};
  }
};

// The loss and what else is told of it, from sums over columns of (target - c)^2, c and c^2 and from the sum
// of the squares of B C, with its diagonal or without. components: loss, on-diagonal, off-diagonal, mean c,
// off-diagonal RMS.
template <class S, class C>
MMFAST_HD void write_loss(S on_diagonal, S trace, S diagonal, S energy, bool with_diagonal, int64_t rows,
                          int64_t columns, const Objective<S>& objective, C* loss, C* components) {
  S off_diagonal = energy / rows / rows - (with_diagonal ? diagonal : 0);
  off_diagonal = off_diagonal < 0 ? 0 : off_diagonal;
  const S pairs = columns > 1 ? (S)columns * (S)(columns - 1) : 1;
  *loss = (C)(objective.scale * (on_diagonal + objective.lambd * off_diagonal));
  components[0] = *loss;
  components[1] = (C)on_diagonal;
  components[2] = (C)off_diagonal;
  components[3] = (C)(trace / columns);
  components[4] = (C)square_root(off_diagonal / pairs);
}

}  // namespace MMFAST_NS
