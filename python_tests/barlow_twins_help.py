"""What tests of the Barlow Twins op share: embeddings, gradients in fp64, and the axes that tests run along."""

import os

import pytest
import torch

from mmfast import backends
from mmfast.losses.barlow_twins import Options
from mmfast.ops.barlow_twins import op as ops
from mmfast.ops.barlow_twins.definition import Definition, Request
from mmfast.ops.barlow_twins.kernels import passes_for

# cuBLAS refuses the deterministic mode of `poisoned_memory` without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
WHY_NOT = backends.why_not("cpu", "cpu")
native = pytest.mark.skipif(WHY_NOT != "", reason=WHY_NOT)
FORMS = pytest.mark.parametrize("gram", [True, False], ids=["gram", "direct"])
CENTER = pytest.mark.parametrize("center", [True, False], ids=["centred", "raw"])
# On both sides of the choice of form.
SHAPES = pytest.mark.parametrize("shape", [(20, 90), (90, 20)], ids=str)
HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALF]


def views(rows, columns, dtype=torch.float64, seed=0, noise=0.5):
    """Two embeddings that agree up to noise, and whose features are correlated."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    mix = normal(columns, columns)
    z = normal(rows, columns) @ mix
    other = z + noise * mix.norm(dim=0) * normal(rows, columns)
    return tuple(x.to(torch.get_default_device(), dtype) for x in (z, other))


def modalities(rows, widths, dtype=torch.float64):
    """Embeddings that share something, with offsets and scales of their own."""
    shared = torch.randn(rows, max(widths), dtype=torch.float64)
    noise = [torch.randn(rows, width, dtype=torch.float64) for width in widths]
    return [(2 * (shared[:, : e.shape[1]] + 0.7 * e) + 3 * m).to(dtype) for m, e in enumerate(noise)]


def settings_of(variant, **given):
    """Fields of a published definition, and whether its statistics are ``pooled``."""
    return Options(variant=variant, **given).resolved()


def request_of(settings, **more):
    """The same as the ops take it, for one process unless ``sharing`` says otherwise."""
    settings = dict(settings)
    pooled = settings.pop("pooled", False)
    return Request(Definition(**settings), pooled, **more)


def is_narrow(dtype):
    return ops._narrow(dtype, torch.get_default_device())


def skip_where_bfloat16_is_not_rounded(backend, dtype):
    if backend == ("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off")


def passes():
    return passes_for(torch.get_default_device(), narrow=False)


def gradients(function, z_a, z_b, upstream=1.0, dtype=None, **options):
    """(loss, gradients of both views), in float64."""
    z_a, z_b = (z.detach().to(dtype or z.dtype).requires_grad_() for z in (z_a, z_b))
    result = function(z_a, z_b, **options)
    loss = result[0] if isinstance(result, tuple) else result
    (upstream * loss).backward()
    return loss.detach().double(), z_a.grad.double(), z_b.grad.double()
