"""The driver's own decisions, without Ray."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tst_ray.config import load_config
from tst_ray.coordinator import _begin, check_model, memory_problem
from tst_ray.elastic import Node
from tst_ray.errors import RunError
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


class Task:
    """Stands in for a Ray task: what it was asked with, and what came of it."""

    asked: dict[str, Any]

    def options(self, **options: Any) -> Task:
        self.asked = options
        return self

    def remote(self, *args: Any) -> str:
        return "reference"


def test_a_task_goes_where_its_memory_is_and_its_loss_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.exceptions import OutOfMemoryError

    def lost(reference: str) -> Any:
        raise OutOfMemoryError("the node ran low on memory\nand more")

    task = Task()
    nodes = [
        Node("head", {"CPU": 0.0, "memory": 256 * GIB}),
        Node("small", {"CPU": 4.0, "memory": 8 * GIB}),
        Node("large", {"CPU": 4.0, "memory": 64 * GIB}),
    ]
    monkeypatch.setattr("ray.remote", lambda function: task)
    monkeypatch.setattr("ray.get", lost)
    nodes.append(Node("blind", {"CPU": 4.0, "memory": 512 * GIB}))
    monkeypatch.setattr(
        "tst_ray.coordinator.living_nodes",
        lambda away: [node for node in nodes if node.node_id not in away],
    )
    for wanted, asked in ((0.0, 0.0), (12 * GIB, 12 * GIB), (96 * GIB, 32 * GIB)):
        wait = _begin("ray", memory_problem, memory=wanted, away=frozenset({"blind"}))
        assert task.asked.pop("label_selector") == {"ray.io/node-id": "!in(blind)"}
        assert task.asked == {"num_cpus": 1, "memory": asked}, "a task too large is tried anyway"
    with pytest.raises(RunError, match="memory_problem: the node ran low on memory and more"):
        wait()
