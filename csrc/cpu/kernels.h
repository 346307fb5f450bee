// The CPU kernels of every op, declared once per instruction set: bindings.cpp includes this file with each
// MMFAST_NS in turn and picks one at run time. Hence no include guard.
//
// Pointers are addresses of dense host memory; `threads` is the number of threads to use at most.
#include "../augment.h"
#include "../barlow_twins.h"
#include "../recurrent.h"
#include "../similarity.h"
#include "../triplets.h"

namespace MMFAST_NS {

// What a kernel may return besides 0.
constexpr int kNotFinite = 1;
constexpr int kNoMemory = 2;

// plan: (batch, plan_stride), every word is written.
int augment_draw(const mmfast::AugmentCall& call, int32_t* plan, int threads);

// x[m]: (B, L, F), strides[2 m] and strides[2 m + 1] elements from sample to sample and from step to step.
// out[view * modalities + m]: (B, L, F) dense. Padding is copied, never computed with.
int augment_apply(const mmfast::AugmentCall& call, const int32_t* plan, int dtype, const void* const* x,
                  const int64_t* strides, void* const* out, bool with_noise, int threads);

// The transposed linear map: x_grads[m] = sum over the views of what grads[view * modalities + m] pulls back.
int augment_adjoint(const mmfast::AugmentCall& call, const int32_t* plan, int dtype, const void* const* grads,
                    void* const* x_grads, int threads);

// barlow_twins.cpp, barlow_twins_gradient.cpp. B rows, D columns; embeddings are of type `dtype` with unit
// column stride, all else is dense and in compute type, fp64 for fp64 (`wide`), else fp32. hat (2, B, D): the
// standardised embeddings Â and B̂. statistics (5, D): r of view a, r of view b, target - c, means of view a,
// means of view b (0 if not `center`). components (5): loss, on-diagonal, off-diagonal, mean c, off-diagonal
// RMS.

// Returns 0, kNoMemory, or kNotFinite if some column has a mean or variance that is not; so do the next.
int barlow_twins_standardise(int dtype, const void* z_a, int64_t stride_a, const void* z_b, int64_t stride_b,
                             int64_t rows, int64_t columns, const mmfast::BarlowTwinsDefinition& definition,
                             void* hat, void* statistics, int threads);
// The forward pass of the Gram form. kept (grad_a + grad_b, B, B): ÂÂ' if grad_b, then B̂B̂' if grad_a.
int barlow_twins_gram_forward(int dtype, const void* z_a, int64_t stride_a, const void* z_b, int64_t stride_b,
                              int64_t rows, int64_t columns, const mmfast::BarlowTwinsDefinition& definition,
                              bool grad_a, bool grad_b, void* hat, void* kept, void* statistics, void* loss,
                              void* components, int threads);
// Direct form, from p = Â'B̂ (D, D), whose diagonal is set to zero.
void barlow_twins_correlation_energy(bool wide, void* p, const void* statistics, int64_t rows,
                                     int64_t columns, const mmfast::BarlowTwinsDefinition& definition,
                                     void* loss, void* components, int threads);
// Gradients of type `dtype`, either of them null if not wanted, for the `upstream` gradient of the loss.
// matrix_a and matrix_b: with `gram` B̂B̂' and ÂÂ' (B, B), otherwise the products B̂p' and Âp (B, D), which may
// become the gradients in place. False if memory ran out.
bool barlow_twins_backward(int dtype, bool gram, const void* matrix_a, const void* matrix_b, const void* hat,
                           const void* statistics, const void* upstream, int64_t rows, int64_t columns,
                           const mmfast::BarlowTwinsDefinition& definition, void* grad_a, void* grad_b,
                           int threads);

// barlow_twins_narrow*.cpp: the Gram form for bf16 embeddings, with bf16 operands of all products; arguments
// and results as above. native: by AVX512-BF16, which the caller knows to be there, else by arithmetic in its
// place.
int barlow_twins_narrow_forward(bool native, const void* z_a, int64_t stride_a, const void* z_b,
                                int64_t stride_b, int64_t rows, int64_t columns,
                                const mmfast::BarlowTwinsDefinition& definition, bool grad_a, bool grad_b,
                                void* kept, void* statistics, void* loss, void* components, int threads);
// False if memory ran out.
bool barlow_twins_narrow_backward(bool native, const void* z_a, int64_t stride_a, const void* z_b,
                                  int64_t stride_b, const void* matrix_a, const void* matrix_b,
                                  const void* statistics, const void* upstream, int64_t rows, int64_t columns,
                                  const mmfast::BarlowTwinsDefinition& definition, void* grad_a, void* grad_b,
                                  int threads);

// similarity.cpp: the passes over a strip of scores (rows, candidates), dense, whose first row is row `start`
// of the rule's. All numbers are of the rule's compute type.

// values (rows), counts (rows): losses and numbers of positives; numbers: L, a, M, b of the rows, `stride`
// apart.
void similarity_forward_rows(const mmfast::SimilarityRule& rule, int64_t start, int64_t rows,
                             const void* scores, void* values, void* counts, void* numbers, int64_t stride,
                             int threads);
// out (rows, candidates), which may be scores: H; with column_weights (candidates) plus that of the
// candidates as rows, whose column_numbers are (4, candidates). sums (rows): of out. weights (rows), numbers:
// of the rows.
void similarity_backward_rows(const mmfast::SimilarityRule& rule, int64_t start, int64_t rows,
                              const void* scores, const void* numbers, int64_t stride, const void* weights,
                              const void* column_numbers, const void* column_weights, void* out, void* sums,
                              int threads);

// similarity_rows.cpp: x (rows, columns) of type `dtype`, with unit column stride; all else is dense and of
// the compute type. unit (rows, columns): x, or with `cosine` its rows divided by their lengths, 0 where
// there is no direction or not valid (null: all are); inverse (rows): 1 / length, or 0. False if what is
// valid is not finite.
bool similarity_units(int dtype, const void* x, int64_t stride, int64_t rows, int64_t columns,
                      const bool* valid, bool cosine, void* unit, void* inverse, int threads);
// out (rows, columns) of type `dtype`, which may be grad: the gradient by x of `grad`, that by unit without
// the factor scale. dots (rows): grad . unit.
void similarity_row_gradients(int dtype, const void* grad, const void* unit, const void* inverse,
                              const void* scale, int64_t rows, int64_t columns, bool cosine, void* out,
                              void* dots, int threads);

// codes (n): x, if all of them fit, which it returns.
bool similarity_codes(const int64_t* x, int64_t n, int32_t* codes);

// triplets.cpp. scores (rows, columns) of a strip, dense, fp64 if `wide`, else fp32, as values (rows), g
// (rows, columns) and weights (rows) are. counts (6, rows) and numbers and places (2, rows) have rows
// `stride` apart. scratch: `bytes` for each thread, a multiple of 8: see
// mmfast/ops/similarity/triplet_kernels.py.

// Either values and counts, or g, the derivative by the scores times the row's weight, are null. most: the
// largest number of positives.
void triplet_strip(bool wide, const mmfast::TripletStrip& strip, const void* scores, int kind, double margin,
                   bool ties, void* values, int64_t* counts, int64_t stride, void* g, const void* weights,
                   int64_t most, void* scratch, int64_t bytes, int threads);
// The least score of a positive and the largest of a negative (infinite where there is none), whose they are,
// the first of equals, and the numbers of positives and negatives.
void triplet_hardest(bool wide, const mmfast::TripletStrip& strip, const void* scores, void* near, void* far,
                     int32_t* places, int64_t* numbers, int64_t stride, void* scratch, int64_t bytes,
                     int threads);

// recurrent.cpp, recurrent_backward.cpp: `dtype` of the inputs and outputs. False if memory ran out.
int64_t recurrent_width(bool wide, int64_t units);
bool recurrent_forward(int dtype, int cell, const mmfast::RecurrentStream* streams, int count,
                       int64_t samples, int64_t units, int threads);
// Gradients of what is null in a stream are not made.
bool recurrent_backward(int dtype, int cell, const mmfast::RecurrentStream* streams, int count,
                        int64_t samples, int64_t units, int threads);

}  // namespace MMFAST_NS
