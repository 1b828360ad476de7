"""Bags: `s` neighbouring tokens folded into one position.

A sequence of L·s tokens with a look-ahead of s folds to L + 1 bags. Bags 0 … L−1 are the inputs,
bags 1 … L the targets of the positions before them, so the look-ahead makes every label valid and
nothing is stored twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def fold_bags(tokens: np.ndarray[Any, Any], bag_size: int) -> np.ndarray[Any, Any]:
    """Fold contiguous tokens into bags.

    Args:
        tokens: [n, (L + 1) · bag_size], the sequences with their look-ahead.
        bag_size: s, tokens a bag.

    Returns:
        [n, L + 1, bag_size], a view of the same memory.

    Raises:
        ValueError: the length is not a whole number of bags.
    """
    rows, length = tokens.shape
    if length % bag_size:
        raise ValueError(f"{length} tokens do not fold into bags of {bag_size}")
    return tokens.reshape(rows, length // bag_size, bag_size)
