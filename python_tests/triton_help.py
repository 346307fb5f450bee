"""What the tests of the Triton kernels share: they run on a GPU, or without one in Triton's interpreter."""

import contextlib
import os

import pytest
import torch
from triton_interpreter import quicken

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
if INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
if INTERPRETED:
    quicken()

ZONE = 64


def to_device(value):
    """Tensors, also in lists and tuples, on the device of the tests."""
    if type(value) in (list, tuple):
        return type(value)(map(to_device, value))
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def one_ulp(dtype):
    """Relative tolerance of results that are rounded once to ``dtype``, from values that agree to a few ulp."""
    return {torch.float64: 1e-11, torch.float32: 2e-6}.get(dtype) or torch.finfo(dtype).eps


def assert_rounded(actual, expected):
    """Equal up to the last bit of a half type; the interpreter rounds to bf16 towards zero, a GPU to nearest."""
    tolerance = one_ulp(expected.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=2e-6)
    if not INTERPRETED and expected.dtype in (torch.bfloat16, torch.float16) and expected.numel() > 1000:
        assert (actual == expected).float().mean() > 0.98


@contextlib.contextmanager
def red_zones():
    """Every tensor that is allocated inside starts out poisoned, between zones that must stay as they are."""
    empty, new_empty, buffers = torch.empty, torch.Tensor.new_empty, []

    def guarded(*shape, dtype=None, device=None):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = torch.Size(shape).numel()
        dtype = dtype or torch.get_default_dtype()
        poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        buffer = empty(size + 2 * ZONE, dtype=dtype, device=device).fill_(poison)
        buffers.append(buffer)
        return buffer[ZONE : ZONE + size].view(shape)

    def like(x, dtype=None):
        return guarded(x.shape, dtype=dtype or x.dtype, device=x.device)

    def new(x, *shape, **options):
        # The interpreter's own have options.
        return new_empty(x, *shape, **options) if options else guarded(*shape, dtype=x.dtype, device=x.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        patch.setattr(torch, "empty_like", like)
        patch.setattr(torch.Tensor, "new_empty", new)
        yield
    for buffer in buffers:
        zones = torch.cat([buffer[:ZONE], buffer[-ZONE:]])
        expected = zones.isnan() if zones.is_floating_point() else zones == torch.iinfo(zones.dtype).max
        assert expected.all(), "a kernel wrote outside its output"


def inside(x, before=3):
    """A copy of x in the middle of a buffer of NaN (or large integers), with gaps between its rows."""
    poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    shape = [2 * x.shape[0] + 1, *(size + 2 * before for size in x.shape[1:])]
    buffer = torch.full(shape, poison, dtype=x.dtype, device=x.device)
    part = buffer[(slice(1, None, 2), *(slice(before, -before) for _ in x.shape[1:]))]
    return part.copy_(x)
