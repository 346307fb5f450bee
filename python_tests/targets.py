"""The kernels that can be tested here, as pairs of a backend and the device of the tensors it takes."""

import contextlib
from importlib.util import find_spec

import pytest
import torch
from triton_interpreter import quicken

from mmfast import backends

PAIRS = (("cpu", "cpu"), ("cuda", "cpu"), ("cuda", "cuda"), ("triton", "cuda"))


def usable(backend: str, device: str) -> bool:
    return (device == "cpu" or torch.cuda.is_available()) and not backends.why_not(backend, device)


KERNELS = [pair for pair in PAIRS if usable(*pair)]
TARGETS = [*KERNELS, ("reference", "cpu")]
INTERPRETED = [("triton", "cpu")] if usable("triton", "cpu") and find_spec("mmfast.triton") else []
if INTERPRETED:
    quicken()
# For the fixture `backend`: everything in the test is made on the device of, and served by, each target. Triton's
# interpreter is slow, and has tests of its own: it takes part where backends meet the op.
BACKENDS = pytest.mark.parametrize("backend", TARGETS, ids="-".join, indirect=True)
ALL_BACKENDS = pytest.mark.parametrize("backend", [*TARGETS, *INTERPRETED], ids="-".join, indirect=True)
# The same for tests of so many cases that the interpreter's take turns.
BACKENDS_IN_TURN = pytest.mark.parametrize(
    "backend",
    [*TARGETS, *(pytest.param(pair, marks=pytest.mark.rotation) for pair in INTERPRETED)],
    ids="-".join,
    indirect=True,
)


@contextlib.contextmanager
def on(target: tuple[str, str]):
    """Everything inside is made on the device of ``target`` and served by its backend."""
    backend, device = target
    with backends.backend(backend), torch.device(device):
        yield
