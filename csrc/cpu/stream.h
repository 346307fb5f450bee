// The random stream of csrc/random.h, 128 coordinates at a time: what the vector units like best.
#pragma once
#include "../random.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace MMFAST_NS {

constexpr int kChunk = 128;          // coordinates
constexpr int kBlocks = kChunk / 4;  // Philox blocks

// 64-bit lanes of which Philox uses the low halves: a 32 x 32 -> 64 bit multiplication then needs no
// shuffling, and garbage in the high halves is never read.
#if defined(__AVX512F__)
constexpr int kLanes = 8;
constexpr int kGroups = 4;
typedef uint64_t Lanes __attribute__((vector_size(64)));
MMFAST_HD Lanes multiply_low(Lanes a, Lanes b) { return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
constexpr int kLanes = 4;
constexpr int kGroups = 2;
typedef uint64_t Lanes __attribute__((vector_size(32)));
MMFAST_HD Lanes multiply_low(Lanes a, Lanes b) { return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
constexpr int kLanes = 2;
constexpr int kGroups = 2;
typedef uint64_t Lanes __attribute__((vector_size(16)));
MMFAST_HD Lanes multiply_low(Lanes a, Lanes b) { return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
constexpr int kLanes = 2;
constexpr int kGroups = 2;
typedef uint64_t Lanes __attribute__((vector_size(16)));
MMFAST_HD Lanes multiply_low(Lanes a, Lanes b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
#endif

// Words of one chunk by word of the block: w[l][j] is coordinate 128 chunk + 4 j + l. Even and odd blocks are
// separate groups of lanes, so that their low halves interleave into full vectors of words in order; several
// groups at a time hide the latency of the rounds.
inline void words_by_lane(uint64_t seed, uint64_t id, uint32_t tag, uint32_t chunk, uint32_t w[4][kBlocks]) {
  const Lanes zero = {};
  const Lanes m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
  Lanes even = zero;
  for (int j = 0; j < kLanes; ++j) even[j] = chunk * kBlocks + 2 * j;
  for (int base = 0; base < kBlocks; base += kGroups * kLanes) {
    Lanes c[kGroups][4];
    for (int g = 0; g < kGroups; ++g) {
      c[g][0] = even + (base + g / 2 * 2 * kLanes + g % 2);
      c[g][1] = zero + (uint32_t)id;
      c[g][2] = zero + (uint32_t)(id >> 32);
      c[g][3] = zero + tag;
    }
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        const Lanes p0 = multiply_low(c[g][0], m0), p1 = multiply_low(c[g][2], m1);
        c[g][0] = (p1 >> 32) ^ c[g][1] ^ (zero + k0);
        c[g][1] = p1;
        c[g][2] = (p0 >> 32) ^ c[g][3] ^ (zero + k1);
        c[g][3] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int g = 0; g < kGroups; g += 2)
      for (int l = 0; l < 4; ++l) {
        const Lanes both = (c[g][l] & 0xFFFFFFFFu) | c[g + 1][l] << 32;
        __builtin_memcpy(&w[l][base + g * kLanes], &both, sizeof both);
      }
  }
}

// Words of coordinates 128 chunk .. 128 chunk + 127.
inline void words_chunk(uint64_t seed, uint64_t id, uint32_t tag, uint32_t chunk, uint32_t out[kChunk]) {
  uint32_t w[4][kBlocks];
  words_by_lane(seed, id, tag, chunk, w);
  for (int j = 0; j < kBlocks; ++j)
    for (int l = 0; l < 4; ++l) out[4 * j + l] = w[l][j];
}

// Standard normals of coordinates 128 chunk .. 128 chunk + 127.
inline void normals_chunk(uint64_t seed, uint64_t id, uint32_t tag, uint32_t chunk, float out[kChunk]) {
  uint32_t w[4][kBlocks];
  float z[4][kBlocks];
  words_by_lane(seed, id, tag, chunk, w);
  for (int j = 0; j < kBlocks; ++j) {
    normal_pair(w[0][j], w[1][j], z[0][j], z[1][j]);
    normal_pair(w[2][j], w[3][j], z[2][j], z[3][j]);
  }
  for (int j = 0; j < kBlocks; ++j)
    for (int l = 0; l < 4; ++l) out[4 * j + l] = z[l][j];
}

}  // namespace MMFAST_NS
