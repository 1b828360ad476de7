"""The nodes of a cluster: what a run must have, whom it asks for more, what is refused."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest

from tests.test_session import config_of
from tst_ray import nodes as nodes_module
from tst_ray.elastic import Node
from tst_ray.errors import RunError
from tst_ray.nodes import (
    check_capacity,
    object_stores,
    unused_gpus,
)
from tst_ray.plan import build_plan
from tst_ray.settings import Config


def nodes(*cpus: float, gpus: float = 0.0) -> list[Node]:
    return [Node(f"n{i}", {"CPU": c, "GPU": gpus}) for i, c in enumerate(cpus)]


class Cluster:
    """Nodes that come when an autoscaler was asked and some time has passed; no time passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *cpus: float) -> None:
        self.nodes, self.coming, self.asked, self.now = nodes(*cpus), nodes(), [], 0.0
        monkeypatch.setattr(nodes_module, "living_nodes", lambda: self.nodes)
        monkeypatch.setattr(nodes_module, "ask_autoscaler", self._ask)
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep)
        monkeypatch.setattr(nodes_module, "time", clock)

    def _ask(self, config: Config, num_workers: int) -> None:
        self.asked.append(num_workers)
        self.coming = nodes(*[1.0] * (num_workers + 1))

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > 60:
            self.nodes = [*self.nodes, *self.coming]


TWO_SIZES = ["--tst.workers=2", "--cluster.workers=8"]


def capacity(step: int, *options: str) -> list[str]:
    config = config_of(*TWO_SIZES, *options)
    said: list[str] = []
    check_capacity(config, build_plan(config), step, said.append)
    return said


def test_a_cluster_that_does_not_grow_must_have_room_for_every_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(monkeypatch, 4)
    with pytest.raises(RunError, match=r"workers = 8: needs 8 x 1 CPU .* the cluster has 4 CPU"):
        capacity(0)
    assert not cluster.asked
    Cluster(monkeypatch, 9)
    assert capacity(0) == []


@pytest.mark.parametrize(("step", "workers"), [(0, 2), (29, 2), (30, 8)])
def test_a_cluster_that_grows_is_asked_for_the_phase_that_comes_next(
    monkeypatch: pytest.MonkeyPatch, step: int, workers: int
) -> None:
    """From nothing: an autoscaler starts no node that nobody asks for."""
    cluster = Cluster(monkeypatch)
    (said,) = capacity(step, "--cluster.wait_s=3600")
    assert f"waiting for the cluster to grow: cluster.workers = {workers}" in said
    assert set(cluster.asked) == {workers}
    assert len(cluster.asked) == 6, "in a minute: others put theirs in its place"


def test_what_is_waited_for_a_cluster_is_told_as_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    config = config_of(*TWO_SIZES, "--cluster.wait_s=3600")
    told: list[float] = []
    check_capacity(
        config, build_plan(config), 0, lambda why: None, lambda: told.append(cluster.now)
    )
    assert told[0] == 0 and told[-1] == cluster.now > 60
    assert max(b - a for a, b in pairwise(told)) < 15


def test_a_finished_run_needs_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch)  # with a head alone, which has no CPU
    assert capacity(100, "--cluster.wait_s=10") == []


def test_waiting_for_a_cluster_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 1)
    with pytest.raises(RunError, match="workers = 2: needs"):
        capacity(0, "--cluster.wait_s=30")
    assert 30 <= cluster.now < 32


def test_gpus_that_nobody_trains_on_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "living_nodes", lambda: nodes(8, 8, gpus=4))
    assert unused_gpus(config_of()) == 8
    assert unused_gpus(config_of("--cluster.gpus_per_worker=1")) == 0


def test_the_object_stores_are_those_that_the_fewest_workers_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stores = {"head": 1.0, "a": 8.0, "b": 4.0, "c": 16.0}
    places = {"head": 0.0, "a": 2.0, "b": 1.0, "c": 4.0}
    there = [Node(n, {"CPU": places[n], "object_store_memory": stores[n]}) for n in stores]
    monkeypatch.setattr(nodes_module, "living_nodes", lambda without=(): there)
    for workers, smallest in ((1, [4, 8]), (4, [4, 8]), (6, [4, 8]), (7, [4, 8, 16])):
        assert object_stores(config_of(), workers) == smallest
    there[2:] = []
    assert object_stores(config_of(), 1) == [8.0], "one node has them once"


def test_the_cpus_of_the_nodes_that_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [Node("a", {"CPU": 2.0}), Node("b", {"CPU": 4.0}), Node("head", {})]
    monkeypatch.setattr(nodes_module, "living_nodes", lambda without=(): there)
    assert nodes_module.cpus_within({}) == 6.0
    assert nodes_module.cpus_within(nodes_module.only_on(["b", "head"])) == 4.0


def test_nodes_that_are_lost_are_known_unless_the_cluster_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": False}]
    assert nodes_module.lost_nodes(["a"]) == set(), "without Ray"
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: there)
    assert nodes_module.lost_nodes(["a", "b", "gone"]) == {"b", "gone"}

    def away() -> None:
        raise RuntimeError("no GCS")

    monkeypatch.setattr("ray.nodes", away)
    assert nodes_module.lost_nodes(["a", "b"]) == set()
