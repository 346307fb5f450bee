// Recurrent layers over sequences of true lengths, as mmfast/ops/recurrent/reference.py defines them.
#pragma once
#include <stdint.h>

namespace mmfast {

// The order of CELLS in mmfast/ops/recurrent/op.py.
enum RecurrentCell : int { kLstm = 0, kGru = 1 };

// Of a call.
constexpr int kMostStreams = 32;

// One direction of one layer over one input. Embeddings of the outer world (x, y, dy, dx) are of the type of
// the call, everything else of its compute type C; a null address: there is none, or it is not wanted. Sample
// b, of length n in [0, steps], is read at steps 0 .. n - 1, or n - 1 .. 0 if `reverse`; beyond, y and dx
// become zero. Strides are of samples and of steps; within a step, numbers are neighbours. What has no stride
// is dense. The order of FIELDS in mmfast/ops/recurrent/kernels.py.
struct RecurrentStream {
  const void* x;  // (B, steps, features)
  int64_t x_sample, x_step, steps, features;
  const int64_t* lengths;  // (B)
  int64_t reverse;
  const void *w_ih, *w_hh, *b_ih, *b_hh;  // as torch has them
  const void *h_0, *c_0;                  // (B, H)
  void* y;                                // (B, steps, H)
  int64_t y_sample, y_step;
  void *h_n, *c_n;  // (B, H), rows of length 0 are not written
  // Of the cells, in the order of the computation: activated gates (cells, 4 U), and c, or h of a GRU (cells,
  // U). U is recurrent_width(H).
  void *gates, *states;

  const void* dy;
  int64_t dy_sample, dy_step;
  const void *dh_n, *dc_n;
  void* dx;
  int64_t dx_sample, dx_step;
  void *dw_ih, *dw_hh, *db_ih, *db_hh;
  void *dh_0, *dc_0;  // rows of length 0 are not written
};

}  // namespace mmfast
