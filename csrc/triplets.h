// Triplets (anchor, positive, negative) of a strip of rows among all: who belongs to whom, and which are
// wanted.
#pragma once
#include "platform.h"

namespace mmfast {

// Row i of the strip is candidate start + i. The candidates of its class are order[first] .. order[last - 1],
// ascending, for its own entries of first and last (columns); equal classes have equal ones. ids and valid
// (columns) may be null.
struct TripletStrip {
  int64_t rows, columns, start;
  const int32_t *order, *first, *last;
  const int64_t* ids;
  const uint8_t* valid;
};

// The order of Python's KINDS.
enum TripletKind { kTripletAll = 0, kTripletSemihard = 1, kTripletHard = 2, kTripletNearest = 3 };

}  // namespace mmfast
