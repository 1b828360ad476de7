"""Which nodes may be used: those where a look has found the run's folder."""

from __future__ import annotations

import time
from typing import Any

import pytest
from ray.exceptions import NodeDiedError, RayTaskError

from tst_ray import sight as sight_module
from tst_ray.elastic import Node
from tst_ray.sight import Sight


class Looks:
    """The nodes of a cluster, and what a look at each of them finds once it is answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.living = ["own", "a"]
        self.problem: dict[str, str | None] = {}  # of those that answer
        self.begun: list[str] = []
        self.now = 1000.0
        monkeypatch.setattr(sight_module, "own_node", lambda: "own")
        monkeypatch.setattr(
            sight_module, "living_nodes", lambda: [Node(name, {}) for name in self.living]
        )
        monkeypatch.setattr(sight_module, "_begin", self._begin)
        monkeypatch.setattr(sight_module, "_is_done", lambda task: task in self.problem)
        monkeypatch.setattr(sight_module, "_problem", lambda task, *_: self.problem[task])
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _begin(self, node: str, path: str) -> str:
        self.begun.append(node)
        return node

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


def test_a_node_is_used_once_it_was_seen_to_see(looks: Looks) -> None:
    sight = Sight("/runs/a/config.yaml")
    sight.look()
    assert (sight.unseen(), looks.begun) == ({"a"}, ["a"])
    assert sight.where() == {"ray.io/node-id": "in(own)"}
    assert sight.problems() == {}, "nobody knows yet"
    looks.problem["a"] = None
    sight.look()
    assert sight.unseen() == frozenset()
    assert sight.where() == {"ray.io/node-id": "in(a,own)"}
    looks.living.append("b")
    sight.look()
    assert (sight.unseen(), looks.begun) == ({"b"}, ["a", "b"])


def test_a_node_that_does_not_see_is_told_and_asked_again(looks: Looks) -> None:
    sight = Sight("/runs/a/config.yaml")
    looks.problem["a"] = "node 10.0.0.7 does not see it"
    sight.settle()
    assert (sight.unseen(), sight.problems()) == ({"a"}, {"a": "node 10.0.0.7 does not see it"})
    sight.look()
    assert looks.begun == ["a"], "not at every look"
    looks.now += 11
    del looks.problem["a"]
    sight.look()
    assert looks.begun == ["a", "a"]
    assert sight.problems() == {"a": "node 10.0.0.7 does not see it"}, "as long as nobody knows"
    looks.problem["a"] = None
    sight.look()
    assert (sight.unseen(), sight.problems()) == (frozenset(), {})


def test_nodes_that_are_gone_are_no_matter(looks: Looks) -> None:
    sight = Sight("/runs/a/config.yaml")
    looks.problem["a"] = "node 10.0.0.7 does not see it"
    sight.settle()
    looks.living.remove("a")
    sight.look()
    assert (sight.unseen(), sight.problems()) == (frozenset(), {})


def test_a_node_that_hangs_is_not_waited_for_for_ever_nor_twice(looks: Looks) -> None:
    sight = Sight("/runs/a/config.yaml")
    sight.settle()
    waited = looks.now - 1000
    assert waited == pytest.approx(120, abs=1)
    assert sight.unseen() == {"a"}
    sight.settle()
    assert looks.now - 1000 == waited


def test_where_all_see_nobody_looks(looks: Looks) -> None:
    sight = Sight()
    sight.settle()
    assert (looks.begun, sight.unseen(), sight.where()) == ([], frozenset(), {})


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (True, None),
        (False, "node 10.0.0.7 does not see /runs/a/config.yaml"),
        (
            RayTaskError("sees", "Traceback\nModuleNotFoundError: No module named 'tst_ray'", None),
            "node 10.0.0.7 cannot import this package "
            "(ModuleNotFoundError: No module named 'tst_ray')",
        ),
        (NodeDiedError("lost"), "node 10.0.0.7 does not answer (NodeDiedError)"),
    ],
    ids=["sees", "does not", "has not the package", "is lost"],
)
def test_what_is_wrong_is_told_with_the_node(
    monkeypatch: pytest.MonkeyPatch, outcome: Any, told: str | None
) -> None:
    def get(task: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr(sight_module, "address_of", lambda node: "10.0.0.7")
    assert sight_module._problem(None, "a", "/runs/a/config.yaml") == told
