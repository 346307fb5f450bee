"""Calls of the recurrent engine in C++: csrc/cpu/recurrent.cpp and recurrent_backward.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import backends
from mmfast.ops.native import DTYPE_CODES

# The order of csrc/recurrent.h.
FIELDS = (
    *("x", "x_sample", "x_step", "steps", "features", "lengths", "reverse"),
    *("w_ih", "w_hh", "b_ih", "b_hh", "h_0", "c_0"),
    *("y", "y_sample", "y_step", "h_n", "c_n", "gates", "states"),
    *("dy", "dy_sample", "dy_step", "dh_n", "dc_n", "dx", "dx_sample", "dx_step"),
    *("dw_ih", "dw_hh", "db_ih", "db_hh", "dh_0", "dc_0"),
)
CELLS = ("lstm", "gru")


def width(dtype: torch.dtype, units: int) -> int:
    """Columns of the states that are kept, see csrc/recurrent.h."""
    return backends._C.recurrent_width(dtype == torch.float64, units)


def run(
    kernel: str, cell: str, dtype: torch.dtype, samples: int, units: int, streams: Sequence[dict]
) -> None:
    """streams: names of FIELDS -> tensors, whose addresses are meant, numbers, or None for none."""
    rows = [[_number(stream.get(name)) for name in FIELDS] for stream in streams]
    enough = getattr(backends._C, kernel)(
        DTYPE_CODES[dtype], CELLS.index(cell), rows, samples, units, torch.get_num_threads()
    )
    if not enough:
        raise MemoryError(f"recurrent: no memory for {samples} samples of {units} units")


def _number(x: Tensor | int | None) -> int:
    return 0 if x is None else x.data_ptr() if isinstance(x, Tensor) else x
