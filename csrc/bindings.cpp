// The only file that knows pybind11: kernels as functions of mmfast._C on integer addresses.
// Python has checked every argument before it calls; the GIL is released around every kernel.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define MMFAST_NS mmfast_generic
#include "cpu/kernels.h"
#undef MMFAST_NS
#ifdef MMFAST_HAS_AVX2
#define MMFAST_NS mmfast_avx2
#include "cpu/kernels.h"
#undef MMFAST_NS
#endif
#ifdef MMFAST_HAS_AVX512
#define MMFAST_NS mmfast_avx512
#include "cpu/kernels.h"
#undef MMFAST_NS
#endif

namespace mmfast {
int cuda_device_count();
const char* cuda_error_string(int code);
}  // namespace mmfast

namespace py = pybind11;

namespace {

enum Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };
const char* const kIsaNames[] = {"generic", "avx2", "avx512"};

Isa best_isa() {
#ifdef MMFAST_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return kAvx512;
#endif
#ifdef MMFAST_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return kAvx2;
#endif
  return kGeneric;
}

Isa current_isa = best_isa();

py::list isas() {
  py::list names;
  for (int i = 0; i <= best_isa(); ++i) names.append(kIsaNames[i]);
  return names;
}

std::string use_isa(const std::string& name) {
  std::string previous = kIsaNames[current_isa];
  for (int i = 0; i <= best_isa(); ++i) {
    if (name == kIsaNames[i]) {
      current_isa = (Isa)i;
      return previous;
    }
  }
  throw std::invalid_argument("use_isa: name must be one of isas(), got '" + name + "'");
}

// The kernel `name` of the current instruction set.
#if defined(MMFAST_HAS_AVX512)
#define KERNEL(name)                             \
  (current_isa == kAvx512 ? &mmfast_avx512::name \
   : current_isa == kAvx2 ? &mmfast_avx2::name   \
                          : &mmfast_generic::name)
#else
#define KERNEL(name) (&mmfast_generic::name)
#endif

template <class T>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// barlow_twins: see cpu/kernels.h.
bool cpu_is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

int barlow_twins_standardise(int dtype, uintptr_t z_a, int64_t stride_a, uintptr_t z_b, int64_t stride_b,
                             int64_t rows, int64_t columns, bool center, double eps, uintptr_t hat,
                             uintptr_t statistics, int threads) {
  return KERNEL(barlow_twins_standardise)(dtype, ptr<void>(z_a), stride_a, ptr<void>(z_b), stride_b, rows,
                                          columns, center, eps, ptr<void>(hat), ptr<void>(statistics),
                                          threads);
}

bool barlow_twins_gram_energy(bool wide, uintptr_t hat, uintptr_t statistics, int64_t rows, int64_t columns,
                              double lambd, bool grad_a, bool grad_b, uintptr_t kept, uintptr_t loss,
                              uintptr_t components, int threads) {
  return KERNEL(barlow_twins_gram_energy)(wide, ptr<void>(hat), ptr<void>(statistics), rows, columns, lambd,
                                          grad_a, grad_b, ptr<void>(kept), ptr<void>(loss),
                                          ptr<void>(components), threads);
}

void barlow_twins_correlation_energy(bool wide, uintptr_t p, uintptr_t statistics, int64_t rows,
                                     int64_t columns, double lambd, uintptr_t loss, uintptr_t components,
                                     int threads) {
  KERNEL(barlow_twins_correlation_energy)(wide, ptr<void>(p), ptr<void>(statistics), rows, columns, lambd,
                                          ptr<void>(loss), ptr<void>(components), threads);
}

bool barlow_twins_backward(int dtype, bool gram, uintptr_t matrix_a, uintptr_t matrix_b, uintptr_t hat,
                           uintptr_t statistics, uintptr_t upstream, int64_t rows, int64_t columns,
                           double lambd, uintptr_t grad_a, uintptr_t grad_b, int threads) {
  return KERNEL(barlow_twins_backward)(dtype, gram, ptr<void>(matrix_a), ptr<void>(matrix_b), ptr<void>(hat),
                                       ptr<void>(statistics), ptr<void>(upstream), rows, columns, lambd,
                                       ptr<void>(grad_a), ptr<void>(grad_b), threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "mmfast's compiled kernels on raw addresses; use mmfast.ops, which checks its arguments.";
  m.def("isas", &isas, "Instruction sets compiled in and usable here, slowest first.");
  m.def("use_isa", &use_isa, "Switch the instruction set of all CPU kernels; returns the previous one.");
  m.def("cpu_is_intel", &cpu_is_intel);
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("barlow_twins_standardise", &barlow_twins_standardise, unlocked);
  m.def("barlow_twins_gram_energy", &barlow_twins_gram_energy, unlocked);
  m.def("barlow_twins_correlation_energy", &barlow_twins_correlation_energy, unlocked);
  m.def("barlow_twins_backward", &barlow_twins_backward, unlocked);
#ifdef MMFAST_WITH_CUDA
  m.def("cuda_device_count", &mmfast::cuda_device_count, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_error_string", &mmfast::cuda_error_string);
#endif
}
