// The random stream: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// Every draw is a pure function of (seed, sample id, view, modality, step of the chain, purpose, coordinate):
//   key       seed, low and high word
//   counter   { coordinate / 4, sample id low, sample id high, tag }, tag = view | modality | step | purpose
// Coordinate i takes word i % 4 of its block. mmfast/ops/random.py is the same stream in plain PyTorch.
#pragma once
#include "platform.h"
#include "scalar.h"

namespace MMFAST_NS {

// What a word is used for; one purpose never shares a counter with another.
enum Purpose : uint32_t {
  kCoin = 0,     // does the step of the chain fire?
  kShare = 1,    // spread of SeqAug's alpha
  kFeature = 2,  // one word per feature: subsets
  kTime = 3,     // one word per real time step: permutations and masks
  kGate = 4,     // one word per real time step: SeqAug's step gate
  kNoise = 5,    // one word per element: Gaussian noise
};

// Stand-ins in the tag and the id for draws that several modalities or all samples have in common.
constexpr uint32_t kAllModalities = 255;
constexpr uint64_t kAllSamples = ~(uint64_t)0;

MMFAST_HD uint32_t stream_tag(uint32_t view, uint32_t modality, uint32_t step, uint32_t purpose) {
  return view << 24 | modality << 16 | step << 8 | purpose;
}

struct Words {
  uint32_t w[4];
};

MMFAST_HD Words philox(uint64_t seed, uint64_t id, uint32_t tag, uint32_t block) {
  uint32_t c0 = block, c1 = (uint32_t)id, c2 = (uint32_t)(id >> 32), c3 = tag;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0;
    uint64_t p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A decision of probability p is `word < threshold`, threshold = round(p 2^32): exact on every backend.
MMFAST_HD bool decide(uint32_t word, uint64_t threshold) { return word < threshold; }

// [0, 1) in 24 bits: exact in fp32 on every backend.
MMFAST_HD float uniform(uint32_t word) { return (float)(int32_t)(word >> 8) * 0x1p-24f; }

// ln(x) for normal x > 0, within 2 ulp: x = 2^k (1 + f) with f in [-1/3, 1/3), and
// ln(1 + f) = f - f^2 / 2 + f^3 q(f) with q fitted for the least relative error. No division: it would cost
// more than all the rest.
MMFAST_HD float log_positive(float x) {
  const uint32_t u = as_bits(x);
  const int32_t k = (int32_t)(u - 0x3F2AAAABu) >> 23;
  const float f = as_float(u - ((uint32_t)k << 23)) - 1.0f;
  const float g = f * f;
  float q = 0.142270103f;
  q = q * f - 0.151246279f;
  q = q * f + 0.139580563f;
  q = q * f - 0.16471903f;
  q = q * f + 0.200130865f;
  q = q * f - 0.250042558f;
  q = q * f + 0.333331794f;
  return f + (g * (q * f - 0.5f) + (float)k * 0.69314718f);
}

// cos and sin of 2 pi uniform(word), within 3 ulp. The reduction to an eighth of a turn is exact, in
// integers: the nearest quarter turn, and what is left of the upper 24 bits as a signed number of 22.
MMFAST_HD void cos_sin_turn(uint32_t word, float& c, float& s) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const float r = (float)((int32_t)(word << 2) >> 10) * (6.2831853f * 0x1p-24f);
  const float z = r * r;
  const float sine = r + r * z * (-0.166666552f + z * (0.008332178f + z * -0.000195172979f));
  const float cosine = 1.0f + z * (-0.5f + z * (0.0416666456f + z * (-0.00138873165f + z * 2.44331568e-05f)));
  const float x = quarter & 1u ? sine : cosine;
  const float y = quarter & 1u ? cosine : sine;
  c = as_float(as_bits(x) ^ ((quarter + 1u) << 30 & 0x80000000u));
  s = as_float(as_bits(y) ^ (quarter << 30 & 0x80000000u));
}

// Two standard normals from two words (Box and Muller 1958). 1 - u keeps the logarithm's argument off zero.
MMFAST_HD void normal_pair(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  const float radius = fast_square_root(-2.0f * log_positive(1.0f - uniform(w0)));
  float c, s;
  cos_sin_turn(w1, c, s);
  z0 = radius * c;
  z1 = radius * s;
}

}  // namespace MMFAST_NS
