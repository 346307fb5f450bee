// Triplets of strips of scores: see mmfast/ops/similarity/triplet_passes.py, whose `strip` and `hardest`
// these are.
#include "../triplets.h"

#include "kernels.h"
#include "parallel.h"

namespace MMFAST_NS {
namespace {

using mmfast::TripletStrip;

constexpr int kLanes = 16;
constexpr int64_t kRun = 12;

template <class T>
constexpr T infinity() {
  return (T)__builtin_inf();
}

// Of one row: its positives in `index`, and shown[j] = score of a negative, -infinity for others. How many.
struct Found {
  int64_t positives, negatives;
};

template <class T>
Found split(const TripletStrip& strip, int64_t i, const T* scores, T* shown, int32_t* index) {
  const int64_t row = strip.start + i, columns = strip.columns;
  const int32_t own = strip.first[row], end = strip.last[row];
  if (strip.valid && !strip.valid[row]) {
    for (int64_t j = 0; j < columns; ++j) shown[j] = -infinity<T>();
    return {0, 0};
  }
  for (int64_t j = 0; j < columns; ++j) shown[j] = strip.first[j] == own ? -infinity<T>() : scores[j];
  Found found = {0, columns - (end - own)};
  for (int32_t k = own; k < end; ++k) {
    const int32_t j = strip.order[k];
    const bool in =
        j != row && (!strip.valid || strip.valid[j]) && (!strip.ids || strip.ids[j] != strip.ids[row]);
    if (in) index[found.positives++] = j;
  }
  if (strip.valid || strip.ids) {
    int64_t out = 0;
    for (int64_t j = 0; j < columns; ++j) {
      const bool in = (!strip.valid || strip.valid[j]) && (!strip.ids || strip.ids[j] != strip.ids[row]);
      if (!in && strip.first[j] != own) shown[j] = -infinity<T>(), ++out;
    }
    found.negatives -= out;
  }
  return found;
}

// Sorts n values with their indices, stably; the others are scratch. Runs by insertion, then merges.
template <class T>
void sort(int64_t n, T* value, int32_t* index, T* other_value, int32_t* other_index) {
  for (int64_t a = 0; a < n; a += kRun) {
    const int64_t b = a + kRun < n ? a + kRun : n;
    for (int64_t k = a + 1; k < b; ++k) {
      const T v = value[k];
      const int32_t x = index[k];
      int64_t at = k;
      for (; at > a && v < value[at - 1]; --at) value[at] = value[at - 1], index[at] = index[at - 1];
      value[at] = v, index[at] = x;
    }
  }
  T *from = value, *to = other_value;
  int32_t *from_index = index, *to_index = other_index;
  for (int64_t width = kRun; width < n; width *= 2) {
    for (int64_t a = 0; a < n; a += 2 * width) {
      const int64_t middle = a + width < n ? a + width : n, b = a + 2 * width < n ? a + 2 * width : n;
      int64_t p = a, q = middle;
      for (int64_t k = a; k < b; ++k) {
        const bool second = p == middle || (q < b && from[q] < from[p]);
        const int64_t source = second ? q : p;
        to[k] = from[source], to_index[k] = from_index[source];
        q += second, p += !second;
      }
    }
    T* t = from;
    from = to, to = t;
    int32_t* u = from_index;
    from_index = to_index, to_index = u;
  }
  if (from != value)
    for (int64_t k = 0; k < n; ++k) value[k] = from[k], index[k] = from_index[k];
}

// below[j] = how many of the sorted, infinity-padded 2 * half - 1 values are smaller than shown[j].
template <class T>
void search(const T* sorted, int32_t half, const T* shown, int64_t columns, int32_t* below) {
  for (int64_t j = 0; j < columns; ++j) below[j] = 0;
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    int32_t at[kLanes];
    for (int l = 0; l < kLanes; ++l) at[l] = 0;
    for (int32_t step = half; step > 0; step /= 2)
      for (int l = 0; l < kLanes; ++l) at[l] += sorted[at[l] + step - 1] < shown[j + l] ? step : 0;
    for (int l = 0; l < kLanes; ++l) below[j + l] = at[l];
  }
  for (; j < columns; ++j)
    for (int32_t step = half; step > 0; step /= 2)
      below[j] += sorted[below[j] + step - 1] < shown[j] ? step : 0;
}

// How many of the sorted values equal `x`, the first of them at `at`.
template <class T>
int64_t equal(const T* sorted, int64_t n, int64_t at, T x) {
  if (at >= n || sorted[at] != x) return 0;
  int64_t low = at + 1, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] <= x)
      low = middle + 1;
    else
      high = middle;
  }
  return low - at;
}

// What one thread works on: columns padded to 16, and positives padded to 2 half.
template <class T>
struct Scratch {
  T *shown, *value, *shifted, *other;
  int32_t *below, *active, *index, *other_index, *ends, *who;

  Scratch(char* at, int64_t columns, int64_t padded) {
    shown = (T*)at, value = shown + columns, shifted = value + padded, other = shifted + padded;
    below = (int32_t*)(other + padded), active = below + columns, index = active + columns;
    other_index = index + padded, ends = other_index + padded, who = ends + padded;
  }
};

template <class T>
struct Row {
  const TripletStrip& strip;
  int kind;
  double margin;
  bool ties;

  // The sum of the terms; counts of terms, easy, semi-hard, hard; g may be null.
  double operator()(int64_t i, const T* scores, T weight, const Scratch<T>& s, int32_t half, int64_t* counts,
                    T* g) const {
    const int64_t columns = strip.columns;
    for (int k = 0; k < 6; ++k) counts[k] = 0;
    if (g)
      for (int64_t j = 0; j < columns; ++j) g[j] = 0;
    const Found found = split(strip, i, scores, s.shown, s.index);
    const int64_t n = found.positives;
    counts[4] = n, counts[5] = found.negatives;
    if (n == 0 || found.negatives == 0) return 0;
    for (int64_t k = 0; k < n; ++k) s.value[k] = scores[s.index[k]];
    sort(n, s.value, s.index, s.other, s.other_index);
    while (half > 1 && half > n) half /= 2;
    for (int64_t k = n; k < 2 * half; ++k) s.value[k] = infinity<T>();
    for (int64_t k = 0; k < 2 * half; ++k) s.shifted[k] = s.value[k] - (T)margin;
    search(s.value, half, s.shown, columns, s.below);
    search(s.shifted, half, s.shown, columns, s.active);
    return kind == mmfast::kTripletNearest ? nearest(weight, s, n, counts, g)
                                           : interval(weight, s, n, counts, g);
  }

  double interval(T weight, const Scratch<T>& s, int64_t n, int64_t* counts, T* g) const {
    const bool tied = ties && margin > 0;
    const double centre = s.value[n / 2];
    for (int64_t k = 0; k <= n; ++k) s.ends[k] = 0;
    double sum = 0;
    int64_t active_sum = 0, semihard = 0, hard_sum = 0, terms = 0;
    for (int64_t j = 0; j < strip.columns; ++j) {
      const int32_t below = s.below[j], active = s.active[j];
      const int32_t up_to = below + (int32_t)equal(s.value, n, below, s.shown[j]);
      const int32_t hard = tied ? up_to : below, far = active > up_to ? active : up_to;
      active_sum += active, semihard += far - up_to, hard_sum += hard;
      const int32_t first = kind == mmfast::kTripletSemihard ? up_to : 0;
      const int32_t last = kind == mmfast::kTripletSemihard ? far
                           : kind == mmfast::kTripletHard   ? hard
                                                            : active;
      if (last == first) continue;
      terms += last - first;
      sum += (last - first) * (s.shown[j] - centre);
      ++s.ends[first], --s.ends[last];
      if (g) g[j] = weight * (T)(last - first);
    }
    int64_t of_positive = 0;
    for (int64_t k = 0; k < n; ++k) {
      of_positive += s.ends[k];
      sum -= of_positive * (s.value[k] - centre);
      if (g) g[s.index[k]] = -weight * (T)of_positive;
    }
    counts[0] = terms, counts[1] = n * counts[5] - active_sum, counts[2] = semihard, counts[3] = hard_sum;
    return sum + margin * terms;
  }

  double nearest(T weight, const Scratch<T>& s, int64_t n, int64_t* counts, T* g) const {
    const bool tied = ties && margin > 0;
    int64_t farthest = -1, active_sum = 0;
    for (int64_t k = 0; k <= n; ++k) s.who[k] = -1;
    for (int64_t j = 0; j < strip.columns; ++j) {
      const T x = s.shown[j];
      if (x == -infinity<T>()) continue;
      if (farthest < 0 || x < s.shown[farthest]) farthest = j;
      const int32_t below = s.below[j], active = s.active[j];
      const int32_t up_to = below + (int32_t)equal(s.value, n, below, x);
      active_sum += active, counts[2] += active > up_to ? active - up_to : 0,
          counts[3] += tied ? up_to : below;
      if (s.who[up_to] < 0 || x > s.shown[s.who[up_to]]) s.who[up_to] = (int32_t)j;
    }
    counts[1] = n * counts[5] - active_sum;
    int64_t best = -1;
    double sum = 0;
    for (int64_t k = 0; k < n; ++k) {
      if (s.who[k] >= 0) best = s.who[k];
      const int64_t j = best < 0 ? farthest : best;
      const T term = s.shown[j] - s.value[k] + (T)margin;
      if (!(term > 0)) continue;
      sum += term, ++counts[0];
      if (g) g[j] += weight, g[s.index[k]] -= weight;
    }
    return sum;
  }
};

template <class T>
void strip_of(const TripletStrip& strip, const T* scores, int kind, double margin, bool ties, T* values,
              int64_t* counts, int64_t stride, T* g, const T* weights, int64_t most, char* scratch,
              int64_t bytes, int threads) {
  int32_t half = 1;
  while (2 * half - 1 < most) half *= 2;
  const Row<T> row = {strip, kind, margin, ties};
  parallel_for(strip.rows, threads, 8.0 * strip.columns, [&](int64_t i, int worker) {
    const Scratch<T> own(scratch + worker * bytes, strip.columns, 2 * half);
    int64_t found[6];
    const double value = row(i, scores + i * strip.columns, weights ? weights[i] : (T)1, own, half, found,
                             g ? g + i * strip.columns : nullptr);
    if (values) {
      values[i] = (T)value;
      for (int k = 0; k < 6; ++k) counts[k * stride + i] = found[k];
    }
  });
}

template <class T>
void hardest_of(const TripletStrip& strip, const T* scores, T* near, T* far, int32_t* places,
                int64_t* numbers, int64_t stride, char* scratch, int64_t bytes, int threads) {
  parallel_for(strip.rows, threads, 2.0 * strip.columns, [&](int64_t i, int worker) {
    T* shown = (T*)(scratch + worker * bytes);
    int32_t* index = (int32_t*)(shown + strip.columns);
    const T* own = scores + i * strip.columns;
    const Found found = split(strip, i, own, shown, index);
    T least = infinity<T>(), most = -infinity<T>();
    int32_t p = 0, n = 0;
    for (int64_t k = 0; k < found.positives; ++k)
      if (own[index[k]] < least) least = own[index[k]], p = index[k];
    T lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = -infinity<T>();
    int64_t j = 0;
    for (; j + kLanes <= strip.columns; j += kLanes)
      for (int l = 0; l < kLanes; ++l) lanes[l] = shown[j + l] > lanes[l] ? shown[j + l] : lanes[l];
    for (; j < strip.columns; ++j) lanes[0] = shown[j] > lanes[0] ? shown[j] : lanes[0];
    for (int l = 0; l < kLanes; ++l) most = lanes[l] > most ? lanes[l] : most;
    if (most > -infinity<T>())
      while (shown[n] != most) ++n;
    near[i] = least, far[i] = most;
    places[i] = p, places[stride + i] = n;
    numbers[i] = found.positives, numbers[stride + i] = found.negatives;
  });
}

}  // namespace

void triplet_strip(bool wide, const TripletStrip& strip, const void* scores, int kind, double margin,
                   bool ties, void* values, int64_t* counts, int64_t stride, void* g, const void* weights,
                   int64_t most, void* scratch, int64_t bytes, int threads) {
  if (wide)
    strip_of(strip, (const double*)scores, kind, margin, ties, (double*)values, counts, stride, (double*)g,
             (const double*)weights, most, (char*)scratch, bytes, threads);
  else
    strip_of(strip, (const float*)scores, kind, margin, ties, (float*)values, counts, stride, (float*)g,
             (const float*)weights, most, (char*)scratch, bytes, threads);
}

void triplet_hardest(bool wide, const TripletStrip& strip, const void* scores, void* near, void* far,
                     int32_t* places, int64_t* numbers, int64_t stride, void* scratch, int64_t bytes,
                     int threads) {
  if (wide)
    hardest_of(strip, (const double*)scores, (double*)near, (double*)far, places, numbers, stride,
               (char*)scratch, bytes, threads);
  else
    hardest_of(strip, (const float*)scores, (float*)near, (float*)far, places, numbers, stride,
               (char*)scratch, bytes, threads);
}

}  // namespace MMFAST_NS
