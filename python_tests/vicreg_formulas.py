"""VICReg as its authors and solo-learn write it, for fp64: the oracle by autograd."""

import torch

WEIGHTS = (25.0, 25.0, 1.0)


def terms(a, b, eps=1e-4, hinge=0.5):
    """Invariance, variance and covariance, without their weights."""
    rows, columns = a.shape
    variance = covariance = 0.0
    for z in (a, b):
        variance = variance + hinge * torch.relu(1 - (z.var(0) + eps).sqrt()).mean()
        d = z - z.mean(0)
        c = d.T @ d / (rows - 1)
        covariance = covariance + (c - c.diagonal().diag()).square().sum() / columns
    return (a - b).square().mean(), variance, covariance


def official(a, b, *weights, eps=1e-4, hinge=0.5):
    return sum(w * x for w, x in zip(weights or WEIGHTS, terms(a, b, eps, hinge), strict=True))


def solo(a, b, *weights):
    return official(a, b, *weights, hinge=1.0)
