// The passes over strips of scores of the similarity losses: a row is the work of one thread, and always done
// in the same order.
#include "../similarity.h"

#include "kernels.h"
#include "lanes.h"
#include "parallel.h"

namespace MMFAST_NS {
namespace {
using namespace mmfast;

// What belongs to the candidates, at the one that is looked at or at the first: out, numbers (L, a, M, b) and
// weights in the backward pass only; ids, valid, numbers[0]: null if there are none.
template <class C>
struct Candidates {
  const C* scores;
  const Code<C>*labels, *ids, *valid;
  const C *numbers[4], *weights;
  C* out;
};

// Candidates of which all count, or of which `exists` and one, `own`, may have the row's position.
struct All {};
template <class C>
struct Some {
  Codes<C> exists, own;
};

// visit(candidates, offset, All or Some) for all of n candidates, then flush() after every few of them: sums
// of short runs keep the growth of rounding errors down. own: the row's own position, or one that does not
// exist.
template <class C, class Visit, class Flush>
MMFAST_HD void for_candidates(const Candidates<C>& of, int64_t n, int64_t own, const Visit& visit,
                              const Flush& flush) {
  constexpr int kSize = kLanes<C>;
  constexpr int64_t kRun = 64 * kSize;
  Codes<C> lane = {};
  for (int i = 0; i < kSize; ++i) lane[i] = i;
  const int64_t whole = n - n % kSize;
  const int64_t apart = own - own % kSize;
  for (int64_t start = 0; start < whole; start += kRun) {
    const int64_t stop = start + kRun < whole ? start + kRun : whole;
    for (int64_t j = start; j < stop; j += kSize) {
      if (__builtin_expect(j == apart, 0))
        visit(of, j, Some<C>{lane == lane, lane == (Code<C>)(own - j)});
      else
        visit(of, j, All{});
    }
    flush();
  }
  if (whole == n) return;
  const int rest = (int)(n - whole);
  C numbers[7][kSize] = {};
  Code<C> codes[3][kSize] = {};
  Candidates<C> last = {};
  const auto copy = [&](const auto* from, auto* to) {
    for (int i = 0; from && i < rest; ++i) to[i] = from[whole + i];
    return from ? to : nullptr;
  };
  last.scores = copy(of.scores, numbers[0]);
  for (int k = 0; k < 4; ++k) last.numbers[k] = copy(of.numbers[k], numbers[1 + k]);
  last.weights = copy(of.weights, numbers[5]);
  last.labels = copy(of.labels, codes[0]);
  last.ids = copy(of.ids, codes[1]);
  last.valid = copy(of.valid, codes[2]);
  last.out = numbers[6];
  visit(last, 0, Some<C>{lane < (Code<C>)rest, lane == (Code<C>)(apart == whole ? own - whole : kSize)});
  flush();
  for (int i = 0; of.out && i < rest; ++i) of.out[whole + i] = numbers[6][i];
}

// One row's view of the rule. kPlain: there are neither ids nor valid.
template <class C, bool kPlain>
struct Judge {
  Codes<C> label, id, valid;
  C scale, bias;
  bool itself;

  Judge(const SimilarityRule& rule, int64_t row)
      : label(every_code<C>(((const Code<C>*)rule.labels_q)[row])),
        id(every_code<C>(rule.ids_q ? ((const Code<C>*)rule.ids_q)[row] : 0)),
        valid(every_code<C>(rule.valid_q ? ((const Code<C>*)rule.valid_q)[row] : -1)),
        scale(*(const C*)rule.scale),
        bias(rule.bias ? *(const C*)rule.bias : 0),
        itself(rule.itself) {}

  MMFAST_HD Numbers<C> logits(const Candidates<C>& of, int64_t j) const {
    return numbers_at(of.scores + j) * scale + bias;
  }
  MMFAST_HD Codes<C> same(const Candidates<C>& of, int64_t j) const {
    return codes_at<C>(of.labels + j) == label;
  }
  // Which candidates are positives or negatives, but for the row's own position.
  MMFAST_HD Codes<C> may_count(const Candidates<C>& of, int64_t j, const Codes<C>& own) const {
    Codes<C> active = valid;
    if (of.ids) active &= ~((codes_at<C>(of.ids + j) == id) & ~own);
    if (of.valid) active &= codes_at<C>(of.valid + j);
    return active;
  }
  MMFAST_HD Codes<C> active(const Candidates<C>& of, int64_t j, All) const {
    return kPlain ? every_code<C>(-1) : may_count(of, j, Codes<C>{});
  }
  MMFAST_HD Codes<C> active(const Candidates<C>& of, int64_t j, const Some<C>& some) const {
    const Codes<C> active = kPlain ? some.exists : some.exists & may_count(of, j, some.own);
    return itself ? active & ~some.own : active;
  }
};

template <class C>
Candidates<C> candidates_of(const SimilarityRule& rule, const C* scores) {
  return {scores,
          (const Code<C>*)rule.labels_k,
          (const Code<C>*)rule.ids_k,
          (const Code<C>*)rule.valid_k,
          {},
          nullptr,
          nullptr};
}

// The row's own position matters where it is excluded, or is itself an exception.
int64_t own_position(const SimilarityRule& rule, int64_t row) {
  const bool matters = rule.itself || rule.ids_q;
  return matters && row < rule.candidates ? row : INT64_MAX - 4096;
}

// The shift of exp: of no numbers it is 0.
template <class C>
C shift_of(C largest) {
  return __builtin_isfinite(largest) ? largest : 0;
}

template <class C, int kKind, bool kPlain>
RowResult<double> forward_row(const SimilarityRule& rule, int64_t row, const C* scores) {
  const Judge<C, kPlain> judge(rule, row);
  const Candidates<C> of = candidates_of<C>(rule, scores);
  const int64_t n = rule.candidates, own = own_position(rule, row);
  const Numbers<C> nothing = every<C>(-(C)__builtin_inf());
  Codes<C> counted = {};
  double sum_n = 0, sum_p = 0, sum_l = 0;
  Numbers<C> run_n = {}, run_p = {}, run_l = {};
  const auto flush = [&]() MMFAST_INLINED {
    sum_n += sum_of<C>(run_n);
    sum_p += sum_of<C>(run_p);
    sum_l += sum_of<C>(run_l);
    run_n = run_p = run_l = Numbers<C>{};
  };
  const auto positives = [&] {
    int64_t count = 0;
    for (int i = 0; i < kLanes<C>; ++i) count -= counted[i];
    return (double)count;
  };

  if constexpr (kKind == kSigmoid) {
    for_candidates(
        of, n, own,
        [&](const Candidates<C>& at, int64_t j, const auto& place) MMFAST_INLINED {
          const Numbers<C> l = judge.logits(at, j);
          const Codes<C> same = judge.same(at, j), active = judge.active(at, j, place);
          Numbers<C> sigmoid;
          run_n += where<C>(active, softplus<C>(select<C>(same, -l, l), sigmoid));
          counted += same & active;
        },
        flush);
    return {sum_n, positives(), {0, 1, 0, 1}};
  }

  Numbers<C> top_n = nothing, top_p = nothing;
  for_candidates(
      of, n, own,
      [&](const Candidates<C>& at, int64_t j, const auto& place) MMFAST_INLINED {
        const Numbers<C> l = judge.logits(at, j);
        const Codes<C> same = judge.same(at, j), active = judge.active(at, j, place);
        top_n = larger<C>(select<C>(active & ~same, l, nothing), top_n);
        top_p = larger<C>(select<C>(active & same, l, nothing), top_p);
        counted += same & active;
      },
      [] {});
  const double count = positives();
  if (count == 0) return row_that_does_not_count<double>();
  const C shift_n = shift_of(largest_of<C>(top_n)), shift_p = shift_of(largest_of<C>(top_p));
  for_candidates(
      of, n, own,
      [&](const Candidates<C>& at, int64_t j, const auto& place) MMFAST_INLINED {
        const Numbers<C> l = judge.logits(at, j);
        const Codes<C> same = judge.same(at, j), active = judge.active(at, j, place);
        const Numbers<C> e = exponential<C>(l - select<C>(same, every<C>(shift_p), every<C>(shift_n)));
        run_n += where<C>(active & ~same, e);
        if (any<C>(same)) {
          run_p += where<C>(active & same, e);
          run_l += where<C>(active & same, l);
        }
      },
      flush);
  const LogSum<double> negatives = {shift_n, sum_n};

  if constexpr (kKind == kNegatives) {
    const double of_negatives = log_of(negatives);
    const Numbers<C> level = every<C>((C)of_negatives);
    sum_p = sum_l = 0;
    for_candidates(
        of, n, own,
        [&](const Candidates<C>& at, int64_t j, const auto& place) MMFAST_INLINED {
          const Codes<C> same = judge.same(at, j);
          if (!any<C>(same)) return;
          const Codes<C> positive = same & judge.active(at, j, place);
          Numbers<C> sigmoid;
          run_l += where<C>(positive, softplus<C>(level - judge.logits(at, j), sigmoid));
          run_p += where<C>(positive, sigmoid);
        },
        flush);
    return {sum_l / count, count, {of_negatives, sum_p / count, 0, 1 / count}};
  }

  return softmax_row(kKind, negatives, LogSum<double>{shift_p, sum_p}, sum_l, count);
}

// A row, or all candidates at once, in its role of a row: what the derivative by its logits needs.
template <class C>
struct Role {
  Numbers<C> first, a, second, b, weight;
};

template <class C, int kKind>
MMFAST_HD Numbers<C> derivative(const Role<C>& role, const Numbers<C>& l, const Codes<C>& same,
                                bool any_positive) {
  const Numbers<C> e = exponential<C>(l - role.first);
  const Numbers<C> negatives = role.a * e;
  if (!any_positive) return role.weight * negatives;
  Numbers<C> positives;
  if constexpr (kKind == kNegatives) {
    positives = -role.b / (e + (C)1);
  } else {
    if constexpr (kKind == kOut)
      positives = negatives - role.b;
    else
      positives = negatives - role.b * exponential<C>(l - role.second);
    const Codes<C> alone = same & (role.second == (C)__builtin_inf());
    if (any<C>(alone)) positives = select<C>(alone, -role.b / (e + (C)1), positives);
  }
  return role.weight * select<C>(same, positives, negatives);
}

// H of a row, plus, with numbers of the candidates, that of them as rows, to `out`; returns its sum.
template <class C, int kKind, bool kPlain>
C backward_row(const SimilarityRule& rule, int64_t row, const Candidates<C>& of, const C (&numbers)[4],
               C weight) {
  const Judge<C, kPlain> judge(rule, row);
  const Role<C> own = {every<C>(numbers[0]), every<C>(numbers[1]), every<C>(numbers[2]), every<C>(numbers[3]),
                       every<C>(weight)};
  const bool both = of.weights;
  double sum = 0;
  Numbers<C> run = {};
  for_candidates(
      of, rule.candidates, own_position(rule, row),
      [&](const Candidates<C>& at, int64_t j, const auto& place) MMFAST_INLINED {
        const Numbers<C> l = judge.logits(at, j);
        const Codes<C> same = judge.same(at, j);
        Numbers<C> h;
        if constexpr (kKind == kSigmoid) {
          Numbers<C> sigmoid;
          softplus<C>(select<C>(same, -l, l), sigmoid);
          h = own.weight * select<C>(same, -sigmoid, sigmoid);
          if (both) h += numbers_at(at.weights + j) * select<C>(same, -sigmoid, sigmoid);
        } else {
          const bool any_positive = any<C>(same);
          h = derivative<C, kKind>(own, l, same, any_positive);
          if (both) {
            const Role<C> other = {numbers_at(at.numbers[0] + j), numbers_at(at.numbers[1] + j),
                                   numbers_at(at.numbers[2] + j), numbers_at(at.numbers[3] + j),
                                   numbers_at(at.weights + j)};
            h += derivative<C, kKind>(other, l, same, any_positive);
          }
        }
        h = where<C>(judge.active(at, j, place), h);
        put<C>(h, at.out + j);
        run += h;
      },
      [&]() MMFAST_INLINED {
        sum += sum_of<C>(run);
        run = Numbers<C>{};
      });
  return (C)sum;
}

// Nanoseconds of a score.
constexpr double kForwardCost = 0.7, kBackwardCost = 0.8;

template <class C, int kKind, bool kPlain>
void forward_strip(const SimilarityRule& rule, int64_t start, int64_t rows, const void* scores, void* values,
                   void* counts, void* numbers, int64_t stride, int threads) {
  parallel_for(rows, threads, kForwardCost * rule.candidates, [&](int64_t i, int) {
    const RowResult<double> result =
        forward_row<C, kKind, kPlain>(rule, start + i, (const C*)scores + i * rule.candidates);
    ((C*)values)[i] = (C)result.value;
    ((C*)counts)[i] = (C)result.count;
    for (int k = 0; k < 4; ++k) ((C*)numbers)[k * stride + i] = (C)result.numbers[k];
  });
}

template <class C, int kKind, bool kPlain>
void backward_strip(const SimilarityRule& rule, int64_t start, int64_t rows, const void* scores,
                    const void* numbers, int64_t stride, const void* weights, const void* column_numbers,
                    const void* column_weights, void* out, void* sums, int threads) {
  const int64_t n = rule.candidates;
  parallel_for(rows, threads, kBackwardCost * n, [&](int64_t i, int) {
    Candidates<C> of = candidates_of<C>(rule, (const C*)scores + i * n);
    for (int k = 0; column_weights && k < 4; ++k) of.numbers[k] = (const C*)column_numbers + k * n;
    of.weights = (const C*)column_weights;
    of.out = (C*)out + i * n;
    C own[4];
    for (int k = 0; k < 4; ++k) own[k] = ((const C*)numbers)[k * stride + i];
    ((C*)sums)[i] = backward_row<C, kKind, kPlain>(rule, start + i, of, own, ((const C*)weights)[i]);
  });
}

// run(a number of the compute type, the kind, whether there are neither ids nor valid), the latter two as
// types.
template <class C, int kKind, class Run>
void with_plain(const SimilarityRule& rule, const Run& run) {
  if (rule.ids_q || rule.valid_q)
    run(C{}, Constant<kKind>{}, Constant<0>{});
  else
    run(C{}, Constant<kKind>{}, Constant<1>{});
}

template <class C, class Run>
void with_kind(const SimilarityRule& rule, const Run& run) {
  switch (rule.kind) {
    case kOut:
      return with_plain<C, kOut>(rule, run);
    case kIn:
      return with_plain<C, kIn>(rule, run);
    case kSum:
      return with_plain<C, kSum>(rule, run);
    case kNegatives:
      return with_plain<C, kNegatives>(rule, run);
    default:
      return with_plain<C, kSigmoid>(rule, run);
  }
}

template <class Run>
void with_types(const SimilarityRule& rule, const Run& run) {
  if (rule.wide)
    with_kind<double>(rule, run);
  else
    with_kind<float>(rule, run);
}

}  // namespace

void similarity_forward_rows(const SimilarityRule& rule, int64_t start, int64_t rows, const void* scores,
                             void* values, void* counts, void* numbers, int64_t stride, int threads) {
  with_types(rule, [&](auto c, auto kind, auto plain) {
    forward_strip<decltype(c), decltype(kind)::value, decltype(plain)::value != 0>(
        rule, start, rows, scores, values, counts, numbers, stride, threads);
  });
}

void similarity_backward_rows(const SimilarityRule& rule, int64_t start, int64_t rows, const void* scores,
                              const void* numbers, int64_t stride, const void* weights,
                              const void* column_numbers, const void* column_weights, void* out, void* sums,
                              int threads) {
  with_types(rule, [&](auto c, auto kind, auto plain) {
    // The derivatives of both are the same.
    constexpr int kKind = decltype(kind)::value == kSum ? kIn : decltype(kind)::value;
    backward_strip<decltype(c), kKind, decltype(plain)::value != 0>(rule, start, rows, scores, numbers,
                                                                    stride, weights, column_numbers,
                                                                    column_weights, out, sums, threads);
  });
}

}  // namespace MMFAST_NS
