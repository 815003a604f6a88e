"""Random order without a generator: permutations and numbers that are functions of (seed, epoch, index)."""

from __future__ import annotations

import numpy as np


def shuffled(index: np.ndarray, total: int, seed: int, epoch: int) -> np.ndarray:
    """Images of `index` (int64, 0 <= index < total) under the permutation of range(total) that (seed, epoch) names.

    A Feistel network over the next even number of bits; values outside the range walk on until they are inside (Black
    and Rogaway, "Ciphers with arbitrary finite domains", 2002, method 2). Nothing of size `total` is made.
    """
    half = np.uint64(max(1, (int(total - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = mix(epoch_key(seed, epoch) + np.arange(1, 7, dtype=np.uint64))
    value = np.asarray(index).astype(np.uint64)
    todo = np.arange(value.size)
    while todo.size:
        left, right = value[todo] >> half, value[todo] & mask
        for key in keys:
            left, right = right, left ^ (mix(right + key) & mask)
        value[todo] = (left << half) | right
        todo = todo[value[todo] >= total]
    return value.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014) on uint64 arrays."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_key(seed: int, epoch: int) -> np.ndarray:
    """(1,) uint64 from (seed, epoch)."""
    return mix(mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)) ^ np.array([epoch], np.uint64))
