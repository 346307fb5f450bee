// Runs CUDA sources on the CPU, for tests under sanitizers on machines without a GPU.
//
// A block's threads are fibers that give way to each other at barriers and warp collectives only; blocks run
// one after the other. The order of blocks, and of threads between barriers, is shuffled anew for every
// launch, so that what depends on it is likely to show. A barrier that some thread of the block or warp never
// reaches ends the process with a message.
//
// Not modelled: threads that run at the same time, the memory model, divergence beyond barriers, partial warp
// masks, tensor cores, speed.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
constexpr int CUDART_VERSION = 0;
inline cudaError_t nothing(int* value) {
  *value = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) { return nothing(count); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return nothing(value); }
inline cudaError_t cudaDriverGetVersion(int* version) { return nothing(version); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none: CUDA is emulated"; }

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum class Wait { kNone, kBlock, kWarp, kForever };

// The stack a simulated thread runs on; one that ends without ever waiting leaves its fiber to the next.
struct Fiber {
  static constexpr size_t kStack = 256 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake_stack = nullptr;
  Index thread;
  Wait wait = Wait::kForever;
  const char* at = "";  // the collective it waits in
};

struct Warp {
  uint64_t slots[2][32];  // what lanes hand each other, by the parity of the collective
};

class Machine {
 public:
  Index block, block_size, grid_size;
  Fiber* current = nullptr;

  void run(unsigned grid_x, unsigned grid_y, unsigned threads, std::function<void()> kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kernel_ = std::move(kernel);
    grid_size = {grid_x, grid_y, 1};
    block_size = {threads, 1, 1};
    std::vector<uint64_t> blocks((uint64_t)grid_x * grid_y);
    for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), random_);
    for (uint64_t i : blocks) {
      block = {(unsigned)(i % grid_x), (unsigned)(i / grid_x), 0};
      run_block(threads);
    }
  }

  void wait(Wait wait, const char* at) {
    current->wait = wait;
    current->at = at;
    to_scheduler(current);
  }

  // What the lanes of this warp bring to the same collective, by lane.
  template <class T>
  const uint64_t* share(T value, const char* at) {
    const unsigned thread = current->thread.x;
    uint64_t* slots = warps_[thread / 32].slots[parity_[thread] ^= 1];
    slots[thread % 32] = 0;
    memcpy(&slots[thread % 32], &value, sizeof(T));
    wait(Wait::kWarp, at);
    return slots;
  }

 private:
  std::mutex mutex_;
  std::mt19937_64 random_{20261122};
  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned> order_;
  std::vector<Warp> warps_;
  std::vector<uint8_t> parity_;
  size_t next_ = 0, finished_ = 0;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;

  void run_block(unsigned threads) {
    warps_.assign(threads / 32, {});
    parity_.assign(threads, 0);
    order_.resize(threads);
    for (unsigned i = 0; i < threads; ++i) order_[i] = i;
    std::shuffle(order_.begin(), order_.end(), random_);
    next_ = finished_ = 0;
    size_t used = 0;
    std::vector<Fiber*> ready;
    while (finished_ < threads) {
      if (next_ < threads) {
        if (used == fibers_.size()) fibers_.push_back(std::make_unique<Fiber>());
        start(fibers_[used++].get());
        continue;
      }
      release(used, threads, ready);
      std::shuffle(ready.begin(), ready.end(), random_);
      for (Fiber* fiber : ready) {
        fiber->wait = Wait::kNone;
        to_fiber(fiber);
      }
    }
  }

  // Whoever may go on: all of a block that has arrived whole, and the warps that have.
  void release(size_t used, unsigned threads, std::vector<Fiber*>& ready) {
    ready.clear();
    std::vector<std::vector<Fiber*>> warps(threads / 32);
    std::vector<Fiber*> block;
    for (size_t i = 0; i < used; ++i) {
      Fiber* fiber = fibers_[i].get();
      if (fiber->wait == Wait::kBlock) block.push_back(fiber);
      if (fiber->wait == Wait::kWarp) warps[fiber->thread.x / 32].push_back(fiber);
    }
    for (const auto& warp : warps) {
      if (warp.size() != 32) continue;
      for (const Fiber* fiber : warp)
        if (strcmp(fiber->at, warp[0]->at)) fail("lanes of one warp wait in different collectives", fiber);
      ready.insert(ready.end(), warp.begin(), warp.end());
    }
    if (block.size() == threads) ready = block;
    if (ready.empty()) {
      for (size_t i = 0; i < used; ++i)
        if (fibers_[i]->wait == Wait::kBlock || fibers_[i]->wait == Wait::kWarp)
          fail("not every thread reaches it", fibers_[i].get());
    }
  }

  [[noreturn]] void fail(const char* what, const Fiber* fiber) const {
    fprintf(stderr, "CUDA emulation: divergent %s, thread %u of block (%u, %u): %s\n", fiber->at,
            fiber->thread.x, block.x, block.y, what);
    abort();
  }

  void start(Fiber* fiber) {
    fiber->wait = Wait::kNone;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = Fiber::kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, (void (*)())&Machine::enter, 0);
    fiber->fake_stack = nullptr;
    to_fiber(fiber);
  }

  static void enter();

  void body() {
    Fiber* fiber = current;
    arrived(fiber);
    while (next_ < order_.size()) {
      fiber->thread = {order_[next_++], 0, 0};
      kernel_();
      ++finished_;
    }
    fiber->wait = Wait::kForever;
    to_scheduler(fiber);
  }

  // AddressSanitizer has to be told of every change of stacks.
  void to_fiber(Fiber* fiber) {
    current = fiber;
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, fiber->stack.get(), Fiber::kStack);
    swapcontext(&scheduler_, &fiber->context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    swapcontext(&scheduler_, &fiber->context);
#endif
  }

  void to_scheduler(Fiber* fiber) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fiber->fake_stack, scheduler_stack_, scheduler_size_);
#endif
    swapcontext(&fiber->context, &scheduler_);
    arrived(fiber);
  }

  void arrived(Fiber* fiber) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber->fake_stack, &scheduler_stack_, &scheduler_size_);
#else
    (void)fiber;
#endif
  }
};

inline Machine machine;

inline void Machine::enter() { machine.body(); }

inline void run(unsigned grid_x, unsigned grid_y, unsigned threads, std::function<void()> kernel) {
  machine.run(grid_x, grid_y, threads, std::move(kernel));
}

}  // namespace emulation

#define threadIdx (emulation::machine.current->thread)
#define blockIdx (emulation::machine.block)
#define blockDim (emulation::machine.block_size)
#define gridDim (emulation::machine.grid_size)

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}

inline void __syncthreads() { emulation::machine.wait(emulation::Wait::kBlock, "__syncthreads"); }
inline void __syncwarp() { emulation::machine.wait(emulation::Wait::kWarp, "__syncwarp"); }

namespace emulation {
template <class T>
T from_lane(T value, unsigned lane, const char* at) {
  memcpy(&value, &machine.share(value, at)[lane % 32], sizeof(T));
  return value;
}
}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::from_lane(value, threadIdx.x % 32 ^ (unsigned)mask, "__shfl_xor_sync");
}
inline unsigned __ballot_sync(unsigned, bool flag) {
  const uint64_t* flags = emulation::machine.share(flag, "__ballot_sync");
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= (unsigned)flags[lane] << lane;
  return bits;
}
