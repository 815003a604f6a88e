"""The definition of a draw in Python's integers and exact fractions, row by row; shares no code with the package.

Written from the text at the top of fastrnn/reference_sample.py; only the polynomial's coefficients are read from there.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np

from fastrnn.reference_sample import EXP2_COEFFICIENTS


def exact_fma(a: float, b: float, c: float) -> float:
    """float32(a * b + c) by exact rational arithmetic, ties to even; the result must be normal."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(exact)))
    exponent += (abs(exact) >= Fraction(2) ** (exponent + 1)) - (abs(exact) < Fraction(2) ** exponent)
    unit = Fraction(2) ** (exponent - 23)
    return float(round(exact / unit) * unit)


@functools.cache
def python_parts(z: float) -> tuple[int, int]:
    z = max(z, -63.0)
    k = math.floor(z)
    f = float(np.float32(z) - np.float32(k))
    q = EXP2_COEFFICIENTS[5]
    for coefficient in EXP2_COEFFICIENTS[4::-1]:
        q = exact_fma(q, f, coefficient)
    return int(min(max(q, 1.0), 2 - 2.0**-23) * 2**23), -k


def python_mass(z: float) -> int:
    significand, shift = python_parts(z)
    return (significand << 31) >> shift


def python_philox(seed: int, counter: list[int]) -> tuple[int, int]:
    k, c = [seed % 2**32, seed >> 32], list(counter)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0] + (c[1] << 32), c[2] + (c[3] << 32)


def python_first_above(masses: list[int], word: int) -> int:
    threshold, total = (word * sum(masses)) >> 64, 0
    for index, mass in enumerate(masses):
        total += mass
        if total > threshold:
            return index
    raise AssertionError("no mass")


def python_draw(row: list[float], columns: dict[str, float], number: int) -> int:
    scale = np.float32(columns["scale"])
    gap = lambda x, top: float((np.float32(x) - np.float32(top)) * scale) if x > -math.inf else -math.inf  # noqa: E731
    order = sorted((i for i, x in enumerate(row) if x > -math.inf), key=lambda i: (-row[i], i))
    top = row[order[0]]
    if scale == 0:
        return order[0]
    if columns["top_k"]:
        order = order[: columns["top_k"]]
    if columns["top_p"]:
        masses = [python_mass(gap(row[i], top)) >> 16 for i in order]
        target = math.ceil(Fraction(columns["top_p"], 2**63) * sum(masses))
        order = order[: next(n for n in range(1, len(order) + 1) if sum(masses[:n]) >= target)]
    kept = {i for i in order if -gap(row[i], top) <= columns["min_p"]}
    row = [x if i in kept else -math.inf for i, x in enumerate(row)]
    r_tile, r_token = python_philox(
        columns["seed"] % 2**64,
        [number, columns["step"] % 2**32, columns["sequence"] % 2**32, (columns["sequence"] % 2**64) >> 32],
    )
    tiles = [row[t : t + 256] for t in range(0, len(row), 256)]
    masses = [[python_mass(gap(x, max(tile))) if x > -math.inf else 0 for x in tile] for tile in tiles]
    tile = 0
    if len(tiles) > 1:
        level = []
        for values, mass in zip(tiles, masses):
            significand, shift = python_parts(gap(max(values), max(row)))
            level.append((((sum(mass) >> 24) * significand) >> 16) >> shift if sum(mass) else 0)
        tile = python_first_above(level, r_tile)
    return 256 * tile + python_first_above(masses[tile], r_token)
