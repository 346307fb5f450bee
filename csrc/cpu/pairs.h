// Products of bf16 numbers with fp32 sums. Operands are pairs of numbers, the first in the lower half of a
// word; `native`: by AVX512-BF16, else by the two fp32 products that it stands for.
#pragma once
#include "tiles.h"

// Compilers that are older may come with an assembler that does not know the instruction.
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 10)
#define MMFAST_NATIVE_PAIRS
#endif

namespace MMFAST_NS {

typedef uint32_t Pairs __attribute__((vector_size(MMFAST_VECTOR_BYTES), aligned(4), may_alias));
constexpr int kPairs = kLanes<float>;

// sum + x y of both numbers. In assembly, for intrinsics would need the instruction set of the whole file.
template <bool native>
MMFAST_HD Vector<float> add_products(Vector<float> sum, Pairs x, Pairs y) {
#ifdef MMFAST_NATIVE_PAIRS
  if constexpr (native) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
    return sum;
  }
#endif
  sum += (Vector<float>)(x << 16) * (Vector<float>)(y << 16);
  return sum + (Vector<float>)(x & 0xFFFF0000u) * (Vector<float>)(y & 0xFFFF0000u);
}

// Inner products of kDotRows rows x with kDotColumns rows y, each the sum of two, over `steps` vectors.
// x (steps, kDotRows), y (steps, kDotColumns, 2) vectors; out (kDotRows, kDotColumns).
template <bool native>
void split_dots(const uint32_t* x, const uint32_t* y, int64_t steps, float* out) {
  Vector<float> sum[kDotRows][kDotColumns];
  for (int i = 0; i < kDotRows; ++i)
    for (int k = 0; k < kDotColumns; ++k) sum[i][k] = Vector<float>{};
  for (int64_t s = 0; s < steps; ++s, x += kDotRows * kPairs, y += 2 * kDotColumns * kPairs) {
    Pairs a[kDotRows];
    for (int i = 0; i < kDotRows; ++i) a[i] = *(const Pairs*)(x + i * kPairs);
    for (int k = 0; k < kDotColumns; ++k) {
      const Pairs b = *(const Pairs*)(y + 2 * k * kPairs), c = *(const Pairs*)(y + (2 * k + 1) * kPairs);
      for (int i = 0; i < kDotRows; ++i) sum[i][k] = add_products<native>(sum[i][k], a[i], b);
      for (int i = 0; i < kDotRows; ++i) sum[i][k] = add_products<native>(sum[i][k], a[i], c);
    }
  }
  DotTile<float> tile;
  for (int i = 0; i < kDotRows; ++i)
    for (int k = 0; k < kDotColumns; ++k) tile.lanes[i][k] = sum[i][k];
  dots(tile, out, kDotColumns);
}

// out (rows, kWidth) = left (rows, depth) right (depth, kWidth), or adds it; depth in pairs, which are rows of
// left and of columns of right; rows of `left` are `depth` apart.
template <bool native>
void multiply_pairs(const uint32_t* left, const uint32_t* right, int64_t rows, int64_t depth, bool add,
                    float* out) {
  constexpr int64_t kDepth = 256, kRow = kWidth<float>;
  for (int64_t first = 0; first < depth; first += kDepth) {
    const int64_t last = first + kDepth < depth ? first + kDepth : depth;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const uint32_t* l[kTileRows];
      for (int t = 0; t < kTileRows; ++t) l[t] = left + (i + t < rows ? i + t : rows - 1) * depth;
      for (int v = 0; v < kVectors; v += kTileVectors) {
        Vector<float> sum[kTileRows][kTileVectors];
        for (int t = 0; t < kTileRows; ++t)
          for (int u = 0; u < kTileVectors; ++u) sum[t][u] = Vector<float>{};
        for (int64_t k = first; k < last; ++k) {
          Pairs r[kTileVectors];
          for (int u = 0; u < kTileVectors; ++u)
            r[u] = *(const Pairs*)(right + k * kRow + (v + u) * kPairs);
          for (int t = 0; t < kTileRows; ++t) {
            const Pairs both = Pairs{} + l[t][k];
            for (int u = 0; u < kTileVectors; ++u) sum[t][u] = add_products<native>(sum[t][u], both, r[u]);
          }
        }
        for (int t = 0; t < kTileRows && i + t < rows; ++t)
          for (int u = 0; u < kTileVectors; ++u) {
            Vector<float>* to = (Vector<float>*)(out + (i + t) * kRow + (v + u) * kPairs);
            *to = first || add ? *to + sum[t][u] : sum[t][u];
          }
      }
    }
  }
}

}  // namespace MMFAST_NS
