"""Bagging: fold each sequence's tokens into bags of `s`, as a Ray Data preprocessor.

A sequence of L·s tokens with a look-ahead of s folds to L + 1 bags. Bags 0 … L−1 are the inputs,
bags 1 … L the targets of the positions before them, so the look-ahead makes every label valid and
nothing is stored twice. Folding is a view: no token moves, none is copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from ray.data.preprocessor import Preprocessor
except ModuleNotFoundError:  # a machine without Ray still folds, in process
    Preprocessor = object  # type: ignore[assignment,misc]


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


class BaggingPreprocessor(Preprocessor):  # type: ignore[misc,unused-ignore]
    """Folds column `tokens` of a Ray dataset from [(L + 1) · s] to [L + 1, s] a row.

    Nothing is fitted: a bag is defined by the plan alone.
    See https://docs.ray.io/en/latest/data/preprocessors.html.
    """

    _is_fittable = False

    def __init__(self, bag_size: int) -> None:
        super().__init__()
        self.bag_size = bag_size

    def _transform_numpy(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "tokens": fold_bags(batch["tokens"], self.bag_size)}

    def __repr__(self) -> str:
        return f"BaggingPreprocessor(bag_size={self.bag_size})"
