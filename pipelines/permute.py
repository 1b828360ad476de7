"""Pseudo-random permutations that answer one index at a time.

A shuffled array of 10 million rows is 80 MB that every process would have to agree on. A Feistel
network is a permutation of [0, 2^2h) by construction, whatever its round function; walking its
cycle until the value falls below `n` restricts it to [0, n) (Black & Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002). Nothing is stored, so any position of any epoch is O(1).

The arithmetic is fixed 64-bit integer mixing, not NumPy's generators, whose streams may change
between releases: the order of a run must outlive the library that started it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

UInt64 = np.ndarray[Any, np.dtype[np.uint64]]
Int64 = np.ndarray[Any, np.dtype[np.int64]]

_ROUNDS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(values: UInt64) -> UInt64:
    """Scramble 64-bit words one to one (splitmix64's finaliser). Shape is kept."""
    with np.errstate(over="ignore"):
        z = values + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def combine(*words: Any) -> UInt64:
    """Hash several integers (scalars or arrays that broadcast) into one 64-bit word each."""
    state = np.zeros((), dtype=np.uint64)
    for word in words:
        state = mix64(state ^ mix64(np.asarray(word).astype(np.uint64)))
    return state


def permute(index: Int64, size: Int64 | int, key: UInt64) -> Int64:
    """Where a keyed permutation of [0, size) sends `index`.

    Args:
        index: positions, any shape, 0 <= index < size.
        size: the permuted range's size, per position or one for all.
        key: 64-bit key, per position or one for all; another key is another permutation.

    Returns:
        int64 positions in [0, size), one to one for each (size, key).
    """
    shape = np.shape(index)
    value = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    bound = np.broadcast_to(np.asarray(size, dtype=np.uint64), value.shape)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), value.shape)
    half_bits = _half_bits(bound)
    out = _feistel(value, half_bits, keys)
    walking = np.flatnonzero(out >= bound)
    while walking.size:
        out[walking] = _feistel(out[walking], half_bits[walking], keys[walking])
        walking = walking[out[walking] >= bound[walking]]
    return out.astype(np.int64).reshape(shape)


def _half_bits(bound: UInt64) -> UInt64:
    """Half the (even) number of bits that hold bound − 1: the domain is at most 4 × bound."""
    # frexp is exact below 2^53, far above any number of rows or cells.
    bits = np.frexp(np.maximum(bound.astype(np.float64) - 1, 1))[1]
    return ((bits + 1) // 2).astype(np.uint64)


def _feistel(value: UInt64, half_bits: UInt64, key: UInt64) -> UInt64:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for round_number in range(_ROUNDS):
        scrambled = mix64(right ^ mix64(key + np.uint64(round_number))) & mask
        left, right = right, left ^ scrambled
    return (left << half_bits) | right
