"""The published Barlow Twins losses as their projects write them, transcribed for fp64: oracles by autograd.

And what tests need to compare with them.
"""

import torch


def _from_correlation(c, lambd):
    diagonal = c.diagonal()
    return (diagonal - 1).square().sum() + lambd * (c - diagonal.diag()).square().sum()


def _two_views(standardise, a, b, lambd, scale=1.0):
    return scale * _from_correlation(standardise(a).T @ standardise(b) / len(a), lambd)


def _batch_norm(z):
    return torch.nn.functional.batch_norm(z, None, None, training=True, eps=1e-5)


def official(a, b, lambd=5e-3):
    return _two_views(_batch_norm, a, b, lambd)


lightly = official


def solo(a, b, lambd=5e-3):
    return _two_views(_batch_norm, a, b, lambd, 0.025)


def vissl(a, b, lambd=0.0051):
    z = torch.cat([a, b])
    mean = z.mean(0)
    # The same number as mean(z^2) - mean^2, which loses its digits where means are large.
    variance = (z - mean).square().mean(0)
    hat_a, hat_b = ((z - mean) * torch.rsqrt(variance + 1e-5)).chunk(2)
    return 0.024 * _from_correlation(hat_a.T @ hat_b / len(a), lambd)


def monai(a, b, lambd=5e-3):
    return _two_views(lambda z: (z - z.mean(0)) / (z.std(0) + 1e-6), a, b, lambd)


def catalyst(a, b, lambd=1.0):
    return _two_views(lambda z: (z - z.mean(0)) / torch.sqrt(z.var(0) + 1e-12), a, b, lambd)


def stable_pretraining(a, b, lambd=5e-3):
    return _two_views(lambda z: (z - z.mean(0)) / (z.std(0) + 1e-5), a, b, lambd)


def lightning(a, b, lambd=5e-3):
    return _two_views(lambda z: (z - z.mean(0)) / z.std(0), a, b, lambd)


def thesis(a, b, lambd=5e-3):
    return _from_correlation(_batch_norm(a).T @ _batch_norm(b), lambd)


FORMULAS = {
    "official": official,
    "lightly": lightly,
    "solo": solo,
    "vissl": vissl,
    "monai": monai,
    "catalyst": catalyst,
    "stable-pretraining": stable_pretraining,
    "lightning": lightning,
    "thesis": thesis,
}


def views(rows, columns, noise=0.7, seed=0):
    """Embeddings that agree up to noise, with scales and means of their own, that fp32 can hold."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cpu")

    z = normal(rows, columns)
    other = z + noise * normal(rows, columns)
    scale = torch.linspace(0.5, 2, columns, device="cpu")
    return tuple(x.to(torch.get_default_device()) for x in (z * scale + 0.3, other))


def gradients(function, z_a, z_b, upstream=1.0, dtype=torch.float64):
    """(loss, gradients of both views), in fp64."""
    z_a, z_b = (z.detach().to(dtype).requires_grad_() for z in (z_a, z_b))
    loss = function(z_a, z_b)
    (upstream * loss).backward()
    return loss.detach().double(), z_a.grad.double(), z_b.grad.double()


def relative_error(x, truth):
    return float((x.double() - truth.double()).norm() / truth.double().norm())
