"""The run's corpus: in what shares its sources are mixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.manifest import Manifest
from tests.corpora import write_corpus
from tests.tiny import make_config
from tst_ray.corpus import build_order, mixture, shown_mixture
from tst_ray.errors import ConfigError
from tst_ray.plan import build_plan


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two sources of 3,000 and 1,000 tokens."""
    return write_corpus(tmp_path_factory.mktemp("shards"), 3_000, 1_000)


def shares(tmp_path: Path, manifest: Manifest, **overrides: str) -> dict[str, float]:
    config = make_config(tmp_path, manifest, **overrides)
    return mixture(build_order(config, build_plan(config), manifest))


def test_prepared_shards_are_mixed_by_weights_or_by_their_tokens(
    tmp_path: Path, manifest: Manifest
) -> None:
    assert shares(tmp_path, manifest) == {"s0": 0.75, "s1": 0.25}
    assert shares(tmp_path, manifest, data__weights="{s1: 3, s0: 1}") == {"s0": 0.25, "s1": 0.75}
    assert shown_mixture({"s0": 0.25, "s1": 0.75}) == "s0 25.0%, s1 75.0%"


@pytest.mark.parametrize("weights", ["{s0: 1}", "{s0: 1, s1: 1, s2: 1}", "{s0: 1, web: 1}"])
def test_weights_name_the_sources_that_there_are(
    tmp_path: Path, manifest: Manifest, weights: str
) -> None:
    with pytest.raises(ConfigError, match=r"data\.weights: names .*; the shards have s0, s1; give"):
        shares(tmp_path, manifest, data__weights=weights)
