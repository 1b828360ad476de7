"""Bagging as a Ray Data preprocessor: the step of the plan that folds tokens into bags."""

from __future__ import annotations

from typing import Any

from ray.data.preprocessor import Preprocessor

from pipelines.bags import fold_bags


class BaggingPreprocessor(Preprocessor):  # type: ignore[misc,unused-ignore]
    """Folds column `tokens` of a Ray dataset from [(L + 1) · s] to [L + 1, s] a row.

    Nothing is fitted: a bag is defined by the plan alone.
    See https://docs.ray.io/en/latest/data/preprocessors.html.

    Args:
        bag_size: how many tokens a bag holds.
        options: how it runs, as `Dataset.map_batches` takes them.
    """

    _is_fittable = False

    def __init__(self, bag_size: int, **options: Any) -> None:
        super().__init__()
        self.bag_size, self.options = bag_size, options

    def _get_transform_config(self) -> dict[str, Any]:
        return dict(self.options)

    def _transform_numpy(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "tokens": fold_bags(batch["tokens"], self.bag_size)}

    def __repr__(self) -> str:
        return f"BaggingPreprocessor(bag_size={self.bag_size})"
