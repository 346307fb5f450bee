"""Unpadded data, padded batches and attention written out, for the tests of encoders."""

from __future__ import annotations

import math

import torch

FEATURES = {"text": 5, "audio": 4, "visual": 3}
# Missing modalities, length 1, the full length, and nothing at all.
LENGTHS = {
    "text": [7, 3, 1, 0, 4, 0, 5],
    "audio": [7, 3, 1, 6, 0, 0, 5],
    "visual": [7, 3, 1, 6, 4, 0, 0],
}
# For encoders that need no aligned modalities.
UNALIGNED = {
    "text": [7, 3, 1, 0, 4, 0, 5],
    "audio": [2, 5, 1, 6, 0, 0, 3],
    "visual": [8, 1, 4, 6, 2, 0, 0],
}
# fp64 throughout: differently shaped matrix products differ by a few ulp of 2e-16, sums of 8 steps by more.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def sequences(lengths, features=FEATURES, seed=1):
    """Unpadded data: a list of (n, F) per modality."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: [torch.randn(n, features[name], generator=generator, dtype=torch.float64) for n in ns]
        for name, ns in lengths.items()
    }


def padded(data, padding="back", extra=0, fill=0.0):
    """Values and lengths; every modality is padded to its own longest sample plus ``extra`` steps."""
    values, lengths = {}, {}
    for name, samples in data.items():
        n = [len(s) for s in samples]
        steps = max(n) + extra
        x = torch.full((len(samples), steps, samples[0].shape[1]), fill, dtype=samples[0].dtype)
        for b, s in enumerate(samples):
            x[b, slice(0, len(s)) if padding == "back" else slice(steps - len(s), steps)] = s
        values[name], lengths[name] = x, torch.tensor(n)
    return values, lengths


def attend(layer, queries, keys):
    """softmax(Q K^T / sqrt d) V of one sample, written out."""
    if len(queries) == 0 or len(keys) == 0:
        return queries.new_zeros(queries.shape)
    q, k, v = queries @ layer.query.weight.T, keys @ layer.key.weight.T, keys @ layer.value.weight.T
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v
