// The random stream: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// Every draw is a pure function of (seed, sample id, view, modality, step of the chain, purpose, coordinate):
//   key       seed, low and high word
//   counter   { coordinate / 4, sample id low, sample id high, tag }, tag = view | modality | step | purpose
// Coordinate i takes word i % 4 of its block. mmfast/ops/random.py is the same stream in plain PyTorch.
#pragma once
#include "platform.h"

namespace MMFAST_NS {

// What a word is used for; one purpose never shares a counter with another.
enum Purpose : uint32_t {
  kCoin = 0,     // does the step fire?
  kShare = 1,    // spread of SeqAug's alpha
  kFeature = 2,  // feature subsets
  kOrder = 3,    // sort keys of the real time steps
  kGate = 4,     // SeqAug's gate per time step
  kNoise = 5,    // Gaussian noise per element
};

MMFAST_HD uint32_t stream_tag(uint32_t view, uint32_t modality, uint32_t step, uint32_t purpose) {
  return view << 24 | modality << 16 | step << 8 | purpose;
}

struct Words {
  uint32_t w[4];
};

MMFAST_HD Words philox(uint64_t seed, uint32_t block, uint64_t id, uint32_t tag) {
  uint32_t c0 = block, c1 = (uint32_t)id, c2 = (uint32_t)(id >> 32), c3 = tag;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0;
    uint64_t p1 = (uint64_t)0xCD9E8D57u * c2;
    uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    uint32_t n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// [0, 1) in 24 bits: exact in fp32 on every backend.
MMFAST_HD float uniform(uint32_t word) { return (float)(word >> 8) * 0x1p-24f; }

}  // namespace MMFAST_NS
