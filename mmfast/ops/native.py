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


def call_cuda(op: str, kernel, device: torch.device, *arguments) -> None:
    """Launches a kernel of ``mmfast._C`` on the current stream of ``device`` (the CPU: where CUDA is emulated)."""
    if device.type == "cpu":
        code = kernel(*arguments, 0, 0)
    elif device.index == torch.cuda.current_device():
        # torch.cuda.current_stream builds an object for what this returns as a number.
        code = kernel(*arguments, device.index, torch._C._cuda_getCurrentRawStream(device.index))
    else:
        with torch.cuda.device(device):
            return call_cuda(op, kernel, device, *arguments)
    if code:
        raise RuntimeError(f"{op}: {_cuda_failure(code)}")


def _cuda_failure(code: int) -> str:
    what = f"CUDA error {code}: {backends.cuda_error(code)}"
    # A launch waits for nothing: what goes wrong within kernels comes up at some later call, of whomever.
    if (code >= 700 and code != 701) or code == 214:
        return f"{what}; in this call or an earlier kernel: CUDA_LAUNCH_BLOCKING=1 shows in which"
    return what
