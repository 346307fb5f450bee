// Launchers of the CUDA kernels, one per entry of mmfast._C. Pointers are device addresses unless it is said
// otherwise; every function returns 0 or CUDA's error code, and waits for nothing.
#pragma once
#include "../augment.h"
#include "../barlow_twins.h"
#include "../similarity.h"

namespace mmfast {

// Where kernels are launched: a CUDA stream of a device.
struct Target {
  int device;
  void* stream;
};

// device.cu: what the CUDA runtime that is linked in here says, or minus its error code. They initialise the
// driver, after which a process that is forked cannot use it, but make no context.
int cuda_device_count();          // of usable devices; error 35: no driver, or one older than the runtime
int cuda_capability(int device);  // 10 major + minor
int cuda_runtime_version();       // 1000 major + 10 minor
int cuda_driver_version();        // of the newest runtime that the driver serves; 0: no driver
const char* cuda_error_string(int code);

// As in cpu/kernels.h; in `call`, lengths, seed and ids are on the device, the tables on the host. Lengths
// are clamped to [0, L], for nobody waits to look at them. Outputs begin at multiples of 16 bytes. A sample
// has at most kMostCells elements, so that int32 holds the end of the last vector and of the last tile of
// keys too, and a chain at most kLongestChain steps.
constexpr int kLongestChain = 64;
constexpr int64_t kMostCells = INT32_MAX - 4096;
int cuda_augment_draw(const AugmentCall& call, int32_t* plan, const Target& target);
int cuda_augment_apply(const AugmentCall& call, const int32_t* plan, int dtype, const void* const* x,
                       const int64_t* strides, void* const* out, bool with_noise, const Target& target);
// x_grads are fp32 for half gradients.
int cuda_augment_adjoint(const AugmentCall& call, const int32_t* plan, int dtype, const void* const* grads,
                         void* const* x_grads, const Target& target);

// barlow_twins_*.cu: the five passes of mmfast/ops/barlow_twins/kernels.py (Plain says what they compute).
// Embeddings, and views of a half type, have unit column stride and any row stride; all else is dense.
// `wide`: the compute type C is fp64, else fp32. `scratch` holds as many values of C as the function of that
// name says; null for 0.
int64_t cuda_barlow_twins_standardise_scratch(bool wide, int64_t rows, int64_t columns);
int cuda_barlow_twins_standardise(int dtype, bool narrow, const void* z_a, int64_t stride_a, const void* z_b,
                                  int64_t stride_b, int64_t rows, int64_t columns,
                                  const BarlowTwinsDefinition& definition, void* hat, void* statistics,
                                  void* scratch, const Target& target);

// gram_loss with `gram`, else correlation_loss.
int64_t cuda_barlow_twins_loss_scratch(bool wide, bool gram, int64_t rows, int64_t columns);
int cuda_barlow_twins_loss(bool wide, bool gram, void* matrices, const void* statistics, int64_t rows,
                           int64_t columns, const BarlowTwinsDefinition& definition, void* loss,
                           void* components, void* scratch, const Target& target);

// From `count` fp32 matrices (n, n) to a half type.
int cuda_barlow_twins_narrowed(int dtype, const void* matrices, int64_t count, int64_t n, int exponent,
                               void* out, const Target& target);

// Views are of type `view_dtype`: C, or a half type to standardise. A null gradient is not wanted.
int64_t cuda_barlow_twins_gradient_scratch(bool wide, int64_t rows, int64_t columns);
int cuda_barlow_twins_gradient(int view_dtype, int grad_dtype, const void* m_a, const void* m_b,
                               const void* view_a, int64_t stride_a, const void* view_b, int64_t stride_b,
                               const void* statistics, const void* upstream, int64_t rows, int64_t columns,
                               const BarlowTwinsDefinition& definition, bool gram, int exponent,
                               const void* gram_b, const void* gram_a, void* grad_a, void* grad_b,
                               void* scratch, const Target& target);

// similarity.cu and similarity_rows.cu: as in cpu/kernels.h, but for what SimilarityRule says, for all kinds,
// and that nobody looks for what is not finite. valid: bool.
int cuda_similarity_forward_rows(const SimilarityRule& rule, int64_t start, int64_t rows, const void* scores,
                                 void* values, void* counts, void* numbers, int64_t stride,
                                 const Target& target);
int cuda_similarity_backward_rows(const SimilarityRule& rule, int64_t start, int64_t rows, const void* scores,
                                  const void* numbers, int64_t stride, const void* weights,
                                  const void* column_numbers, const void* column_weights, void* out,
                                  void* sums, const Target& target);
int cuda_similarity_units(int dtype, const void* x, int64_t stride, int64_t rows, int64_t columns,
                          const void* valid, bool cosine, void* unit, void* inverse, const Target& target);
int cuda_similarity_row_gradients(int dtype, const void* grad, const void* unit, const void* inverse,
                                  const void* scale, int64_t rows, int64_t columns, bool cosine, void* out,
                                  void* dots, const Target& target);

}  // namespace mmfast
