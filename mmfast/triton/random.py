"""The random stream of csrc/random.h: the same words, and normals by the same polynomials."""

import triton
import triton.language as tl


@triton.jit
def philox(seed, id, tag, block):
    """Four words of each block: ``seed`` and ``id`` are int64, ``block`` has 32 bits."""
    return tl.philox(seed, block, id.to(tl.uint32), (id >> 32).to(tl.uint32), tag.to(tl.uint32))


@triton.jit
def words(seed, id, tag, first, BLOCKS: tl.constexpr):
    """The 4 * BLOCKS words from block ``first`` on, in order."""
    w0, w1, w2, w3 = philox(seed, id, tag, (first + tl.arange(0, BLOCKS)).to(tl.uint32))
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def uniform(word):
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def log_positive(x):
    u = x.to(tl.int32, bitcast=True)
    k = (u - 0x3F2AAAAB) >> 23
    f = (u - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    g = f * f
    q = f * 0.142270103 - 0.151246279
    q = q * f + 0.139580563
    q = q * f - 0.16471903
    q = q * f + 0.200130865
    q = q * f - 0.250042558
    q = q * f + 0.333331794
    return f + (g * (q * f - 0.5) + k.to(tl.float32) * 0.69314718)


@triton.jit
def cos_sin_turn(word):
    """cos and sin of 2 pi uniform(word)."""
    quarter = ((word + 0x20000000) >> 30).to(tl.int32)
    # The scale is 2 pi of fp32 times 2^-24.
    r = ((word << 2).to(tl.int32, bitcast=True) >> 10).to(tl.float32) * 3.7450703871400037e-07
    z = r * r
    sine = r + r * z * (-0.166666552 + z * (0.008332178 + z * -0.000195172979))
    cosine = 1.0 + z * (-0.5 + z * (0.0416666456 + z * (-0.00138873165 + z * 2.44331568e-05)))
    odd = (quarter & 1) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -x, x), tl.where((quarter & 2) != 0, -y, y)


@triton.jit
def normal_pair(w0, w1):
    """Two standard normals from two words."""
    radius = tl.sqrt(-2.0 * log_positive(1.0 - uniform(w0)))
    c, s = cos_sin_turn(w1)
    return radius * c, radius * s


@triton.jit
def normals(seed, id, tag, first, BLOCKS: tl.constexpr):
    """The normals of 4 * BLOCKS coordinates from 4 * ``first`` on, in order."""
    w0, w1, w2, w3 = philox(seed, id, tag, (first + tl.arange(0, BLOCKS)).to(tl.uint32))
    z0, z1 = normal_pair(w0, w1)
    z2, z3 = normal_pair(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def normals_at(seed, id, tag, coordinate):
    """The normals of any coordinates."""
    w0, w1, w2, w3 = philox(seed, id, tag, (coordinate >> 2).to(tl.uint32))
    upper = (coordinate & 2) != 0
    z0, z1 = normal_pair(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    return tl.where((coordinate & 1) != 0, z1, z0)
