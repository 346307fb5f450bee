"""The kernels that can be tested here, as pairs of a backend and the device of the tensors it takes."""

import contextlib

import torch

from mmfast import backends

PAIRS = (("cpu", "cpu"), ("cuda", "cpu"), ("cuda", "cuda"), ("triton", "cuda"))


def usable(backend: str, device: str) -> bool:
    return (device == "cpu" or torch.cuda.is_available()) and not backends.why_not(backend, device)


KERNELS = [pair for pair in PAIRS if usable(*pair)]


@contextlib.contextmanager
def on(target: tuple[str, str]):
    """Everything inside is made on the device of ``target`` and served by its backend."""
    backend, device = target
    with backends.backend(backend), torch.device(device):
        yield
