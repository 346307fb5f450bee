// How the recurrent engine lays out units, weights and samples.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "../recurrent.h"
#include "kernels.h"
#include "lanes.h"

namespace MMFAST_NS {
using namespace mmfast;

// Memory for n numbers, of no value yet, at a multiple of 64 bytes; null if there is none.
template <class T>
class Room {
 public:
  Room() : memory_(nullptr) {}
  explicit Room(int64_t n) : memory_(malloc((size_t)n * sizeof(T) + 64)) {}
  Room(const Room&) = delete;
  void operator=(const Room&) = delete;
  ~Room() { free(memory_); }
  void take(int64_t n) {
    free(memory_);
    memory_ = malloc((size_t)n * sizeof(T) + 64);
  }
  T* get() const { return memory_ ? (T*)(((uintptr_t)memory_ + 63) / 64 * 64) : nullptr; }
  T& operator[](int64_t i) const { return get()[i]; }

 private:
  void* memory_;
};

template <class C>
MMFAST_HD int64_t whole_vectors(int64_t n) {
  return (n + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// The narrowest vector that is used has 16 bytes.
template <class C>
constexpr int kLeastLanes = 16 / sizeof(C);

// Lanes of the vector that the next of `rest` columns go into: whole ones, then a narrower one for the last.
template <class C>
int lanes_for(int64_t rest) {
  int lanes = kLanes<C>;
  while (lanes / 2 >= kLeastLanes<C> && lanes / 2 >= rest) lanes /= 2;
  return lanes;
}

// run(the number of lanes as a type).
template <class C, class Run>
MMFAST_HD void with_lanes(int lanes, const Run& run) {
  constexpr int kAll = kLanes<C>;
  if (lanes == kAll) return run(Constant<kAll>{});
  if constexpr (kAll / 2 >= kLeastLanes<C>)
    if (lanes == kAll / 2) return run(Constant<kAll / 2>{});
  if constexpr (kAll / 4 >= kLeastLanes<C>) run(Constant<kAll / 4>{});
}

// Units whose four sums lie beside each other: those of a vector. `at`: the first of its 4 x lanes columns.
struct Block {
  int unit, lanes, real, at;
};

// The units [0, H) in blocks.
template <class C>
struct Blocks {
  Room<Block> of;
  int count, width;  // width: of units, with those that are none; there are 4 times as many columns

  explicit Blocks(int64_t units) : of(units / kLanes<C> + 3), count(0), width(0) {
    for (int64_t unit = 0; of.get() && unit < units; unit += kLanes<C>) {
      const int lanes = lanes_for<C>(units - unit);
      const int real = units - unit < lanes ? (int)(units - unit) : lanes;
      of[count++] = {(int)unit, lanes, real, 4 * width};
      width += lanes;
    }
  }
  int columns() const { return 4 * width; }
};

// Where the weights of a sum are: rows of torch's matrices in multiples of H, -1 for none. A GRU has sums for
// r, z, and what the input and the state give to n.
MMFAST_HD int input_gate(int cell, int g) { return cell == kGru && g == 3 ? -1 : g; }
MMFAST_HD int state_gate(int cell, int g) { return cell == kLstm ? g : g == 2 ? -1 : g == 3 ? 2 : g; }

// Samples that one task walks through time with, longest first: places [first, first + count) of the order.
// Its cells are the rows from `base` on.
struct Batch {
  int first, count;
  int64_t base;
};

// The samples of a stream by falling length, those of length 0 left out, and their batches. Neither depends
// on the number of threads.
struct Schedule {
  Room<int32_t> order;
  Room<Batch> batches;
  int rows, count;
  bool complete;  // there was memory

  void make(const int64_t* lengths, int64_t samples, int64_t steps) {
    constexpr int kMost = 16, kRows = 40;
    order.take(samples + 1);
    batches.take(kMost);
    Room<int64_t> places(steps + 2);
    rows = count = 0;
    complete = order.get() && batches.get() && places.get();
    if (!complete) return;
    // places[n]: of the next sample of length n.
    for (int64_t n = 0; n < steps + 2; ++n) places[n] = 0;
    for (int64_t b = 0; b < samples; ++b) ++places[lengths[b]];
    int64_t before = 0, cells = 0;
    for (int64_t n = steps; n >= 1; --n) {
      const int64_t here = places[n];
      places[n] = before;
      before += here;
      cells += here * n;
    }
    rows = (int)before;
    for (int64_t b = 0; b < samples; ++b)
      if (lengths[b]) order[places[lengths[b]]++] = (int32_t)b;
    const int64_t parts = rows < 2 * kRows ? 1 : rows / kRows < kMost ? rows / kRows : kMost;
    int64_t done = 0;
    for (int i = 0; i < rows;) {
      Batch& batch = batches[count];
      batch = {i, 0, done};
      // Of equal work, but for the last.
      const int64_t until = cells * (count + 1) / parts;
      while (i < rows && (done < until || count + 1 == parts)) {
        done += lengths[order[i++]];
        ++batch.count;
      }
      ++count;
    }
  }
};

// A batch's rows: sample, length, and of each step of the scan the first of its cells.
struct Scan {
  Room<int32_t> sample, length;
  Room<int64_t> cell;
  int rows, steps;
  bool complete;

  Scan(const Schedule& schedule, const Batch& batch, const int64_t* lengths)
      : sample(batch.count),
        length(batch.count),
        rows(batch.count),
        steps((int)lengths[schedule.order[batch.first]]) {
    cell.take(steps + 1);
    complete = sample.get() && length.get() && cell.get();
    if (!complete) return;
    for (int r = 0; r < rows; ++r) {
      sample[r] = schedule.order[batch.first + r];
      length[r] = (int32_t)lengths[sample[r]];
    }
    cell[0] = batch.base;
    for (int p = 0, n = rows; p < steps; ++p) {
      while (length[n - 1] <= p) --n;
      cell[p + 1] = cell[p] + n;
    }
  }
  int alive(int p) const { return (int)(cell[p + 1] - cell[p]); }
  // Where row r's p-th step is in x and y.
  int64_t step(const RecurrentStream& stream, int r, int p) const {
    return stream.reverse ? length[r] - 1 - p : p;
  }
};

template <class T>
MMFAST_HD void load_row(const T* from, int64_t n, typename Scalar<T>::compute* to) {
  for (int64_t j = 0; j < n; ++j) to[j] = Scalar<T>::load(from[j]);
}
template <class T>
MMFAST_HD void store_row(const typename Scalar<T>::compute* from, int64_t n, T* to) {
  for (int64_t j = 0; j < n; ++j) to[j] = Scalar<T>::store(from[j]);
}

// Zeros behind the end of sample b.
template <class T>
void clear_padding(T* x, int64_t sample, int64_t step, int64_t width, const RecurrentStream& stream,
                   int64_t b) {
  for (int64_t t = stream.lengths[b]; t < stream.steps; ++t)
    memset((void*)(x + b * sample + t * step), 0, (size_t)width * sizeof(T));
}

}  // namespace MMFAST_NS
