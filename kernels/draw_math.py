"""The arithmetic of a draw in Triton, bit for bit that of `fastrnn.reference_sample` (csrc/sampling.h in C++).

Only float32 fma, mul, sub and compare, each correctly rounded, and integer operations stand on the path of a
decision, so that a kernel must be launched with ``enable_fp_fusion=False``: a multiplication and the subtraction after
it would otherwise become one fma. Masses are int64; every sum of them is below 2**63 and does not depend on its order.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(256)  # ids in a tile, canonical
TILE_UNIT_BITS = tl.constexpr(54)  # exp_mass(0) = 2**54
ROW_UNIT_BITS = tl.constexpr(37)  # row_mass of one token at z = 0
TOP_P_SHIFT = tl.constexpr(16)
LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))  # the float32
LN_2 = tl.constexpr(0.6931471805599453)
SCALE_MIN = tl.constexpr(2.0**-126)
LARGEST_FLOAT = tl.constexpr(float.fromhex("0x1.fffffep+127"))
INFINITY = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
# Minimax fit P of 2**f on [0, 1] in relative error with P(0) = 1; the coefficients of reference_sample.py.
C1 = tl.constexpr(float.fromhex("0x1.62e4bap-1"))
C2 = tl.constexpr(float.fromhex("0x1.ebdb6ap-3"))
C3 = tl.constexpr(float.fromhex("0x1.c91c10p-5"))
C4 = tl.constexpr(float.fromhex("0x1.277c1cp-7"))
C5 = tl.constexpr(float.fromhex("0x1.e96912p-10"))

STATUS_NAN = tl.constexpr(1)
STATUS_INFINITE = tl.constexpr(2)
STATUS_EMPTY = tl.constexpr(3)
STATUS_PARAMETER = tl.constexpr(4)


@triton.jit
def exp2_parts(z):
    """``(m24, -k)`` of ``2**z`` for float32 ``z <= 0`` as int32; ``z`` below -63 and NaN count as -63."""
    z = tl.where(z > -63.0, z, -63.0)
    k = z.to(tl.int32)
    k -= (k.to(tl.float32) > z).to(tl.int32)  # tl.floor takes a denormal z for 0, this for -1
    f = z - k.to(tl.float32)
    q = tl.fma(f, tl.full(f.shape, C5, tl.float32), tl.full(f.shape, C4, tl.float32))
    q = tl.fma(q, f, tl.full(f.shape, C3, tl.float32))
    q = tl.fma(q, f, tl.full(f.shape, C2, tl.float32))
    q = tl.fma(q, f, tl.full(f.shape, C1, tl.float32))
    q = tl.fma(q, f, tl.full(f.shape, 1.0, tl.float32))
    bits = q.to(tl.int32, bitcast=True) - 0x3F000000
    bits = tl.minimum(tl.maximum(bits, 0x800000), 0xFFFFFF)  # q clamped to [1, 2)
    return bits, -k


@triton.jit
def exp_mass(z):
    """``E(z)``: ``2**z`` as an int64 in units of ``2**-54``, float32 ``z <= 0``, zero below -54, -inf and NaN too."""
    significand, shift = exp2_parts(z)
    return (significand.to(tl.int64) << 31) >> shift.to(tl.int64)


@triton.jit
def row_mass(tile_sum, z, tiles):
    """``U_t`` of tiles with sums ``W_t`` whose largest logits lie ``z`` below the row's; ``W_t`` if it is the only."""
    significand, shift = exp2_parts(z)
    mass = (((tile_sum >> 24) * significand.to(tl.int64)) >> 16) >> shift.to(tl.int64)
    return tl.where(tiles == 1, tile_sum, mass)


@triton.jit
def log_total(total, tiles):
    """Natural logarithm, in float64, of the sum of ``2**z`` of a row whose ``U`` is ``total``."""
    unit_bits = tl.where(tiles == 1, TILE_UNIT_BITS, ROW_UNIT_BITS)
    return LN_2 * (tl.log2(total.to(tl.float64)) - unit_bits)


@triton.jit
def order_key(x):
    """An int32 in the order of float32 values; -0.0 and 0.0 share one."""
    bits = tl.where(x == 0.0, 0, x.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def mulhi64(a, b):
    """High 64 bits of uint64 ``a`` times int64 ``b >= 0``, as int64."""
    return tl.umulhi(a, b.to(tl.uint64)).to(tl.int64)


@triton.jit
def random_words(seed, sequence, step, draw):
    """``(r_tile, r_token)`` as uint64 of the draws numbered ``draw``, int64; seed, sequence and step are int64 too."""
    low = sequence.to(tl.uint32)
    high = (sequence >> 32).to(tl.uint32)
    zero = draw.to(tl.uint32) * 0
    w0, w1, w2, w3 = tl.philox(seed, draw.to(tl.uint32), zero + step.to(tl.uint32), zero + low, zero + high)
    r_tile = w0.to(tl.uint64) | (w1.to(tl.uint64) << 32)
    return r_tile, w2.to(tl.uint64) | (w3.to(tl.uint64) << 32)


@triton.jit
def look_up(prefix, threshold):
    """How many of the prefix sums ``prefix [D, N]`` are at most ``threshold [D]``, the largest of them (or 0) and the
    smallest of the others (or 2**63 - 1)."""
    below = prefix <= threshold[:, None]
    COUNT: tl.constexpr = prefix.shape[1]
    index = tl.min(tl.where(below, COUNT, tl.arange(0, COUNT)[None, :]), axis=1)
    low = tl.max(tl.where(below, prefix, 0), axis=1)
    return index, low, tl.min(tl.where(below, 0x7FFFFFFFFFFFFFFF, prefix), axis=1)


@triton.jit
def boundary_distance(low, high, threshold, total):
    """Distance of ``threshold`` in [low, high) from the nearest inner boundary, relative to ``total``, float64."""
    below = tl.where(low == 0, INFINITY, (threshold - low).to(tl.float64))
    above = tl.where(high == total, INFINITY, (high - threshold).to(tl.float64))
    return tl.minimum(below, above) / total.to(tl.float64)
