"""Small things every call into ``mmfast._C`` needs."""

from __future__ import annotations

import torch

from mmfast import backends

# The codes of csrc/scalar.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def dtype_code(op: str, argument: str, tensor: torch.Tensor) -> int:
    """The code of a floating tensor's dtype, or a TypeError naming ``op`` and ``argument``."""
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPE_CODES)
        raise TypeError(
            f"{op}: {argument} must be one of {names}, got {str(tensor.dtype).removeprefix('torch.')}"
        )
    return code


def cuda_target(device: torch.device) -> tuple[int, int]:
    """(device index, stream) where a CUDA kernel is to be launched; of no meaning where CUDA is emulated."""
    if device.type == "cpu":
        return 0, 0
    return device.index, torch._C._cuda_getCurrentRawStream(device.index)


def check_cuda(op: str, code: int) -> None:
    """Raises what a launcher of ``mmfast._C`` reports."""
    if code:
        raise RuntimeError(f"{op}: CUDA error {code}: {backends.cuda_error(code)}")
