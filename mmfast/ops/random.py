"""The random stream of csrc/random.h in plain PyTorch: bit-identical words, on any device.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Words are int64 tensors
that hold 32-bit values, for PyTorch has little arithmetic on unsigned types.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COIN, SHARE, FEATURE, TIME, GATE, NOISE = range(6)
ALL_MODALITIES = 255
ALL_SAMPLES = -1
MASK = 0xFFFFFFFF


def stream_tag(view: int, modality: int, step: int, purpose: int) -> int:
    """The fourth word of the counter; each part has 8 bits."""
    return view << 24 | modality << 16 | step << 8 | purpose


def philox(seed: Tensor, ids: Tensor, tag: int, blocks: Tensor) -> Tensor:
    """Four words per block.

    Args:
        seed: int64, one element; its 64 bits are the key.
        ids: int64 sample ids, broadcast against ``blocks``.
        tag: see :func:`stream_tag`.
        blocks: int64 block numbers, coordinate // 4.

    Returns:
        int64 of the broadcast shape + (4,), each in [0, 2^32).
    """
    ids, blocks = torch.broadcast_tensors(ids, blocks)
    k0, k1 = seed.reshape(()) & MASK, seed.reshape(()) >> 32 & MASK
    c0, c1, c2, c3 = blocks & MASK, ids & MASK, ids >> 32 & MASK, torch.full_like(blocks, tag)
    for _ in range(10):
        # The product wraps around in int64, which leaves the right 64 bits behind.
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def words(seed: Tensor, ids: Tensor, tag: int, count: int) -> Tensor:
    """Words of coordinates 0 .. count - 1 for each id: (len(ids), count)."""
    blocks = torch.arange((count + 3) // 4, device=ids.device)
    return philox(seed, ids[:, None], tag, blocks).flatten(1)[:, :count]


def uniform(word: Tensor) -> Tensor:
    """fp64 in [0, 1) from the top 24 bits of each word."""
    return (word >> 8).double() * 2.0**-24


def normals(seed: Tensor, ids: Tensor, tag: int, count: int) -> Tensor:
    """fp64 standard normals (len(ids), count) of coordinates 0 .. count - 1, by Box and Muller (1958)."""
    pairs = words(seed, ids, tag, count + count % 2).unflatten(1, (-1, 2))
    radius = (-2 * (1 - uniform(pairs[..., 0])).log()).sqrt()
    angle = 2 * math.pi * uniform(pairs[..., 1])
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :count]


def threshold(p: float) -> int:
    """A decision of probability p is ``word < threshold(p)``: round(p 2^32), half up."""
    return math.floor(p * 2.0**32 + 0.5)
