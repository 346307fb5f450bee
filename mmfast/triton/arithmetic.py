"""Functions of numbers that are rounded as csrc/platform.h has them rounded."""

import triton
import triton.language as tl


@triton.jit
def root(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def log_of_one_and(x):
    """log(1 + x) of 0 <= x <= 1, as exact for a small x: the error of 1 + x is in its logarithm and in y - 1."""
    y = 1 + x
    grown = y - 1
    none = grown == 0
    return tl.where(none, x, tl.log(y) * (x / tl.where(none, 1.0, grown)))
