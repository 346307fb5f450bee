// What both passes for bf16 embeddings share: blocks of columns, memory, and numbers rounded to bf16 as
// pairs.
#pragma once
#include <omp.h>

#include "../barlow_twins.h"
#include "pairs.h"
#include "parallel.h"

namespace MMFAST_NS {

constexpr int kColumns = kWidth<float>;      // of a block
constexpr int kSteps = 1024 / (2 * kPairs);  // vectors of pairs that a panel has of a row
constexpr int kBlockSteps = kColumns / (2 * kPairs);
constexpr int kPanelBlocks = kSteps / kBlockSteps;
constexpr int kAhead = 16;  // rows
constexpr int kSquare = 8;  // rows whose cache lines survive a walk down their columns

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t ratio_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Parts of one allocation.
struct Arena {
  char* start;
  int64_t size = 0;

  template <class T>
  T* take(int64_t count) {
    T* part = (T*)(start + size);
    size += up(count * sizeof(T), 64);
    return part;
  }
};

// lay_out(arena), once for the size and once for the addresses; false if there is no memory, else true after
// run().
template <class LayOut, class Run>
bool with_memory(LayOut lay_out, Run run) {
  Arena arena{0};
  lay_out(arena);
  char* memory = (char*)__builtin_malloc(arena.size + 64);
  if (!memory) return false;
  arena = {(char*)up((int64_t)memory, 64)};
  lay_out(arena);
  run();
  __builtin_free(memory);
  return true;
}

// body(Whole or Part) for the block of columns that begins at j.
template <class Body>
MMFAST_HD void with_extent(int64_t columns, int64_t j, Body body) {
  if (columns - j >= kColumns)
    body(Whole{});
  else
    body(Part{(int)(columns - j)});
}

// Asks for a block's part of a row: rows are far apart, and no hardware foresees them.
MMFAST_HD void prefetch(const bfloat16* row) {
  for (int j = 0; j < kColumns; j += 32) __builtin_prefetch(row + j);
}

MMFAST_HD void copy(const bfloat16* from, Whole, bfloat16* to) {
  __builtin_memcpy(to, from, kColumns * sizeof(bfloat16));
}
MMFAST_HD void copy(const bfloat16* from, Part part, bfloat16* to) {
  for (int k = 0; k < kColumns; ++k) to[k] = k < part.width ? from[k] : bfloat16{0};
}

MMFAST_HD float sum_of(const Row<float>& x) {
  Vector<float> sum = (x.v[0] + x.v[1]) + (x.v[2] + x.v[3]);
  return sum_in_place<kPairs>((float*)&sum);
}

// x in bf16; to the nearest, ties away from zero, as it matters to nobody here. NaN may become anything.
MMFAST_HD Row<float> rounded(const Row<float>& x) {
  Row<float> row;
  for (int i = 0; i < kVectors; ++i) row.v[i] = (Vector<float>)(((Pairs)x.v[i] + 0x8000u) & 0xFFFF0000u);
  return row;
}

// Numbers of bf16 as pairs: those of the first vector with those of the second, and so on.
MMFAST_HD void pack(const Row<float>& x, Pairs (&to)[kBlockSteps]) {
  for (int i = 0; i < kBlockSteps; ++i) to[i] = (Pairs)x.v[2 * i] >> 16 | (Pairs)x.v[2 * i + 1];
}

// Near the mean in columns that are constant or whose mean is large against 1 / r, so that value(i) less this
// is exact in bf16 for all rows i; else 0. All numbers from half the shift to twice it are so (Sterbenz
// 1974), and if a number lies beyond, the deviation is at least the mean's part of 2 sqrt(rows).
template <class Value>
MMFAST_HD Row<float> exact_shift(int64_t rows, const Row<float>& mean, const Row<float>& r,
                                 const Scaling<float>& scaling, Value value) {
  constexpr float kLarge = 2;
  const float r_of_constant = scaling.inverse_deviation(0);
  float m[kColumns], q[kColumns];
  mean.to(m);
  r.to(q);
  bool any = false;
  for (int k = 0; k < kColumns; ++k) {
    const float ratio = m[k] * q[k];
    if (ratio > kLarge || ratio < -kLarge || q[k] == r_of_constant)
      any = true;
    else
      m[k] = 0;
  }
  if (!any) return Row<float>::all(0);
  Row<float> shift = rounded(Row<float>::of(m));
  Pairs rest[kVectors] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const Row<float> d = value(i) - shift;
    for (int k = 0; k < kVectors; ++k) rest[k] |= (Pairs)d.v[k] & 0xFFFFu;
  }
  for (int k = 0; k < kVectors; ++k) shift.v[k] = (Vector<float>)((Pairs)shift.v[k] & (Pairs)(rest[k] == 0));
  return shift;
}

}  // namespace MMFAST_NS
