// The CPU kernels of every op, declared once per instruction set: bindings.cpp includes this file with each
// MMFAST_NS in turn and picks one at run time. Hence no include guard.
//
// Pointers are addresses of dense host memory; `threads` is the number of threads to use at most.
#ifndef MMFAST_NS
#error "define MMFAST_NS before including kernels.h"
#endif

namespace MMFAST_NS {}  // namespace MMFAST_NS
