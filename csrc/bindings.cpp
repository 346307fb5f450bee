// The only file that knows pybind11, with bindings_cuda.h: kernels as functions of mmfast._C on integer
// addresses. Python has checked every argument before it calls; the GIL is released around every kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

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

#ifdef MMFAST_WITH_CUDA
#include "cuda/kernels.h"
#endif

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

using Address = uintptr_t;
using Ints = std::vector<int64_t>;
using Addresses = std::vector<Address>;

template <class T>
T* ptr(Address address) {
  return reinterpret_cast<T*>(address);
}

// Owns the arrays that an AugmentCall points to. `steps` and `amounts` are rows of (kind, apply, flags, coin,
// gate) and (amount, spread); `shapes` rows of (L, F, front, address of lengths), one per modality.
struct AugmentArguments {
  Ints steps_per_view;
  std::vector<mmfast::StepSpec> steps;
  std::vector<mmfast::ModalitySpec> shapes;
  mmfast::AugmentCall call;

  AugmentArguments(int64_t batch, Ints steps_per_view_, const Ints& step_rows,
                   const std::vector<double>& amounts, const Ints& shape_rows, Address seed, Address ids,
                   int64_t plan_stride)
      : steps_per_view(std::move(steps_per_view_)) {
    for (size_t i = 0; 5 * i < step_rows.size(); ++i) {
      const int64_t* row = &step_rows[5 * i];
      steps.push_back({row[0], row[1], row[2], row[3], row[4], amounts[2 * i], amounts[2 * i + 1]});
    }
    for (size_t i = 0; i < shape_rows.size(); i += 4)
      shapes.push_back(
          {shape_rows[i], shape_rows[i + 1], shape_rows[i + 2], ptr<const int64_t>(shape_rows[i + 3])});
    call = {batch,        (int64_t)shapes.size(), (int64_t)steps_per_view.size(), steps_per_view.data(),
            steps.data(), shapes.data(),          ptr<const uint64_t>(seed),      ptr<const int64_t>(ids),
            plan_stride};
  }
};

void check_memory(int status) {
  if (status == mmfast_generic::kNoMemory) throw std::bad_alloc();
}

template <class T>
std::vector<T*> ptrs(const Addresses& addresses) {
  std::vector<T*> result;
  for (Address a : addresses) result.push_back(ptr<T>(a));
  return result;
}

void augment_draw(const AugmentArguments& arguments, Address plan, int threads) {
  check_memory(KERNEL(augment_draw)(arguments.call, ptr<int32_t>(plan), threads));
}

void augment_apply(const AugmentArguments& arguments, Address plan, int dtype, const Addresses& x,
                   const Ints& strides, const Addresses& out, bool with_noise, int threads) {
  check_memory(KERNEL(augment_apply)(arguments.call, ptr<const int32_t>(plan), dtype,
                                     ptrs<const void>(x).data(), strides.data(), ptrs<void>(out).data(),
                                     with_noise, threads));
}

void augment_adjoint(const AugmentArguments& arguments, Address plan, int dtype, const Addresses& grads,
                     const Addresses& x_grads, int threads) {
  check_memory(KERNEL(augment_adjoint)(arguments.call, ptr<const int32_t>(plan), dtype,
                                       ptrs<const void>(grads).data(), ptrs<void>(x_grads).data(), threads));
}

// barlow_twins: see cpu/kernels.h and cuda/kernels.h.
using Definition = mmfast::BarlowTwinsDefinition;

bool cpu_is_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

int barlow_twins_standardise(int dtype, Address z_a, int64_t stride_a, Address z_b, int64_t stride_b,
                             int64_t rows, int64_t columns, const Definition& definition, Address hat,
                             Address statistics, int threads) {
  return KERNEL(barlow_twins_standardise)(dtype, ptr<void>(z_a), stride_a, ptr<void>(z_b), stride_b, rows,
                                          columns, definition, ptr<void>(hat), ptr<void>(statistics),
                                          threads);
}

int barlow_twins_gram_forward(int dtype, Address z_a, int64_t stride_a, Address z_b, int64_t stride_b,
                              int64_t rows, int64_t columns, const Definition& definition, bool grad_a,
                              bool grad_b, Address hat, Address kept, Address statistics, Address loss,
                              Address components, int threads) {
  return KERNEL(barlow_twins_gram_forward)(dtype, ptr<void>(z_a), stride_a, ptr<void>(z_b), stride_b, rows,
                                           columns, definition, grad_a, grad_b, ptr<void>(hat),
                                           ptr<void>(kept), ptr<void>(statistics), ptr<void>(loss),
                                           ptr<void>(components), threads);
}

void barlow_twins_correlation_energy(bool wide, Address p, Address statistics, int64_t rows, int64_t columns,
                                     const Definition& definition, Address loss, Address components,
                                     int threads) {
  KERNEL(barlow_twins_correlation_energy)(wide, ptr<void>(p), ptr<void>(statistics), rows, columns,
                                          definition, ptr<void>(loss), ptr<void>(components), threads);
}

bool barlow_twins_backward(int dtype, bool gram, Address matrix_a, Address matrix_b, Address hat,
                           Address statistics, Address upstream, int64_t rows, int64_t columns,
                           const Definition& definition, Address grad_a, Address grad_b, int threads) {
  return KERNEL(barlow_twins_backward)(dtype, gram, ptr<void>(matrix_a), ptr<void>(matrix_b), ptr<void>(hat),
                                       ptr<void>(statistics), ptr<void>(upstream), rows, columns, definition,
                                       ptr<void>(grad_a), ptr<void>(grad_b), threads);
}

// Whether products of bf16 numbers are faster than those of fp32 numbers.
bool fast_bf16() {
#if defined(MMFAST_HAS_AVX512) && (defined(__clang__) || __GNUC__ >= 10)
  return current_isa == kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

int barlow_twins_narrow_forward(Address z_a, int64_t stride_a, Address z_b, int64_t stride_b, int64_t rows,
                                int64_t columns, const Definition& definition, bool grad_a, bool grad_b,
                                Address kept, Address statistics, Address loss, Address components,
                                int threads) {
  return KERNEL(barlow_twins_narrow_forward)(
      fast_bf16(), ptr<void>(z_a), stride_a, ptr<void>(z_b), stride_b, rows, columns, definition, grad_a,
      grad_b, ptr<void>(kept), ptr<void>(statistics), ptr<void>(loss), ptr<void>(components), threads);
}

bool barlow_twins_narrow_backward(Address z_a, int64_t stride_a, Address z_b, int64_t stride_b,
                                  Address matrix_a, Address matrix_b, Address statistics, Address upstream,
                                  int64_t rows, int64_t columns, const Definition& definition, Address grad_a,
                                  Address grad_b, int threads) {
  return KERNEL(barlow_twins_narrow_backward)(fast_bf16(), ptr<void>(z_a), stride_a, ptr<void>(z_b), stride_b,
                                              ptr<void>(matrix_a), ptr<void>(matrix_b), ptr<void>(statistics),
                                              ptr<void>(upstream), rows, columns, definition,
                                              ptr<void>(grad_a), ptr<void>(grad_b), threads);
}

using SimilarityRule = mmfast::SimilarityRule;

void similarity_forward_rows(const SimilarityRule& rule, int64_t start, int64_t rows, Address scores,
                             Address values, Address counts, Address numbers, int64_t stride, int threads) {
  KERNEL(similarity_forward_rows)(rule, start, rows, ptr<void>(scores), ptr<void>(values), ptr<void>(counts),
                                  ptr<void>(numbers), stride, threads);
}

void similarity_backward_rows(const SimilarityRule& rule, int64_t start, int64_t rows, Address scores,
                              Address numbers, int64_t stride, Address weights, Address column_numbers,
                              Address column_weights, Address out, Address sums, int threads) {
  KERNEL(similarity_backward_rows)(rule, start, rows, ptr<void>(scores), ptr<void>(numbers), stride,
                                   ptr<void>(weights), ptr<void>(column_numbers), ptr<void>(column_weights),
                                   ptr<void>(out), ptr<void>(sums), threads);
}

bool similarity_units(int dtype, Address x, int64_t stride, int64_t rows, int64_t columns, Address valid,
                      bool cosine, Address unit, Address inverse, int threads) {
  return KERNEL(similarity_units)(dtype, ptr<void>(x), stride, rows, columns, ptr<bool>(valid), cosine,
                                  ptr<void>(unit), ptr<void>(inverse), threads);
}

void similarity_row_gradients(int dtype, Address grad, Address unit, Address inverse, Address scale,
                              int64_t rows, int64_t columns, bool cosine, Address out, Address dots,
                              int threads) {
  KERNEL(similarity_row_gradients)(dtype, ptr<void>(grad), ptr<void>(unit), ptr<void>(inverse),
                                   ptr<void>(scale), rows, columns, cosine, ptr<void>(out), ptr<void>(dots),
                                   threads);
}

bool similarity_codes(Address x, int64_t n, Address codes) {
  return KERNEL(similarity_codes)(ptr<int64_t>(x), n, ptr<int32_t>(codes));
}

mmfast::TripletStrip triplet_rows(int64_t rows, int64_t columns, int64_t start, Address order, Address first,
                                  Address last, Address ids, Address valid) {
  return {rows,
          columns,
          start,
          ptr<const int32_t>(order),
          ptr<const int32_t>(first),
          ptr<const int32_t>(last),
          ptr<const int64_t>(ids),
          ptr<const uint8_t>(valid)};
}

void triplet_strip(bool wide, const mmfast::TripletStrip& strip, Address scores, int kind, double margin,
                   bool ties, Address values, Address counts, int64_t stride, Address g, Address weights,
                   int64_t most, Address scratch, int64_t bytes, int threads) {
  KERNEL(triplet_strip)(wide, strip, ptr<void>(scores), kind, margin, ties, ptr<void>(values),
                        ptr<int64_t>(counts), stride, ptr<void>(g), ptr<void>(weights), most,
                        ptr<void>(scratch), bytes, threads);
}

void triplet_hardest(bool wide, const mmfast::TripletStrip& strip, Address scores, Address near, Address far,
                     Address places, Address numbers, int64_t stride, Address scratch, int64_t bytes,
                     int threads) {
  KERNEL(triplet_hardest)(wide, strip, ptr<void>(scores), ptr<void>(near), ptr<void>(far),
                          ptr<int32_t>(places), ptr<int64_t>(numbers), stride, ptr<void>(scratch), bytes,
                          threads);
}

// Rows of integers and addresses in the order of RecurrentStream.
std::vector<mmfast::RecurrentStream> recurrent_streams(const std::vector<Ints>& rows) {
  std::vector<mmfast::RecurrentStream> streams(rows.size());
  if (rows.size() > mmfast::kMostStreams) throw std::invalid_argument("recurrent: too many streams");
  for (size_t i = 0; i < rows.size(); ++i) {
    static_assert(sizeof(mmfast::RecurrentStream) % sizeof(int64_t) == 0 && sizeof(void*) == sizeof(int64_t));
    if (rows[i].size() * sizeof(int64_t) != sizeof(streams[i]))
      throw std::invalid_argument("recurrent: a stream has another number of fields");
    std::memcpy(&streams[i], rows[i].data(), sizeof(streams[i]));
  }
  return streams;
}

int64_t recurrent_width(bool wide, int64_t units) { return KERNEL(recurrent_width)(wide, units); }

bool recurrent_forward(int dtype, int cell, const std::vector<Ints>& rows, int64_t samples, int64_t units,
                       int threads) {
  const auto streams = recurrent_streams(rows);
  const py::gil_scoped_release no_gil;
  return KERNEL(recurrent_forward)(dtype, cell, streams.data(), (int)streams.size(), samples, units, threads);
}

bool recurrent_backward(int dtype, int cell, const std::vector<Ints>& rows, int64_t samples, int64_t units,
                        int threads) {
  const auto streams = recurrent_streams(rows);
  const py::gil_scoped_release no_gil;
  return KERNEL(recurrent_backward)(dtype, cell, streams.data(), (int)streams.size(), samples, units,
                                    threads);
}

#ifdef MMFAST_WITH_CUDA
#include "bindings_cuda.h"
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "mmfast's compiled kernels on raw addresses; use mmfast.ops, which checks its arguments.";
  m.def("isas", &isas, "Instruction sets compiled in and usable here, slowest first.");
  m.def("use_isa", &use_isa, "Switch the instruction set of all CPU kernels; returns the previous one.");
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<AugmentArguments>(m, "AugmentArguments")
      .def(py::init<int64_t, Ints, const Ints&, const std::vector<double>&, const Ints&, Address, Address,
                    int64_t>());
  m.def("augment_draw", &augment_draw, no_gil);
  m.def("augment_apply", &augment_apply, no_gil);
  m.def("augment_adjoint", &augment_adjoint, no_gil);
  m.def("cpu_is_intel", &cpu_is_intel);
  py::class_<Definition>(m, "BarlowTwinsDefinition")
      .def(py::init([](double lambd, bool center, double eps, bool eps_outside, bool unbiased, bool divide,
                       double scale, bool normalise) {
        return Definition{lambd, center, eps, eps_outside, unbiased, divide, scale, normalise};
      }));
  m.def("barlow_twins_standardise", &barlow_twins_standardise, no_gil);
  m.def("barlow_twins_gram_forward", &barlow_twins_gram_forward, no_gil);
  m.def("barlow_twins_correlation_energy", &barlow_twins_correlation_energy, no_gil);
  m.def("barlow_twins_backward", &barlow_twins_backward, no_gil);
  m.def("fast_bf16", &fast_bf16, "Whether the instruction set multiplies bf16 faster than fp32.");
  m.def("barlow_twins_narrow_forward", &barlow_twins_narrow_forward, no_gil);
  m.def("barlow_twins_narrow_backward", &barlow_twins_narrow_backward, no_gil);
  py::class_<SimilarityRule>(m, "SimilarityRule")
      .def(py::init([](bool wide, int kind, bool itself, int64_t candidates, Address labels_q,
                       Address labels_k, Address ids_q, Address ids_k, Address valid_q, Address valid_k,
                       Address scale, Address bias) {
        return SimilarityRule{wide,
                              kind,
                              itself,
                              candidates,
                              ptr<void>(labels_q),
                              ptr<void>(labels_k),
                              ptr<void>(ids_q),
                              ptr<void>(ids_k),
                              ptr<void>(valid_q),
                              ptr<void>(valid_k),
                              ptr<void>(scale),
                              ptr<void>(bias)};
      }));
  m.def("similarity_forward_rows", &similarity_forward_rows, no_gil);
  m.def("similarity_backward_rows", &similarity_backward_rows, no_gil);
  m.def("similarity_units", &similarity_units, no_gil);
  m.def("similarity_row_gradients", &similarity_row_gradients, no_gil);
  m.def("similarity_codes", &similarity_codes, no_gil);
  py::class_<mmfast::TripletStrip>(m, "TripletStrip").def(py::init(&triplet_rows));
  m.def("triplet_strip", &triplet_strip, no_gil);
  m.def("triplet_hardest", &triplet_hardest, no_gil);
  m.def("recurrent_width", &recurrent_width);
  m.def("recurrent_forward", &recurrent_forward);
  m.def("recurrent_backward", &recurrent_backward);
#ifdef MMFAST_WITH_CUDA
  bind_cuda(m);
#endif
}
