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

// Inner products of kDotColumns rows x with kDotRows rows y, each the sum of two, over `steps` vectors.
// x (steps, kDotColumns), y (steps, kDotRows, 2) vectors; out (kDotColumns, kDotRows).
template <bool native>
void split_dots(const uint32_t* x, const uint32_t* y, int64_t steps, float* out) {
  Vector<float> sum[kDotColumns][kDotRows];
  for (int i = 0; i < kDotColumns; ++i)
    for (int k = 0; k < kDotRows; ++k) sum[i][k] = Vector<float>{};
  for (int64_t s = 0; s < steps; ++s, x += kDotColumns * kPairs, y += 2 * kDotRows * kPairs) {
    for (int part = 0; part < 2; ++part) {
      asm("" : "+r"(x));  // else x is loaded once for both parts, and kept in registers that are not there
      Pairs b[kDotRows];
      for (int k = 0; k < kDotRows; ++k) b[k] = *(const Pairs*)(y + (2 * k + part) * kPairs);
      for (int i = 0; i < kDotColumns; ++i) {
        const Pairs a = *(const Pairs*)(x + i * kPairs);
        for (int k = 0; k < kDotRows; ++k) sum[i][k] = add_products<native>(sum[i][k], a, b[k]);
      }
    }
  }
  for (int i = 0; i < kDotColumns; ++i)
    for (int k = 0; k < kDotRows; ++k) out[i * kDotRows + k] = sum_in_place<kPairs>((float*)&sum[i][k]);
}

// done(row, v, sum) for every row and vector v of left (rows, depth) right (depth, kWidth), plus out if
// `add`; depth is of pairs, in rows of left and in columns of right. out (rows, kWidth) is overwritten.
template <bool native, class Done>
MMFAST_HD void multiply_pairs(const uint32_t* left, const uint32_t* right, int64_t rows, int64_t depth,
                              bool add, float* out, Done done) {
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
          for (int u = 0; u < kTileVectors; ++u) r[u] = *(const Pairs*)(right + k * kRow + (v + u) * kPairs);
          for (int t = 0; t < kTileRows; ++t) {
            const Pairs both = Pairs{} + l[t][k];
            for (int u = 0; u < kTileVectors; ++u) sum[t][u] = add_products<native>(sum[t][u], both, r[u]);
          }
        }
        for (int t = 0; t < kTileRows && i + t < rows; ++t)
          for (int u = 0; u < kTileVectors; ++u) {
            Vector<float>* to = (Vector<float>*)(out + (i + t) * kRow + (v + u) * kPairs);
            const Vector<float> total = first || add ? *to + sum[t][u] : sum[t][u];
            if (last < depth)
              *to = total;
            else
              done(i + t, v + u, total);
          }
      }
    }
  }
}

}  // namespace MMFAST_NS
