"""What the driver has done elsewhere: where it goes, what it waits for, how its end is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError

from tst_ray.config import load_config
from tst_ray.elastic import Node
from tst_ray.errors import ConfigError, RunError
from tst_ray.estimates import ModelShape
from tst_ray.plan import build_plan
from tst_ray.tasks import begin, check_model, store_problem

GIB = 2.0**30


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    config = load_config(None)
    remarks, shape, _ = check_model(config, build_plan(config), None)
    assert not remarks
    return shape


def test_checkpoints_in_memory_take_half_of_the_object_stores_at_the_most(
    shape: ModelShape,
) -> None:
    billion = replace(shape, parameters=2**30)  # 12 GiB each; two kept and one on its way
    assert store_problem(billion, [72 * GIB]) is None  # on one node, once
    assert store_problem(billion, [36 * GIB] * 4) is None  # on several, twice
    told = store_problem(billion, [35 * GIB] * 4)
    assert told is not None and "would take 72.0 GiB" in told and "have 140.0;" in told
    assert store_problem(shape, [GIB]) is None  # the demo, where Ray has a single gibibyte


class Ray:
    """Stands in for Ray: how a task was asked for, and what comes of it."""

    asked: dict[str, Any]

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_begun = True
        self.outcome: Any = None
        monkeypatch.setattr("ray.remote", self._remote)
        monkeypatch.setattr("ray.wait", lambda tasks, timeout: (tasks[: self.has_begun], []))
        monkeypatch.setattr("ray.get", self._get)

    def _remote(self, function: Callable[..., Any]) -> Any:
        class Remote:
            def options(_, **options: Any) -> Remote:
                self.asked = options
                return _

            def remote(_, *args: Any) -> Any:
                return function(*args)

        return Remote()

    def _get(self, told: Any) -> Any:
        if told is not None and isinstance(self.outcome, Exception):
            raise self.outcome
        return told


NODES = [
    Node("head", {"CPU": 0.0, "memory": 256 * GIB}),
    Node("small", {"CPU": 4.0, "memory": 8 * GIB}),
    Node("large", {"CPU": 4.0, "memory": 64 * GIB}),
    Node("blind", {"CPU": 4.0, "memory": 512 * GIB}),
]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    monkeypatch.setattr(
        "tst_ray.tasks.living_nodes",
        lambda away: [node for node in NODES if node.node_id not in away],
    )
    return Ray(monkeypatch)


def test_a_task_goes_where_its_memory_is(ray: Ray) -> None:
    for wanted, asked in ((0.0, 0.0), (12 * GIB, 12 * GIB), (96 * GIB, 32 * GIB)):
        task = begin("ray", max, 3, 7, memory=wanted, away=frozenset({"blind"}))
        assert ray.asked["label_selector"] == {"ray.io/node-id": "!in(blind)"}
        need = (ray.asked["num_cpus"], ray.asked["memory"])
        assert need == (1, asked), "a task too large is tried anyway"
        assert task.has_begun(0.0) and task.result() == 7
    assert begin("inline", max, 3, 7).result() == 7


def test_how_a_task_ends_is_told_in_a_line(ray: Ray) -> None:
    ray.outcome = OutOfMemoryError("the node ran low on memory\nand more")
    with pytest.raises(RunError, match="max: the node ran low on memory and more"):
        begin("ray", max, 3, 7).result()
    ray.outcome = RayTaskError("max", "Traceback", ConfigError("model.source: no such model"))
    with pytest.raises(ConfigError, match=r"^model\.source: no such model$"):
        begin("ray", max, 3, 7).result()


def test_a_task_that_has_no_place_says_what_it_lacks(
    ray: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [Node("large", {"memory": 64 * GIB}), Node("blind", {"CPU": 4.0, "memory": 512 * GIB})]
    monkeypatch.setattr(
        "tst_ray.tasks.free_nodes", lambda away: [n for n in free if n.node_id not in away]
    )
    ray.has_begun, away = False, frozenset({"blind"})
    task = begin("ray", max, 3, 7, away=away)
    assert (task.has_begun(0.0), task.lacks()) == (False, "a free CPU")
    large = begin("ray", max, 3, 7, memory=12 * GIB, away=away)
    assert large.lacks() == "a free CPU and 12.0 GiB of free memory"
    free[0] = Node("large", {"CPU": 1.0, "memory": 8 * GIB})
    assert (task.lacks(), large.lacks() is None) == (None, False)
    ray.has_begun = True
    assert task.has_begun(0.0)
    ray.has_begun = False
    assert task.has_begun(0.0), "Ray is not asked again"


@pytest.mark.slow
def test_ray_tells_that_a_task_has_begun() -> None:
    """What `Task` builds on, with Ray itself: nobody's CPU, and then one of its own."""
    import ray as real

    class Holder:
        def holds(self) -> bool:
            return True

    real.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        holder = real.remote(Holder).options(num_cpus=1).remote()
        assert real.get(holder.holds.remote())
        task = begin("ray", divmod, 7, 0)
        assert not task.has_begun(1.0)
        assert task.lacks() == "a free CPU"
        real.kill(holder)
        assert task.has_begun(120.0)
        with pytest.raises(ZeroDivisionError):
            task.result()
        assert begin("ray", divmod, 7, 2).result() == (3, 1)
    finally:
        real.shutdown()
