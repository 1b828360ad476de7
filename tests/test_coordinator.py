"""The driver's own decisions, without Ray."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tst_ray.config import load_config
from tst_ray.coordinator import check_model, memory_problem
from tst_ray.plan import ModelShape, build_plan

GIB = 2.0**30


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    config = load_config(None)
    remarks, shape = check_model(config, build_plan(config), None)
    assert not remarks
    return shape


def test_checkpoints_in_memory_take_half_of_the_object_stores_at_the_most(
    shape: ModelShape,
) -> None:
    billion = replace(shape, parameters=2**30)  # 12 GiB each; two kept and one on its way
    assert memory_problem(billion, [72 * GIB]) is None  # on one node, once
    assert memory_problem(billion, [36 * GIB] * 4) is None  # on several, twice
    told = memory_problem(billion, [35 * GIB] * 4)
    assert told is not None and "would take 72.0 GiB" in told and "have 140.0;" in told
    assert memory_problem(shape, [GIB]) is None  # the demo, where Ray has a single gibibyte
