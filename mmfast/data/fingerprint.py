"""Hashes by which samples and data are known again, whatever file, format, order, ids and names they come with."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def of_samples(values: Mapping[str, tuple[Tensor, Tensor]], lengths: Mapping[str, Tensor]) -> Tensor:
    """(N,) int64 from modality -> (steps, F) float32 with the first step of each sample (N,), and lengths (N,).

    0 for a sample without any step.
    """
    hashes = [blake2b(digest_size=8) for _ in range(len(next(iter(lengths.values()))))]
    for modality in sorted(values):
        flat, starts = values[modality]
        flat = flat.numpy()
        for hashed, start, length in zip(hashes, starts.tolist(), lengths[modality].tolist(), strict=True):
            # One zero and one NaN: which of them a cell holds depends on how it was computed.
            with np.errstate(invalid="ignore"):
                steps = np.add(flat[start : start + length], np.float32(0), order="C")
            steps[np.isnan(steps)] = np.nan
            hashed.update(f"{modality}\0{steps.shape}".encode())
            hashed.update(steps.astype("<f4", copy=False))
    digests = np.frombuffer(b"".join(h.digest() for h in hashes), "<i8").astype(np.int64)
    return torch.from_numpy(digests).masked_fill(torch.stack(list(lengths.values())).amax(0) == 0, 0)


def of_all(features: Mapping[str, int], samples: Tensor, labels: Tensor) -> str:
    """32 hexadecimal digits from the samples' fingerprints and labels (N,) or (N, K), in any order."""
    bits = torch.where(labels.isnan(), torch.nan, labels + 0.0).view(torch.int32)
    columns = bits.numpy() if bits.ndim == 2 else bits.numpy()[:, None]
    rows = np.concatenate([samples.numpy()[:, None], columns], axis=1)
    rows = rows[np.lexsort(rows.T)].astype("<i8", copy=False)
    return of_parts(sorted(features.items()), rows.tobytes())


def of_parts(*parts) -> str:
    """32 hexadecimal digits from plain values."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()
