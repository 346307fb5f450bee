"""What the Barlow Twins loss keeps for its backward pass, and the peak of a process, by formula."""

import subprocess
import sys

import pytest
import torch
from barlow_twins_formulas import views
from barlow_twins_help import FORMS

from mmfast import functional as F


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("needs", [(True, True), (True, False)], ids=["both", "one"])
def test_bytes_saved_for_backward(needs, dtype, gram):
    """On the CPU: what is standardised or, if that is less, the inputs; 5 D statistics; min(B^2, D^2) terms."""
    rows, columns = (24, 300) if gram else (300, 24)
    z = [x.to(dtype).requires_grad_(need) for x, need in zip(views(rows, columns), needs, strict=True)]
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.barlow_twins(*z)
    matrices = sum(needs) * rows**2 if gram else columns**2
    assert sum(storages.values()) == 2 * z[0].nbytes + (5 * columns + matrices) * loss.element_size()


# VmHWM, for ru_maxrss begins with the peak of the parent.
PEAK = """
import sys, torch
from mmfast.functional import barlow_twins
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
rows, columns, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
torch.set_num_threads(2)
for shape in ((60, 90), (90, 60), (rows, columns)):
    z = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2)]
    before = peak()
    barlow_twins(*z).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(256, 16384), (16384, 256)], ids=str)
def test_peak_bytes(shape, dtype):
    """Of a whole process: standardised copies, gradients and products, B D each; no max(B, D)^2 = 1 GiB."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, shape), dtype], capture_output=True, text=True, check=True
    )
    size = 4 * shape[0] * shape[1]
    gradients = 2 * size * getattr(torch, dtype).itemsize / 4
    assert 0.9 * gradients < 1024 * int(run.stdout) < 7 * size + 2 * 4 * min(shape) ** 2 + 2**24
