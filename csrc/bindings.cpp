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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "mmfast's compiled kernels on raw addresses; use mmfast.ops, which checks its arguments.";
  m.def("isas", &isas, "Instruction sets compiled in and usable here, slowest first.");
  m.def("use_isa", &use_isa, "Switch the instruction set of all CPU kernels; returns the previous one.");
#ifdef MMFAST_WITH_CUDA
  m.def("cuda_device_count", &mmfast::cuda_device_count, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_error_string", &mmfast::cuda_error_string);
#endif
}
